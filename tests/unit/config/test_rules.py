"""Every contradiction is refused with its reason; what is merely odd is noted."""

import math

import pytest

from diffexpo.config import RunConfig, check_combinations, config_notes, list_recipes, load_config
from diffexpo.config.families import find_checkpoint
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.rules import guidance_notes
from diffexpo.errors import ConfigError

JUDGE = "evaluation.judges=[{name: j, type: clip, path: emoji:judge_heldout}]"
STEPS = ("algorithm.reference=ema", "algorithm.reference_follows=step")
HALF = ("tuning.reference_dtype=bfloat16", "training.mixed_precision=bf16")
FAST = "model.inference_precision=bf16"
VALIDATES = "explore.validation.judges=[{name: v, type: clip, path: emoji:judge_train}]"
BEST = ("explore.keep=best", VALIDATES, "explore.validation.prompts=a.txt")
TWO_REWARDS = "rewards=[{name: a, type: clip, path: x}, {name: b, type: jpeg_compressibility}]"


def load(*overrides):
    return load_config([], overrides, {}).config


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algorithm.alpha=0.1", "explore.agents=1"], "same weights"),
        (["algorithm.alpha=0.1", "algorithm.kind=simpo"], "reference"),
        (["algorithm.alpha=0.1", "algorithm.type=diffusion_dpo"], "belongs to expo"),
        (["algorithm.alpha=0.1", "explore.iterations=1"], "never acts"),
        (["algorithm.alpha=0.1", "algorithm.contrast_fraction=0"], "no contrast pairs"),
        (["algorithm.uncertainty=optimism"], "spread between scorers"),
        (["algorithm.uncertainty=pessimism"], "1 train reward:"),
        (["algorithm.uncertainty=optimism", TWO_REWARDS, "rewards.1.role=watch"], "1 train reward:"),
        (["algorithm.uncertainty=optimism", TWO_REWARDS, "algorithm.kind=simpo"], "simpo has none"),
        (["algorithm.uncertainty=optimism", TWO_REWARDS, "algorithm.uncertainty_scale=0"], "always 0"),
        (["algorithm.timestep_range=[0.5, 0.5]"], "holds no time"),
        (["algorithm.timestep_range=[0.5, 0.2]", "algorithm.type=diffusion_dpo"], "holds no time"),
        (["algorithm.label_smoothing=0.1"], "only cdpo and robust"),
        (["algorithm.simpo_gamma=0.1"], "only simpo"),
        (["algorithm.anchor_guidance=2"], "nothing is held to it"),
        (["algorithm.anchor_guidance=0.5", "algorithm.anchor_weight=0.1"], "expected a number >= 1"),
        (["algorithm.proximal_weight=0.1", "algorithm.kind=simpo"], "no reference to be held to"),
        (["algorithm.proximal_weight=-1"], "expected .* >= 0"),
        (["algorithm.draws=0"], "expected .* >= 1"),
        (["algorithm.anchor_draws=2"], "no more draws to be held at"),
        (["algorithm.type=guidance_distillation"], "drawn by the base, and there is no second agent"),
        (
            ["algorithm.type=guidance_distillation", "explore.agents=1", "pairing.min_margin=0.1"],
            "makes no pairs of images",
        ),
        (["algorithm.type=guidance_distillation", "algorithm.guidance=1"], "expected a number > 1"),
        (["algorithm.reference_decay=0.9"], "reference = base: only ema averages"),
        (["algorithm.reference=previous", "algorithm.reference_decay=0.0"], "only ema averages"),
        (["algorithm.reference_follows=step"], "reference = base: only ema is an average"),
        ([*STEPS, "algorithm.reference_decay=0"], "every margin 0"),
        ([*STEPS, *HALF], "would swallow the share of a step"),
        (["algorithm.reference_budget=0.01"], "reference = base: only the reference that becomes an iterate"),
        (["algorithm.reference=previous", "algorithm.reference_budget=0"], "expected a number > 0"),
        ([FAST, "training.pair_gradient=two_pass"], "slopes of its first pass"),
        (["model.inference_precision=fp16", "training.mixed_precision=bf16"], "one half precision"),
        ([FAST, "algorithm.type=ddpo", "explore.agents=1", "offline.source=null"], "replayed in another"),
        (["explore.patience=2"], "explore.patience is set with explore.keep = last"),
        (["explore.validation.num_prompts=3"], "explore.validation is set with explore.keep = last"),
        (["explore.keep=best", VALIDATES], "without explore.validation.prompts"),
        (["explore.keep=best", "explore.validation.prompts=a.txt"], "without explore.validation.judges"),
        ([*BEST, "explore.validation.prompts=emoji:heldout"], "chosen by the images that then evaluate it"),
        ([*BEST, "explore.validation.prompts=emoji:train"], "goes on gaining after it has begun to lose"),
        ([*BEST, "explore.validation.judges.0.name=judge_train"], "unique"),
        ([*BEST, "explore.validation.judges.0.path=null"], "validation.judges.0.path is empty"),
        (["explore.sampler.guidance=1"], "never evaluated"),
        (["explore.sampler.guidance=0.5"], "followed instead of avoided"),
        (["explore.negatives.agents=exploration", "explore.agents=1"], "no separate exploration agent"),
        (["offline.source=null", "explore.iterations=1"], "nothing to learn from"),
        (["hybrid.offline_weight=0", "explore.iterations=1"], "weight 0"),
        (["offline.source=null", "baseline.offline_dpo=true"], "no pairs to train on"),
        (["prompts.source=''"], "prompts.source is empty"),
        (["evaluation.prompts=emoji:train"], "never trained on"),
        (["rewards=[]"], "no reward with role: train"),
        (["rewards.0.role=watch"], "no reward with role: train"),
        (["rewards.0.weight=0"], "ranks nothing"),
        (["rewards.0.path=null"], "path is empty"),
        (["rewards=[{name: a, type: python, path: scorer.py}]"], "file.py:function"),
        (["rewards=[{name: a, type: jpeg_compressibility, path: x}]"], "reads no file"),
        ([TWO_REWARDS, "rewards.1.name=a"], "unique"),
        ([JUDGE, "evaluation.judges.0.name=judge_train"], "unique"),
        ([JUDGE, "evaluation.judges.0.path=emoji:judge_train"], "over-optimisation"),
        (["training.batch_size=32", "training.micro_batch_size=12"], "8 does"),
        (["evaluation.vendi_images=1"], "always 1"),
        (["evaluation.base_guidances=[2.5, 7.5]"], "evaluated there anyway"),
        (["evaluation.base_guidances=[2.5, 2.5]"], "a scale twice"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        load(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["explore.sampler.guidance=1", "explore.negatives.schedule=off"],
        ["explore.sampler.guidance=1", "explore.negatives.mode=append"],
        ["explore.sampler.guidance=1", "explore.negatives.source=null"],
        ["explore.iterations=1", "rewards=[]"],
        ["offline.source=null", "baseline={offline_dpo: true, offline_source: emoji:offline}"],
        ["explore.agents=1", "explore.images_per_prompt=1"],
        ["algorithm.uncertainty=optimism", TWO_REWARDS],
        ["algorithm.alpha=0.1"],
        ["algorithm.timestep_range=[0.0, 0.2]"],
        ["algorithm.reference=ema", "algorithm.reference_decay=0.9"],
        ["algorithm.label_smoothing=0.1", "algorithm.kind=cdpo"],
        ["offline.source=null"],
        ["algorithm.type=guidance_distillation", "explore.agents=1", "offline.source=null", "rewards=[]"],
        ["algorithm.type=guidance_distillation", "explore.iterations=1", "rewards=[]"],
        [JUDGE, "rewards.0.role=watch", "explore.iterations=1"],
    ],
)
def test_what_makes_sense_passes(overrides):
    check_combinations(load(*overrides))


