"""The code on the pages of the documentation: found, checked against the commands and settings that there are, and run.

A fence is run, all of a page in order in one folder, unless the comment above it says why not: `<!-- not run: needs a GPU -->`. Indented
lines show the form of a command, or what took minutes to measure. Both are checked: commands by the command line's own parser, recipes by
the settings, Python by its grammar, scripts and modules by being there.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from diffexpo.cli.main import app
from diffexpo.config import RunConfig, list_recipes, load_config
from tests.commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"```(\w*)(?:.*title=\"([^\"]+)\")?")
REASON = re.compile(r"<!-- not run: (.+?) -->")
PYTHON = {"def", "with", "from", "import", "class"}
# Programs that are not ours: nothing is known of their arguments here.
OTHERS = {
    "[",
    "cd",
    "export",
    "git",
    "ls",
    "mkdir",
    "npm",
    "sbatch",
    "scancel",
    "squeue",
    "srun",
    "ssh",
    "tensorboard",
}
# Commands whose arguments are recipes and whose `--set` are settings of a run.
RECIPE_COMMANDS = {"config", "estimate", "run"}
OURS = {"diffexpo", "make", "pip", "python", "python3", "torchrun"}


@dataclass(frozen=True)
class Snippet:
    """One block of code."""

    page: Path
    line: int
    language: str
    """bash, python, yaml, or another word for what is neither run nor checked."""
    title: str | None
    """Name of the file that the block is."""
    text: str
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """Every block of code of a page, fenced or indented, in order."""
    return list(_snippets(page, page.read_text(encoding="utf-8").splitlines()))


def _snippets(page: Path, lines: list[str]) -> Iterator[Snippet]:
    reason, number = None, 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if line.startswith("```"):
            while not lines[number].startswith("```"):
                number += 1
            language, title = FENCE.match(line).groups()  # type: ignore[union-attr]
            yield Snippet(
                page, start + 1, language, title, "\n".join(lines[start + 1 : number]), reason is None
            )
            number += 1
        elif line.startswith("    ") and not lines[start - 1].strip():
            while number < len(lines) and lines[number].startswith("    "):
                number += 1
            text = "\n".join(each[4:] for each in lines[start:number])
            yield Snippet(page, start + 1, _language(text), None, text, False)
        if line.strip():
            found = REASON.fullmatch(line.strip())
            reason = found[1] if found else None


def _language(text: str) -> str:
    """What an indented block is."""
    first = next((line.split()[0] for line in text.splitlines() if line.lstrip()[:1] not in ("", "#")), "")
    if Path(first).name in OURS | OTHERS:
        return "bash"
    if first in PYTHON:
        return "python"
    return "yaml" if first.endswith(":") and first[:-1] in RunConfig.model_fields else "text"


def shell_lines(text: str) -> list[tuple[list[str], int]]:
    """(words, expected exit code) of each command; what stands behind two spaces or # explains it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        said = re.search(r"exit code (\d+)", line)
        command = re.split(r"\s{2,}|\s#", line.removeprefix("$ "))[0]
        words = shlex.split(re.sub(r" +", " ", command), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append((words, int(said[1]) if said else 0))
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Words of every `diffexpo ...` in running text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`(?:\.venv/bin/)?(diffexpo [a-z-][^`]*)`", text)
    return [shlex.split(command.replace(" ...", "")) for command in found]


def check(snippet: Snippet, files: dict[str, Path]) -> None:
    """Whether commands, settings and grammar of a block are such as there are.

    Args:
        snippet: The block.
        files: Files that the page shows, by name.
    Raises:
        AssertionError: naming what there is not.
    """
    if snippet.language == "python":
        ast.parse(textwrap.dedent(snippet.text))
    elif snippet.language == "yaml":
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder, "recipe.yaml")
            recipe.write_text(snippet.text)
            # Part of a recipe: what it leaves out is that of the embedded world, whose pairs not every method takes.
            load_config([recipe], [] if "offline:" in snippet.text else ["offline.source=null"], {})
    elif snippet.language == "bash" and snippet.title is not None:
        done = subprocess.run(["bash", "-n"], check=False, input=snippet.text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for command in re.findall(r"\bdiffexpo (.+)", snippet.text):
            check_diffexpo(shlex.split(command), files)
    elif snippet.language == "bash":
        for words, _ in shell_lines(snippet.text):
            check_command(words, files)


def check_command(words: list[str], files: dict[str, Path]) -> None:
    """One command line of a page."""
    program, arguments = Path(words[0]).name, words[1:]
    said = shlex.join(words)
    assert program in OURS | OTHERS, f"{said}: unknown program {program}"
    if program == "diffexpo":
        check_diffexpo(arguments, files)
    elif program == "make":
        targets = set(
            re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        )
        assert {word for word in arguments if "=" not in word} <= targets, said
    elif program == "pip":
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\[([\w,]+)\]", said):
            assert all(re.search(rf"^{name} = \[", text, re.MULTILINE) for name in extra.split(",")), said
    elif "-m" in arguments:
        rest = [word for word in arguments[arguments.index("-m") + 1 :] if word != "--"]
        if rest[0] == "diffexpo":
            check_diffexpo(rest[1:], files)
        else:
            assert any((ROOT / (rest[0].replace(".", "/") + end)).exists() for end in (".py", "")) or rest[
                0
            ] in (
                "venv",
                "pytest",
            ), said
    elif "-c" in arguments:
        ast.parse(arguments[arguments.index("-c") + 1])
    elif program in ("python", "python3"):
        check_script(arguments, files)


def check_script(arguments: list[str], files: dict[str, Path]) -> None:
    """A script that is there, with options that it reads."""
    script = files.get(arguments[0], ROOT / arguments[0])
    assert script.is_file(), f"no script {arguments[0]}"
    read = [script, *script.parent.glob("*.py")]  # options that several scripts share stand beside them
    text = "".join(path.read_text(encoding="utf-8") for path in read)
    missing = [word for word in arguments if word.startswith("--") and f'"{word}"' not in text]
    assert not missing, f"{arguments[0]} takes no {missing}"


def check_diffexpo(arguments: list[str], files: dict[str, Path], *, is_whole: bool = True) -> None:
    """A command as its parser takes it, and its recipes and settings as a run would; in running text arguments may be left out."""
    command = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return
        name = words.pop(0)
        assert name in command.commands, f"diffexpo has no {name!r}: {shlex.join(arguments)}"
        command = command.commands[name]
    try:
        parsed = command.make_context("diffexpo", words).params
    except Exception as error:
        if is_whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise
        return
    if arguments[0] not in RECIPE_COMMANDS:
        return
    names = {recipe.name for recipe in list_recipes()}
    given = [name for key in ("recipes", "recipe") for name in _listed(parsed.get(key))]
    known = [str(files[name]) if name in files else name for name in given if name in names or name in files]
    overrides = parsed.get("overrides") or ()
    if known or overrides:  # settings on top of a reader's own recipe are checked on top of one of ours
        load_config(known or ["scenes/quick"], list(overrides), {})


def _listed(value: object) -> list[str]:
    return (
        [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)] if value else []
    )
