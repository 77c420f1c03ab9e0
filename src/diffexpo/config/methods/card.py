"""The contract of a training method: its settings are the fields of a class, and what the rooms must know of
it stands beside them. Imports without torch.

Nothing outside of `config/methods` and `algorithms` knows a method by its name: rules, cost, loops, estimate,
report and citations ask the card.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

import diffexpo.config.schema as sections
from diffexpo.config.methods.data import Branches, Data, Pairs, TransitionPairs
from diffexpo.config.rewards import RewardCard, RewardConfig, read_card
from diffexpo.config.section import Section

Work = tuple[str, str | None]
"""(what it was used for, key of the work in papers.bib; None: no work is known)."""

ONLINE = ("train", "evaluate", "collect", "pair")
"""Stages of an iteration that learns from what the iterations before it collected."""


class Anchor(NamedTuple):
    """The base's prediction under guidance: the version of the weights that holds the base, and the weight of
    the pull as a share of the loss's own coefficient."""

    version: Literal["reference", "base"]
    weight: float
    guidance: float


class MethodConfig(Section):
    """Any method: typed settings, and the facts that are declared with them."""

    type: str
    """The training method."""

    title: ClassVar[str]
    """Name as its paper writes it."""
    papers: ClassVar[tuple[str, ...]] = ()
    """Works to cite for it, by their keys in papers.bib."""
    stages: ClassVar[tuple[str, ...]] = ONLINE
    """Stages of an iteration in order. Those after `evaluate` serve the next iteration; the last has none."""
    first_stages: ClassVar[tuple[str, ...]] = ()
    """Stages that come once, before all others, as iteration 0."""
    pairing: ClassVar[Literal["ranked", "data", "improved", "none"]] = "ranked"
    """How images are compared, in pairs or by their scores: best against worst by the rewards, images of the
    offline data against the model's own, or improved images against those that they were made from; or
    not at all (`none`), and no reward is needed."""
    prompts_of_data: ClassVar[bool] = False
    """Images are drawn for the prompts of the offline data, not for those of `prompts.source`."""
    drawn_by: ClassVar[Literal["iterates", "base"]] = "iterates"
    """Whose images are collected: those of the agents, which are iterates, or of the base in each
    iteration."""
    versions_drawn: ClassVar[int] = 1
    """Images that become of each image drawn for training (2: it is improved)."""
    group_size: ClassVar[int] = 2
    """Smallest number of images of one prompt that it can learn from."""
    restraint: ClassVar[str] = "lower training.learning_rate"
    """The advice that holds a model closer to where it began."""
    story: ClassVar[str | None] = None
    """One sentence on how it learns, where the general one would not do."""
    learns_at_once: ClassVar[bool] = True
    """Offline images, if there are any, teach in iteration 1 already."""

    # ---- what it learns from, and with -------------------------------------------------------------------

    @property
    def data(self) -> Data:
        """What it learns from."""
        return Pairs()

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions of the weights besides "current" whose prediction the loss looks at: "reference",
        "old"."""
        return ()

    @property
    def measures_batch(self) -> bool:
        """Whether the loss needs a number of the step's whole batch, from a pass without gradient under
        "current" and every other version."""
        return False

    @property
    def needs_uncertainty(self) -> bool:
        """Whether pairs carry the spread between scorers."""
        return False

    @property
    def initial_loss(self) -> float | None:
        """The loss where current, reference and old agree; None: not known beforehand."""
        return None

    @property
    def start_loss(self) -> float | None:
        """What a report draws as the start of the loss, e.g. ln 2 of a logistic one; None: nothing."""
        return self.initial_loss if self.initial_loss == math.log(2) else None

    @property
    def improvement(self) -> sections.ImproverConfig | None:
        """The improvement model that redraws what was drawn; None: there is none."""
        return None

    @property
    def named_files(self) -> tuple[str, ...]:
        """Files and folders that its settings name."""
        return ()

    # ---- what follows from it ----------------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:
        """Whether the loss runs the version "reference"."""
        return "reference" in self.versions

    @property
    def needs_old_policy(self) -> bool:
        """Whether the loss runs the version "old", which starts each iteration as a copy of "current"."""
        return "old" in self.versions

    @property
    def shows_agreement(self) -> bool:
        """Whether a step shows that policy and reference agree, by a margin of 0 or by a loss that is
        known."""
        return self.needs_reference and (isinstance(self.data, Pairs) or self.initial_loss is not None)

    @property
    def reference_memory(self) -> float | None:
        """Share of itself that the reference keeps when it follows an iterate: 0 is the previous iterate;
        None: it does not follow, and is the base."""
        return None

    def reference_share(self, measured: Mapping[str, object]) -> float:
        """Share of itself that the reference keeps when it follows an iterate that was trained with these
        metrics."""
        return self.reference_memory or 0.0

    @property
    def moving_versions(self) -> tuple[str, ...]:
        """Versions besides "current" that may change within an iteration, so that its checkpoints hold
        them."""
        return ("old",) if self.needs_old_policy else ()

    @property
    def moves_reference(self) -> bool:
        """Whether the reference follows the iterates instead of being the base."""
        return self.reference_memory is not None

    @property
    def anchor_version(self) -> Literal["reference", "base"] | None:
        """Version of the weights that holds the base, where the loss pulls to its prediction; else None."""
        return None

    @property
    def anchor(self) -> Anchor | None:
        """What the loss pulls predictions to besides what it learns; None: to nothing."""
        return None

    @property
    def anchor_forwards(self) -> int:
        """Forwards without gradient that this takes of each image of a pair, besides those of `versions`."""
        return 0

    @property
    def held_draws(self) -> int:
        """At how many of a row's draws of noise and time it takes them."""
        return self.data.draws

    @property
    def proximal(self) -> float:
        """Share of the loss's coefficient with which predictions are pulled to the reference's; 0: not."""
        return 0.0

    @property
    def learned_guidance(self) -> float:
        """Guidance that the loss teaches the policy's own prediction, which is then drawn from without; 1:
        none."""
        return 1.0

    def describe_pull(self, elements: int) -> str | None:
        """What the pull to the reference comes to with latents of so many elements; None where it does not
        depend on them."""
        return None

    @property
    def logit_scale(self) -> float | None:
        """What the loss multiplies a pair's margin of errors by; None where it is no multiple of it."""
        return None

    @property
    def margin_pairs(self) -> int:
        """Pairs of an iteration whose margins are measured at most; 0 where there are no margins of pairs."""
        return 0

    @property
    def draws_first(self) -> bool:
        """Whether each iteration draws the images that it learns from, with one agent, keeping every step of
        the sampler; else it learns from those of the iterations before it."""
        return self.stages.index("collect") < self.stages.index("train")

    @property
    def has_pairs(self) -> bool:
        """Whether it learns from pairs of images that the pair stage makes."""
        return "pair" in self.stages and self.data.images_per_row == 2

    @property
    def is_ranked(self) -> bool:
        """Whether rewards order what was drawn."""
        return self.pairing == "ranked"

    @property
    def branches(self) -> Branches | None:
        """How steps branch into candidates while images are drawn; None: they do not."""
        return self.data.branches if isinstance(self.data, TransitionPairs) else None

    @property
    def filters_by_reward(self) -> bool:
        """Whether improved images must also score above those that they were made from."""
        return False

    def learns_from_offline(self, run: Run) -> bool:
        """Whether iteration 1 has something to train on."""
        return run.offline.source is not None and self.learns_at_once

    def first_trained(self, run: Run) -> int:
        """The first iteration that trains: the second where there is nothing to learn from before."""
        return 1 if self.draws_first or self.learns_from_offline(run) else 2

    def starts_apart(self, run: Run, iteration: int) -> bool:
        """Whether an iteration that trains may start from another model than what its loss measures it
        against: the base, or an average of iterates, from which it has been trained away before; or the same
        in another precision."""
        if run.model.inference_precision not in ("no", run.training.mixed_precision):
            return True
        is_base = self.reference_memory is None or self.anchor_version == "base"
        if not is_base and self.reference_memory == 0:
            return False
        return iteration > self.first_trained(run) or (is_base and run.tuning.start is not None)

    def collects(self, run: Run) -> bool:
        """Whether any images are drawn for training: from the second iteration on, or in each where it learns
        from how they were drawn."""
        return self.draws_first or run.explore.iterations > 1

    def images_of_prompt(self, run: Run) -> int:
        """Images that are drawn for a prompt in one collection, by all agents."""
        return run.explore.images_per_prompt * (1 if self.draws_first else 2)

    # ---- what it says of a run ---------------------------------------------------------------------------

    def problems(self, run: Run) -> Iterable[str]:
        """Every contradiction of the method with the rest of the settings, one line each."""
        return ()

    def notes(self, run: Run) -> Iterable[str]:
        """What is allowed but worth knowing before spending time, one sentence each."""
        return ()

    def one_size_reason(self) -> str | None:
        """Why all images must have one size, ending with what to do besides leaving `model.buckets` empty;
        None: they need not."""
        return None

    def works(self, run: Run) -> Iterator[Work]:
        """Works that the run used because of its method."""
        for key in self.papers:
            yield f"method {self.title}", key

    def evaluations_per_image(self, sampler: sections.SamplerConfig, evaluations: int) -> int:
        """Network evaluations of drawing an image for training, where the sampler alone takes
        `evaluations`."""
        return evaluations

    def stage_costs(self, run: Run, images: int) -> Mapping[str, int]:
        """Network evaluations of its own stages: "drawing" for `images` images, "training" once."""
        return {"drawing": 0, "training": 0}

    def plan(self, run: Run) -> Mapping[str, str]:
        """What its own stages do, in words, by stage."""
        return {}


