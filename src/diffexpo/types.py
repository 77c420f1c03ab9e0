"""Records, batches and Protocols shared by all rooms. Imports without torch.

Three nouns: a **Policy** can denoise, a **Reward** can score, the **Store** remembers. Algorithms know
policies, and the online loop knows rewards, only through the Protocols below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffexpo.config.methods.card import MethodConfig
    from diffexpo.config.schema import SamplerConfig
    from diffexpo.diffusion.path import Path as DiffusionPath


@dataclass(frozen=True)
class Prompt:
    """One prompt. `attributes` may hold what the text leaves out (e.g. {"occupation": "firefighter"})."""

    id: str
    text: str
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditioning:
    """What a policy's text side hands to its denoiser: named tensors whose first axis is the batch."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, index: Tensor | Sequence[int] | slice) -> Conditioning:
        """Rows by index (repeats allowed) or slice."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """The same rows on a device, floating tensors in `dtype`."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return Conditioning({name: moved(tensor) for name, tensor in self.tensors.items()})

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all batches in order; all must hold the same names."""
        import torch

        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})


class WeightSets(Protocol):
    """Named versions of the trainable weights on one base.

    "current" is trained; "reference" is what the loss is measured against; "main", "exploration", "ema",
    "base" and others are versions by name. With LoRA a version is a named adapter on the frozen base and
    "base" is the base with adapters off; with full fine-tuning a version is a copy.
    """

    def use(self, name: str, *, merged: bool = False) -> AbstractContextManager[None]:
        """Inside the block `predict` runs with that version. Nestable; restores the previous one.

        With `merged` a LoRA version runs folded into the base's weights: the same model, faster, rounded
        differently.
        """

    def standing_in(self, name: str) -> AbstractContextManager[None]:
        """Inside the block `use` runs this version whatever name it is given."""

    def copy(self, source: str, target: str) -> None:
        """Make or overwrite `target` with the values of `source` (exact)."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of "current" that are trained, by stable name."""

    def state(self, name: str) -> dict[str, Tensor]:
        """Detached CPU copy of a version, by the names of `trainable()`."""

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Make or overwrite a version; names and shapes must match exactly."""

    def follow(self, name: str, source: str, memory: float) -> None:
        """name <- memory name + (1 - memory) source, for memory in [0, 1], without a copy in main memory."""

    def fingerprint(self, name: str) -> str:
        """SHA-256 over a version's names, shapes, types and bytes."""


