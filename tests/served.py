"""A score server in a thread of the test's own process."""

from __future__ import annotations

import threading
from typing import Any, Self

from diffexpo.rewards.server import ScoreHandler, ScoreServer
from diffexpo.types import Reward


class Served(ScoreServer):
    """Serves while the `with` block runs, or from `start` to `stop`; `handler` answers instead of the usual one."""

    def __init__(
        self, reward: Reward, kind: str, *, handler: type[ScoreHandler] = ScoreHandler, **options: Any
    ) -> None:
        super().__init__(reward, kind, **options)
        self.RequestHandlerClass = handler
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End what `start` began; nothing is listening afterwards."""
        self.shutdown()
        self._thread.join()
        self.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
