"""The scoring side of `server.py`: images of many requests, scored in batches by one thread, and the budgets
that their requests share."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from diffexpo.errors import DiffexpoError, RewardError
from diffexpo.rewards.foreign import blame
from diffexpo.rewards.scoring import score_drawn
from diffexpo.types import Drawn, Reward

_log = logging.getLogger("diffexpo")
MAX_WAITING = 4096
WAIT_S = 5.0
BATCH_PIXELS = 2**24
"""Pixels that are scored at once, 64 images of 512 x 512: as float32 they take 192 MiB."""


class RefusedError(RewardError):
    """A request that is not answered with scores, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Budget:
    """So much of something that all requests together may hold; who wants more waits for the others."""

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._held = 0
        self._given_back = threading.Condition()

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one request takes of it, until the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            with self._given_back:
                self._held -= share.held
                self._given_back.notify_all()

    def move(self, amount: int, wait_s: float) -> None:
        """Take so much; RefusedError (503) if the others still hold too much after the wait."""
        with self._given_back:
            if not self._given_back.wait_for(lambda: self._held + amount <= self._most, wait_s):
                raise RefusedError(503, f"other requests hold too many {self._what}; try again later")
            self._held += amount


class Share:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self.held = budget, 0

    def take(self, amount: int, wait_s: float = WAIT_S) -> None:
        """Take more of it; RefusedError (503) if the others hold too much."""
        self._budget.move(amount, wait_s)
        self.held += amount


@dataclass
class Ticket:
    """An image that waits for its score."""

    image: np.ndarray
    prompt: str
    score: Future[float] = field(default_factory=Future)


class Batcher:
    """Scores tickets in batches, in one thread; a batch that is not full waits `wait_ms` for more."""

    def __init__(self, reward: Reward, batch_size: int, wait_ms: float) -> None:
        self.num_images = 0
        self._is_closing = False
        self._reward, self._batch_size, self._wait_s = reward, batch_size, wait_ms / 1000
        self._tickets: queue.Queue[Ticket | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue images for their scores; RefusedError (503) near the end or if too many are waiting."""
        if self._is_closing:
            raise RefusedError(503, "the server is stopping")
        if self._tickets.qsize() + len(tickets) > MAX_WAITING:
            raise RefusedError(503, f"{self._tickets.qsize()} images are waiting; try again later")
        for ticket in tickets:
            self._tickets.put(ticket)

    def close(self) -> None:
        """Score what is queued and end the thread."""
        self._is_closing = True
        self._tickets.put(None)
        self._thread.join()

    def _run(self) -> None:
        ticket = self._tickets.get()
        while ticket is not None:
            batch, until = [ticket], time.monotonic() + self._wait_s
            with suppress(queue.Empty):
                while len(batch) < self._batch_size:
                    ticket = self._tickets.get(timeout=max(until - time.monotonic(), 0.0))
                    if ticket is None:
                        break
                    batch.append(ticket)
            self._score_by_size(batch)
            if ticket is not None:
                ticket = self._tickets.get()

    def _score_by_size(self, batch: Sequence[Ticket]) -> None:
        """Images of one size can be stacked, as many as their pixels allow; who has gone is passed over."""
        wanted = [ticket for ticket in batch if ticket.score.set_running_or_notify_cancel()]
        for shape in dict.fromkeys(ticket.image.shape for ticket in wanted):
            alike = [ticket for ticket in wanted if ticket.image.shape == shape]
            count = max(1, BATCH_PIXELS // (shape[0] * shape[1]))
            for start in range(0, len(alike), count):
                self._score(alike[start : start + count])

    def _score(self, tickets: Sequence[Ticket]) -> None:
        stacked = torch.from_numpy(np.stack([ticket.image for ticket in tickets]))
        images = stacked.permute(0, 3, 1, 2).float().div_(255)
        prompts = [ticket.prompt for ticket in tickets]
        self.num_images += len(tickets)
        try:
            # One bad request must not end the server, whatever the scorer raises.
            with blame(f"reward {self._reward.name!r}", "correct the scorer"):
                drawn = Drawn(images=images)
                scores = score_drawn([self._reward], drawn, prompts, batch_size=self._batch_size)
        except DiffexpoError as error:
            _log.error("%s", error)
            for ticket in tickets:
                ticket.score.set_exception(error)
        else:
            for ticket, score in zip(tickets, scores[self._reward.name].tolist(), strict=True):
                ticket.score.set_result(score)
