"""What to do when memory runs out: in which phase it did, how much was missing, and the settings that take
less there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from diffexpo.config import RunConfig
from diffexpo.config.resuming import CHANGEABLE
from diffexpo.errors import Interrupted, OutOfMemory, memory_failure
from diffexpo.estimate.advice import Change, savings_in
from diffexpo.estimate.memory import GIB
from diffexpo.phases import phase_of

ASKED = r"(?:[Tt]ried|Unable) to allocate (?P<size>[\d.]+ \w+)"
FREE = r"capacity of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free"


@contextmanager
def explain_memory(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Inside the block a failed allocation becomes an error that says what to do.

    Raises:
        OutOfMemory: in place of whatever the allocator, or what stood in its way, raised.
    """
    try:
        yield
    except Exception as error:
        cause = memory_failure(error)
        if cause is None or isinstance(error, Interrupted):
            raise
        raise OutOfMemory(message(config, run_dir, phase_of(error, cause), cause)) from error


def message(config: RunConfig, run_dir: Path, phase: str | None, cause: BaseException) -> str:
    """What is said of a failed allocation in a phase (None: it is not known which)."""
    changes = savings_in(phase, config)
    now = [change for change in changes if all(name.split("=")[0] in CHANGEABLE for name in change.settings)]
    later = [change for change in changes if change not in now]
    resume = f"diffexpo run --resume {run_dir}"
    lines = [f"out of memory while {phase or 'running'}: {_amounts(cause)}"]
    if now:
        lines += [f"takes less, and can be set now: {resume} --set SETTING, cheapest first", *_table(now)]
    else:
        lines.append(f"what was saved is not lost: {resume} goes on where more memory is free")
    if later:
        lines += ["takes less, but in a new run, because results depend on it", *_table(later)]
    return "\n".join(lines)


def _table(changes: Sequence[Change]) -> list[str]:
    settings = [" --set ".join(change.settings) for change in changes]
    width = max(map(len, settings))
    return [f"    {each:{width}}  {change.price}" for each, change in zip(settings, changes, strict=True)]


def _amounts(cause: BaseException) -> str:
    """How much was asked for and how much was free, as far as the allocator or the system says."""
    text = str(cause)
    found = re.search(ASKED, text)
    size = found["size"] if found else "an unknown amount"
    if size.endswith(" bytes"):
        size = f"{int(size.split()[0]) / GIB:.4g} GiB"
    stated = re.search(FREE, text)
    if stated:
        return f"{size} asked for, {stated['free']} of {stated['total']} free"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{size} asked for, {free / GIB:.3g} of {total / GIB:.3g} GiB free now"
    return f"{size} asked for, {psutil.virtual_memory().available / GIB:.3g} GiB of main memory free now"
