"""Scores that were paid for once: kept on disk by picture, prompt and scorer, so that the same question is
not asked again.

    FOLDER/<name>-<identity>.jsonl    {"scorer": {...}} first, then {"key": ..., "score": ..., "check": ...} a
    line

    key   = sha256(picture, prompt)            the 8-bit picture that every scorer sees
          = sha256(all keys of the batch, row)      where the last bits of a score depend on what it is
          computed with: networks
    check = blake2b(identity, key, score)      a line that was torn, changed or copied from another scorer
    does not pass

One file holds the scores of one identity: type, version, unit and settings of a scorer. Another version has
another file. Lines are appended whole and under a lock, so several processes may share a folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffexpo.errors import RewardError, StoreError
from diffexpo.rewards.base import to_bytes
from diffexpo.types import Reward

_log = logging.getLogger("diffexpo")


class CachedReward:
    """A scorer that is asked only for what is not in its cache. Scores are those of the scorer, bit for bit.

    Args:
        reward: The scorer.
        folder: Where scores are kept; made if need be.
        identity: What a score depends on besides picture and prompt.
        by_batch: The scorer is a network here, whose last bits depend on the images that it gets together: a
            batch is known as a whole or not at all. False: each image is scored by itself, and known by
                itself.
    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(
        self, reward: Reward, folder: Path, identity: Mapping[str, str], *, by_batch: bool = False
    ) -> None:
        self.name = reward.name
        self.version = reward.version
        self.scale = reward.scale
        self.reward = reward
        self.num_hits = 0
        self.num_misses = 0
        self.cache = ScoreCache(folder, reward.name, identity)
        self._by_batch = by_batch

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts, NaN where none was obtained.

        Raises:
            RewardError: images and prompts differ in number, or the scorer fails.
            StoreError: the disk refuses a new score.
        """
        if len(images) != len(prompts):
            raise RewardError(f"reward {self.name!r}: {len(images)} images but {len(prompts)} prompts")
        pictures = zip(to_bytes(images), prompts, strict=True)
        keys = [picture_key(picture, prompt) for picture, prompt in pictures]
        if self._by_batch:
            keys = batch_keys(keys)
        known = self.cache.find(keys)
        if self._by_batch and len(known) < len(keys):
            known = {}
        num_hits = sum(key in known for key in keys)
        # The same question twice in a batch is asked once.
        rows = list({key: row for row, key in reversed(list(enumerate(keys))) if key not in known}.values())
        if rows:
            rows.sort()
            answers = self.reward.score(images[rows], [prompts[row] for row in rows]).tolist()
            found = {keys[row]: answer for row, answer in zip(rows, answers, strict=True)}
            new = {key: answer for key, answer in found.items() if math.isfinite(answer)}
            self.cache.add(new)
            known |= new
        self.num_hits += num_hits
        self.num_misses += len(keys) - num_hits
        return torch.tensor([known.get(key, math.nan) for key in keys], dtype=torch.float32)


class ScoreCache:
    """The scores of one identity in a folder.

    Args:
        folder: Made if need be.
        name: The reward, for messages and the file's name; another name of the same identity finds the same
            scores.
        identity: What scores depend on besides picture and prompt.
    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, str]) -> None:
        self._identity = dict(identity)
        self._digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        kind = re.sub(r"[^A-Za-z0-9.]+", "-", str(identity.get("type", "scorer")))
        self.path = folder / f"{kind}-{self._digest[:24]}.jsonl"
        self.num_refused = 0
        self._name = name
        self._scores: dict[str, float] = {}
        self._read_to = 0
        self._lock = threading.Lock()
        with self._refusals():
            folder.mkdir(parents=True, exist_ok=True)
            self._refresh()

    def __len__(self) -> int:
        return len(self._scores)

    def find(self, keys: Sequence[str]) -> dict[str, float]:
        """Those of the keys that have a score, what other processes have added by now included."""
        with self._lock, self._refusals():
            self._refresh()
        return {key: self._scores[key] for key in keys if key in self._scores}

    def add(self, scores: Mapping[str, float]) -> None:
        """Keep finite scores; they are on the disk when this returns."""
        if not scores:
            return
        lines = "".join(self._line(key, score) for key, score in scores.items())
        with self._lock, self._refusals(), self._opened(os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size == 0:
                lines = json.dumps({"scorer": self._identity}) + "\n" + lines
            elif os.pread(file, 1, size - 1) != b"\n":
                lines = "\n" + lines  # a line that a killed process left behind must not take ours with it
            left = memoryview(lines.encode())
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)

    def _refresh(self) -> None:
        """Read what was appended since the last time."""
        if not self.path.exists():
            return
        with self._opened(os.O_RDONLY) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            with open(file, "rb", closefd=False) as stream:
                stream.seek(self._read_to)
                refused = sum(not self._take(line) for line in stream)
                self._read_to = stream.tell()
        if refused:
            self.num_refused += refused
            _log.warning(
                "reward %r: %d lines of %s are no scores of this scorer (torn or changed); they are left out "
                "and asked again",
                self._name,
                refused,
                self.path,
            )

    def _take(self, line: bytes) -> bool:
        """Whether a line is good; its score is known then. Of two scores of one key the first counts."""
        text = line.strip()
        if not text:
            return True
        try:
            record = json.loads(text)
            if "scorer" in record:
                return bool(record["scorer"] == self._identity)
            key, score = record["key"], record["score"]
            is_number = isinstance(score, float) and math.isfinite(score)
            if not is_number or record["check"] != self._check(key, score):
                return False
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        self._scores.setdefault(key, score)
        return True

    def _line(self, key: str, score: float) -> str:
        return json.dumps({"key": key, "score": score, "check": self._check(key, score)}) + "\n"

    def _check(self, key: str, score: float) -> str:
        return hashlib.blake2b(f"{self._digest} {key} {score!r}".encode(), digest_size=8).hexdigest()

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        """A descriptor; closing it gives its lock back."""
        file = os.open(self.path, flags | os.O_CLOEXEC, 0o644)
        try:
            yield file
        finally:
            os.close(file)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns what the disk raises into one clear error."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"reward {self._name!r}: the score cache {self.path} cannot be used "
                f"({error.strerror or error}); free space or "
                "correct its permissions and resume, or remove `cache` from the reward"
            ) from error


def picture_key(picture: np.ndarray, prompt: str) -> str:
    """Name of a question: the SHA-256 of a picture (H,W,3) uint8, its shape and the prompt."""
    digest = hashlib.sha256(f"{picture.shape}".encode())
    digest.update(np.ascontiguousarray(picture).data)
    digest.update(prompt.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def batch_keys(keys: Sequence[str]) -> list[str]:
    """Names of the rows of a batch, of which each depends on all keys and their order."""
    batch = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    return [hashlib.sha256(f"{batch} {row}".encode()).hexdigest() for row in range(len(keys))]