def test_all_contradictions_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load("algorithm.alpha=0.1", "explore.agents=1", "evaluation.vendi_images=1")
    assert len(str(caught.value).splitlines()) == 2


def test_literal_beta_is_beta_over_a_thousand():
    assert load("algorithm.beta_explore=literal").algorithm.bonus_beta == 5.0
    assert load("algorithm.beta_explore=matched").algorithm.bonus_beta == 5000.0
    assert load("algorithm.beta_explore=12").algorithm.bonus_beta == 12.0


def notes(*overrides):
    return "\n".join(config_notes(load(JUDGE, *overrides)))


def test_notes_speak_of_what_is_odd_and_are_silent_otherwise():
    assert notes() == ""
    assert notes("algorithm.alpha=1") == ""
    assert "nearly inert" in notes("algorithm.alpha=1", "algorithm.beta_explore=literal")
    assert "same loss as sigmoid" in notes("algorithm.kind=robust")
    assert notes("algorithm.reference=ema") == ""
    for decay, what in ((0, "the previous iterate"), (1, "where training starts, and never moves")):
        assert what in notes("algorithm.reference=ema", f"algorithm.reference_decay={decay}")
    assert "reference = ema is not used" in notes("algorithm.reference=ema", "algorithm.kind=simpo")
    assert "iteration 1 has no offline pairs" in notes("offline.source=null")
    assert "no win rate" in "\n".join(config_notes(RunConfig()))
    assert "collapsed" in notes("training.learning_rate=1e-4")
    assert "collapsed" not in notes("training.learning_rate=8e-5")


ANCHOR = ["algorithm.anchor_weight=0.01", "algorithm.anchor_guidance=2.5"]
DISTIL = ["algorithm.type=guidance_distillation", "algorithm.guidance=2.5", "explore.agents=1"]


def guided(draw: float, evaluate: float) -> list[str]:
    scales = [f"explore.sampler.guidance={draw}", f"evaluation.sampler.guidance={evaluate}"]
    return [*scales, "explore.negatives.schedule=off"]


