"""An iterate of a run by name: `runs/expo@2` is what iteration 2 of runs/expo trained. Imports without
torch."""

import re
from pathlib import Path


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
