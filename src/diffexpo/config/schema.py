"""The whole configuration of a run. Every field is documented here (those of the training methods in
`methods/`) and nowhere else; unknown keys are errors.

Defaults are the settings of the EXPO paper (SD 1.5, section 5.1 of "Aligning Diffusion Models with Online
Preference Learning") where it states one; the embedded recipes scale them down and say so. Imports without
torch.
"""

from typing import Literal

from pydantic import Field

from diffexpo.config.rewards import RewardConfig
from diffexpo.config.section import AspectRatio, Count, Fraction, NotNegative, Positive, Section


class ModelConfig(Section):
    path: str = "emoji:diffusion"
    """Base model: a diffusers folder, a hub id, a run's folder (RUN@2: its second iterate; what it trained is
    folded into a whole model then), or an embedded model such as `scenes:diffusion` or `emoji:flow`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) when `path` is a hub id."""
    variant: str | None = None
    """Hub file variant, e.g. `fp16`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights. Errors and losses are float32 in any case, and so is the
    autoencoder."""
    resolution: Count | tuple[Count, Count] | None = None
    """Size of the images in pixels: one number for squares, or [height, width]; null is the checkpoint's
    own. Both must be multiples of what the autoencoder, and the transformer's patches, shrink by."""
    buckets: tuple[tuple[Count, Count] | AspectRatio, ...] = ()
    """Sizes besides `resolution` that images of a run may have: [height, width] in pixels, or an aspect
    ratio "width:height", which is that shape at the area of `resolution`. An offline pair goes to the size
    nearest to its winner's shape."""
    drop_t5: bool = False
    """Stable Diffusion 3: leave the T5 encoder out; zeros stand for its tokens, as in the pipeline with
    `text_encoder_3=None`."""
    max_sequence_length: int | None = Field(default=None, ge=0, le=512)
    """Tokens that T5 reads, or zeros that stand for them, or Gemma's in SANA; null is the pipeline's default
    (SD3 256, FLUX 512, PixArt-Sigma and SANA 300)."""
    guidance_embedding: NotNegative = 3.5
    """FLUX.1-dev: the guidance scale that is fed to the network, in sampling and in training (3.5: its
    pipeline's default)."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one, else the CPU; or a torch device such as `cpu`,
    `cuda:1`."""
    vae_slicing: bool = False
    """Decode and encode one image at a time: less memory, the same images up to rounding."""
    vae_tiling: bool = False
    """Decode and encode large images in overlapping tiles: less memory; images above the autoencoder's
    own size change a little."""
    channels_last: bool = False
    """Hold the weights of a UNet and its autoencoder in the channels-last layout, which convolutions prefer,
    on CPUs too. Changes rounding only."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks` compiles the denoiser's repeated blocks with torch.compile: faster after a first slow step.
    Needs Triton, changes rounding, and is refused on the CPU, where runs are exact."""
    inference_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the denoiser's forwards that no gradient follows: drawing, the reference, validation and
    evaluation. `no` leaves them to `dtype`, and those in training to `training.mixed_precision`. Faster where
    the processor computes in it; images, and the errors of the reference, are rounded more coarsely."""


class LoraConfig(Section):
    rank: Count = 16
    """Rank of the low-rank update."""
    alpha: float | None = Field(default=None, gt=0.0)
    """Scale numerator; the update is multiplied by alpha / rank. Default: alpha = rank."""
    target_modules: tuple[str, ...] | None = None
    """Module name endings that get an adapter; it is an error if none is found. Null is the family's own
    choice: the attention projections `to_q`, `to_k`, `to_v`, `to_out.0`, and for FLUX those of the text
    stream and the feed-forward layers too."""


class TuningConfig(Section):
    kind: Literal["lora", "full"] = "full"
    """`lora` trains adapters on a frozen base; `full` trains the denoiser itself (references are copies)."""
    lora: LoraConfig = LoraConfig()
    """Adapter settings; read only with `kind: lora`."""
    reference_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen reference of full fine-tuning: half needs the same `training.mixed_precision`,
    under which the reference's errors are the same bits; its tensors take half the memory, and the base lies
    in main memory while it does not run."""
    reference_device: Literal["same", "cpu"] = "same"
    """Where the frozen copies of full fine-tuning (reference, base, main, old) lie while they do not run: on
    `model.device`, or in main memory. With `cpu` results are the same; each use costs a transfer of the whole
    denoiser."""
    start: str | None = None
    """Where training starts, if not at the base: the folder of a finished run with the same model and tuning
    (RUN@2: its second iterate); with `kind: full` that of a model of the same shape; with `kind: lora` a LoRA
    file of diffusers, peft or kohya, of at most `lora.rank`. `model.path` stays the base, and the reference
    where that is the base. `contender:NAME`: the last iterate of one of
    `baseline.contenders`, trained before everything else; offline DPO starts there too."""


class PromptConfig(Section):
    source: str = "emoji:train"
    """Prompts to draw from: `emoji:train`, `emoji:animals` (24 of them), `prompts:first_tries` (60, for first
    tries with real models), or a `.txt` (one a line), `.jsonl` or `.parquet` file."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; longer ones are dropped and counted. Default: what the text encoder takes."""


