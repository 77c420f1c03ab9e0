"""One evaluated model on disk: its images, and the scores of every scorer that saw them.

    <folder>/model.json                  what it is, how it was drawn
    <folder>/images/00000.png            one file a row
    <folder>/drawn/00000.json            one file a batch, written last: the SHA-256 of its images
    <folder>/scores/<scorer>/judge.json  what the scorer is
    <folder>/scores/<scorer>/00000.json  one file a batch: scores, and the images that they are of

A batch without its file is drawn again, whole, so that an interrupted evaluation ends with the bits of one
that was not; an image that was changed or lost makes its batch one that is not drawn. A scorer's folder is
named by its version: another version's scores stay beside it. Imports without torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffexpo.bounded import texts as bounded
from diffexpo.bounded.images import read_image
from diffexpo.data.images import encode_png
from diffexpo.errors import ConfigError
from diffexpo.evaluation.records import image_path
from diffexpo.files import put, sha256_of, write_json
from diffexpo.types import Prompt

Json = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The images of a suite in the order in which they are drawn: prompt by prompt, cut into batches."""

    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    @property
    def batches(self) -> range:
        """Numbers of the batches."""
        return range(-(-len(self) // self.batch_size))

    def of(self, batch: int) -> range:
        """Rows of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self)))

    def prompt(self, row: int) -> Prompt:
        """The prompt of a row."""
        return self.prompts[row // self.images_per_prompt]

    def index(self, row: int) -> int:
        """Which of its prompt's images a row is."""
        return row % self.images_per_prompt

    @cached_property
    def prompt_ids(self) -> list[str]:
        """Prompt id of every row."""
        return [self.prompt(row).id for row in range(len(self))]


@dataclass
class Gallery:
    """The folder of one model."""

    folder: Path
    rows: Rows
    _shown: dict[int, list[str | None]] = field(default_factory=dict, repr=False)

    def claim(self, facts: Json, advice: str) -> None:
        """Write what the model is, or check that the folder is this model's (else a ConfigError)."""
        path = self.folder / "model.json"
        if not path.exists():
            write_json(path, facts)
            return
        before = read_json(path) or {}
        changed = [name for name in ("identity", "guidance") if before.get(name) != facts[name]]
        if changed:
            raise ConfigError(
                f"{self.folder} holds images of another model: its {changed[0]} was "
                f"{before.get(changed[0])!r:.120}, now {facts[changed[0]]!r:.120}; {advice}"
            )

    def images_of(self, batch: int) -> list[str | None] | None:
        """SHA-256 of each image of a batch, None for an image that there is not; None: it is not drawn, or a
        file of it is not what was written."""
        found = self._shown.get(batch) or self._check(batch)
        if found is not None:
            self._shown[batch] = found  # another process may draw what is not there yet
        return found

    def _check(self, batch: int) -> list[str | None] | None:
        written = read_json(self._drawn(batch))
        names = written.get("images") if written else None
        rows = self.rows.of(batch)
        if not isinstance(names, list) or len(names) != len(rows):
            return None
        for row, digest in zip(rows, names, strict=True):
            path = image_path(self.folder, row)
            if digest is not None and (not path.is_file() or sha256_of(path) != digest):
                return None
        return names

    def missing(self) -> list[int]:
        """Batches that are not drawn."""
        return [batch for batch in self.rows.batches if self.images_of(batch) is None]

    def is_damaged(self, batch: int) -> bool:
        """Whether a batch was drawn, and its files are no longer what was written."""
        return self._drawn(batch).exists() and self.images_of(batch) is None

    def keep(self, batch: int, images: Sequence[np.ndarray | None], **facts: object) -> None:
        """Write the images (H,W,3) uint8 of a batch, None for those that there are not, then its file."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        names: list[str | None] = []
        for row, image in zip(self.rows.of(batch), images, strict=True):
            data = b"" if image is None else encode_png(image)
            if image is not None:
                put(image_path(self.folder, row), data)
            names.append(hashlib.sha256(data).hexdigest() if data else None)
        write_json(self._drawn(batch), {"images": names, **facts})
        self._shown.pop(batch, None)

    def digest(self, row: int) -> str | None:
        """SHA-256 of an image's file; None: there is none."""
        batch = row // self.rows.batch_size
        names = self.images_of(batch)
        return None if names is None else names[row - self.rows.of(batch)[0]]

    def read(self, row: int) -> np.ndarray | None:
        """An image (H,W,3) uint8; None: there is none."""
        return None if self.digest(row) is None else read_image(image_path(self.folder, row))

    def spent(self, name: str) -> float:
        """Sum of a fact over the drawn batches, such as `seconds`."""
        found = [read_json(self._drawn(batch)) or {} for batch in self.rows.batches]
        return float(sum(each.get(name, 0.0) for each in found))

    def drawn_with(self) -> Json | None:
        """The sampler; None for images that others have drawn."""
        found: Json | None = self.batch_facts().get("sampler")
        return found

    def batch_facts(self) -> Json:
        """What was written of the first batch."""
        return read_json(self._drawn(0)) or {}

    def facts(self) -> Json:
        """What model.json says."""
        return read_json(self.folder / "model.json") or {}

    def scores_of(self, scorer: str, batch: int) -> list[float] | None:
        """What a scorer gave the images of a batch, NaN where it failed; None: it saw others or none."""
        found = read_json(self._scores(scorer, batch))
        if not found or found.get("images") != self.images_of(batch):
            return None
        return [math.nan if value is None else float(value) for value in found["scores"]]

    def keep_scores(self, scorer: str, batch: int, scores: Sequence[float]) -> None:
        """Write what a scorer gave the images of a batch."""
        values = [float(value) if math.isfinite(value) else None for value in scores]
        write_json(self._scores(scorer, batch), {"images": self.images_of(batch), "scores": values})

    def keep_judge(self, scorer: str, facts: Json) -> None:
        """Write what a scorer is, beside its scores."""
        path = self.folder / "scores" / scorer / "judge.json"
        if read_json(path) != facts:
            write_json(path, facts)

    def judges(self) -> list[Json]:
        """What the scorers are that have seen images of this model."""
        found = (read_json(path) for path in sorted(self.folder.glob("scores/*/judge.json")))
        return [facts for facts in found if facts]

    def scores(self, scorer: str) -> np.ndarray:
        """Scores (N,) of all rows, NaN where there is none."""
        found = [self.scores_of(scorer, batch) for batch in self.rows.batches]
        parts = [
            [math.nan] * len(self.rows.of(batch)) if part is None else part
            for batch, part in zip(self.rows.batches, found, strict=True)
        ]
        return np.array([value for part in parts for value in part], dtype=np.float64)

    def _drawn(self, batch: int) -> Path:
        return self.folder / "drawn" / f"{batch:05d}.json"

    def _scores(self, scorer: str, batch: int) -> Path:
        return self.folder / "scores" / scorer / f"{batch:05d}.json"


def read_json(path: Path) -> Json | None:
    """A JSON object; None for a file that is not there or holds something else."""
    try:
        found = bounded.read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
