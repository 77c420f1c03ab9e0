"""What cannot be learned from whole images, each with its reason: which images a method's mathematics allows.
Part of `rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffexpo.config.algorithms import (
    AwmConfig,
    DiffusionDpoConfig,
    DiffusionNftConfig,
    ExpoConfig,
    ImprovementDpoConfig,
    MapoConfig,
    RwrConfig,
    SpinConfig,
)

if TYPE_CHECKING:
    from diffexpo.config.schema import RunConfig

ON_POLICY = (DiffusionNftConfig, AwmConfig)
ON_PAIRS = (DiffusionDpoConfig, SpinConfig, MapoConfig)


def learns_from_offline(config: RunConfig) -> bool:
    """Whether the first iteration has something to train on; SPIN's losers must be drawn first, and so must
    all pairs of improvement DPO where offline pairs only train the improvement model.
    """
    if config.offline.source is None or isinstance(config.algorithm, SpinConfig):
        return False
    return not (isinstance(config.algorithm, ImprovementDpoConfig) and config.hybrid.offline_weight == 0)


def image_problems(config: RunConfig) -> list[str]:
    """Every contradiction of a method on images with the rest, one line each."""
    return [
        *_own_images(config),
        *_self_play(config),
        *_improvement(config),
        *_guards(config),
        *_pair_gradient(config),
    ]


def image_notes(config: RunConfig) -> list[str]:
    """What is allowed but changes what a method on images means."""
    guidance = config.explore.sampler.guidance
    if isinstance(config.algorithm, ON_POLICY) and guidance != 1.0:
        note = (
            f"explore.sampler.guidance = {guidance:g} with algorithm.type = {config.algorithm.type}: images "
            f"are drawn with guidance and "
            f"trained without, so what drew them is not quite the old policy; the authors draw with guidance "
            f"1"
        )
        return [note]
    return []


def _own_images(config: RunConfig) -> list[str]:
    algorithm, explore = config.algorithm, config.explore
    if not isinstance(algorithm, (RwrConfig, *ON_POLICY)):
        return []
    head = f"with algorithm.type = {algorithm.type}"
    problems = []
    if config.offline.source is not None:
        why = (
            "its images have won or lost pairs but have no reward, so exp(reward / temperature) is not "
            "defined for them"
            if isinstance(algorithm, RwrConfig)
            else "the loss compares the policy with the one that drew the images, and nobody knows which drew these"
        )
        problems.append(
            f"offline.source = {config.offline.source!r} {head}: {why}; set offline.source=null and "
            f"explore.iterations to 2 or more"
        )
    if not isinstance(algorithm, ON_POLICY):
        return problems
    if explore.agents == 2:
        problems.append(
            f"explore.agents = 2 {head}: the main agent's images are drawn by the iterate before the old "
            f"policy, against which the "
            f"loss measures; set explore.agents=1"
        )
    if explore.iterations > 2 and config.hybrid.decay > 0:
        problems.append(
            f"hybrid.decay = {config.hybrid.decay:g} {head}: images of earlier collections were drawn by "
            f"earlier policies than the old "
            f"one, against which the loss measures; set hybrid.decay=0"
        )
    return problems


def _self_play(config: RunConfig) -> list[str]:
    explore, hybrid = config.explore, config.hybrid
    if not isinstance(config.algorithm, SpinConfig):
        return []
    head = "with algorithm.type = spin"
    problems = []
    if config.offline.source is None:
        problems.append(f"offline.source = null {head}: its winners are images of a data set; name one")
    if explore.iterations == 1:
        problems.append(
            f"explore.iterations = 1 {head}: its losers are the model's own images, which iteration 1 draws "
            f"and iteration 2 is the "
            f"first to learn from; use two iterations or more"
        )
    if explore.agents == 2:
        problems.append(
            f"explore.agents = 2 {head}: losers are images of the newest iterate, and there is no second "
            f"agent; set explore.agents=1"
        )
    if hybrid.offline_weight > 0:
        problems.append(
            f"hybrid.offline_weight = {hybrid.offline_weight:g} {head}: the losers of offline pairs are not "
            f"the model's own, so these "
            f"pairs would teach preferences instead; set hybrid.offline_weight=0 (their winners are used all "
            f"the same)"
        )
    if explore.iterations > 2 and hybrid.decay > 0:
        problems.append(
            f"hybrid.decay = {hybrid.decay:g} {head}: losers of earlier collections are not images of the "
            f"previous iterate, and no longer "
            f"what has to be told from data; set hybrid.decay=0"
        )
    return problems


def _improvement(config: RunConfig) -> list[str]:
    explore, algorithm = config.explore, config.algorithm
    if not isinstance(algorithm, ImprovementDpoConfig):
        return []
    head, improver = "with algorithm.type = improvement_dpo", algorithm.improver
    problems = []
    if config.offline.source is None and improver.path is None:
        problems.append(
            f"offline.source = null {head}: the improvement model learns from offline pairs; name some, or a "
            f"trained one in "
            f"algorithm.improver.path"
        )
    if explore.iterations == 1:
        problems.append(
            f"explore.iterations = 1 {head}: its losers are the model's own images, which iteration 1 draws "
            f"and iteration 2 is the "
            f"first to learn from; use two iterations or more"
        )
    if explore.agents == 2:
        problems.append(
            f"explore.agents = 2 {head}: losers are images of the newest iterate, and there is no second "
            f"agent; set explore.agents=1"
        )
    if algorithm.uncertainty != "off":
        problems.append(
            f"algorithm.uncertainty = {algorithm.uncertainty} {head}: no rewards rank its pairs, so there is "
            f"no spread between them; "
            f"set uncertainty: off"
        )
    if algorithm.filter_by_reward and not any(reward.role == "train" for reward in config.rewards):
        problems.append(
            f"algorithm.filter_by_reward = true {head}: no reward has role: train, so nothing can filter; "
            f"add one"
        )
    total = sum(improver.task_probabilities)
    if abs(total - 1) > 1e-6:
        problems.append(
            f"algorithm.improver.task_probabilities add up to {total:g}: expected 1, e.g. [0.8, 0.1, 0.1]"
        )
    if improver.batch_size % improver.micro_batch_size:
        problems.append(
            f"algorithm.improver.micro_batch_size = {improver.micro_batch_size} does not divide "
            f"algorithm.improver.batch_size = "
            f"{improver.batch_size}"
        )
    return problems


def _guards(config: RunConfig) -> list[str]:
    algorithm = config.algorithm
    if not isinstance(algorithm, DiffusionDpoConfig) or not algorithm.auto_beta:
        return []
    problems = []
    if algorithm.kind == "simpo":
        problems.append(
            "algorithm.auto_beta = true with kind: simpo: its margins do not start at 0, so their size says "
            "nothing of saturation"
        )
    if isinstance(algorithm, ExpoConfig) and algorithm.alpha > 0:
        problems.append(
            f"algorithm.auto_beta = true with algorithm.alpha = {algorithm.alpha:g}: the bonus keeps its "
            f"beta while that of the pairs "
            f"falls, so alpha <= 1 would no longer protect labels; use one of them"
        )
    return problems


def _pair_gradient(config: RunConfig) -> list[str]:
    if config.training.pair_gradient == "joint" or isinstance(config.algorithm, ON_PAIRS):
        return []
    problem = (
        f"training.pair_gradient = two_pass with algorithm.type = {config.algorithm.type}: only a loss on "
        f"pairs has two halves; "
        f"lower training.micro_batch_size to save memory"
    )
    return [problem]
