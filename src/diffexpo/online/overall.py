"""How far a whole run is: which stage of how many, and about how long the rest will take.

A stage's share of the time is its share of the network evaluations, and what an evaluation takes is measured
on the stages that are done; what scorers and decoding take comes along in that measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from diffexpo.config import RunConfig
from diffexpo.online.cost import check_cost, evaluation_cost, sampling_cost, training_cost
from diffexpo.online.loop import Loop, Stage, schedule

SKIPPED_S = 0.5
"""A stage that took less was complete already, and says nothing about speed."""


def stage_costs(config: RunConfig) -> list[tuple[str, int]]:
    """The stages of a run's loop in order, as "train 2", each with its network evaluations."""
    explore, images = config.explore, config.algorithm.images_of_prompt(config)
    drawn = sampling_cost(config, explore.prompts_per_iteration * images)
    extra = config.algorithm.stage_costs(config, explore.prompts_per_iteration * images)
    costs = {"collect": drawn, "improve": extra["drawing"], "improver": extra["training"]}
    found = []
    for stage, iteration in schedule(config):
        cost = costs.get(stage, 0)
        if stage == "train":
            cost = training_cost(config, iteration) + check_cost(config, iteration)
        if stage == "evaluate" and (config.evaluation.every_iteration or iteration == explore.iterations):
            cost = evaluation_cost(config)
        found.append((f"{stage} {iteration}", cost))
    return found


class Overall:
    """Counts the stages of a run, tells each when it begins, and hands it on (`on_stage`).

    Args:
        planned: (name, network evaluations) of every stage in order.
        say: Where a line per stage goes.
        on_stage: Called with (number from 1, total, name) before a stage.
        clock: Seconds.
    """

    def __init__(
        self,
        planned: Sequence[tuple[str, int]],
        say: Callable[[str], None],
        on_stage: Callable[[int, int, str], None] = lambda number, total, name: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._planned, self._say, self._on_stage, self._clock = list(planned), say, on_stage, clock
        self._number, self._seconds, self._measured = 0, 0.0, 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is the next stage of that name; stages between that are not run are passed over."""
        names = [planned for planned, _ in self._planned]
        self._number = names.index(name, self._number) + 1 if name in names[self._number :] else self._number
        left = self.seconds_left()
        told = "" if left is None else f", about {in_words(left)} left"
        self._say(f"stage {self._number} of {len(names)}: {name}{told}")
        self._on_stage(self._number, len(names), name)
        began = self._clock()
        yield
        if (spent := self._clock() - began) >= SKIPPED_S and self._number:
            self._seconds += spent
            self._measured += self._planned[self._number - 1][1]

    def seconds_left(self) -> float | None:
        """From the beginning of the present stage to the end of the run; None where nothing is measured."""
        rest = sum(cost for _, cost in self._planned[max(self._number - 1, 0) :])
        return self._seconds / self._measured * rest if self._measured else None

    def watch(self, stages: Mapping[str, Stage]) -> dict[str, Stage]:
        """The same stages of the loop, each within `stage`."""

        def watched(name: str, run: Stage) -> Stage:
            def work(loop: Loop, iteration: int) -> None:
                with self.stage(f"{name} {iteration}"):
                    run(loop, iteration)

            return work

        return {name: watched(name, run) for name, run in stages.items()}


def in_words(seconds: float) -> str:
    """A rough duration: `in_words(200)` is "3 min", `in_words(40)` "1 min", `in_words(9000)` "2.5 h"."""
    if seconds < 5400:
        return f"{max(round(seconds / 60), 1)} min"
    return f"{seconds / 3600:.1f} h"
