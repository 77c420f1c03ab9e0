"""The settings of each training method, one class a method; `algorithm.type` chooses among those in
`METHODS`.

Methods share a setting by sharing the base class that declares it first. Such a setting means the same in all
of them and survives when a later layer changes `algorithm.type`; two settings of the same name that are
declared apart (the `beta` of Diffusion-KTO and that of MaPO) do not. Defaults are those of the papers or of
their authors' code; the docstring says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import get_annotations
from typing import Annotated, Literal, TypeVar, Union

from pydantic import BeforeValidator, Field

from diffexpo.config.section import Count, Fraction, NotNegative, Positive, Section

Chosen = TypeVar("Chosen", bound="MethodConfig")


# ---- shared ------------------------------------------------------------------------------------------------


class MethodConfig(Section):
    """Any method."""

    type: str
    """The training method."""


class ForwardConfig(MethodConfig):
    """Methods that noise a clean image to one random time and look at the prediction error there."""

    empty_prompt_fraction: Fraction = 0.2
    """Share of rows trained with the empty prompt, policy and reference alike (Diffusion-DPO: 0.2)."""
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Training times: t drawn as usual is mapped to low + (high - low) t, so that losses look at a part of
    the path only (Diffusion-DPO's refiner setting, t below 200 of 1000, is [0, 0.2]). The default is the
    whole path."""


class ReferencedConfig(MethodConfig):
    """Methods that measure the policy against a reference."""

    reference: Literal["base", "previous"] = "base"
    """What errors are measured against: the base model throughout, or the previous iterate."""


class MarginConfig(ForwardConfig, ReferencedConfig):
    """Methods on the margin h = -beta/2 [(e_w - e_w_ref) - (e_l - e_l_ref)] of a pair."""

    beta: Positive = 5000.0
    """Pull towards the reference. Multiplies a *mean* squared error (by beta/2), so the pull grows with the
    number of latent
    elements: 5000 at 16,384 elements (SD 1.5) pulls like 156 at 512."""


class AdvantageConfig(MethodConfig):
    """Methods that weigh an image by its advantage, the reward compared with the other images of its
    prompt."""

    global_std: bool = True
    """Advantages are divided by the std of all rewards of a collection (true) or of the prompt's own images
    (false). Flow-GRPO: true."""
    advantage_clip: Positive = 5.0
    """Advantages are clipped to plus or minus this (DDPO, Flow-GRPO, DiffusionNFT: 5)."""


class TrajectoryConfig(MethodConfig):
    """Methods that learn from the transitions of the sampled trajectory."""

    timestep_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of a trajectory's transitions that is trained, the same number of every trajectory (DDPO:
    all)."""


class ClippedRatioConfig(TrajectoryConfig):
    """Policy gradients on exp(log-prob - old log-prob), with log-probs averaged per latent element."""

    clip_range: Positive = 1e-4
    """The ratio is clipped to 1 plus or minus this. Log-probs are means per latent element: 1e-4 is a change
    of 1.6 of the true log-ratio at 16,384 elements (DDPO, DPOK, Flow-GRPO: 1e-4)."""


# ---- methods on pairs --------------------------------------------------------------------------------------


class DiffusionDpoConfig(MarginConfig):
    """Diffusion-DPO and its variants (arXiv 2311.12908)."""

    type: Literal["diffusion_dpo"] = "diffusion_dpo"
    """The training method."""
    kind: Literal["sigmoid", "hinge", "ipo", "cdpo", "robust", "simpo"] = "sigmoid"
    """Loss on the pair's logit."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels, for `cdpo` and `robust`."""
    simpo_gamma: NotNegative = 0.0
    """Target margin of `simpo` (reference-free)."""
    sft_weight: NotNegative = 0.0
    """Adds this times the winner's error: an anchor against both errors rising."""
    uncertainty: Literal["off", "optimism", "pessimism"] = "off"
    """Offset Gamma_w - Gamma_l in the logit: `optimism` fits r + Gamma, `pessimism` (the printed sign of eq.
    5) r - Gamma."""
    uncertainty_scale: NotNegative = 1.0
    """Gamma = scale x population std of the per-prompt z-scored rewards across scorers (needs two or more
    rewards)."""
    safeguard: bool = False
    """Scale each loser's gradient down where a step would raise the winner's error (Diffusion-SDPO, arXiv
    2511.03317)."""
    safeguard_mu: Fraction = 0.9
    """Share of the winner's own descent that must remain under `safeguard` (the authors: 0.9 for SD 1.5, 0.6
    for SDXL)."""
    auto_beta: bool = False
    """At every step, take the beta at which a pair of the batch's mean margin has the gradient factor
    `auto_beta_target`; `beta` is then the largest. Costs a pass without gradient."""
    auto_beta_target: float = Field(default=0.2, gt=0.0, lt=0.5)
    """Gradient factor sigmoid(-h) that `auto_beta` aims at (SimpleTuner: 0.2)."""


