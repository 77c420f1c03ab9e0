"""Combinations of settings that are wrong together, each refused with its reason; notes on merely odd ones.

A setting that would silently do nothing is refused too: its user expects an effect.
"""

from collections import Counter
from collections.abc import Iterator

from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import Pairs
from diffexpo.config.rewards import RewardCard
from diffexpo.config.schema import ValidationConfig
from diffexpo.errors import ConfigError

AUTOCAST_TYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""What each `training.mixed_precision` casts weights to."""

VALIDATED_APART = {
    "evaluation.prompts": (
        "the iterate that is best on them would be chosen by the images that then evaluate it, so its score "
        "would be too high by that choice; expected prompts of their own"
    ),
    "prompts.source": (
        "on prompts that it trains on a model goes on gaining after it has begun to lose elsewhere; expected "
        "prompts of their own"
    ),
}
"""Why prompts of validation may be no others', by the setting that names those."""


def check_combinations(config: Run) -> None:
    """Refuse settings that contradict each other.

    Args:
        config: A configuration whose single values are already valid.
    Returns:
        None; `check_combinations(RunConfig())` passes.
    Raises:
        ConfigError: every contradiction found, one line each: keys and values, the reason, what to do.
    """
    method = config.algorithm.problems
    rules = (
        _rewards,
        _data,
        _negatives,
        _training,
        _copies,
        _inference,
        _evaluation,
        _validation,
        method,
        _sizes,
    )
    if problems := [problem for rule in rules for problem in rule(config)]:
        raise ConfigError("\n".join(problems))


def train_rewards(config: Run) -> list[RewardCard]:
    """The rewards that rank images."""
    return [reward for reward in config.rewards if reward.role == "train"]


def negatives_are_on(config: Run) -> bool:
    """Whether any prompt can get a negative prompt while collecting."""
    negatives = config.explore.negatives
    return (
        config.algorithm.collects(config)
        and negatives.source is not None
        and negatives.schedule != "off"
        and negatives.initial > 0
    )


def _rewards(config: Run) -> Iterator[str]:
    for label, scorers in config.scorers.items():
        for index, reward in enumerate(scorers):
            where = f"{label}.{index}"
            yield from (f"{where}.{problem}" for problem in reward.problems(config, where))
    names = Counter(reward.name for scorers in config.scorers.values() for reward in scorers)
    for name in sorted(name for name, count in names.items() if count > 1):
        yield f"{names[name]} rewards or judges are named {name!r}: metrics would mix; names are unique"
    trained = {reward.identity: reward.name for reward in train_rewards(config)}
    for index, judge in enumerate(config.evaluation.judges):
        if judge.identity in trained:
            yield (
                f"evaluation.judges.{index} ({judge.name}) is the training reward "
                f"{trained[judge.identity]!r}: a judge that was trained on cannot show over-optimisation; "
                "choose another judge"
            )
    if trained:
        return
    algorithm, without = config.algorithm, "rewards holds no reward with role: train, but"
    if algorithm.draws_first:
        yield f"{without} algorithm.type = {algorithm.type} learns from rewards: add one"
    elif algorithm.collects(config) and algorithm.is_ranked:
        yield (
            f"{without} explore.iterations = {config.explore.iterations} ranks new images: add one, or set "
            "explore.iterations=1 to learn from offline pairs alone"
        )


def _data(config: Run) -> Iterator[str]:
    is_offline, has_pairs = not config.algorithm.collects(config), config.offline.source is not None
    if is_offline and not has_pairs:
        yield (
            "offline.source = null with explore.iterations = 1: there is nothing to learn from; name offline "
            "pairs or use two iterations or more"
        )
    if is_offline and has_pairs and config.hybrid.offline_weight == 0:
        yield (
            "hybrid.offline_weight = 0 with explore.iterations = 1: the only data, the offline pairs, has "
            "weight 0"
        )
    baseline = config.baseline
    if baseline.offline_dpo and not has_pairs and baseline.offline_source is None:
        yield (
            "baseline.offline_dpo = true with offline.source = null: the baseline has no pairs to train on; "
            "name some in baseline.offline_source"
        )
    if not config.prompts.source.strip():
        yield "prompts.source is empty: name a prompt file or emoji:train"
    if config.prompts.source == config.evaluation.prompts:
        yield (
            f"evaluation.prompts = prompts.source = {config.prompts.source!r}: evaluation needs prompts "
            "never trained on"
        )


