"""Every fence of the documentation, as a person would type it: a page from top to bottom in one folder.

The environment makes runs small, and on pages about a model of one's own an embedded one takes its place. What a fence does not run, and
why, is said above it; tests/architecture/test_snippets.py checks those.
"""

from __future__ import annotations

import linecache
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, start
from tests.snippets import PAGES, Snippet, shell_lines, snippets

SMALL = {
    "EXPLORE__ITERATIONS": "2",
    "EXPLORE__PROMPTS_PER_ITERATION": "2",
    "EXPLORE__IMAGES_PER_PROMPT": "2",
    "EXPLORE__BATCH_SIZE": "4",
    "TRAINING__STEPS": "1",
    "TRAINING__BATCH_SIZE": "2",
    "TRAINING__MICRO_BATCH_SIZE": "2",
    "EVALUATION__NUM_PROMPTS": "2",
    "EVALUATION__KL_PROMPTS": "0",
    "EVALUATION__VENDI_PROMPTS": "0",
    "EVALUATION__BOOTSTRAP": "20",
    "EVALUATION__GRID_PROMPTS": "2",
}
# In place of the reader's model and of a judge of the hub.
EMBEDDED = {
    "MODEL__PATH": "emoji:diffusion",
    "MODEL__DTYPE": "float32",
    "MODEL__DEVICE": "cpu",
    "MODEL__VARIANT": "null",
    "EVALUATION__JUDGES": '[{"name": "judge", "type": "jpeg_incompressibility"}]',
}
MORE = {
    "docs/tutorials/sd15.md": EMBEDDED,
    "docs/howto/own_data.md": EMBEDDED,
    "README.md": {"OFFLINE__LIMIT": "4", "BASELINE__OFFLINE_DPO": "false", "BASELINE__CONTENDERS": "[]"},
}
API = ROOT / "docs" / "api"


def fences(page: Path) -> list[Snippet]:
    return [each for each in snippets(page) if each.is_run and each.language in ("bash", "python")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# docs/python.md has a test of its own, which also looks at what its run left.
RUN = [page for page in PAGES if fences(page) and page.parent != API and name_of(page) != "docs/python.md"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is run: files that it shows can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def run_page(page: Path, folder: Path, environment: dict[str, str]) -> None:
    """Files are written, commands and Python run, in the order of the page."""
    names: dict[str, object] = {"__name__": "page"}
    for snippet in snippets(page):
        if snippet.title is not None:
            (folder / snippet.title).write_text(snippet.text + "\n")
        elif not snippet.is_run:
            continue
        elif snippet.language == "python":
            run_python(snippet, names)
        elif snippet.language == "bash":
            run_shell(snippet, folder, environment)


def run_python(snippet: Snippet, names: dict[str, object]) -> None:
    source = snippet.text + "\n"
    linecache.cache[str(snippet)] = (len(source), None, source.splitlines(keepends=True), str(snippet))
    exec(compile(source, str(snippet), "exec"), names)  # noqa: S102 (the page's own lines)


def run_shell(snippet: Snippet, folder: Path, environment: dict[str, str]) -> None:
    for words, code in shell_lines(snippet.text):
        if words[0] == "diffexpo":
            done = start(*words[1:], cwd=folder, **environment).wait()
            assert done.code == code, f"{snippet}: {' '.join(words)}\n{done.out[-2000:]}{done.err[-2000:]}"


@pytest.mark.timeout(1200)  # some pages train an embedded model, beside whatever else the machine does
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_a_page_does_what_it_says(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {f"DIFFEXPO_{key}": value for key, value in (SMALL | MORE.get(name_of(page), {})).items()}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    run_page(page, folder, given)


@pytest.mark.timeout(1200)
def test_the_examples_of_public_names_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run serves all of them: the page on `run` comes first, as in the table of names."""
    for key, value in SMALL.items():
        monkeypatch.setenv(f"DIFFEXPO_{key}", value)
    pages = sorted(API.glob("*.md"), key=lambda page: (page.name != "run.md", page.name))
    assert len(pages) > 25
    for page in pages:
        run_page(page, folder, {})


def test_a_job_that_was_stopped_is_queued_again(tmp_path: Path) -> None:
    """The script for SLURM, with stand-ins for srun, scontrol and diffexpo: two tasks, stopped, then done."""
    (script,) = [
        each for each in snippets(ROOT / "docs" / "howto" / "many_gpus.md") if each.title == "job.sh"
    ]
    (tmp_path / "job.sh").write_text(script.text)
    stand_ins = {
        "srun": 'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" || code=$?; done; exit ${code:-0}',
        "scontrol": 'if [ "$1" = show ]; then echo first; else echo "$*" >> said; fi',
        "diffexpo": 'echo "$RANK of $WORLD_SIZE on $MASTER_ADDR: $*" >> said; exit $CODE',
    }
    for name, text in stand_ins.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "first"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for code, last in (("75", ["requeue 42"]), ("0", [])):
        (tmp_path / "said").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "job.sh"], cwd=tmp_path, env={**os.environ, **slurm, **path, "CODE": code}, check=False
        )
        tasks = [f"{rank} of 2 on first: run mine.yaml --name big" for rank in (0, 1)]
        assert done.returncode == int(code)
        assert (tmp_path / "said").read_text().splitlines() == tasks + last