class Run(Section):
    """The settings of a run, as cards see them; `RunConfig` chooses among the methods."""

    name: str = Field(default="expo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run name; the default folder is `runs/<name>`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The one seed. Every random number is keyed by it and by what it is for."""
    model: sections.ModelConfig = sections.ModelConfig()
    tuning: sections.TuningConfig = sections.TuningConfig()
    prompts: sections.PromptConfig = sections.PromptConfig()
    explore: sections.ExploreConfig = sections.ExploreConfig()
    rewards: tuple[RewardConfig, ...] = (
        read_card(name="judge_train", type="clip", path="emoji:judge_train"),
    )
    """Scorers of images: those with `role: train` rank them."""
    mixture: sections.MixtureConfig = sections.MixtureConfig()
    pairing: sections.PairingConfig = sections.PairingConfig()
    offline: sections.OfflineConfig = sections.OfflineConfig()
    hybrid: sections.HybridConfig = sections.HybridConfig()
    algorithm: MethodConfig
    training: sections.TrainingConfig = sections.TrainingConfig()
    evaluation: sections.EvaluationConfig = sections.EvaluationConfig()
    baseline: sections.BaselineConfig = sections.BaselineConfig()
    tracking: sections.TrackingConfig = sections.TrackingConfig()

    @property
    def scorers(self) -> dict[str, tuple[RewardCard, ...]]:
        """Everything that scores images, by the setting that names it."""
        return {
            "rewards": self.rewards,
            "evaluation.judges": self.evaluation.judges,
            "explore.validation.judges": self.explore.validation.judges,
        }