def _negatives(config: Run) -> Iterator[str]:
    explore = config.explore
    if not negatives_are_on(config):
        return
    if explore.negatives.mode == "cfg" and explore.sampler.guidance <= 1:
        effect = "never evaluated" if explore.sampler.guidance == 1 else "followed instead of avoided"
        yield (
            f"explore.negatives.mode = cfg with explore.sampler.guidance = {explore.sampler.guidance:g}: the "
            f"negative branch is {effect}; set guidance above 1, negatives.mode=append or "
            "negatives.schedule=off"
        )
    if explore.negatives.agents == "exploration" and explore.agents == 1:
        yield (
            "explore.negatives.agents = exploration with explore.agents = 1: there is no separate "
            "exploration agent; use both"
        )


def _training(config: Run) -> Iterator[str]:
    training = config.training
    if training.pair_gradient == "two_pass" and not isinstance(config.algorithm.data, Pairs):
        yield (
            f"training.pair_gradient = two_pass with algorithm.type = {config.algorithm.type}: only a loss "
            "on pairs has two halves; lower training.micro_batch_size to save memory"
        )
    if training.batch_size % training.micro_batch_size:
        sizes = range(1, min(training.batch_size, training.micro_batch_size) + 1)
        near = max(size for size in sizes if training.batch_size % size == 0)
        yield (
            f"training.micro_batch_size = {training.micro_batch_size} does not divide training.batch_size = "
            f"{training.batch_size}; {near} does"
        )


def _copies(config: Run) -> Iterator[str]:
    """Settings of full fine-tuning's frozen copies, and of merged adapters, where there are none."""
    tuning, dtype = config.tuning, config.tuning.reference_dtype
    autocast = config.training.mixed_precision
    if tuning.kind == "lora" and dtype != "float32":
        yield (
            f"tuning.reference_dtype = {dtype} with tuning.kind = lora: the reference is the frozen base "
            "without adapters, or an adapter on it; model.dtype is its precision"
        )
    if tuning.kind == "lora" and tuning.reference_device != "same":
        yield (
            f"tuning.reference_device = {tuning.reference_device} with tuning.kind = lora: there are no "
            "copies of the denoiser that could lie elsewhere; remove it"
        )
    if tuning.kind == "full" and config.explore.merge_lora:
        yield (
            "explore.merge_lora = true with tuning.kind = full: there are no adapters to merge; set it to "
            "false"
        )
    if tuning.kind == "full" and dtype != "float32" and AUTOCAST_TYPES.get(autocast) != dtype:
        needed = next(name for name, cast in AUTOCAST_TYPES.items() if cast == dtype)
        yield (
            f"tuning.reference_dtype = {dtype} with training.mixed_precision = {autocast}: the policy would "
            "run in another precision than its reference, so their errors would differ where their weights "
            f"are equal, and the loss would not start at margin 0; set training.mixed_precision={needed} or "
            "tuning.reference_dtype=float32"
        )


def _inference(config: Run) -> Iterator[str]:
    """A precision of forwards without gradient that training's own settings contradict."""
    training, precision = config.training, config.model.inference_precision
    if precision in ("no", training.mixed_precision):
        return
    shown = f"model.inference_precision = {precision}"
    if training.mixed_precision != "no":
        yield (
            f"{shown} with training.mixed_precision = {training.mixed_precision}: the reference would be "
            f"rounded in one half precision and the policy in another; set both to {precision}"
        )
    if training.pair_gradient == "two_pass":
        yield (
            f"{shown} with training.pair_gradient = two_pass: the slopes of its first pass would be of "
            "another precision than the gradients of its second; set training.pair_gradient=joint, or "
            f"training.mixed_precision={precision}"
        )