class Policy(Protocol):
    """A text-to-image model that can denoise. `t` is a float in [0, 1], 1 is pure noise.

    A policy that takes latents of several shapes (`HasBuckets`) is told the image's size by x_t alone.
    """

    path: DiffusionPath
    latent_shape: tuple[int, int, int]
    device: torch.device
    fingerprint: str

    @property
    def weights(self) -> WeightSets: ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1], on any device, to scaled latents (B,C,h,w) on the policy's, posterior
        mean."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B,C,h,w), on any device, to float32 images (B,3,H,W) in [0,1] on the policy's."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own prediction (eps, v, x0 or velocity) for x_t (B,C,h,w) at t (B,)."""


@runtime_checkable
class HasBuckets(Protocol):
    """A policy whose images have several sizes: the shapes of their latents, `latent_shape` first."""

    latent_shapes: tuple[tuple[int, int, int], ...]


@runtime_checkable
class HoldsTextEncoders(Protocol):
    """A policy whose text encoders may leave the device until the next text is to be encoded."""

    def release_text_encoders(self) -> None: ...


@dataclass(frozen=True)
class Drawn:
    """What was drawn: latents (B,C,h,w) and their images (B,3,H,W) in [0,1]; None if no scorer reads it."""

    latents: Tensor | None = None
    images: Tensor | None = None


class Reward(Protocol):
    """Scores images. Higher is better; images float32 (B,3,H,W) in [0,1]; returns (B,) float32, NaN where
    scoring failed. One with an attribute `reads = "latents"` is given latents (B,C,h,w) as they were drawn.
    """

    name: str
    version: str
    scale: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


Scorer = Reward


class StepJudge(Protocol):
    """Scores how well what x_t = alpha_t x0 + sigma_t eps will become fits its prompt; higher is better."""

    def score(
        self, x_t: Tensor, alpha_t: float | Tensor, sigma_t: float | Tensor, prompts: Sequence[str]
    ) -> Tensor:
        """(B,) float32 for x_t (B,C,h,w) at a noise level, numbers or (B,)."""


@dataclass(frozen=True)
class MixedRows:
    """Rows of several shapes, such as latents of several image sizes: one tensor a shape, in order.

    A batch of a step may hold it where a batch of one shape holds a tensor; a micro-batch never does. A slice
    of rows that have one shape is a tensor.
    """

    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, rows: slice) -> Tensor | MixedRows:
        """Rows start..stop-1; views, no copies."""
        start, stop, _ = rows.indices(len(self))
        firsts = zip([0, *self.borders], self.parts, strict=True)
        cut = [part[max(start - first, 0) : max(stop - first, 0)] for first, part in firsts]
        found = [part for part in cut if len(part)]
        return MixedRows(tuple(found)) if len(found) > 1 else [*found, self.parts[0][:0]][0]

    @property
    def borders(self) -> list[int]:
        """Rows at which another shape begins, in order; none for one part."""
        return list(accumulate(len(part) for part in self.parts[:-1]))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device


# Marks fields whose rows are not those of `keys`: they count by the names in this field.
ROWS_OF = "rows"
CONTRAST = {ROWS_OF: "contrast_keys"}
# Marks fields that say what is computed instead of being computed with: they stay in main memory, where they
# are read without waiting for the device.
STAYS = "stays"


class NamedRows:
    """A batch of B rows, each with a name in `keys`: a loss draws noise and t from the names, so a batch's
    split does not change them.

    `weight` (B,) scales each row's loss (1 by default). `measured` is what the algorithm found on the whole
    batch beforehand (see `MeasuresBatch`). With `is_grouped` the rows of a group are consecutive and all that
    there are of it; the batch is then never cut within a group.
    """

    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class PairBatch(NamedRows):
    """Winner and loser latents of B prompts; optionally a contrast pair (exploration sample, main sample) of
    E prompts.

    `uncertainty_winner/_loser` (B,) are the Gamma of the offset.
    """

    winner: Tensor
    loser: Tensor
    conditioning: Conditioning
    keys: tuple[str, ...]
    weight: Tensor | None = None
    uncertainty_winner: Tensor | None = None
    uncertainty_loser: Tensor | None = None
    explored: Tensor | None = field(default=None, metadata=CONTRAST)
    main: Tensor | None = field(default=None, metadata=CONTRAST)
    contrast_conditioning: Conditioning | None = field(default=None, metadata=CONTRAST)
    contrast_keys: tuple[str, ...] = field(default=(), metadata=CONTRAST)
    measured: float | None = None


@dataclass(frozen=True)
class ScoredBatch(NamedRows):
    """B images with what was thought of them: latents (B,C,h,w), a prompt each, no pairs.

    `rewards` (B,) are the mixed scores within the prompt, higher is better; of an offline image the share of
    its pairs that it won. `advantages` (B,) compare a reward with all images of the same prompt and
    collection, in the batch or not. `groups` (B,) int64: equal numbers are the same prompt and collection.
    `desirable` (B,) bool. `groups` stays in main memory when a batch moves to a device.
    """

    latents: Tensor
    conditioning: Conditioning
    keys: tuple[str, ...]
    rewards: Tensor
    advantages: Tensor
    groups: Tensor = field(metadata={STAYS: True})
    desirable: Tensor
    weight: Tensor | None = None
    is_grouped: bool = False
    measured: float | None = None


@dataclass(frozen=True)
class TrajectoryBatch(NamedRows):
    """B transitions x_t -> x_next of sampled trajectories, each with the advantage of its image.

    `x_t`, `x_next` (B,C,h,w) are bit for bit what the sampler had. `index` (B,) int64 is the transition's
    place in the sampler's grid, 0 the noisiest: the grid gives t, the next t and the kernel; it stays in main
    memory when a batch moves to a device. `old_log_prob`
    (B,) is the mean log-prob per latent element of x_next under the policy that sampled it, with the same
    guidance. `sampler` drew them; it gives grid and guidance. `negative_conditioning` is the other side of
    guidance (None: none was used). `old_mean` (B,C,h,w) is the kernel's mean under the sampling policy, for
    methods that compare means.
    """

    x_t: Tensor
    x_next: Tensor
    index: Tensor = field(metadata={STAYS: True})
    old_log_prob: Tensor
    advantages: Tensor
    conditioning: Conditioning
    keys: tuple[str, ...]
    sampler: SamplerConfig
    negative_conditioning: Conditioning | None = None
    old_mean: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class TrajectoryPairBatch(NamedRows):
    """B pairs of transitions of one prompt each, of which one is preferred.

    The transitions `winner_x_t` -> `winner_x_next` and `loser_x_t` -> `loser_x_next` (each (B,C,h,w)) stand
    at the same place `index` (B,) int64 of the sampler's grid. They come from two trajectories (D3PO, PRDP)
    or branch from a shared x_t (SPO: winner_x_t equals loser_x_t). `winner_reward`, `loser_reward` (B,) are
    the rewards behind the preference. Rows with the same number in `groups` (B,) int64 are steps of one pair
    of trajectories, from noise to image. The other fields are those of `TrajectoryBatch`.
    """

    winner_x_t: Tensor
    winner_x_next: Tensor
    loser_x_t: Tensor
    loser_x_next: Tensor
    index: Tensor = field(metadata={STAYS: True})
    winner_old_log_prob: Tensor
    loser_old_log_prob: Tensor
    winner_reward: Tensor
    loser_reward: Tensor
    conditioning: Conditioning
    keys: tuple[str, ...]
    sampler: SamplerConfig
    negative_conditioning: Conditioning | None = None
    weight: Tensor | None = None
    groups: Tensor | None = field(default=None, metadata={STAYS: True})
    is_grouped: bool = False


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss to minimise and metrics: name -> (sum over samples, count), so that means are exact over
    any split. A sum over the samples in place of the count makes the metric a ratio of two sums."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, int | Tensor]]


Batch = PairBatch | ScoredBatch | TrajectoryBatch | TrajectoryPairBatch


class Algorithm(Protocol):
    """One training method: a loss on a batch. `settings` is its card, which says what it learns from and what
    it needs; that is checked before anything is spent.
    """

    settings: MethodConfig

    def __init__(self, settings: Any, empty: Conditioning) -> None:
        """`empty`: one-row conditioning of the empty prompt."""

    def loss(self, policy: Policy, batch: Any, noise_key: tuple[str | int, ...]) -> LossOutput:
        """Loss of a micro-batch, of the kind that the card says: the mean over its rows of `weight` times the
        row's loss."""


