"""The whole configuration of a run. Every field is documented here (those of the training methods in
`methods/`) and nowhere else; unknown keys are errors.

Defaults are the settings of the EXPO paper (SD 1.5, section 5.1 of "Aligning Diffusion Models with Online
Preference Learning") where it states one; the embedded recipes scale them down and say so. Imports without
torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffexpo.config.section import AspectRatio, Count, Fraction, NotNegative, Positive, Section

# Scorers that are looked at rather than trained on, unless a configuration says otherwise.
WATCHED = ("brisque", "open_nsfw")


class ModelConfig(Section):
    path: str = "emoji:diffusion"
    """Base model: a diffusers folder, a hub id, or one of the embedded models `emoji:diffusion`,
    `emoji:flow`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) when `path` is a hub id."""
    variant: str | None = None
    """Hub file variant, e.g. `fp16`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights. Errors and losses are float32 in any case, and so is the
    autoencoder."""
    resolution: Count | tuple[Count, Count] | None = None
    """Size of the pictures in pixels: one number for squares, or [height, width]; null is the checkpoint's
    own. Both must be multiples of what the autoencoder, and the transformer's patches, shrink by."""
    buckets: tuple[tuple[Count, Count] | AspectRatio, ...] = ()
    """Sizes besides `resolution` that pictures of a run may have: [height, width] in pixels, or an aspect
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
    """Decode and encode one picture at a time: less memory, the same pictures up to rounding."""
    vae_tiling: bool = False
    """Decode and encode large pictures in overlapping tiles: less memory; pictures above the autoencoder's
    own size change a little."""
    channels_last: bool = False
    """Hold a UNet's weights in the channels-last layout, which convolutions on accelerators prefer. Changes
    rounding only."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks` compiles the denoiser's repeated blocks with torch.compile: faster after a first slow step.
    Needs Triton, changes rounding, and is refused on the CPU, where runs are exact."""


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
    """Where training starts, if not at the base: the folder of a finished run with the same model and tuning,
    or, with `kind: full`, of a model of the same shape. `model.path` stays the base, and the reference where
    that is the base."""


class PromptConfig(Section):
    source: str = "emoji:train"
    """Prompts to draw from: `emoji:train`, `emoji:animals` (24 of them), `prompts:first_tries` (60, for first
    tries with real models), or a `.txt` (one a line), `.jsonl` or `.parquet` file."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; longer ones are dropped and counted. Default: what the text encoder takes."""


class NegativeConfig(Section):
    source: str | None = "emoji:negatives"
    """Negative prompts, one a line: `emoji:negatives` or a text file; null turns them off."""
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
    """Classifier-free guidance scale; 1 turns guidance off and halves the cost."""
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
    """Images per network call while collecting. Results belong to it: a picture is regenerated at the same
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
    where they count, and pictures are rounded differently. The base's own bits come back afterwards.
    Evaluation and training never run merged."""


class ServiceConfig(Section):
    timeout_s: Positive = 60.0
    """Longest wait for one answer, in seconds."""
    retry_s: NotNegative = 120.0
    """How long a call that failed is tried again, in seconds, with growing pauses; 0 tries once."""
    images_per_request: Count = 16
    """`remote`: images in one request."""
    max_failed_fraction: Fraction = 0.1
    """Stop the run when more than this share of the last 256 images got no score (of fewer, at the start; but
    not before 20)."""
    max_failed: int | None = Field(default=None, ge=0)
    """Stop the run when more than this many images in all got no score; null sets no such limit."""
    scorer: str | None = None
    """`remote`: name that the server must give of its scorer; null takes any."""
    version: str | None = None
    """`remote`: version that the server must give of its scorer; null takes any. One that changes during a
    run stops it anyway."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key, which is sent as a bearer token. The key itself is
    written nowhere."""


class VlmConfig(Section):
    mode: Literal["yes_no", "pairwise", "caption"] = "yes_no"
    """`yes_no`: probability of "yes"; `pairwise`: share of wins against the prompt's other images in the
    batch, each pair shown in both orders; `caption`: similarity of the model's description of the picture and
    the prompt (DDPO)."""
    model: str | None = None
    """Name of the model on the server; null takes the only one that it serves."""
    question: str | None = None
    """Text sent with the picture, `{prompt}` stands for the prompt; null takes the mode's own
    (docs/rewards/vlm.md)."""
    top_logprobs: int = Field(default=20, ge=2, le=20)
    """`yes_no`, `pairwise`: tokens whose probabilities are asked for; lower it for servers that give
    fewer."""
    max_tokens: Count = 96
    """`caption`: longest description, in tokens."""
    text_encoder: str | None = None
    """`caption`: folder of the text model that compares: a CLIPModel (cosine), `emoji:judge_train`, or
    another encoder (BERTScore recall, as in DDPO)."""
    text_layer: int | None = Field(default=None, ge=0)
    """`caption`: hidden layer that BERTScore compares, 0 is the embedding; null is the last (bert_score takes
    40 of deberta-xlarge-mnli)."""