def _evaluation(config: Run) -> Iterator[str]:
    if config.evaluation.vendi_prompts > 0 and config.evaluation.vendi_images < 2:
        yield (
            "evaluation.vendi_images = 1: the Vendi score of one image is always 1; use 2 or more, or "
            "vendi_prompts: 0"
        )
    scales, own = config.evaluation.base_guidances, config.evaluation.sampler.guidance
    shown = f"evaluation.base_guidances = {[float(scale) for scale in scales]}"
    if own in scales:
        yield f"{shown} holds evaluation.sampler.guidance, {own:g}: the base is evaluated there anyway"
    if len(set(scales)) < len(scales):
        yield f"{shown} holds a scale twice"


def _validation(config: Run) -> Iterator[str]:
    explore = config.explore
    validation = explore.validation
    if explore.keep == "last":
        for key, is_set in (
            ("patience", explore.patience is not None),
            ("validation", validation != ValidationConfig()),
        ):
            if is_set:
                yield (
                    f"explore.{key} is set with explore.keep = last: no iterate is validated, so it would do "
                    "nothing; set explore.keep=best"
                )
        return
    if validation.prompts is None or not validation.judges:
        missing = "prompts" if validation.prompts is None else "judges"
        yield (
            f"explore.keep = best without explore.validation.{missing}: iterates are compared by a judge on "
            "prompts of their own; name both"
        )
    for key, prompts in (("evaluation.prompts", config.evaluation.prompts), *_trained_prompts(config)):
        if validation.prompts == prompts:
            yield f"explore.validation.prompts = {key} = {prompts!r}: {VALIDATED_APART[key]}"


def _trained_prompts(config: Run) -> Iterator[tuple[str, str]]:
    if not config.algorithm.prompts_of_data:
        yield "prompts.source", config.prompts.source


def _sizes(config: Run) -> Iterator[str]:
    """Fewer images of a prompt than the method compares, sizes that no image would have, choices between one
    size, and what needs images of one size."""
    algorithm, images = config.algorithm, config.algorithm.images_of_prompt(config)
    if algorithm.collects(config) and images < algorithm.group_size:
        drawers = 1 if algorithm.draws_first else 2
        yield (
            f"explore.images_per_prompt = {config.explore.images_per_prompt} gives {images} images of a "
            f"prompt, but algorithm.type = {algorithm.type} compares {algorithm.group_size} or more; set "
            f"explore.images_per_prompt={-(-algorithm.group_size // drawers)} or more"
        )
    aspect, buckets = config.explore.aspect, config.model.buckets
    head, has_pairs = f"explore.aspect = {aspect}", config.offline.source is not None
    if aspect != "first" and not buckets:
        yield f"{head} with model.buckets = []: there is one size only; name others in model.buckets"
    if aspect != "first" and not algorithm.collects(config):
        yield f"{head} with explore.iterations = 1: no image is drawn for training; set it to first"
    if aspect == "offline" and not has_pairs:
        yield (
            f"{head} with offline.source = null: there are no offline winners whose sizes it could follow; "
            "use uniform"
        )
    if aspect == "first" and buckets and not has_pairs:
        yield (
            "model.buckets with offline.source = null and explore.aspect = first: no image would have "
            "another size than the first; set explore.aspect=uniform, or leave model.buckets empty"
        )
    reason = algorithm.one_size_reason()
    if buckets and reason is not None:
        yield f"model.buckets with algorithm.type = {algorithm.type}: {reason} leave model.buckets empty"


