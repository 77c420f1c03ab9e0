"""Which images a method may learn from: what its mathematics forbids is refused with the reason."""

from __future__ import annotations

import pytest

from diffexpo.config import RunConfig, config_notes, load_config
from diffexpo.errors import ConfigError

OWN = ["offline.source=null", "explore.agents=1", "hybrid.decay=0"]
SPIN = ["algorithm.type=spin", "explore.agents=1", "hybrid={offline_weight: 0, decay: 0}"]


def load(*overrides: str) -> RunConfig:
    return load_config([], overrides, {}).config


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algorithm.type=rwr"], "have no reward, so exp"),
        (["algorithm.type=rwr", "explore.iterations=1", "rewards=[]"], "have no reward"),
        (["algorithm.type=diffusion_nft", *OWN[1:]], "nobody knows which drew these"),
        (["algorithm.type=awm", *OWN[1:]], "nobody knows which drew these"),
        (["algorithm.type=awm", OWN[0], OWN[2]], "agents = 2 .*iterate before the old policy"),
        (["algorithm.type=diffusion_nft", *OWN[:2]], "earlier policies than the old"),
        (["algorithm.type=awm", *OWN, "rewards=[]"], "no reward with role: train"),
        (["algorithm.type=awm", *OWN, "explore.iterations=1"], "nothing to learn from"),
        ([*SPIN, "offline.source=null"], "winners are images of a data set"),
        ([*SPIN, "explore.iterations=1"], "which iteration 1 draws"),
        ([*SPIN, "explore.agents=2"], "there is no second agent"),
        ([*SPIN, "hybrid.offline_weight=1"], "would teach preferences instead"),
        ([*SPIN, "hybrid.decay=1"], "not images of the previous iterate"),
        (["algorithm.type=sft", "training.pair_gradient=two_pass"], "only a loss on pairs has two halves"),
        (["algorithm.auto_beta=true", "algorithm.kind=simpo"], "do not start at 0"),
        (["algorithm.auto_beta=true", "algorithm.alpha=0.1"], "no longer protect labels"),
    ],
)
def test_what_the_mathematics_forbids_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.type=rwr", "offline.source=null"],
        ["algorithm.type=diffusion_nft", *OWN],
        ["algorithm.type=awm", *OWN[:2], "explore.iterations=2"],
        ["algorithm.type=dgpo"],
        ["algorithm.type=diffusion_kto"],
        ["algorithm.type=mapo", "training.pair_gradient=two_pass"],
        SPIN,
        [*SPIN, "rewards=[]"],
        ["algorithm.auto_beta=true", "algorithm.safeguard=true"],
    ],
)
def test_what_makes_sense_passes(overrides: list[str]) -> None:
    load(*overrides)


def test_the_first_iteration_of_self_play_only_draws() -> None:
    def learns(*settings: str) -> bool:
        config = load(*settings)
        return config.algorithm.learns_from_offline(config)

    assert learns() and not learns("offline.source=null")
    assert not learns(*SPIN)


def test_guidance_is_noted_where_the_old_policy_is_measured_against() -> None:
    method = ["algorithm.type=awm", *OWN]
    assert "not quite the old policy" in "\n".join(config_notes(load(*method)))
    plain = load(*method, "explore.sampler.guidance=1", "explore.negatives.source=null")
    assert "not quite the old policy" not in "\n".join(config_notes(plain))