@pytest.mark.parametrize(
    "settings",
    [
        guided(2.5, 2.5),
        guided(1, 1),
        [*guided(1, 1), *ANCHOR],
        [*guided(1, 1), "algorithm.anchor_weight=0.01"],
        [*guided(2.5, 1), *DISTIL],
        # Nothing is drawn for training, so its guidance says nothing.
        [*guided(7.5, 1), "explore.iterations=1"],
        [*guided(1, 7.5), "explore.iterations=1"],
        [*guided(7.5, 1), "explore.iterations=1", *ANCHOR],
        [*guided(7.5, 1), "explore.iterations=1", *DISTIL],
    ],
)
def test_consistent_guidance_is_not_warned_of(settings):
    assert guidance_notes(load(*settings)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (guided(1, 2.5), ["learns from images of another guidance than it is evaluated at"]),
        (guided(7.5, 1), ["explore.sampler.guidance = 7.5, evaluation.sampler.guidance = 1"]),
        ([*guided(1, 2.5), *ANCHOR], ["evaluation.sampler.guidance = 2.5: the loss has taught"]),
        ([*guided(2.5, 1), *ANCHOR], ["explore.sampler.guidance = 2.5: the loss has taught"]),
        ([*guided(4, 4), *ANCHOR], ["explore.sampler.guidance = 4", "evaluation.sampler.guidance = 4"]),
        ([*guided(2.5, 2.5), *DISTIL], ["evaluation.sampler.guidance = 2.5: the loss has taught"]),
        ([*guided(4, 1), *DISTIL], ["the base draws at another guidance than the loss teaches, 2.5"]),
        ([*guided(1, 4), "explore.iterations=1", *DISTIL], ["guided twice"]),
    ],
)
def test_inconsistent_guidance_is_warned_of(settings, words):
    found = guidance_notes(load(JUDGE, *settings))
    assert len(found) == len(words) and all(word in note for word, note in zip(words, found, strict=True))
    assert all(note.endswith("; see docs/guidance.md") for note in found)
    assert set(found) <= set(config_notes(load(JUDGE, *settings)))


def test_what_a_start_has_learned_counts_as_if_the_loss_had_taught_it():
    plain, held = load(*guided(1, 1)), load(*guided(1, 1), *ANCHOR)
    assert guidance_notes(plain, 2.5) == guidance_notes(held, 2.5) == []
    twice = guidance_notes(load(*guided(2.5, 2.5)), 2.5)
    assert len(twice) == 2 and all("the run of tuning.start has taught" in note for note in twice)
    (back,) = guidance_notes(load(*guided(1, 1), "algorithm.anchor_weight=0.01"), 2.5)
    assert "pulls it back to the base" in back and "anchor_guidance=2.5" in back


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_no_recipe_is_warned_of_its_guidance(recipe):
    assert guidance_notes(load_config([recipe], [], {}).config) == []


def test_the_note_on_a_strong_bonus_gives_the_margin_at_which_it_stalls():
    # Descent on -log sigma(h) + alpha sigma(h) has its zero at sigma(h) = 1 / alpha.
    stall = -math.log(3.0 - 1.0)
    assert 1 / (1 + math.exp(-stall)) == pytest.approx(1 / 3)
    assert f"h = {stall:+.3g}" in notes("algorithm.alpha=3")


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_every_recipe_loads_and_its_samplers_fit(recipe):
    config = load_config([recipe], [], {}).config
    known = find_checkpoint(config.model.path)
    family = "" if known is None else known[0].name
    is_flow = config.model.path in ("emoji:flow", "scenes:flow") or family in ("sd3", "flux")
    used = [
        config.evaluation.sampler,
        *([config.explore.sampler] if config.algorithm.collects(config) else []),
    ]
    assert {sampler.name.startswith("flow") for sampler in used} == {is_flow}
    assert config.evaluation.judges


class ComparesEight(DiffusionDpoConfig):
    group_size = 8


def check_eight(*overrides: str) -> None:
    config: RunConfig = load_config([], overrides, {}).config
    check_combinations(config.model_copy(update={"algorithm": ComparesEight()}))


def test_too_few_images_of_a_prompt_are_refused_with_the_number_that_does() -> None:
    check_eight("explore.images_per_prompt=4")
    with pytest.raises(ConfigError, match=r"= 3 gives 6 images.* compares 8 or more.*images_per_prompt=4"):
        check_eight("explore.images_per_prompt=3")
    # Nothing is collected in a single iteration: the offline pairs are what they are.
    check_eight("explore.images_per_prompt=3", "explore.iterations=1")


def test_a_method_on_margins_says_what_its_beta_comes_to_at_stable_diffusion():
    said = load("algorithm.beta=156.25").algorithm.describe_pull(512)
    assert (
        said is not None and "156.25 multiplies means over 512 latent elements: it pulls like 5000 at" in said
    )
    assert "like 5000 at" in str(load("algorithm.beta=5000").algorithm.describe_pull(4 * 64 * 64))
    assert load("algorithm.type=sft").algorithm.describe_pull(512) is None


def test_no_pictures_kl_and_diversity_may_be_asked_for() -> None:
    names = ("grid_prompts", "kl_prompts", "vendi_prompts")
    config = load_config(["emoji/quick"], [f"evaluation.{name}=0" for name in names], {}).config
    assert [getattr(config.evaluation, name) for name in names] == [0, 0, 0]
