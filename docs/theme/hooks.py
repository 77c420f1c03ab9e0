"""What the site needs beyond Markdown: a navigation that no new page breaks, and formulas as MathML.

mkdocs calls `on_config` and `on_page_content` by name (mkdocs.yml).
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

# Sections of the site in their order, each with its pages: paths, or a folder for all that is in it. A page that stands nowhere here
# goes to the last section.
SECTIONS: Mapping[str, Sequence[str]] = {
    "Start": ["index.md", "quickstart.md", "tutorials/"],
    "How to": ["howto/"],
    "Concepts": ["concepts/"],
    "Methods": ["gallery.md", "algorithms/", "papers.md"],
    "Measured": ["results.md", "scenes.md", "emoji.md", "methods.md", "without_reward.md", "lab/"],
    "Python": ["python.md", "api/"],
    "Reference": ["rewards/"],
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Fill the navigation from the folders."""
    config.nav = navigation(Path(config.docs_dir))
    return config


def navigation(docs: Path) -> list[dict[str, list[Any]]]:
    """Every page of a folder, by section."""
    named = {page for pages in SECTIONS.values() for page in pages}
    rest = sorted(page.name for page in docs.glob("*.md") if page.name not in named)
    sections = {name: list(pages) for name, pages in SECTIONS.items()}
    last = list(sections)[-1]
    sections[last] = rest + sections[last]
    return [{name: [entry for page in pages for entry in _entries(docs, page)]} for name, pages in sections.items()]


def _entries(docs: Path, page: str) -> list[Any]:
    """A page, or the pages of a folder: under the folder's title where it has more than a few."""
    if not page.endswith("/"):
        return [page]
    pages = sorted((docs / page).glob("*.md"), key=lambda path: (path.name != "index.md", path.name))
    listed = [path.relative_to(docs).as_posix() for path in pages]
    titles = {"algorithms/": "Each method", "rewards/": "Rewards", "api/": "Every public name", "lab/": "What was tried"}
    return [{titles[page]: listed}] if page in titles else listed


def on_page_content(page_html: str, **_: object) -> str:
    """Formulas of a page as MathML, which browsers typeset themselves."""
    return FORMULA.sub(_mathml, page_html)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[3]).strip(), display=display)
