"""What a run writes, handed on to trackers: each line of metrics.jsonl once, with its number as the step, and
the first images of each evaluated version.

`tracking.json` in the run's folder remembers how far each tracker has come, so that a resumed run goes on
behind it: lines that are trained again are the same numbers and are not sent twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffexpo.bounded.texts import read_json
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.load import leaves
from diffexpo.evaluation.records import Json, is_saved, load_suite
from diffexpo.files import write_json
from diffexpo.training.metrics import read_metrics
from diffexpo.training.tracking import Tracker, open_tracker

FILE = "tracking.json"
IMAGES = 8
EVERY_S = 10.0
SHARE = 20
"""The next reading comes no sooner than so many times as long as the last one took."""


class Feed:
    """The trackers of a run, kept up to date.

    Args:
        config: The run's settings. run_dir: Its folder.
        trackers: Kinds of trackers, see `TrackingConfig`. project: What groups runs there.
    """

    def __init__(self, config: RunConfig, run_dir: Path, trackers: Sequence[str], project: str) -> None:
        self._dir, self._due = run_dir, 0.0
        path = run_dir / FILE
        self._state: Json = read_json(path) if path.is_file() else {}
        settings = {name: str(value) for name, value in leaves(config.model_dump(mode="json"))}
        self._open: dict[str, Tracker] = {}
        for kind in trackers:
            state = self._state.setdefault(kind, {"lines": 0, "versions": [], "id": ""})
            self._open[kind] = open_tracker(kind, project, run_dir.name, run_dir, state["id"], settings)
            state["id"] = self._open[kind].id

    def line(self, line: Mapping[str, object]) -> None:
        """A line was written: trackers are brought up to date now and then."""
        if time.monotonic() >= self._due:
            self.update()

    def update(self) -> None:
        """Hand on whatever the run's files hold beyond what was handed on before."""
        began = time.monotonic()
        lines = read_metrics(self._dir / "metrics.jsonl")
        versions = sorted(folder for folder in (self._dir / "eval").glob("*") if is_saved(folder))
        for kind, tracker in self._open.items():
            state = self._state[kind]
            for number, line in enumerate(lines[state["lines"] :], start=state["lines"] + 1):
                tracker.log(_numbers(line), number)
            state["lines"] = max(len(lines), state["lines"])
            for folder in versions:
                if folder.name not in state["versions"]:
                    _send_images(tracker, folder, state["lines"])
                    state["versions"].append(folder.name)
        write_json(self._dir / FILE, self._state)
        self._due = time.monotonic() + max(EVERY_S, SHARE * (time.monotonic() - began))

    def close(self) -> None:
        """Hand on the rest and take leave of the trackers."""
        self.update()
        for tracker in self._open.values():
            tracker.close()


def track(run_dir: Path, trackers: Sequence[str], project: str | None = None) -> dict[str, int]:
    """Hand a run's files on to trackers, whatever state it is in; returns the lines that each has now."""
    config = read_resolved(run_dir / "config.yaml").config
    feed = Feed(config, run_dir, trackers, project or config.tracking.project)
    feed.close()
    return {kind: feed._state[kind]["lines"] for kind in trackers}


def _numbers(line: Json) -> dict[str, float]:
    """The metrics of a line, with the iteration and the optimiser step that it belongs to."""
    named = {"run/iteration": line["iteration"], "run/step": line["step"]}
    values = {**named, **{name: value for name, value in line.items() if "/" in name}}
    return {name: float(value) for name, value in values.items() if value is not None}


def _send_images(tracker: Tracker, folder: Path, step: int) -> None:
    suite = load_suite(folder)
    files = sorted((folder / "images").glob("*.png"))[:IMAGES]
    tracker.images(folder.name, suite.images[:IMAGES], files, step)
