"""Docstrings of the package as mkdocstrings reads them: sections apart, aligned formulas as they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Source)s?:")
ALIGNED = re.compile(r"\S {2,}\S")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """A blank line before each section; paragraphs with aligned columns become code blocks."""
    lines: list[str] = []
    for line in text.splitlines():
        if SECTION.match(line):
            lines.append("")
        lines.append(line)
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs)


def _paragraph(text: str) -> str:
    if text.startswith("Source:"):  # a sentence of its own, not a section
        return " ".join(text.split()).replace("Source:", "**Source.**", 1)
    if not SECTION.match(text) and ALIGNED.search(text):
        return "\n".join(f"    {line}" for line in text.splitlines())
    return text