class NegativeConfig(Section):
    source: str | None = "emoji:negatives"
    """Negative prompts, one a line: `emoji:negatives` or a text file (# begins a comment); null turns them
    off, and is the default with a model that is not the embedded one."""
    schedule: Literal["linear", "constant", "cosine", "off"] = "linear"
    """tau(t), the probability that a prompt gets a negative prompt in iteration t (the paper: linear
    decay)."""
    initial: Fraction = 1.0
    """tau at the first collecting iteration (the paper leaves it open)."""
    mode: Literal["cfg", "append"] = "cfg"
    """`cfg`: the negative prompt replaces the empty prompt in classifier-free guidance; `append`: its words
    are added to the prompt (algorithm 1 read literally). The training prompt is the plain one in both."""
    agents: Literal["both", "exploration"] = "both"
    """Who gets it: both agents (algorithm 1) or the exploration agent only."""


class SamplerConfig(Section):
    name: Literal["ddpm", "ddim", "dpmpp", "flow_euler", "flow_sde"] = "ddpm"
    """`ddpm` ancestral, `ddim` with `eta`, `dpmpp` DPM-Solver++ 2M; for flow models `flow_euler`, or the
    stochastic `flow_sde`."""
    steps: Count = 50
    """Network calls per image (doubled by guidance)."""
    guidance: float = Field(default=7.5, ge=0.0)
    """Classifier-free guidance scale; 1 turns guidance off and halves the cost. What goes together in
    drawing, loss and evaluation: docs/guidance.md."""
    eta: Fraction = 0.0
    """Noise of `ddim`: 0 deterministic, 1 like `ddpm`. Ignored by the others."""
    sde: Literal["flow_grpo", "dance", "cps"] = "flow_grpo"
    """Stochastic step of `flow_sde`: Flow-GRPO's, DanceGRPO's or coefficients-preserving. Ignored by the
    others."""
    noise_level: float = Field(default=0.7, ge=0.0)
    """Noise of `flow_sde`: a of `flow_grpo` and `cps`, eta of `dance` (Flow-GRPO: 0.7; DanceGRPO: 0.3)."""
    random_steps: tuple[int, int] | None = None
    """Only the steps from the first number up to, not including, the second are random (0 is the noisiest);
    null is all."""


class ValidationConfig(Section):
    """What chooses among iterates under `explore.keep: best`: judges, on prompts of their own."""

    prompts: str | None = None
    """Prompts that are neither trained nor evaluated on, such as `scenes:validation`, or a prompt file; a
    list that shares a prompt with either is refused."""
    num_prompts: Count = 128
    """How many of them (keyed order)."""
    images_per_prompt: Count = 1
    """Images of each, drawn by `evaluation.sampler`, with the same seeds for every iterate."""
    judges: tuple[RewardConfig, ...] = ()
    """The first one's mean score decides which iterate is kept; the others are reported beside it."""


class ExploreConfig(Section):
    iterations: Count = 5
    """Outer iterations T. Iteration 1 trains on offline data; samples are collected after iterations
    1..T-1."""
    prompts_per_iteration: Count = 20480
    """Prompts drawn per iteration, without replacement while they last."""
    images_per_prompt: Count = 4
    """Images B each agent draws for a prompt; with two agents 2B compete."""
    agents: Literal[1, 2] = 2
    """2 is EXPO-II: main = previous iterate, exploration = current one. 1 is EXPO-I: both are the current
    one."""
    sampler: SamplerConfig = SamplerConfig()
    """How agents draw images."""
    negatives: NegativeConfig = NegativeConfig()
    """Negative prompts that widen the search early."""
    batch_size: Count = 64
    """Images per network call while collecting. Results belong to it: an image is regenerated at the same
    batch size."""
    aspect: Literal["first", "uniform", "offline"] = "first"
    """Which of the sizes of `model.resolution` and `model.buckets` a prompt's images are drawn at, by a draw
    keyed by the prompt: always the `first`; all alike often (`uniform`); or each as often as it is among the
    winners of the `offline` pairs."""
    overlap_scoring: bool = True
    """Score a batch while the next one is drawn, in evaluation too. Results are the same; turn it off where
    memory is short for both at once."""
    merge_lora: bool = False
    """Draw with the adapters folded into the base's weights: fewer kernels a step, so sampling is faster
    where they count, and images are rounded differently. The base's own bits come back afterwards.
    Evaluation and training never run merged."""
    keep: Literal["last", "best"] = "last"
    """Which iterate is the result, in the report and in the export: the last one, or the one that scored best
    in `validation` (of equal ones the earliest), which never looks at the evaluation's prompts."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many iterations in a row without a better validation score; null: never."""
    validation: ValidationConfig = ValidationConfig()
    """The judge of `keep: best`."""


class MixtureConfig(Section):
    kind: Literal["zscore", "global", "rank", "pareto"] = "zscore"
    """How several `train` rewards become one ranking within a prompt: weighted sum of z-scores within the
    prompt (`zscore`) or over all prompts of the collection (`global`), weighted sum of ranks, or Pareto (the
    winner must beat the loser under every reward). With one reward all four rank alike."""


