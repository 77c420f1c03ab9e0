"""What a method learns from, as facts that the rooms act on: pairs of images, images with scores, transitions
of the sampler, or pairs of those. Imports without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, a winner and a loser each.

    `contrast_fraction` is the number of contrast pairs (an image of the exploration agent and one of the main
    agent) for each pair of a batch; 0 is none. Each pair is looked at with `draws` noises and times.
    """

    contrast_fraction: float = 0.0
    draws: int = 1
    unit: ClassVar[str] = "pairs"
    images_per_row: ClassVar[int] = 2

    def contrast_pairs(self, batch_size: int) -> int:
        """Contrast pairs that accompany `batch_size` pairs: at least one where there are any."""
        return max(1, round(batch_size * self.contrast_fraction)) if self.contrast_fraction > 0 else 0


@dataclass(frozen=True)
class Images:
    """Single images with a score.

    Args:
        keep: Images that are learned from: all; those whose advantage is not 0 (`decided`); those better than
            their prompt's mean (`desirable`); the best of each prompt.
        desirable_fraction: Share of desirable images in the draw; None leaves it as it is.
        global_std: Advantages are divided by the std of all rewards of a collection, not of the prompt's own.
        weigh_scope: Whose rewards the weights of losses are computed from (`WeighsImages`): those of one
            prompt, or all of a collection.
        whole_groups: A loss must see all images of a prompt and collection at once.
    """

    keep: Literal["all", "decided", "desirable", "best"] = "all"
    desirable_fraction: float | None = None
    global_std: bool = False
    weigh_scope: Literal["prompt", "global"] = "prompt"
    whole_groups: bool = False
    unit: ClassVar[str] = "images"
    images_per_row: ClassVar[int] = 1
    draws: ClassVar[int] = 1


@dataclass(frozen=True)
class RunningAdvantage:
    """Reward against the running mean and std of the prompt's own rewards (`PerPromptStats`), clipped."""

    buffer_size: int
    min_count: int
    clip: float


@dataclass(frozen=True)
class GroupAdvantage:
    """Reward against those of the prompt's other images (`group_advantages`), clipped."""

    global_std: bool
    clip: float


@dataclass(frozen=True)
class ValueBaseline:
    """How a learned value is fitted to the rewards of each collection (`FitsBaseline`)."""

    learning_rate: float
    steps: int
    batch_size: int


@dataclass(frozen=True)
class PlainReward:
    """The reward itself, less a learned value of the transition where there is a baseline."""

    baseline: ValueBaseline | None = None


@dataclass(frozen=True)
class Transitions:
    """Transitions of sampled trajectories, each with the advantage of its image.

    `fraction` is the share of a trajectory's transitions that is trained, the noisiest ones if `takes_first`,
    else a keyed choice. With `needs_means` the kernel's means are kept for the loss.
    """

    advantage: RunningAdvantage | GroupAdvantage | PlainReward
    fraction: float = 1.0
    takes_first: bool = False
    needs_means: bool = False
    unit: ClassVar[str] = "transitions"
    images_per_row: ClassVar[int] = 1
    draws: ClassVar[int] = 1


@dataclass(frozen=True)
class Branches:
    """Steps that branch into candidates: how many, from which step on, and the gap of scores above which the
    best and the worst become a pair. `judge` names what scores noisy candidates; None: the run's rewards.
    """

    num_candidates: int
    first_transition: int
    min_margin: float
    judge: str | None = None


@dataclass(frozen=True)
class TransitionPairs:
    """Pairs of transitions at the same step, of which one is preferred.

    `source`: the trajectories of the pair stage's pairs (`decided`), of every two scored images of a prompt
    (`every`), or candidates of one step (`branches`). With `whole_pairs` all steps of a pair stay together.
    """

    source: Literal["decided", "every", "branches"]
    fraction: float = 1.0
    whole_pairs: bool = False
    branches: Branches | None = None
    takes_first: ClassVar[bool] = False
    unit: ClassVar[str] = "transitions"
    images_per_row: ClassVar[int] = 2
    draws: ClassVar[int] = 1


Data = Pairs | Images | Transitions | TransitionPairs
