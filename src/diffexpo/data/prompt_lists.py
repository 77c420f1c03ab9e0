"""Published prompt lists, each read from the file that its authors give out. None of them is shipped.

Every reader yields (where, prompt); a line that cannot be read is an error with file and line, as in
`prompts`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.bounded.texts import is_junk, read_json
from diffexpo.data.offline.cells import text_of_id
from diffexpo.data.offline.reading import parquet_schema
from diffexpo.data.prompts import (
    READERS,
    Located,
    PromptReport,
    distinct_prompts,
    json_records,
    make_prompt,
    prompt_lines,
    read_jsonl,
    read_parquet,
    read_txt,
    require_file,
    skipped_lines,
)
from diffexpo.errors import ConfigError, ImportFormatError, MissingError
from diffexpo.files import replacing
from diffexpo.rng import keyed_uniform
from diffexpo.types import Prompt

_LARGEST = 256 * 1024 * 1024
_IMAGENET_ANIMALS = 398


@dataclass(frozen=True)
class PromptList:
    """One published list: what its source is and how it is read."""

    summary: str
    read: Callable[[Path], Located]
    is_folder_too: bool = False


def read_prompt_list(source: str | Path, format: str = "auto") -> tuple[list[Prompt], PromptReport]:
    """The distinct prompts of a published list, in its order, and a count of what was dropped.

    Args:
        source: The file or folder that the list is given out as.
        format: A key of `PROMPT_LISTS`; "auto" goes by the ending (.txt, .jsonl, .parquet).
    """
    path = Path(source)
    names = ", ".join(PROMPT_LISTS)
    if format == "auto":
        format = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix.lower(), "")
        if not format:
            raise ConfigError(f"{path}: its ending does not tell the format; name one with --format: {names}")
    if format not in PROMPT_LISTS:
        raise ConfigError(f"prompt format {format!r} is unknown; expected one of {names}")
    form = PROMPT_LISTS[format]
    if path.is_dir() and not form.is_folder_too:
        raise MissingError(f"{path} is a folder; the format {format} is one file: {form.summary}")
    if not path.is_dir():
        require_file(path, "the prompt list")
        # of Parquet only the captions are read, whatever images it holds as well
        if path.stat().st_size > _LARGEST and path.suffix.lower() != ".parquet":
            raise ImportFormatError(f"{path} is larger than 256 MiB; expected a list of prompts")
    found, report = distinct_prompts(form.read(path), f"{path}")
    is_text = path.is_file() and path.suffix.lower() in (".txt", ".jsonl")
    return found, replace(report, skipped=skipped_lines(path) if is_text else 0)


def split_prompts(
    prompts: Sequence[Prompt], shares: dict[str, float], seed: int = 0
) -> dict[str, list[Prompt]]:
    """Parts of a list by key: where a prompt goes depends on its text and the seed alone.

    Args:
        prompts: Distinct prompts.
        shares: Part -> its share of all, each > 0, sum at most 1; what is left over is in no part.
        seed: Name of the choice.
    Returns:
        Part -> prompts, each in the list's order. A prompt stays in its part when others come or go.
    """
    if not shares or any(share <= 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise ConfigError(
            f"shares = {shares}: expected positive numbers that sum to at most 1, such as 0.9 and 0.1"
        )
    parts: dict[str, list[Prompt]] = {name: [] for name in shares}
    for prompt in prompts:
        place = keyed_uniform(seed, "prompt split", prompt.text)
        for name, share in shares.items():
            if place < share:
                parts[name].append(prompt)
                break
            place -= share
    return parts


def choose_categories(prompts: Sequence[Prompt], categories: Sequence[str]) -> list[Prompt]:
    """The prompts of some categories, in order; a category that no prompt has is a ConfigError."""
    known = sorted({prompt.category for prompt in prompts})
    for name in categories:
        if name not in known:
            raise ConfigError(f"no prompt has the category {name!r}; there are {', '.join(map(repr, known))}")
    return [prompt for prompt in prompts if prompt.category in categories]


def write_prompts(prompts: Sequence[Prompt], target: str | Path) -> None:
    """Write a prompt file that `load_prompts` reads back: .jsonl or .parquet whole, .txt the texts alone."""
    path = Path(target)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ConfigError(f"{path} ends in {path.suffix!r}; expected .jsonl, .parquet or .txt")
    records = [
        {"prompt": p.text, "id": p.id, **({"category": p.category} if p.category else {}), **p.attributes}
        for p in prompts
    ]
    with replacing(path) as temporary:
        if suffix == ".parquet":
            names = dict.fromkeys(["prompt", "id", *(name for record in records for name in record)])
            schema = pa.schema([(name, pa.string()) for name in names])
            pq.write_table(pa.Table.from_pylist(records, schema), temporary)
        else:
            lines = [r["prompt"] if suffix == ".txt" else json.dumps(r, ensure_ascii=False) for r in records]
            temporary.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _table(*columns: str, is_tsv: bool = False) -> Callable[[Path], Located]:
    """A reader of the prompt, its category and attributes; in a TSV quotation marks are text."""

    def read(path: Path) -> Located:
        for _ in prompt_lines(path):
            pass  # refuses what is not UTF-8, with the line
        stream = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        tsv = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        reader = tsv if is_tsv else csv.reader(stream, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in columns if name not in header]:
                expected = ", ".join(columns)
                raise ImportFormatError(f"{path}: column {missing[0]!r} is missing; expected {expected}")
            for cells in reader:
                if not cells:
                    continue  # a blank line
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise ImportFormatError(f"{where} has {len(cells)} cells; expected {len(header)}")
                row = dict(zip(header, cells, strict=True))
                text, category, *others = (row[name].strip() for name in columns)
                attributes = dict(zip((name.lower() for name in columns[2:]), others, strict=True))
                yield _prompt(where, text, category, **attributes)
        except csv.Error as error:
            raise ImportFormatError(f"{path}, line {reader.line_num} is no table row ({error})") from error

    return read


def _prompt(
    where: str, text: object, category: str = "", id: object = None, **attributes: str
) -> tuple[str, Prompt]:
    if not isinstance(text, str) or not text.strip():
        raise ImportFormatError(f"{where}: the prompt is {str(text)[:60]!r}; expected text")
    named = text_of_id(id)
    if id is not None and named is None:
        raise ImportFormatError(f"{where}: 'id' is {id!r}; expected text or a whole number")
    kept = {name: value for name, value in attributes.items() if value}
    return where, make_prompt(text, category, named, kept)


def _json_list(path: Path) -> list[tuple[str, Any]]:
    try:
        elements = read_json(path)
    except ValueError as error:
        raise ImportFormatError(f"{path} is not JSON ({error}); expected a list of prompts") from error
    if not isinstance(elements, list):
        raise ImportFormatError(f"{path} is a JSON {type(elements).__name__}; expected a list of prompts")
    return [(f"{path}, element {number}", element) for number, element in enumerate(elements)]


def _files(path: Path, pattern: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.glob(pattern) if file.is_file() and not is_junk(file.name))
    if not found:
        raise MissingError(f"{path} holds no {pattern}; expected the list's files")
    return found


def _pickapic(path: Path) -> Located:
    """A JSON list of texts or objects, a text file, or Parquet, of which only the captions are read."""
    if path.is_dir() or path.suffix.lower() == ".parquet":
        for file in _files(path, "*.parquet"):
            names = [name for name in ("prompt", "caption") if name in parquet_schema(file).names]
            if not names:
                raise ImportFormatError(f"{file}: column 'caption' is missing; expected Pick-a-Pic's columns")
            yield from read_parquet(file, names[:1])
    elif path.suffix.lower() == ".json":
        for where, element in _json_list(path):
            text = element.get("prompt", element.get("caption")) if isinstance(element, dict) else element
            yield _prompt(where, text)
    else:
        yield from read_txt(path)


def _hpdv2(path: Path) -> Located:
    for file in _files(path, "*.json"):
        for number, (where, element) in enumerate(_json_list(file)):
            text = element.get("prompt") if isinstance(element, dict) else element
            # Published images are called by it, also where prompts come twice and are one here.
            yield _prompt(where, text, file.stem, number=str(number))


def _t2i_compbench(path: Path) -> Located:
    for file in _files(path, "*.txt"):
        category, _, part = file.stem.rpartition("_")
        for where, text in prompt_lines(file):
            yield _prompt(where, text, category or part, split=part if category else "")


def _geneval(path: Path) -> Located:
    expected = "with tag, include and prompt"
    for where, record in json_records(path, expected):
        if not isinstance(record.get("tag"), str):
            raise ImportFormatError(f"{where} is {str(record)[:60]!r}; expected an object {expected}")
        names = [name for name in ("include", "exclude") if record.get(name)]
        checks = {name: json.dumps(record[name], sort_keys=True) for name in names}
        yield _prompt(where, record.get("prompt"), str(record["tag"]), **checks)


def _imagereward(path: Path) -> Located:
    for where, element in _json_list(path):
        if not isinstance(element, dict):
            raise ImportFormatError(
                f"{where} is {str(element)[:60]!r}; expected an object with id and prompt"
            )
        yield _prompt(where, element.get("prompt"), id=element.get("id"))


def _ddpo_animals(path: Path) -> Located:
    """Animals as "a cat"; of a folder with simple_animals.txt and activities.txt, "a cat riding a bike"."""
    if path.is_dir():
        for name in ("simple_animals.txt", "activities.txt"):
            require_file(path / name, "the prompt list")
        activities = [text for _, text in prompt_lines(path / "activities.txt")]
        for where, noun in prompt_lines(path / "simple_animals.txt"):
            for activity in activities:
                yield _prompt(where, f"{_with_article(noun)} {activity}", activity, animal=noun)
    elif path.stem == "imagenet_classes":
        # the classes that are animals come first
        for where, text in list(prompt_lines(path))[:_IMAGENET_ANIMALS]:
            yield _prompt(where, text, "imagenet animals")
    elif path.stem == "activities":
        what = "what animals do, which is no prompt"
        raise ImportFormatError(f"{path} holds {what}; name its folder, with simple_animals.txt in it")
    else:
        for where, noun in prompt_lines(path):
            yield _prompt(where, _with_article(noun), "animals")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


PROMPT_LISTS: dict[str, PromptList] = {
    "text": PromptList("one prompt a line", read_txt),
    "jsonl": PromptList("one object a line", read_jsonl),
    "parquet": PromptList("a `prompt` or `caption` column", read_parquet),
    "hpdv2": PromptList("HPDv2's benchmark/*.json: a folder or one style", _hpdv2, True),
    "pickapic": PromptList(
        "Pick-a-Pic captions: .txt, .json, .parquet or a folder of .parquet", _pickapic, True
    ),
    "partiprompts": PromptList(
        "PartiPrompts.tsv", _table("Prompt", "Category", "Challenge", "Note", is_tsv=True)
    ),
    "drawbench": PromptList("DrawBench as CSV with Prompts and Category", _table("Prompts", "Category")),
    "t2i_compbench": PromptList(
        "T2I-CompBench's *_val.txt and *_train.txt: a folder or one file", _t2i_compbench, True
    ),
    "geneval": PromptList("GenEval's evaluation_metadata.jsonl", _geneval),
    "imagereward": PromptList("ImageReward's benchmark-prompts.json", _imagereward),
    "ddpo_animals": PromptList(
        "DDPO's simple_animals.txt, imagenet_classes.txt, or their folder", _ddpo_animals, True
    ),
}