class PairingConfig(Section):
    min_margin: float = Field(default=0.0, ge=0.0)
    """A pair is kept only if best minus worst exceeds this (in units of the mixed score, or of the raw reward
    with one)."""


class OfflineConfig(Section):
    source: str | None = "emoji:offline"
    """Offline pairs D_off: `emoji:offline`, `scenes:offline`, or a file or folder in one of the formats of
    docs/data.md; null for none, which is the default with a model that is not the embedded one."""
    format: Literal[
        "auto", "pickapic", "hpdv2", "hpdv3", "imagerewarddb", "folders", "table", "webdataset", "diffexpo"
    ] = "auto"
    """Format of the offline pairs; `auto` recognises it by content."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many pairs (by keyed order)."""


class HybridConfig(Section):
    offline_weight: float = Field(default=1.0, ge=0.0)
    """Sampling weight of each offline pair relative to an online pair (1: plain union, as in the paper; 0:
    on-policy only)."""
    decay: Fraction = 1.0
    """Sampling weight of a pair collected k iterations ago is decay**k (1: all iterations count alike; 0: the
    last only)."""


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


class TrainingConfig(Section):
    steps: Count = 2000
    """Optimiser steps per iteration."""
    batch_size: Count = 512
    """Pairs per optimiser step, over all processes and accumulated micro-batches."""
    micro_batch_size: Count = 8
    """Pairs per forward. Changes speed and memory, not results beyond rounding."""
    learning_rate: Positive = 5.12e-6
    """AdamW learning rate as used (the papers' 1e-8 is per pair of the effective batch: 1e-8 x 512)."""
    warmup_fraction: Fraction = 0.25
    """Linear warm-up over this share of an iteration's steps, then constant (the paper: 25%)."""
    weight_decay: float = Field(default=1e-2, ge=0.0)
    """AdamW weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW first moment decay."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """AdamW second moment decay."""
    adam_epsilon: Positive = 1e-8
    """AdamW epsilon."""
    max_grad_norm: Positive = 1.0
    """Gradient norm clip."""
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Exponential moving average of the trained weights within an iteration; 0 is off. With it the iterate is
    the average."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in the denoiser."""
    pair_gradient: Literal["joint", "two_pass"] = "joint"
    """Gradient of a loss on pairs: `joint` in one backward through winners and losers; `two_pass` one half
    after the other, with the same result, about half the activation memory and one more forward of the policy
    on each image."""
    checkpoint_every: Count = 100
    """Optimiser steps between checkpoints inside an iteration."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the denoiser's forward; policy and reference run under the same one."""
    max_bad_steps: Count = 5
    """Stop after this many consecutive non-finite steps (each is skipped and counted)."""


class EvaluationConfig(Section):
    prompts: str = "emoji:heldout"
    """Prompts never trained on: `emoji:heldout` (or its part `emoji:heldout-animals`), or a prompt file."""
    num_prompts: Count = 128
    """How many of them (keyed order)."""
    images_per_prompt: Count = 1
    """Images per prompt and model, with the same seeds for every model."""
    sampler: SamplerConfig = SamplerConfig()
    """The deployment sampler, for all models alike."""
    judges: tuple[RewardConfig, ...] = ()
    """Held-out judges: never used for training. The first decides the win rate."""
    kl_prompts: int = Field(default=32, ge=0)
    """Prompts for the KL to the base (one path each); 0 turns it off."""
    vendi_prompts: int = Field(default=8, ge=0)
    """Prompts for the Vendi score; 0 turns it off."""
    vendi_images: Count = 8
    """Images per prompt for the Vendi score (its maximum)."""
    base_guidances: tuple[NotNegative, ...] = ()
    """The base is evaluated at these guidance scales too, on the same prompts and noise: what turning the
    scale up gives without any training. The report compares the run with the best of them."""
    every_iteration: bool = True
    """Evaluate each iterate (reward-KL curve), not only the last."""
    bootstrap: Count = 10000
    """Bootstrap resamples, clustered by prompt, for 95% intervals."""
    grid_prompts: int = Field(default=8, ge=0)
    """Prompts in the before/after image (the first of the keyed order, not chosen by hand); 0: no image."""


class TrackingConfig(Section):
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics and images of evaluations go besides the run's folder; `tensorboard` writes to
    `tracking/` inside it, the others go by their own environment variables."""
    project: str = "diffexpo"
    """Project (Weights & Biases) or experiment (MLflow) that holds the run."""


class BaselineConfig(Section):
    offline_dpo: bool = False
    """Also train Diffusion-DPO on D_off alone with the same number of network evaluations, and compare."""
    offline_source: str | None = None
    """Offline pairs of that baseline, where the run learns from none or from others; null: those of
    `offline.source`."""
    contenders: tuple[str, ...] = ()
    """What the run is compared with besides: recipes (names or files), which are trained beside it at their
    own cost, and folders of finished runs. Seed, model, tuning, prompts, rewards and evaluation are the
    run's; their last iterates, or what finished runs kept (RUN@2: their second iterate), are evaluated on the
    same prompts and noise."""
