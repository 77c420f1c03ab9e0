"""The works of `papers.bib`, and how they are printed. Imports without torch.

Authors are joined by " and ", "others" stands for the rest, and braces surround a body that is not a person.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from diffexpo import __version__

FILE = Path(__file__).with_name("papers.bib")
# The file's spelling of characters that BibTeX without UTF-8 cannot read.
TEX = {
    r"{\"u}": "ü",
    r"{\"o}": "ö",
    r"{\'e}": "é",
    r"{\`e}": "è",
    r"\&": "&",
    r"\_": "_",
    r"\%": "%",
    r"$\alpha$": "α",
    r"$\Sigma$": "Σ",
}
FIELDS = {"author", "title", "journal", "booktitle", "year", "eprint", "archivePrefix", "url", "note"}
ARXIV = "https://arxiv.org/abs/"


@dataclass(frozen=True)
class Work:
    """A paper, data set or program. `venue` is empty for a preprint or web page; `entry` is its BibTeX."""

    key: str
    authors: str
    title: str
    entry: str
    year: int | None = None
    venue: str = ""
    arxiv: str = ""
    url: str = ""
    note: str = ""


def read_works(text: str) -> dict[str, Work]:
    """Every work of a BibTeX file by its key.

    Args:
        text: Entries separated by empty lines, one field a line, and comments that begin with %.
    Returns:
        Works in the order of the file; VERSION in it stands for the version of this package.
    Raises:
        ValueError: anything else in the file, an unknown field, or two works of one key.
    """
    works: dict[str, Work] = {}
    for block in text.replace("VERSION", __version__).strip().split("\n\n"):
        if all(line.startswith("%") for line in block.splitlines()):
            continue
        entry = re.fullmatch(r"@(article|inproceedings|misc)\{(\w+),\n((?:  \w+ = \{.+\},\n)+)\}", block)
        if entry is None:
            raise ValueError(f"not a BibTeX entry with one field a line:\n{block}")
        fields = dict(re.findall(r"^  (\w+) = \{(.+)\},$", entry[3], re.MULTILINE))
        if not {"author", "title"} <= fields.keys() <= FIELDS or entry[2] in works:
            raise ValueError(f"an unknown, missing or repeated field or key:\n{block}")
        plain = defaultdict(str, {name: _plain(value) for name, value in fields.items()})
        works[entry[2]] = Work(
            key=entry[2],
            authors=plain["author"],
            title=plain["title"].removeprefix("{").removesuffix("}"),
            entry=block,
            year=int(plain["year"]) if "year" in plain else None,
            venue=plain["journal"] or plain["booktitle"],
            arxiv=plain["eprint"],
            url="" if plain["url"] == ARXIV + plain["eprint"] else plain["url"],
            note=plain["note"],
        )
    return works


def readable(work: Work) -> str:
    """One line: authors (year). Title. Venue, arXiv identifier or address.

    Args:
        work: What is cited.
    Returns:
        For example "Ho and Salimans (2022). Classifier-Free Diffusion Guidance. arXiv 2207.12598."
    """
    head = short_authors(work.authors) + (f" ({work.year})" if work.year else "")
    parts = [work.venue, f"arXiv {work.arxiv}" if work.arxiv else "", work.url, work.note]
    places = ", ".join(part for part in parts if part)
    return f"{head.removesuffix('.')}. {work.title}." + (f" {places}." if places else "")


def short_authors(authors: str) -> str:
    """Family names: all of one or two authors, the first of more with "et al."."""
    if authors.startswith("{"):
        return authors.strip("{}")
    parted = [name.partition(",") for name in authors.split(" and ")]
    names = [(head if comma else head.split()[-1]).strip("{}") for head, comma, _ in parted]
    if len(names) > 2 or names[-1] == "others":
        return f"{names[0]} et al."
    return " and ".join(names)


def _plain(value: str) -> str:
    for tex, character in TEX.items():
        value = value.replace(tex, character)
    return value


WORKS: dict[str, Work] = read_works(FILE.read_text(encoding="utf-8"))
"""Every work by its BibTeX key."""
