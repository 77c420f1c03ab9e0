"""A user's own function: card of `rewards/python_file.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

from diffexpo.config.rewards.card import RewardCard, Run


class PythonCard(RewardCard):
    """A function in a file."""

    scorer: ClassVar[str] = "PythonFileReward"
    what: ClassVar[str] = "a function of yours"
    unit: ClassVar[str] = "the function's own"
    path_is: ClassVar[str] = "file.py:function"
    source: ClassVar[str] = "yours"
    is_concurrent: ClassVar[bool] = True

    type: Literal["python"] = "python"

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """The function chooses its own device."""
        return {"path": resolve(str(self.path)), "concurrency": self.concurrency or 1}

    def _wrong(self, run: Run, where: str) -> Iterator[str]:
        yield from super()._wrong(run, where)
        if self.path and ":" not in self.path:
            yield f"path = {self.path!r}: a python scorer is named file.py:function"