class ExpoConfig(DiffusionDpoConfig):
    """EXPO: Diffusion-DPO with a bonus for exploring. With alpha 0 it is Diffusion-DPO bit for bit."""

    type: Literal["expo"] = "expo"
    """The training method."""
    alpha: NotNegative = 0.0
    """Exploration bonus (EXPO eq. 3). Up to 1 (matched beta) no labelled preference is reversed. The papers
    state no value."""
    beta_explore: Literal["matched", "literal"] | Positive = "matched"
    """beta inside the bonus: the same as `beta`, the papers' literal beta without T (beta / 1000), or a
    number."""
    contrast_fraction: Fraction = 0.25
    """Contrast pairs per preference pair in a batch when alpha > 0."""


class SpinConfig(MarginConfig):
    """SPIN-Diffusion (arXiv 2402.10210): data images against the previous iterate's own."""

    type: Literal["spin"] = "spin"
    """The training method."""
    beta: Positive = 2000.0
    """As in Diffusion-DPO, with beta/2 on mean errors (model card: 2000, then 5000 in later iterations;
    whether its code has the factor 1/2 is not known)."""
    reference: Literal["base", "previous"] = "previous"
    """What errors are measured against: the previous iterate, whose images are the losers (the paper), or the
    base model."""


class ImproverConfig(Section):
    """The improvement model: what it is trained on, and how it draws winners."""

    path: str | None = None
    """Folder of a trained improvement model to use; null trains one on the offline pairs before the first
    iteration."""
    steps: Count = 200_000
    """Optimiser steps of its training (the paper: up to 200,000)."""
    batch_size: Count = 2048
    """Pairs per step (the paper: 2048)."""
    micro_batch_size: Count = 8
    """Pairs per forward."""
    learning_rate: Positive = 1e-4
    """AdamW learning rate (the paper: 1e-4). Other settings of the optimiser are those of `training`."""
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Moving average of its weights, which then are the model; 0 is off (the paper names none)."""
    checkpoint_every: Count = 1000
    """Optimiser steps between checkpoints of its training."""
    task_probabilities: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)
    """Shares of the tasks: improve (text and loser to winner), reconstruct (an image to itself),
    unconditional. The paper trains on "a mixture" without numbers."""
    text_scale: NotNegative = 3.5
    """s_T of double guidance when it draws winners: how far towards the prompt (the paper: 3.5)."""
    image_scale: NotNegative = 3.0
    """s_I: how close to the loser (the paper: 3.0)."""
    sampler_steps: int | None = Field(default=None, ge=1)
    """Steps when it draws winners; null takes those of `explore.sampler`, whose other settings hold but for
    guidance."""


class ImprovementDpoConfig(DiffusionDpoConfig):
    """Iterative DPO with an improvement model: losers are the model's own images, winners what the
    improvement model makes of them."""

    type: Literal["improvement_dpo"] = "improvement_dpo"
    """The training method."""
    beta: Positive = 2000.0
    """As in Diffusion-DPO, with beta/2 on mean errors (the paper: 2000, T merged)."""
    improver: ImproverConfig = ImproverConfig()
    """The improvement model."""
    filter_by_reward: bool = False
    """Keep a pair only if the train rewards too score the improved image above its loser (an ablation; the
    paper has no rewards)."""


class MapoConfig(ForwardConfig):
    """MaPO (arXiv 2406.06424): reference-free margin on amplified errors."""

    type: Literal["mapo"] = "mapo"
    """The training method."""
    beta: Positive = 0.1
    """Weight of the margin term beside the winner's error (the authors: 0.1). Not the beta of
    Diffusion-DPO."""
    shift: Positive = 0.5
    """s in phi(e) = s e / (exp(s e) - 1) (the authors: 0.5)."""
    num_train_timesteps: Count = 1000
    """T, which multiplies the difference of the two phi (the authors: 1000)."""


# ---- methods on scored images ------------------------------------------------------------------------------


class SftConfig(ForwardConfig):
    """Supervised fine-tuning on chosen images: winners of D_off, and the best of each prompt (RAFT, best of
    n)."""

    type: Literal["sft"] = "sft"
    """The training method."""
    keep: Literal["best", "desirable", "all"] = "best"
    """Images learned from: the best of each prompt (RAFT), all above their prompt's mean, or all. Others
    never enter a batch, so that the mean is over what was kept."""


class DiffusionKtoConfig(ForwardConfig, ReferencedConfig):
    """Diffusion-KTO (arXiv 2404.04465): images that are desirable or not, no pairs."""

    type: Literal["diffusion_kto"] = "diffusion_kto"
    """The training method."""
    beta: Positive = 1000.0
    """Multiplies error_ref - error without the factor 1/2: 1000 acts like 2000 of Diffusion-DPO (the authors'
    code: 1000; the
    paper: 5000)."""
    utility: Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"] = (
        "sigmoid"
    )
    """Shape of human utility (section 4 of the paper; its best is `sigmoid`)."""
    baseline: Literal["mean", "class_mean"] = "mean"
    """Estimate of the KL that utilities are measured from: mean of error_ref - error clamped at 0, or the
    average of the means of both classes, not clamped."""
    desirable_weight: NotNegative = 1.0
    """Weight of desirable images."""
    undesirable_weight: NotNegative = 1.0
    """Weight of undesirable images."""
    desirable_fraction: float = Field(default=0.8, gt=0.0, lt=1.0)
    """Share of desirable images in the draw (the authors' positive ratio: 0.8)."""


class RwrConfig(ForwardConfig):
    """Reward-weighted regression, the baseline of the DDPO paper (arXiv 2305.13301)."""

    type: Literal["rwr"] = "rwr"
    """The training method."""
    kind: Literal["exponential", "sparse"] = "exponential"
    """Weights B softmax(rewards / temperature), or equal weights above a percentile and 0 below."""
    scope: Literal["prompt", "global"] = "prompt"
    """Which rewards an image's is compared with: those of its prompt in its collection, or those of its whole
    collection (then prompts whose images always score high are learned most)."""
    temperature: Positive = 5.0
    """Divides the reward (the authors' "temperature" 1/5 for JPEG kilobytes multiplies it). In units of the
    reward: set it to a fraction of the reward's spread within a prompt."""
    percentile: float = Field(default=90.0, ge=0.0, lt=100.0)
    """Smallest percentile of the kept images, for `sparse` (the authors: 90 or 95)."""


class DiffusionNftConfig(ForwardConfig, ReferencedConfig, AdvantageConfig):
    """DiffusionNFT (arXiv 2509.16117): the forward process, an optimality in [0, 1] for each image, and an
    old policy."""

    type: Literal["diffusion_nft"] = "diffusion_nft"
    """The training method."""
    beta: Positive = 1.0
    """Distance of the two implicit policies from the old one (the authors: 1.0; 0.1 for text rendering and
    several rewards). Not the beta of Diffusion-DPO."""
    kl_weight: NotNegative = 1e-4
    """Weight of the squared distance to the reference's prediction (the authors' `train.beta`: 1e-4)."""
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    """Which advantages become optimalities."""
    old_decay: Literal["iteration", 0, 1, 2] = "iteration"
    """How the old policy follows: `iteration` holds what drew the images for the whole iteration; after each
    optimiser step, 0 follows at once, 1 with decay min(0.001 step, 0.5), 2 at once for 75 steps, then
    min(0.0075 (step - 75), 0.999). The authors use 0, 1 and 2 with one or two steps an iteration; with many
    steps an old policy that follows holds nothing back."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows trained with the empty prompt (the method is free of guidance: 0)."""


class AwmConfig(ForwardConfig, ReferencedConfig, AdvantageConfig):
    """AWM, advantage-weighted matching (arXiv 2509.25050): a clipped ratio on exp(-weighted error)."""

    type: Literal["awm"] = "awm"
    """The training method."""
    clip_range: Positive = 1e-4
    """The ratio is clipped to 1 plus or minus this (the range of Flow-GRPO; the sources leave it open)."""
    weighting: Literal["uniform", "t", "t_squared", "huber", "ghuber"] = "uniform"
    """Weight of the error at time t inside the log-probability."""
    power: float = Field(default=0.25, gt=0.0, le=1.0)
    """Exponent of the generalised Huber weighting `ghuber`."""
    kl_weight: NotNegative = 0.0
    """Weight of the squared distance to the reference's prediction."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows trained with the empty prompt (0: prompts are trained as they were sampled)."""


class DgpoConfig(ForwardConfig, ReferencedConfig, AdvantageConfig):
    """DGPO (arXiv 2510.08425): errors of a whole group, weighted by advantage, within one sigmoid."""

    type: Literal["dgpo"] = "dgpo"
    """The training method."""
    beta: Positive = 100.0
    """Multiplies the group's mean of advantage times error difference: two images of advantage 1 and -1 are
    Diffusion-DPO at this very beta (flow DPO: 100)."""
    clip_range: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Images whose ratio to the policy at the iteration's start is beyond 1 plus or minus this get no
    gradient; null is off."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows trained with the empty prompt (0: prompts are trained as they were sampled)."""


# ---- methods on trajectories -------------------------------------------------------------------------------


class DdpoConfig(ClippedRatioConfig):
    """DDPO (arXiv 2305.13301)."""

    type: Literal["ddpo"] = "ddpo"
    """The training method."""
    estimator: Literal["importance_sampling", "score_function"] = "importance_sampling"
    """Clipped importance sampling (several updates from one collection), or the score function (one
    update)."""
    advantage_clip: Positive = 5.0
    """Advantages are clipped to plus or minus this (the authors: 5)."""
    buffer_size: Count = 16
    """Rewards remembered for each prompt (the authors: 16 for compression, 32 for aesthetics)."""
    min_count: Count = 16
    """A prompt with fewer remembered rewards is compared with the whole batch (the authors: 16)."""


class DpokConfig(ClippedRatioConfig, ReferencedConfig):
    """DPOK (arXiv 2305.16381)."""

    type: Literal["dpok"] = "dpok"
    """The training method."""
    reward_weight: Positive = 100.0
    """Multiplies the policy term (the authors: 100)."""
    kl_weight: NotNegative = 0.01
    """Multiplies the KL term (the authors: 0.01)."""
    kl: Literal["eps_mse", "gaussian"] = "eps_mse"
    """Squared difference of the guided noise predictions (the authors' code), or the exact Gaussian KL of a
    transition (the paper)."""
    has_value_baseline: bool = True
    """Subtract a learned value of (x_t, prompt, t) from the reward (the authors' `v_flag`: 1)."""
    value_learning_rate: Positive = 1e-4
    """Learning rate of the value network (the authors: 1e-4)."""
    value_steps: Count = 5
    """Updates of the value network for each collection (the authors: 5)."""
    value_batch_size: Count = 256
    """Transitions in each of them (the authors: 256)."""


class D3poConfig(TrajectoryConfig, ReferencedConfig):
    """D3PO (arXiv 2311.13231): one preference between two trajectories, applied to each transition."""

    type: Literal["d3po"] = "d3po"
    """The training method."""
    beta: Positive = 0.1
    """Multiplies the difference of mean log-ratios (the authors: 0.1; nearly linear there, so the learning
    rate sets the step)."""
    clip_range: Positive = 0.1
    """Ratios are clamped to 1 plus or minus this (the authors: 0.1)."""


class SpoConfig(TrajectoryConfig, ReferencedConfig):
    """SPO (arXiv 2406.04314): preferences between candidates of one transition."""

    type: Literal["spo"] = "spo"
    """The training method."""
    beta: Positive = 10.0
    """Multiplies the difference of mean log-ratios (the authors: 10)."""
    clip_range: Positive = 0.1
    """Ratios are clamped to 1 plus or minus this (the authors: 0.1)."""
    num_candidates: int = Field(default=4, ge=2)
    """Candidates drawn from the same x_t (the authors: 4 for SD 1.5, 2 for SDXL)."""
    first_transition: int = Field(default=4, ge=0)
    """Transitions before this one are not branched (the authors' `divert_start_step`: 4)."""
    threshold: float = Field(default=0.3, ge=0.0, lt=1.0)
    """A pair is kept if its preference probabilities differ by more than this (the authors: 0.3; SDXL
    0.4)."""
    judge: str | None = None
    """What ranks the candidates: a step-aware judge (a folder, or `emoji:step_judge`) that reads a candidate
    and its noise level; or null, the run's rewards on the picture of its predicted x0. The authors: a
    step-aware judge of that picture."""


class PrdpConfig(TrajectoryConfig, ReferencedConfig):
    """PRDP (arXiv 2402.08714), experimental: no official code, the paper's numbers are not reproduced."""

    type: Literal["prdp"] = "prdp"
    """The training method."""
    beta: Positive = 1.0
    """Scale of the summed log-ratio that is regressed on reward differences (the paper's value is not
    verified)."""
    clip_range: Positive = 1e-4
    """Each transition's log-ratio to the sampling policy is clipped to plus or minus this (not verified)."""


class FlowGrpoConfig(ClippedRatioConfig, ReferencedConfig, AdvantageConfig):
    """Flow-GRPO (arXiv 2505.05470) and its relatives."""

    type: Literal["flow_grpo"] = "flow_grpo"
    """The training method."""
    kl_weight: NotNegative = 0.04
    """Weight of the KL to the reference (the authors: 0.04; 0.01 with PickScore)."""
    kl: Literal["flow_grpo", "exact"] = "flow_grpo"
    """Flow-GRPO's KL leaves out a factor of the time step; `exact` is the Gaussian KL, 4 to 112 times larger
    on its schedule."""
    ratio: Literal["plain", "guard"] = "plain"
    """`guard` centres and scales the log-ratio (GRPO-Guard, arXiv 2510.22319); use clip_range 2e-6 with
    it."""
    window: int | None = Field(default=None, ge=1)
    """MixGRPO: only so many transitions, a sliding window, are stochastic and trained; null is all."""
    window_every: Count = 25
    """Iterations after which the window moves by one transition towards the image (MixGRPO: 25)."""
    timestep_fraction: float = Field(default=0.99, gt=0.0, le=1.0)
    """Share of a trajectory's transitions that is trained (the authors: 0.99, which leaves out the last)."""


# ---- the choice --------------------------------------------------------------------------------------------

# To switch a method on: add its settings class here, when `diffexpo.algorithms.ALGORITHMS` has its class.
# Everything else (recipes, --set, the list of settings, messages, resolved files) follows from this line.
METHODS: tuple[type[MethodConfig], ...] = (
    ExpoConfig,
    DiffusionDpoConfig,
    SpinConfig,
    ImprovementDpoConfig,
    MapoConfig,
    SftConfig,
    DiffusionKtoConfig,
    RwrConfig,
    DiffusionNftConfig,
    AwmConfig,
    DgpoConfig,
    DdpoConfig,
    DpokConfig,
    D3poConfig,
    SpoConfig,
    PrdpConfig,
    FlowGrpoConfig,
)

DEFAULT_METHOD = "expo"
METHOD_BY_NAME: dict[str, type[MethodConfig]] = {
    method.model_fields["type"].default: method for method in METHODS
}


def _named(value: object) -> object:
    """Settings that name no method are of the default one."""
    if isinstance(value, Mapping) and "type" not in value:
        return {"type": DEFAULT_METHOD, **value}
    return value


AlgorithmConfig = Annotated[
    Annotated[Union[METHODS], Field(discriminator="type")],  # noqa: UP007 (a tuple of classes)
    BeforeValidator(_named),
]
"""Settings of any method in `METHODS`, told apart by `type`."""


def same_meaning(first: type[MethodConfig], second: type[MethodConfig], name: str) -> bool:
    """Whether both methods have a setting of this name and inherit it from the same class.

    Args:
        first, second: Settings classes of two methods.
        name: Of a setting.
    Returns:
        True for `beta` of EXPO and SPIN (both have the margin's), False for `beta` of EXPO and MaPO.
    """
    if name not in first.model_fields or name not in second.model_fields:
        return False
    return _declared_by(first, name) is _declared_by(second, name)


def carry_over(settings: MethodConfig, method: type[Chosen], **changes: object) -> Chosen:
    """The settings of another method, with every value that means the same in both taken over.

    Args:
        settings: Of the method that is left.
        method: Settings class of the method that is taken.
        changes: Values to set beside.
    Returns:
        Settings of `method`; what it does not share with the other one has its default.
    """
    shared = {
        name: getattr(settings, name)
        for name in method.model_fields
        if name != "type" and same_meaning(type(settings), method, name)
    }
    return method.model_validate(shared | changes)


def _declared_by(settings: type[MethodConfig], name: str) -> type:
    return [ancestor for ancestor in settings.__mro__ if name in get_annotations(ancestor)][-1]
