"""An iterate of a run by name: `runs/expo@2` is what iteration 2 of runs/expo trained, `runs/expo` the run's
result. Imports without torch."""

import re
from pathlib import Path

from diffexpo.config.load import read_resolved


def split_iterate(text: str) -> tuple[str, int | None]:
    """The run's folder and the iteration that a name chooses; None where it chooses none.

    A file or folder that is really called so wins: `split_iterate("runs/expo@2")` is ("runs/expo", 2) unless
    there is a folder of that name, and `split_iterate("runs/expo")` is ("runs/expo", None).
    """
    found = re.fullmatch(r"(?P<run>.+)@(?P<iteration>\d+)", text)
    if found is None or Path(text).expanduser().exists():
        return text, None
    return found["run"], int(found["iteration"])


def exported_folder(run_dir: Path, iteration: int | None) -> Path:
    """Where a run's export lies: `export`, or `export/iteration-2` of an iterate that was asked for."""
    folder = run_dir / "export"
    return folder if iteration is None else folder / f"iteration-{iteration}"


def run_of_model(path: str) -> tuple[Path, int | None] | None:
    """The run, and its iterate, that `model.path` names; None where it names anything else."""
    name, iteration = split_iterate(path)
    folder = Path(name).expanduser()
    is_run = (folder / "config.yaml").is_file() and not (folder / "model_index.json").is_file()
    return (folder, iteration) if is_run else None


def whole_model_folder(run_dir: Path, iteration: int | None) -> Path:
    """Where the whole pipeline of a run's result, or of an iterate, lies: its base with what was trained."""
    folder = exported_folder(run_dir, iteration)
    return folder if (folder / "model_index.json").is_file() else folder / "whole"


def folder_of_model(path: str) -> str:
    """A run or iterate as the folder of its whole pipeline; anything else unchanged."""
    found = run_of_model(path)
    return path if found is None else str(whole_model_folder(*found))


def shape_of_model(path: str) -> str:
    """A run or iterate as a model of the same shape that is there already: its own, or else its base."""
    found = run_of_model(path)
    if found is None or Path(folder := folder_of_model(path)).is_dir():
        return path if found is None else folder
    return str(read_resolved(found[0] / "config.yaml").config.model.path)
