"""What cannot be learned from trajectories is refused with the mathematical reason."""

import pytest

from diffexpo.config import config_notes, load_config
from diffexpo.config.rules import negatives_are_on
from diffexpo.errors import ConfigError

BASE = ["offline.source=null", "explore.sampler.name=ddim", "explore.sampler.eta=1.0"]
TWO_REWARDS = "rewards=[{name: a, type: clip, path: x}, {name: b, type: jpeg_compressibility}]"
FLOW = ["explore.sampler.name=flow_sde", "evaluation.sampler.name=flow_euler"]


def load(method, *overrides):
    return load_config([], [f"algorithm.type={method}", *BASE, *overrides], {}).config


@pytest.mark.parametrize(
    ("method", "overrides", "reason"),
    [
        ("ddpo", ["explore.sampler.eta=0"], r"explore\.sampler\.eta = 0.*no density"),
        ("d3po", ["explore.sampler.name=dpmpp"], "no density.*use ddpm, or ddim with eta"),
        ("flow_grpo", ["explore.sampler.name=flow_euler", "algorithm.kl=exact"], "no density.*use flow_sde"),
        ("ddpo", [FLOW[0], "explore.sampler.noise_level=0"], "no density.*0.7"),
        ("ddpo", ["offline.source=emoji:offline"], "offline images have none"),
        ("ddpo", ["algorithm.estimator=score_function"], "biased; set training.steps=1"),
        ("prdp", ["algorithm.timestep_fraction=0.5"], "sum over all its steps"),
        ("spo", ["algorithm.first_transition=50"], "no step is branched"),
        ("spo", ["algorithm.threshold=1.0"], "threshold"),
        ("ddpo", [TWO_REWARDS, "mixture.kind=pareto"], "order without numbers"),
        ("ddpo", ["pairing.min_margin=0.1"], "makes no pairs of images"),
        ("flow_grpo", [], "factor of the time step.*algorithm.kl=exact"),
        ("flow_grpo", [FLOW[0], "explore.sampler.sde=cps"], "flow_sde, cps.*algorithm.kl=exact"),
        ("flow_grpo", ["algorithm.kl=exact", "algorithm.ratio=guard"], "divides by the time step"),
        ("flow_grpo", [FLOW[0], "algorithm.window=51"], "more steps than there are"),
        ("flow_grpo", [FLOW[0], "algorithm.window=4", "explore.sampler.random_steps=[0, 4]"], "both say"),
        ("ddpo", ["rewards=[]"], "learns from rewards"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(method, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        load(method, *overrides)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("ddpo", ["explore.iterations=1"]),
        ("ddpo", ["algorithm.estimator=score_function", "training.steps=1"]),
        ("ddpo", ["explore.sampler.name=ddpm"]),
        ("d3po", [TWO_REWARDS, "mixture.kind=pareto", "pairing.min_margin=0.1"]),
        ("flow_grpo", ["algorithm.kl=exact"]),
        ("flow_grpo", [FLOW[0], "explore.sampler.sde=dance", "algorithm.ratio=guard"]),
        ("flow_grpo", [FLOW[0], "explore.sampler.sde=cps", "algorithm.kl_weight=0"]),
    ],
)
def test_what_makes_sense_passes(method, overrides):
    config = load(method, *overrides)
    assert config.algorithm.collects(config)


def test_images_are_drawn_from_the_first_iteration_on():
    assert negatives_are_on(load("ddpo", "explore.iterations=1"))


def test_notes():
    def notes(method, *overrides):
        return "\n".join(config_notes(load(method, "training.warmup_fraction=0", *overrides)))

    assert "iteration 1 has no offline pairs" not in notes("ddpo")
    assert "warms up anew" in notes("ddpo", "training.warmup_fraction=0.5")
    assert "the whole batch" in notes("ddpo", "algorithm.min_count=17")
    assert "pushed the same way" in notes("dpok", "algorithm.has_value_baseline=false")
