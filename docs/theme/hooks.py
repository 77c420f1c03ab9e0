"""What the site needs beyond Markdown: a navigation that no new page breaks, and formulas as MathML.

mkdocs calls `on_config` and `on_page_content` by name (mkdocs.yml).
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

# Sections of the site in their order, each with its pages: paths, or a folder for all others in it. A page of
# docs/ that stands nowhere here goes to the last section.
SECTIONS: Mapping[str, Sequence[str]] = {
    "Start": ["index.md", "quickstart.md", "tutorials/"],
    "How to": ["howto/own_data.md", "howto/raters.md", "howto/many_gpus.md", "howto/lora.md", "howto/"],
    "Concepts": [
        "concepts/loop.md",
        "concepts/preference.md",
        "concepts/paths.md",
        "concepts/trajectories.md",
        "concepts/",
    ],
    "Methods": ["gallery.md", "algorithms/", "papers.md"],
    "Measured": ["results.md", "scenes.md", "emoji.md", "methods.md", "without_reward.md", "lab/"],
    "Python": ["python.md", "api/"],
    "Reference": ["rewards/"],
}
# Folders that are folded away under a title of their own.
FOLDED = {
    "algorithms/": "Each method",
    "rewards/": "Rewards",
    "api/": "Every public name",
    "lab/": "What was tried",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Fill the navigation from the folders."""
    config.nav = navigation(Path(config.docs_dir))
    return config


def navigation(docs: Path) -> list[dict[str, list[Any]]]:
    """Every page of a folder, by section; what is named and not there is left out."""
    named = {page for pages in SECTIONS.values() for page in pages}
    rest = [page.name for page in sorted(docs.glob("*.md")) if page.name not in named]
    found = [
        {title: [each for page in pages for each in _entries(docs, page, named)]}
        for title, pages in SECTIONS.items()
    ]
    last = list(SECTIONS)[-1]
    found[-1][last] = rest + found[-1][last]
    return found


def _entries(docs: Path, page: str, named: Collection[str]) -> list[Any]:
    """A page, or those pages of a folder that are not named by themselves."""
    if not page.endswith("/"):
        return [page] if (docs / page).is_file() else []
    paths = sorted((docs / page).glob("*.md"), key=lambda path: (path.name != "index.md", path.name))
    pages = [name for path in paths if (name := path.relative_to(docs).as_posix()) not in named]
    return [{FOLDED[page]: pages}] if page in FOLDED and pages else pages


def on_page_content(page_html: str, **_: object) -> str:
    """Formulas of a page as MathML, which browsers typeset themselves."""
    return FORMULA.sub(_mathml, page_html)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[3]).strip(), display=display)