def config_notes(config: Run) -> list[str]:
    """What is allowed but worth knowing before spending time, one sentence each."""
    training, explore = config.training, config.explore
    notes, is_rollout = [*config.algorithm.notes(config)], config.algorithm.draws_first
    if explore.iterations > 1 and config.offline.source is None and not is_rollout:
        who = " as both agents" if explore.agents == 2 else ""
        model = "the base model" if config.tuning.start is None else "the model of tuning.start"
        notes.append(f"iteration 1 has no offline pairs to train on: it explores with {model}{who}")
    is_same = config.baseline.offline_source in (None, config.offline.source)
    if config.baseline.offline_dpo and is_same and explore.iterations == 1:
        notes.append(
            "baseline.offline_dpo with explore.iterations = 1 trains on the same pairs as the run itself"
        )
    is_constant = explore.iterations == 2 and explore.negatives.schedule == "linear" and not is_rollout
    if is_constant and negatives_are_on(config):
        notes.append(
            "explore.negatives.schedule = linear with 2 iterations: one round is collected, so tau is its "
            "initial value"
        )
    for where, sampler in (("explore", explore.sampler), ("evaluation", config.evaluation.sampler)):
        if sampler.eta > 0 and sampler.name != "ddim":
            notes.append(f"{where}.sampler.eta = {sampler.eta:g} is not used by the sampler {sampler.name}")
    if not config.evaluation.judges:
        notes.append(
            "evaluation.judges is empty: the report has no win rate under a judge that was never trained on"
        )
    on_pairs = isinstance(config.algorithm.data, Pairs)
    if config.tuning.kind == "full" and on_pairs and training.learning_rate >= 1e-4:
        notes.append(
            f"training.learning_rate = {training.learning_rate:g} with full tuning: preference losses "
            "collapsed at 1e-4 in our trials (both errors rise, accuracy near 1); 5e-6 held, with an "
            "anchor 8e-5"
        )
    if config.evaluation.bootstrap < 200:
        notes.append(
            f"evaluation.bootstrap = {config.evaluation.bootstrap}: the ends of intervals from so few "
            "resamples mean nothing; 1000 are enough"
        )
    if config.evaluation.grid_prompts > config.evaluation.num_prompts:
        notes.append("evaluation.grid_prompts exceeds num_prompts: the grid shows all evaluated prompts")
    return [*notes, *guidance_notes(config)]


def guidance_notes(config: Run, start: float = 1.0) -> list[str]:
    """Where drawing, loss and evaluation do not go together in guidance, one sentence each.

    Args:
        config: Its card says what guidance the loss teaches, and who draws what it learns from.
        start: Guidance that the model of `tuning.start` has learned; 1: none.
    Returns:
        Nothing for the three consistent choices of docs/guidance.md.
    """
    return [f"{note}; see docs/guidance.md" for note in _guidance(config, start)]


def _guidance(config: Run, start: float) -> Iterator[str]:
    card, taught = config.algorithm, config.algorithm.learned_guidance
    draw, evaluate = config.explore.sampler.guidance, config.evaluation.sampler.guidance
    draws, by_base = card.collects(config), card.drawn_by == "base"
    learned, teacher = (taught, "the loss") if taught > 1 else (start, "the run of tuning.start")
    used = {"explore": draw} if draws and not by_base else {}
    for where, guidance in (used | {"evaluation": evaluate}).items():
        if learned > 1 and guidance > 1:
            yield (
                f"{where}.sampler.guidance = {guidance:g}: {teacher} has taught the model to draw without "
                f"guidance as at {learned:g}, so it is guided twice; 1 is usual"
            )
    if learned == 1 and used and draw != evaluate:
        yield (
            f"explore.sampler.guidance = {draw:g}, evaluation.sampler.guidance = {evaluate:g}: the model "
            "learns from images of another guidance than it is evaluated at; set both alike"
        )
    if draws and by_base and draw != taught:
        yield (
            f"explore.sampler.guidance = {draw:g}: the base draws at another guidance than the loss teaches, "
            f"{taught:g}, so the model is trained on other images than it will draw; set both alike"
        )
    if taught == 1 and start > 1 and card.anchor_version is not None:
        yield (
            f"tuning.start has learned to draw without guidance as at {start:g}, and the loss pulls it back "
            f"to the base without any; set algorithm.anchor_guidance={start:g}"
        )