@runtime_checkable
class FollowsSteps(Protocol):
    """An algorithm with something to do after each optimiser step, such as moving the old policy after the
    current one."""

    def after_step(self, policy: Policy, step: int) -> None:
        """`step` counts the steps done in this iteration, from 1; steps that were not finite changed nothing
        and are left out."""


@runtime_checkable
class MeasuresBatch(Protocol):
    """An algorithm whose loss needs a number of the whole batch of a step, over all processes and
    micro-batches.

    Where its card says `measures_batch`, the engine adds up `measure` of all micro-batches and gives every
    one of them the result of `with_measured` in `measured`. A loss that finds None there takes its own rows
    for the whole batch.
    """

    def measure(self, policy: Policy, batch: Batch, noise_key: tuple[str | int, ...]) -> Tensor:
        """Sums (k,) float64 over the rows of a micro-batch, without gradient."""

    def with_measured(self, batch: Batch, sums: Tensor) -> Batch:
        """The batch with what follows from the sums over all its rows."""


@runtime_checkable
class WeighsImages(Protocol):
    """An algorithm whose rows carry weights that depend on all images of a prompt."""

    def weigh(self, rewards: Tensor) -> Tensor:
        """Weights (n,) of the scored images of one prompt and collection, from rewards (n,) float64."""


@runtime_checkable
class ChoosesSteps(Protocol):
    """An algorithm that draws and trains some steps of the sampler only."""

    def random_steps(self, iteration: int, num_transitions: int) -> tuple[int, int] | None:
        """First and one past the last step that an iteration draws with noise and trains; None: all."""


@runtime_checkable
class FitsBaseline(Protocol):
    """An algorithm that subtracts a learned value of a transition from its reward."""

    def value_inputs(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the value network sees of transitions, (B, n)."""

    def value_network(
        self, num_inputs: int, generator: torch.Generator, centre: float, scale: float
    ) -> torch.nn.Module:
        """A fresh value network; centre and scale are mean and std of the first rewards."""

    def value_loss(self, value: Tensor, reward: Tensor) -> Tensor:
        """What fitting minimises, (B,)."""


@runtime_checkable
class LearnsInParts(Protocol):
    """An algorithm that can give its loss in several parts, so that only one graph is held at a time."""

    def loss_in_parts(
        self, policy: Policy, batch: Batch, noise_key: tuple[str | int, ...]
    ) -> Iterator[LossOutput]:
        """Losses that add up to `loss`, as their gradients do; ask for each after the last one's backward."""


@runtime_checkable
class MeasuresMargins(Protocol):
    """An algorithm on pairs of images that can show the margins of single draws of noise and time."""

    def margins(
        self,
        policy: Policy,
        batch: PairBatch,
        noise_key: tuple[str | int, ...],
        draws: int,
        *,
        is_changed: bool,
    ) -> Tensor:
        """Margins (B, draws) before beta / 2, without gradient: the policy's own, or with `is_changed` less
        those of "reference"; draw k of a pair is keyed by (noise_key, k, pair key)."""
