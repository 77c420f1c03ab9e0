"""What every reward's card has: its settings and, as class variables and properties, what is known of it
before anything is loaded. Imports without torch.

All types take the same settings, so that resolved files are complete; a type refuses those that it does not
read.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from diffexpo.config.people import Asking
from diffexpo.config.rewards.groups import SelfJudgeConfig, ServiceConfig, VlmConfig, address_problem
from diffexpo.config.section import Section

# Images that are scored in one call; a scorer that compares images of a prompt sees no more of them.
SCORING_BATCH = 64
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"
# Parameters of these CLIPModels, text and image towers together.
VIT_H_PARAMETERS, VIT_L_PARAMETERS = 986_109_441, 427_616_513
# Groups that only some types read, and what the others do not do.
GROUPS = {
    "service": "calls no server",
    "vlm": "asks no vision-language model",
    "self_judge": "asks no model for denoising errors",
}


Run = Any
"""The settings of a run, which cards are a part of: `Run` of `diffexpo.config.methods.card`."""


class RewardCard(Section):
    """Settings and facts of one type of reward.

    `type` is a `Literal` of the subclass with itself as default. The scorer is the class `scorer` in the file
    of `diffexpo.rewards` that has the name of the card's file.
    """

    scorer: ClassVar[str]
    """Name of the class that scores."""
    what: ClassVar[str]
    """What it scores, in words."""
    unit: ClassVar[str]
    """Unit and usual range of its scores, in words."""
    path_is: ClassVar[str] = ""
    """What `path` must name; "" where the type does not read it."""
    path_is_local: ClassVar[bool] = False
    """`path` names a run or file of this machine, never a name of the hub."""
    default_path: ClassVar[str | None] = None
    """Stands in for `path: null`; "" is the run's own model, None means that a path must be given."""
    base_is: ClassVar[str] = ""
    """What `base` must name; "" where the type does not read it."""
    default_base: ClassVar[str | None] = None
    """Stands in for `base: null`."""
    scales: ClassVar[tuple[str, ...]] = ()
    """Values that `scale` may have, the default first; none: the type has its own unit only."""
    has_weights: ClassVar[bool] = False
    """It holds a network, so `precision` acts."""
    source: ClassVar[str] = "nothing to fetch"
    """Where the official weights are found."""
    licence: ClassVar[str] = "-"
    """Licence of the official weights."""
    pickled_entry: ClassVar[str | None] = None
    """The official weights are published as a pickle only, and this subscript gives their tensors."""
    papers: ClassVar[tuple[str, ...]] = ()
    """Keys of `papers.WORKS`; none: no published work stands behind the type itself."""
    reads: ClassVar[Literal["images", "latents"]] = "images"
    """What the scorer is given."""
    is_concurrent: ClassVar[bool] = False
    """Several calls may be under way at once, so `concurrency` acts."""
    asks_people: ClassVar[bool] = False
    """People compare what was drawn; nothing is scored."""
    groups: ClassVar[frozenset[str]] = frozenset()
    """Groups of `GROUPS` that it reads."""
    is_sized_by_files: ClassVar[bool] = False
    """The size of its network is that of the safetensors files in the folder `path`, where there are any."""
    parameters: ClassVar[int | None] = 0
    """Parameters of the network that it holds here; None where that is not known."""
    score_range: ClassVar[tuple[float, float] | None] = None
    """Where scores of images that fit their prompts lie; wide, a first sign that something is wrong."""
    never_cached: ClassVar[str] = ""
    """Why scores may not be kept, as the predicate of a sentence; "" where they may."""
    why_unverified: ClassVar[str] = ""
    """Why the shipped images cannot verify it, as the end of a message; "" where they can."""
    is_right_or_wrong: ClassVar[bool] = False
    """Scores are 1 (right) or 0 (wrong), so their mean is a share of images."""
    biases: ClassVar[str] = "none measured"
    """What its scores are known to follow besides what it is asked, in words."""
    score_slack: ClassVar[float] = 0.0
    """Relative difference from known scores that another version of a library may cause."""

    name: str
    """Name in metrics and reports; unique within the run."""
    type: str
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
    """Folder in which scores are kept by image, prompt and scorer, so that the same question is not asked
    again, by whatever run; null keeps none. Scores of networks are kept by whole batches. A `python` function
    must then score each image independently and deterministically."""
    service: ServiceConfig = ServiceConfig()
    """How `remote` and `vlm` call their server."""
    vlm: VlmConfig = VlmConfig()
    """What `vlm` asks."""
    self_judge: SelfJudgeConfig = SelfJudgeConfig()
    """How `implicit` and `denoising` look at an image."""

    @classmethod
    def kind(cls) -> str:
        """The value of `type`."""
        return str(cls.model_fields["type"].default)

    @classmethod
    def facts(cls) -> dict[str, object]:
        """What `diffexpo rewards list --json` says of the type."""
        names = "what unit path_is default_path base_is default_base scales has_weights source licence"
        shown = {"path_is": "path", "base_is": "base", "source": "where"}
        return {shown.get(name, name): getattr(cls, name) for name in names.split()}

    @classmethod
    def needs(cls) -> str:
        """What a user must have, in words."""
        return f"path: {cls.path_is}" if cls.path_is and cls.default_path is None else cls.source

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """What its scorer is made with besides its name.

        Args:
            resolve: Turns a `path` (an `emoji:` alias, say) into a folder, hub id or file.
            device: Where networks run.
        """
        return {}

    @property
    def chosen_path(self) -> str | None:
        """`path`, or what stands in for it."""
        return self.path or self.default_path

    @property
    def chosen_scale(self) -> str | None:
        """`scale`, or the type's default; None where it has its own unit only."""
        return self.scale or next(iter(self.scales), None)

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What scores: two rewards of one identity are one scorer."""
        return (self.type, self.path)

    @property
    def is_groupwise(self) -> bool:
        """Whether a score depends on the other images of its prompt."""
        return False

    @property
    def stands_on(self) -> str:
        """Name of the reward of the run that this one reads images by; "" where it reads them itself."""
        return ""

    @property
    def why_uncached(self) -> str:
        """Why scores may not be kept, as the end of a message on `cache`; "" where they may."""
        return f": type {self.type} {self.never_cached}; remove cache" if self.never_cached else ""

    @property
    def num_parameters(self) -> int | None:
        """`parameters`, of these settings."""
        return self.parameters

    @property
    def usual_range(self) -> tuple[float, float] | None:
        """`score_range`, of these settings."""
        return self.score_range

    @property
    def known_scores(self) -> str | None:
        """File of `assets/rewards` with the scores that these settings give the shipped images."""
        return None

    @property
    def asking(self) -> Asking | None:
        """What people are asked; None where nobody is."""
        return None

    def plan(self, prompts: int) -> str:
        """What people are asked of a collection of so many prompts, in words; "" where nobody is."""
        return ""

    def uses(self) -> Iterator[tuple[str, str | None]]:
        """Published works that it stands on: (addition to the reward's name, key in `papers.WORKS`); a key of
        None is something that only its user can cite."""
        if not self.papers:
            yield (f" ({self.type} {self.path})" if self.path else ""), None
        for key in self.papers:
            yield "", key

    def problems(self, run: Run, where: str) -> Iterator[str]:
        """What is wrong with these settings in a run: sentences that begin with the name of a setting.

        Args:
            run: The whole configuration, whose single values are valid.
            where: Place of these settings in it, `rewards.0` or `evaluation.judges.0`.
        """
        head = f"type {self.type}"
        if self.path_is and self.default_path is None and not self.path:
            yield f"path is empty: {head} needs {self.path_is}"
        if self.path and not self.path_is:
            yield f"path = {self.path!r}: {head} reads no file; remove the path"
        if self.base and not self.base_is:
            yield f"base = {self.base!r}: {head} stands on no other model; remove base"
        if self.scale and self.scale not in self.scales:
            yield f"scale = {self.scale}: {head} has its own unit ({self.unit}); remove scale"
        if self.precision != "float32" and not self.has_weights:
            yield f"precision = {self.precision}: {head} holds no network; remove precision"
        if self.role == "train" and self.weight == 0:
            yield "weight = 0: it ranks nothing; use role: watch to score without training"
        if self.concurrency is not None and not self.is_concurrent:
            yield (
                f"concurrency = {self.concurrency}: only remote, vlm and python are called several times at "
                "once; remove it"
            )
        if self.cache is not None and self.why_uncached:
            yield f"cache = {self.cache!r}{self.why_uncached}"
        for group, why in GROUPS.items():
            settings = getattr(self, group)
            if group not in self.groups and settings != type(settings)():
                yield f"{group} is set: {head} {why}; remove {group}"


class NetworkCard(RewardCard):
    """A reward whose network runs here."""

    has_weights: ClassVar[bool] = True

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """Where its weights are, and how they run."""
        path, base = self.chosen_path, self.base or self.default_base
        return {
            "path": resolve(path) if path else None,
            "device": device,
            "base": resolve(base) if base else None,
            "precision": self.precision,
        }


class ClipLikeCard(NetworkCard):
    """A reward that is a cosine of a text and an image vector, in one of three units."""

    scales: ClassVar[tuple[str, ...]] = ("logit", "raw", "percent")

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """With its unit."""
        return super().arguments(resolve, device) | {"scale": self.chosen_scale}

    @property
    def usual_range(self) -> tuple[float, float]:
        """Of cosines, or of one of their multiples."""
        return (-0.1, 0.6) if self.chosen_scale == "raw" else (-10.0, 60.0)


class CalledCard(RewardCard):
    """A reward behind a server."""

    is_concurrent: ClassVar[bool] = True
    groups: ClassVar[frozenset[str]] = frozenset({"service"})

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """Its address, and how it is called."""
        return {"url": self.path, "service": self.service, "concurrency": self.concurrency}

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        if self.path and (problem := address_problem(self.path)):
            yield problem
