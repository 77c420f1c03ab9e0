"""Foreign code: a user's file, or a package whose model scores."""

from __future__ import annotations

import importlib.metadata
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffexpo.errors import DiffexpoError, MissingError, RewardError
from diffexpo.rewards.images import check_lengths, to_bytes


@contextmanager
def blame(where: str, advice: str = "correct the function") -> Iterator[None]:
    """Turn whatever foreign code raises into a RewardError that names `where` and says what to do."""
    try:
        yield
    except DiffexpoError:
        raise
    except Exception as error:
        line = ""
        # A syntax error names its line itself; the frames are those of whoever reads the file.
        if not isinstance(error, SyntaxError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            line = f" (line {frame.lineno} of {Path(frame.filename).name})"
        raise RewardError(f"{where} raised {type(error).__name__}: {error}{line}; {advice}") from error


class PackageReward(ABC):
    """A scorer whose model comes with an optional package: MissingError if that is not installed, RewardError
    if its model cannot be built."""

    package: ClassVar[str]
    """Name of the distribution; the module's has `_` for `-`."""
    extra: ClassVar[str]
    """What installs it: `diffexpo[extra]`."""
    scale: str

    def __init__(self, name: str) -> None:
        self.name = name
        module_name = self.package.replace("-", "_")
        try:
            module = import_module(module_name)
        except ImportError as error:
            raise MissingError(
                f"reward {name!r}: {module_name} cannot be imported ({error}); install it with "
                f'`pip install "diffexpo[{self.extra}]"`'
            ) from error
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        self.version = f"{self.package} {version}"
        self._where = f"reward {name!r}: {self.package}"
        with blame(self._where, "look at its message"):
            self._model = self._build(module)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1]; BRISQUE, say, fails on an image of one colour."""
        check_lengths(self.name, images, prompts)
        with blame(self._where, "look at its message"):
            scores = [self._rate(*row) for row in zip(to_bytes(images), prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    @abstractmethod
    def _build(self, module: Any) -> Any:
        """The package's model."""

    @abstractmethod
    def _rate(self, pixels: np.ndarray, prompt: str) -> float:
        """The score of one image (H,W,3) uint8; NaN for none."""