class SelfJudgeConfig(Section):
    draws: Count = 8
    """Noise and time draws K that a score is the mean over; each takes two network evaluations. All
    candidates of a prompt share them."""
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times that are drawn from, 1 is pure noise; e.g. [0.3, 1] leaves out low noise."""
    beta: Positive = 5000.0
    """`implicit`: unit of the score, beta/2 times the fall of the error (Diffusion-DPO's 5000). It changes no
    order."""


class RewardConfig(Section):
    name: str
    """Name in metrics and reports; unique within the run."""
    type: Literal[
        "clip",
        "pickscore",
        "hpsv2",
        "hpsv2.1",
        "imagereward",
        "aesthetic",
        "jpeg_compressibility",
        "jpeg_incompressibility",
        "python",
        "remote",
        "vlm",
        "ocr",
        "brisque",
        "open_nsfw",
        "implicit",
        "denoising",
    ]
    """Kind of scorer; `diffexpo rewards list` says what each needs. `python` is a user's own function."""
    path: str | None = None
    """`clip`: folder, hub id or `emoji:judge_train`; `pickscore`: folder or hub id (default: the official
    one); `hpsv2`, `hpsv2.1`, `imagereward`, `aesthetic`: weights as a safetensors file or a folder with one;
    `python`: `file.py:function`; `remote`, `vlm`: address of the server; `implicit`: folder of a run that was
    trained on pairs, or of its export; `denoising`: a model with the run's autoencoder (default: the run's
    own base)."""
    base: str | None = None
    """Model that the weights stand on, folder or hub id: the CLIPModel of `aesthetic`, the CLIP ViT-H/14 of
    `hpsv2`, `hpsv2.1` and `pickscore` (configuration, tokenizer, image processor), the BERT tokenizer of
    `imagereward`. Default: the official one."""
    scale: Literal["raw", "percent", "logit"] | None = None
    """Unit of CLIP-like scores: `raw` cosine, `percent` 100 x cosine, `logit` cosine times the model's logit
    scale. Default: the unit that the literature prints (`logit` for `clip` and `pickscore`, `percent` for
    HPS)."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the scorer's towers; projection, normalisation and head are float32 in any case. Half precision is
    for accelerators and moves scores a little (PickScore by up to about 0.5)."""
    weight: float = 1.0
    """Weight in the mixture; negative prefers low scores."""
    role: Literal["train", "watch"] = "train"
    """`train` ranks images; `watch` is scored and reported only (and is the default of `brisque` and
    `open_nsfw`)."""
    concurrency: int | None = Field(default=None, ge=1)
    """Calls under way at once: requests of `remote` and `vlm` (default 8), threads in a `python` function,
    which must bear it (default 1)."""
    cache: str | None = None
    """Folder in which scores are kept by picture, prompt and scorer, so that the same question is not asked
    again, by whatever run; null keeps none. Scores of networks are kept by whole batches. A `python` function
    must then score each image by itself, always alike."""
    service: ServiceConfig = ServiceConfig()
    """How `remote` and `vlm` call their server."""
    vlm: VlmConfig = VlmConfig()
    """What `vlm` asks."""
    self_judge: SelfJudgeConfig = SelfJudgeConfig()
    """How `implicit` and `denoising` look at an image."""

    @model_validator(mode="before")
    @classmethod
    def _watch_by_default(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("type") in WATCHED and "role" not in values:
            return {**values, "role": "watch"}
        return values


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
    """Offline pairs D_off: `emoji:offline`, or a file or folder in one of the formats of docs/data.md; null
    for none."""
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
    every_iteration: bool = True
    """Evaluate each iterate (reward-KL curve), not only the last."""
    bootstrap: Count = 10000
    """Bootstrap resamples, clustered by prompt, for 95% intervals."""
    grid_prompts: Count = 8
    """Prompts in the before/after picture (the first of the keyed order, not chosen by hand)."""


class BaselineConfig(Section):
    offline_dpo: bool = False
    """Also train Diffusion-DPO on D_off alone with the same number of network evaluations, and compare."""
