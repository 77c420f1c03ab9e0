"""A scorer in another process, over HTTP: one environment for each scorer, and none of its dependencies here.

The protocol is JSON and PNG, never pickle (docs/rewards/remote.md):

    GET  /version -> {"protocol": 1, "name": ..., "type": ..., "version": ..., "scale": ...}
    POST /score   {"protocol": 1, "items": [{"id": ..., "prompt": ..., "image": base64 PNG}, ...]}
                  -> {"protocol": 1, "name": ..., "version": ..., "scores": {id: number or null, ...}}

Scores are found by id, and an id holds a hash of image and prompt: neither the order of the answers nor an
answer to another question can give an image a score that is not its own.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffexpo.config.rewards import ServiceConfig
from diffexpo.errors import ScorerStoppedError
from diffexpo.rewards.calling import CalledReward, CallFailedError, map_concurrently

_log = logging.getLogger("diffexpo")
PROTOCOL = 1

Question = dict[str, str]
"""One image as the protocol asks for it: id, prompt and image."""


class RemoteReward(CalledReward):
    """Scores by a server that speaks the protocol above, such as `diffexpo rewards serve`.

    A request that fails is sent again, with growing pauses, for `service.retry_s`; what an incomplete answer
    holds is kept. An image that got no score is NaN and counted; past the budget the run stops.

    Raises:
        ConfigError: `url` is no address.
        MissingError: nothing answers there, or the key is not set.
        ScorerStoppedError: it is another scorer than asked for, or speaks another protocol.
    """

    def __init__(
        self, name: str, url: str, service: ServiceConfig | None = None, concurrency: int | None = None
    ) -> None:
        super().__init__(name, url, service, concurrency)
        facts = self._first(self._ask_version, "a running scorer: start it with `diffexpo rewards serve`")
        self._server = (str(facts["name"]), str(facts["version"]))
        self.version, self.scale = f"{facts['type']} {facts['version']}", str(facts["scale"])
        for key, given in zip(("scorer", "version"), self._server, strict=True):
            wanted = getattr(self._service, key)
            if wanted not in (None, given):
                reason = f"{self.url} serves {key} {given!r}, but service.{key} = {wanted!r}"
                advice = f"start the right one or correct service.{key}"
                raise ScorerStoppedError(f"reward {name!r}: {reason}; {advice}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts, NaN where none was obtained;
        ScorerStoppedError past the budget, or if the server now serves another scorer."""
        questions: list[Question] = []
        for png, prompt in zip(self._pngs(images, prompts), prompts, strict=True):
            digest = hashlib.sha256(f"{prompt}\0{png}".encode()).hexdigest()[:16]
            questions.append({"id": f"{len(questions)}-{digest}", "prompt": prompt, "image": png})
        size = self._service.images_per_request
        parts = [questions[start : start + size] for start in range(0, len(questions), size)]
        found: dict[str, float] = {}
        for part in map_concurrently(self._score_part, parts, self._concurrency):
            found |= part
        scores = [found.get(question["id"], math.nan) for question in questions]
        return torch.tensor(scores, dtype=torch.float32)

    def _score_part(self, questions: Sequence[Question]) -> dict[str, float]:
        """Scores by id of one request's images; those that stay without one are missing."""
        self.budget.check()
        found: dict[str, float] = {}
        reason = "the scorer gave no number"
        try:
            self.persist(lambda: self._ask(questions, found))
        except CallFailedError as error:
            if error.is_refused_input and len(questions) > 1:
                # One image too large or too odd must not cost the others.
                half = len(questions) // 2
                return self._score_part(questions[:half]) | self._score_part(questions[half:])
            reason, missing = str(error), len(questions) - len(found)
            _log.warning("reward %r: %s; %d images stay without a score", self.name, error, missing)
        num_failed = sum(math.isnan(found.get(question["id"], math.nan)) for question in questions)
        self.budget.add(len(questions), num_failed, reason)
        return found

    def _ask(self, questions: Sequence[Question], found: dict[str, float]) -> None:
        """One request for what is not found yet."""
        missing = [question for question in questions if question["id"] not in found]
        reply = self._speak("/score", {"protocol": PROTOCOL, "items": missing})
        given = (reply.get("name"), reply.get("version"))
        if None in given:
            raise CallFailedError(f"{self.url} answered without name and version", can_retry=True)
        if given != self._server:
            raise ScorerStoppedError(
                f"reward {self.name!r}: {self.url} now serves {given[0]!r} version {given[1]!r}, at the "
                f"start it was {self._server[0]!r} version {self._server[1]!r}; scores of two scorers cannot "
                "be mixed: start the first one again and resume"
            )
        scores = _read_scores(reply.get("scores"), {question["id"] for question in missing})
        found.update(scores)
        if len(scores) < len(missing):
            text = f"{self.url} answered {len(scores)} of {len(missing)} images"
            raise CallFailedError(text, can_retry=True)

    def _ask_version(self) -> dict[str, object]:
        facts = self._speak("/version")
        lacking = [key for key in ("name", "type", "version", "scale") if not isinstance(facts.get(key), str)]
        if lacking:
            text = f"{self.url}/version gives no {', '.join(lacking)}; it is no scorer of this protocol"
            raise CallFailedError(text, can_retry=False)
        return facts

    def _speak(self, path: str, payload: object = None) -> dict[str, object]:
        """One call; an answer of another protocol is none."""
        reply = self.call(path, payload)
        spoken = reply.get("protocol")
        if spoken is None:
            text = f"{self.url} answered without `protocol`; it is no scorer of this protocol"
            raise CallFailedError(text, can_retry=True)
        if spoken != PROTOCOL:
            reason = f"{self.url} speaks protocol {spoken!r}, expected {PROTOCOL}"
            advice = "run the same version of diffexpo on both sides"
            raise ScorerStoppedError(f"reward {self.name!r}: {reason}; {advice}")
        return reply


def _read_scores(given: object, asked: set[str]) -> dict[str, float]:
    """Scores by id, NaN for null and for numbers that are not finite."""
    if not isinstance(given, dict) or not set(given) <= asked:
        raise CallFailedError("the answer's scores are not those of the images asked for", can_retry=True)
    scores = {}
    for key, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            text = f"the answer holds {value!r:.40} where a number is expected"
            raise CallFailedError(text, can_retry=True)
        scores[key] = float(value) if value is not None and abs(value) <= 3e38 else math.nan
    return scores
