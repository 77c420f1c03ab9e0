"""What the package index shows: README.md, whose links lead to `Source` of `[project.urls]`.

Everything else about the package stands in pyproject.toml. Where it names no `Source`, links into the
repository would lead nowhere: their words stay, with the file's name, and pictures are left out.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def description(text: str, source: str | None) -> str:
    """Markdown whose relative links are absolute.

    Args:
        text: Markdown with links from the repository's root.
        source: Address of the repository's pages, "https://example.org/owner/name"; None: nobody knows it.
    Returns:
        The same text; without an address no link into the repository is left.
    """

    def absolute(found: re.Match[str]) -> str:
        mark, words, path = found.groups()
        if source is not None:
            return f"{mark}[{words}]({source.rstrip('/')}/{'raw' if mark else 'blob'}/main/{path})"
        if mark:
            return ""
        return words if words in path else f"{words} (`{path}`)"

    return LINK.sub(absolute, text)


def main() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (HERE / "README.md").read_text(encoding="utf-8")
    told = description(text, project.get("urls", {}).get("Source"))
    setup(long_description=told, long_description_content_type="text/markdown")


if __name__ == "__main__":
    main()
