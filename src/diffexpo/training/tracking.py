"""Trackers of experiments behind one face, as accelerate opens them: TensorBoard, Weights & Biases,
MLflow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

from diffexpo.errors import MissingError

FOLDER = "tracking"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Where the lines of a run's metrics go, and its images."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name at a step."""

    def images(self, version: str, images: np.ndarray, files: Sequence[Path], step: int) -> None:
        """Images (N,H,W,3) uint8 of an evaluated version, and the files that hold them."""

    def close(self) -> None:
        """Nothing follows."""

    @property
    def id(self) -> str:
        """The tracker's own name of the run, by which it goes on."""


def require_tracker(kind: str) -> None:
    """Raise a MissingError unless the tracker's package is installed."""
    if not _is_there(PACKAGES[kind]):
        raise MissingError(
            f"tracking.trackers: {kind} needs the package {PACKAGES[kind]}, which is not installed; "
            f"`pip install 'diffexpo[track]'` brings TensorBoard, `pip install {PACKAGES[kind]}` this one"
        )


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, or one that was switched off
        return False


def open_tracker(kind: str, project: str, name: str, run_dir: Path, id: str, settings: Any) -> Tracker:
    """A tracker that begins a run, or goes on with the one of this id.

    Args:
        kind: A key of `PACKAGES`. project: What groups runs there. name: The run's name there.
        run_dir: The run's folder; TensorBoard writes to `tracking/` inside it.
        id: What `id` gave before; "" begins a new one.
        settings: The run's settings, plain values by dotted name, kept with a new run.
    Raises:
        MissingError: the package is not installed.
    """
    require_tracker(kind)
    return _OPEN[kind](project, name, run_dir, id, settings)


class _TensorBoard:
    """Event files below the run's folder; the folder is the run, so that it needs no id."""

    id = FOLDER

    def __init__(self, project: str, name: str, run_dir: Path, id: str, settings: Any) -> None:
        self._tracker = TensorBoardTracker(FOLDER, run_dir)
        self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def images(self, version: str, images: np.ndarray, files: Sequence[Path], step: int) -> None:
        self._tracker.log_images({f"images/{version}": images}, step=step, dataformats="NHWC")

    def close(self) -> None:
        self._tracker.finish()


class _Wandb:
    def __init__(self, project: str, name: str, run_dir: Path, id: str, settings: Any) -> None:
        known: dict[str, Any] = {"id": id, "resume": "allow"} if id else {}
        self._tracker = WandBTracker(project, name=name, dir=str(run_dir), **known)
        self._tracker.start()
        if not id:
            self._tracker.store_init_configuration(settings)

    @property
    def id(self) -> str:
        return str(self._tracker.tracker.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def images(self, version: str, images: np.ndarray, files: Sequence[Path], step: int) -> None:
        self._tracker.log_images({f"images/{version}": list(images)}, step=step)

    def close(self) -> None:
        self._tracker.finish()


class _Mlflow:
    def __init__(self, project: str, name: str, run_dir: Path, id: str, settings: Any) -> None:
        self._tracker = MLflowTracker(project, run_id=id or None, run_name=name)
        self._tracker.start()
        if not id:
            self._tracker.store_init_configuration(settings)

    @property
    def id(self) -> str:
        return str(self._tracker.tracker.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def images(self, version: str, images: np.ndarray, files: Sequence[Path], step: int) -> None:
        for file in files:
            self._tracker.log_artifact(str(file), f"images/{version}")

    def close(self) -> None:
        self._tracker.finish()


_OPEN: dict[str, Callable[[str, str, Path, str, Any], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
