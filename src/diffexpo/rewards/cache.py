"""Scores that were paid for once: kept on disk by image, prompt and scorer, and not asked for again.

    FOLDER/scores.sqlite    scorers(identity, facts), scores(identity, question, score, mark)

    question = sha256(image, prompt)               the 8-bit image that every scorer sees
             = sha256(all questions of the batch, row)
                                                   where the last bits of a score depend on what it is
                                                   computed with: networks
    mark     = blake2b(identity, question, score)  a row that was changed, or copied from another scorer, does
                                                   not fit its mark

`identity` is a hash of a scorer's facts: type, version, unit and settings. SQLite writes whole transactions
under its own locks, so several processes may share a folder and any of them may be killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffexpo.errors import StoreError
from diffexpo.rewards.images import check_lengths, to_bytes
from diffexpo.types import Reward

_log = logging.getLogger("diffexpo")
FILE = "scores.sqlite"
LONGEST_WAIT_S = 60.0
"""For a write of another process."""
TABLES = """
CREATE TABLE IF NOT EXISTS scorers(identity TEXT PRIMARY KEY, facts TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores(identity TEXT, question TEXT, score REAL, mark TEXT,
                                  PRIMARY KEY(identity, question)) WITHOUT ROWID;
"""


class CachedReward:
    """A scorer that is asked only for what is not in its cache. Scores are those of the scorer, bit for bit.

    They are kept in `folder`, which is made if need be (StoreError: it cannot be used). `identity` is what a
    score depends on besides image and prompt. With `by_batch` the scorer is a network here, whose last bits
    depend on the images that it gets together: a batch is known as a whole or not at all. Otherwise each
    image is scored, and known, independently.
    """

    def __init__(
        self, reward: Reward, folder: Path, identity: Mapping[str, str], *, by_batch: bool = False
    ) -> None:
        self.name, self.version, self.scale = reward.name, reward.version, reward.scale
        self.reward = reward
        self.num_hits = self.num_misses = 0
        self.cache = ScoreCache(folder, reward.name, identity)
        self._by_batch = by_batch

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts, NaN where none was obtained.

        Raises:
            RewardError: images and prompts differ in number, or the scorer fails.
            StoreError: the disk refuses a new score.
        """
        check_lengths(self.name, images, prompts)
        keys = [question_key(image, prompt) for image, prompt in zip(to_bytes(images), prompts, strict=True)]
        if self._by_batch:
            keys = batch_keys(keys)
        known = self.cache.find(keys)
        if self._by_batch and len(known) < len(keys):
            known = {}
        num_hits = sum(key in known for key in keys)
        # The same question twice in a batch is asked once.
        rows = [keys.index(key) for key in dict.fromkeys(keys) if key not in known]
        if rows:
            answers = self.reward.score(images[rows], [prompts[row] for row in rows]).tolist()
            found = {keys[row]: answer for row, answer in zip(rows, answers, strict=True)}
            new = {key: answer for key, answer in found.items() if math.isfinite(answer)}
            self.cache.add(new)
            known |= new
        self.num_hits += num_hits
        self.num_misses += len(keys) - num_hits
        return torch.tensor([known.get(key, math.nan) for key in keys], dtype=torch.float32)


def cached(scorers: Iterable[Reward]) -> list[CachedReward]:
    """Those of the scorers that keep their scores."""
    return [scorer for scorer in scorers if isinstance(scorer, CachedReward)]


class ScoreCache:
    """The scores of one identity in a folder; StoreError if it cannot be used, or its file is damaged.

    Each call opens the file again: a connection may not be taken into another thread or a forked process.
    `name` is the reward's, for messages; another name of the same identity finds the same scores.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, str]) -> None:
        facts = json.dumps(dict(identity), sort_keys=True)
        self.path = folder / FILE
        self.num_refused = 0
        self._name, self._identity = name, hashlib.sha256(facts.encode()).hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error.strerror or error) from error
        with self._opened() as file:
            if file.execute("SELECT 1 FROM scorers WHERE identity = ?", (self._identity,)).fetchone() is None:
                file.execute("INSERT OR IGNORE INTO scorers VALUES (?, ?)", (self._identity, facts))

    def find(self, keys: Sequence[str]) -> dict[str, float]:
        """Those of the keys that have a score by now, from any process. Scores that do not fit their mark are
        counted and forgotten."""
        found: dict[str, float] = {}
        refused = []
        where = "FROM scores WHERE identity = ? AND question = ?"
        with self._opened() as file:
            for key in dict.fromkeys(keys):
                for score, mark in file.execute(f"SELECT score, mark {where}", (self._identity, key)):
                    if mark == self._mark(key, score):
                        found[key] = score
                    else:
                        refused.append((self._identity, key))
            file.executemany(f"DELETE {where}", refused)
        if refused:
            self.num_refused += len(refused)
            what = "scores of %s are not this scorer's (changed or copied); they are asked again"
            _log.warning(f"reward %r: %d {what}", self._name, len(refused), self.path)
        return found

    def add(self, scores: Mapping[str, float]) -> None:
        """Write finite scores to the disk; of two scores of one key the first counts."""
        rows = [(self._identity, key, score, self._mark(key, score)) for key, score in scores.items()]
        if rows:
            with self._opened() as file:
                file.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)

    def _mark(self, key: str, score: object) -> str:
        return hashlib.blake2b(f"{self._identity} {key} {score!r}".encode(), digest_size=8).hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The file, in one transaction."""
        try:
            with closing(sqlite3.connect(self.path, timeout=LONGEST_WAIT_S)) as file, file:
                file.executescript(TABLES)
                yield file
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from error
        except sqlite3.DatabaseError as error:
            reason = f"the score cache {self.path} is damaged ({error})"
            advice = "delete it and resume, its scores are asked again"
            raise StoreError(f"reward {self._name!r}: {reason}; {advice}") from error

    def _unusable(self, reason: object) -> StoreError:
        return StoreError(
            f"reward {self._name!r}: the score cache {self.path} cannot be used ({reason}); free space or "
            "correct its permissions and resume, or remove `cache` from the reward"
        )


def question_key(image: np.ndarray, prompt: str) -> str:
    """Name of a question: the SHA-256 of an image (H,W,3) uint8, its shape and the prompt."""
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    digest.update(prompt.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def batch_keys(keys: Sequence[str]) -> list[str]:
    """Names of the rows of a batch, each of which depends on all keys and their order."""
    batch = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    return [hashlib.sha256(f"{batch} {row}".encode()).hexdigest() for row in range(len(keys))]
