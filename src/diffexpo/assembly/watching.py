"""What a caller may watch of a run while it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffexpo.assembly.evaluating import eval_dir
from diffexpo.evaluation.records import is_saved, load_suite
from diffexpo.online.loop import Loop

OnStage = Callable[[int, int, str], None]
OnStep = Callable[[int, int, Mapping[str, float | None]], None]
OnImages = Callable[[str, np.ndarray, Sequence[str]], None]


@dataclass(frozen=True)
class Watching:
    """Functions that the first process calls; None calls nothing. What they raise ends the run.

    Args:
        on_stage: (number from 1, how many, name) before each stage, such as (4, 11, "collect 2").
        on_step: (iteration, step, metrics by name) after each optimiser step of the run's own training.
        on_images: (version, images (N,H,W,3) uint8, their prompts) after each evaluation that drew some;
            the version is "base", "iteration-2", ...
    """

    on_stage: OnStage | None = None
    on_step: OnStep | None = None
    on_images: OnImages | None = None

    def attach(self, loop: Loop) -> None:
        """Have a run's loop call the functions for steps and images."""
        if self.on_step is not None:
            loop.metrics.on_line = self._line
        if self.on_images is not None:
            loop.evaluate = self._evaluated(loop.evaluate)

    def stage(self, number: int, total: int, name: str) -> None:
        """A stage begins."""
        if self.on_stage is not None:
            self.on_stage(number, total, name)

    def _line(self, line: Mapping[str, object]) -> None:
        if line["phase"] == "train" and self.on_step is not None:
            metrics = {key: value for key, value in line.items() if "/" in key}
            iteration, step = (int(str(line[key])) for key in ("iteration", "step"))
            self.on_step(iteration, step, metrics)  # type: ignore[arg-type]

    def _evaluated(self, evaluate: Callable[[Loop, str, int], None]) -> Callable[[Loop, str, int], None]:
        def work(loop: Loop, name: str, iteration: int) -> None:
            folder = eval_dir(loop) / name
            was_there = is_saved(folder)
            evaluate(loop, name, iteration)
            if self.on_images is not None and not was_there and loop.world.rank == 0:
                suite = load_suite(folder)
                texts = [suite.prompts[index].text for index in suite.prompt_index]
                self.on_images(name, suite.images, texts)

        return work
