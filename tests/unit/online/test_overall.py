"""Which stage of how many, and how long the rest takes."""

import pytest

from diffexpo.config import load_config
from diffexpo.online.cost import evaluation_cost, run_cost
from diffexpo.online.overall import Overall, in_words, stage_costs

PLAN = [("evaluate base", 100), ("train 1", 300), ("evaluate 1", 100), ("collect 1", 500)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_time_left_is_what_was_measured_times_what_is_left():
    lines, seen, clock = [], [], Clock()
    overall = Overall(PLAN, lines.append, lambda *told: seen.append(told), clock)
    for (name, cost), wait in zip(PLAN, (60.0, 180.0, 60.0, 300.0), strict=True):
        with overall.stage(name):
            clock.now += wait  # 0.6 s an evaluation
        assert cost
    assert seen == [(number, 4, name) for number, (name, _) in enumerate(PLAN, 1)]
    assert lines == [
        "stage 1 of 4: evaluate base",
        "stage 2 of 4: train 1, about 9 min left",
        "stage 3 of 4: evaluate 1, about 6 min left",
        "stage 4 of 4: collect 1, about 5 min left",
    ]


def test_stages_that_were_complete_say_nothing_about_speed():
    lines, clock = [], Clock()
    overall = Overall(PLAN, lines.append, clock=clock)
    for name, _ in PLAN[:3]:
        with overall.stage(name):
            clock.now += 0.01
    with overall.stage("collect 1"):
        pass
    assert lines[-1] == "stage 4 of 4: collect 1"


@pytest.mark.parametrize("name", ["scenes/quick", "scenes/expo", "scenes/ddpo", "scenes/improvement_dpo"])
def test_the_stages_cost_together_what_the_run_costs(name):
    config = load_config([name], [], {}).config
    costs = dict(stage_costs(config))
    judged = sum(cost for stage, cost in costs.items() if stage.startswith("evaluate"))
    count = config.explore.iterations if config.evaluation.every_iteration else 1
    assert judged == count * evaluation_cost(config)
    assert sum(costs.values()) - judged == run_cost(config).total


@pytest.mark.parametrize(("seconds", "words"), [(1, "1 min"), (200, "3 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
