"""A user's own function: card of `rewards/python_file.py`."""

from collections.abc import Callable, Iterator
from typing import Literal

from diffexpo.config.rewards.card import RewardCard, Run


class PythonCard(RewardCard):
    """A function in a file."""

    scorer = "PythonFileReward"
    what = "a function of yours"
    unit = "the function's own"
    path_is = "file.py:function"
    source = "yours"
    is_concurrent = True

    type: Literal["python"] = "python"

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """The function chooses its own device."""
        return {"path": resolve(str(self.path)), "concurrency": self.concurrency or 1}

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        if self.path and ":" not in self.path:
            yield f"path = {self.path!r}: a python scorer is named file.py:function"
