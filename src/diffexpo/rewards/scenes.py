r"""Checkers of scenes: what a small detector finds in an image, against what the prompt asks for.

    score   = max over assignments of  sum_slots log p(slot) + sum_others log(1 - p(sprite))
                                        + log p(relation) + sum_spoilt log(1 - p(spoilt))
    correct = 1 if exactly the things asked for are found, each in its colour, in the relation, nothing else

A slot is one thing that the prompt asks for; p(slot) = p(sprite) p(name) p(look). Logarithms are floored at
log 0.03. GenEval (arXiv 2310.11513) checks the same facts with a large detector, binary only.

How good an image looks is judged apart, by a small dual encoder in the layout of PickScore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffexpo.errors import RewardError
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.dual_encoder import NetworkReward
from diffexpo.rewards.weights import fill, find_folder, fingerprint, read_settings, read_tensors
from diffexpo.worlds.scenes.compose import IMAGE_SIZE, READ_CLARITY, clarity
from diffexpo.worlds.scenes.grammar import (
    COLOURS,
    GENDERS,
    OBJECTS,
    OCCUPATIONS,
    TONES,
    Scene,
    parse_scene,
)

NAMES = (*OBJECTS, *OCCUPATIONS)
LOOKS = (*COLOURS, *(f"{gender} {tone}" for gender in GENDERS for tone in TONES))
STRIDE = 4
"""Pixels between two places of the detector's maps."""
FLOOR = 0.03
FOUND, SPOILT = 0.45, 0.55
"""Probabilities above which a sprite counts as there, or as spoilt."""
MOST_SPRITES = 7
"""Sprites that the score looks at, the surest first."""
CLARITY_WIDTH = 0.06
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, the first with a dilation."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.before, self.between = nn.GroupNorm(8, width), nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.between(self.first(F.silu(self.before(x))))))


class ConvolutionalChecker(nn.Module):
    """A plain convolutional detector: images (B, 3, 64, 64) in [0, 1] to maps (B, 2 + names + looks, 16, 16).

    The first two maps are logits of "the centre of a sprite" and "the centre of a spoilt one".
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1), nn.SiLU(), nn.Conv2d(24, width, 4, 2, 1), Residual(width, 1)
        )
        self.body = nn.Sequential(Residual(width, 2), Residual(width, 2))
        self.head = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 2 + len(NAMES) + len(LOOKS), 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.head(self.body(self.stem(images * 2 - 1)))
        return maps


class Mixer(nn.Module):
    """A depthwise 5 x 5 convolution and two of 1 x 1, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(self.around(x)))))


class MixerChecker(nn.Module):
    """A detector of patches at two resolutions; input and output as of `ConvolutionalChecker`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 6, STRIDE, 1)
        self.fine = nn.Sequential(Mixer(width), Mixer(width))
        self.pool = nn.Conv2d(width, width, 2, 2)
        self.coarse = nn.Sequential(Mixer(width), Mixer(width))
        self.join = nn.Conv2d(2 * width, width, 1)
        self.last = nn.Sequential(Mixer(width), Mixer(width))
        self.head = nn.Conv2d(width, 2 + len(NAMES) + len(LOOKS), 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.patch(images * 2 - 1))
        coarse = F.interpolate(self.coarse(self.pool(fine)), scale_factor=2, mode="bilinear")
        maps: Tensor = self.head(self.last(self.join(torch.cat([fine, coarse], dim=1))))
        return maps


NETWORKS = {"convolutional": ConvolutionalChecker, "mixer": MixerChecker}


@dataclass(frozen=True)
class Sprite:
    """Something found: its probability, centre in pixels, and probabilities of `NAMES` and `LOOKS`."""

    probability: float
    y: float
    x: float
    names: np.ndarray
    looks: np.ndarray

    @property
    def name(self) -> str:
        """The likeliest name."""
        return NAMES[int(self.names.argmax())]

    @property
    def look(self) -> str:
        """The likeliest look."""
        return LOOKS[int(self.looks.argmax())]


@dataclass(frozen=True)
class Findings:
    """What a detector finds in one image: sprites, surest first, and probabilities of spoilt ones."""

    sprites: tuple[Sprite, ...]
    spoilt: tuple[float, ...]

    @property
    def there(self) -> list[Sprite]:
        """The sprites that count."""
        return [sprite for sprite in self.sprites if sprite.probability > FOUND]


@dataclass(frozen=True)
class Facts:
    """Which facts of a prompt hold in an image; `clean` means nothing else and nothing spoilt is there."""

    objects: bool
    count: bool
    look: bool
    position: bool
    clean: bool

    @property
    def all(self) -> bool:
        """Whether the image is entirely right."""
        return self.objects and self.count and self.look and self.position and self.clean


@torch.no_grad()
def find_sprites(network: nn.Module, images: Tensor) -> list[Findings]:
    """What a detector finds in images (B, 3, 64, 64) in [0, 1]: the local maxima of its maps."""
    maps = network(images).float()
    heat = maps[:, :2].sigmoid()
    is_peak = (heat == F.max_pool2d(heat, 5, 1, 2)) & (heat > FLOOR)
    names = maps[:, 2 : 2 + len(NAMES)].softmax(dim=1).cpu().numpy()
    looks = maps[:, 2 + len(NAMES) :].softmax(dim=1).cpu().numpy()
    heat, is_peak = heat.cpu().numpy(), is_peak.cpu().numpy()
    found = []
    for row in range(len(heat)):
        sprites = [
            Sprite(
                float(heat[row, 0, y, x]),
                float(y * STRIDE + STRIDE // 2),
                float(x * STRIDE + STRIDE // 2),
                names[row, :, y, x],
                looks[row, :, y, x],
            )
            for y, x in np.argwhere(is_peak[row, 0])
        ]
        sprites.sort(key=lambda sprite: -sprite.probability)
        found.append(Findings(tuple(sprites), tuple(float(p) for p in heat[row, 1][is_peak[row, 1]])))
    return found


@dataclass(frozen=True)
class _Slot:
    """One thing that a prompt asks for: its name, and the looks that are right."""

    name: str
    looks: tuple[str, ...]

    def probability(self, sprite: Sprite) -> float:
        look = sum(float(sprite.looks[LOOKS.index(each)]) for each in self.looks)
        return sprite.probability * float(sprite.names[NAMES.index(self.name)]) * look


def _slots(scene: Scene) -> list[_Slot]:
    if (person := scene.person) is not None:
        genders = (person.gender,) if person.gender else GENDERS
        tones = (person.tone,) if person.tone else TONES
        return [_Slot(person.name, tuple(f"{gender} {tone}" for gender in genders for tone in tones))]
    return [
        _Slot(thing.name, (thing.colour,) if thing.colour else COLOURS)
        for thing in scene.things
        for _ in range(thing.count)
    ]


def _log(probability: float) -> float:
    return math.log(max(probability, FLOOR))


def scene_score(found: Findings, scene: Scene) -> float:
    """Sum of the log-probabilities of a scene's facts (module's formula)."""
    slots, sprites = _slots(scene), found.sprites[:MOST_SPRITES]
    fits = [[_log(slot.probability(sprite)) for sprite in sprites] for slot in slots]
    absent = [_log(1 - sprite.probability) for sprite in sprites]
    best = -math.inf

    def assign(slot: int, total: float, chosen: tuple[int | None, ...]) -> None:
        nonlocal best
        if slot == len(slots):
            total += sum(value for index, value in enumerate(absent) if index not in chosen)
            best = max(best, total + _relation_score(scene, sprites, chosen))
            return
        assign(slot + 1, total + math.log(FLOOR), (*chosen, None))
        for index, value in enumerate(fits[slot]):
            if index not in chosen and value > math.log(FLOOR) + 1e-6:
                assign(slot + 1, total + value, (*chosen, index))

    assign(0, 0.0, ())
    return best + sum(_log(1 - probability) for probability in found.spoilt)


def _relation_score(scene: Scene, sprites: Sequence[Sprite], chosen: tuple[int | None, ...]) -> float:
    if scene.relation is None:
        return 0.0
    first, second = chosen
    if first is None or second is None:
        return math.log(FLOOR)
    clear = _clarity(scene.relation, sprites[first], sprites[second])
    return _log(1 / (1 + math.exp(-(clear - READ_CLARITY) / CLARITY_WIDTH)))


def _clarity(relation: str, first: Sprite, second: Sprite) -> float:
    return clarity(relation, (first.y, first.x), (second.y, second.x))


def scene_facts(found: Findings, scene: Scene) -> Facts:
    """Which facts of a scene hold among the sprites that count."""
    there, slots = found.there, _slots(scene)
    wanted = {slot.name: [other for other in slots if other.name == slot.name] for slot in slots}
    by_name = {name: [sprite for sprite in there if sprite.name == name] for name in wanted}
    is_placed = True
    if scene.relation is not None:
        first, second = (by_name[thing.name][:1] for thing in scene.things)
        is_placed = bool(first and second) and _clarity(scene.relation, first[0], second[0]) > READ_CLARITY
    return Facts(
        objects=all(by_name.values()),
        count=all(len(by_name[name]) == len(slots) for name, slots in wanted.items()),
        look=all(
            bool(by_name[name]) and all(sprite.look in slots[0].looks for sprite in by_name[name])
            for name, slots in wanted.items()
        ),
        position=is_placed,
        clean=all(sprite.name in wanted for sprite in there) and not any(p > SPOILT for p in found.spoilt),
    )


def load_checker(name: str, path: str) -> tuple[nn.Module, str]:
    """A checker's network in evaluation mode, and the fingerprint of its files.

    Raises:
        MissingError: there is no such folder.
        RewardError: its files are damaged or of another architecture.
    """
    folder = find_folder(name, path, "a checker's folder", key="path", patterns=(CONFIG, WEIGHTS))
    files = [folder / CONFIG, folder / WEIGHTS]
    settings = read_settings(name, files[0])
    if settings.get("architecture") not in NETWORKS:
        raise RewardError(
            f"reward {name!r}: {files[0]} names the architecture {settings.get('architecture')!r} - expected "
            f"one of {', '.join(NETWORKS)}"
        )
    network = NETWORKS[settings["architecture"]](int(settings["width"]))
    fill(name, files[1], network, read_tensors(name, files[1]), "a checker of scenes")
    return network.eval(), fingerprint(files, {})


class SceneScore(NetworkReward):
    """`scene_score` of images (B,3,64,64) under a checker; the text of a prompt says what has to be seen.

    Raises:
        RewardError: images of another size, or a prompt that is not of the scenes' grammar.
    """

    scale = "log-probability"

    def __init__(
        self,
        name: str,
        path: str,
        device: torch.device | str = "cpu",
        *,
        base: str | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__(name, texts=None)
        self.device = torch.device(device)
        self.network, self.version = load_checker(name, path)
        self.network.to(self.device)

    def rate(self, found: Findings, scene: Scene) -> float:
        """The score of one image."""
        return scene_score(found, scene)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise RewardError(
                f"reward {self.name!r}: images are {tuple(images.shape[-2:])}; checkers of scenes read "
                f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels"
            )
        try:
            scenes = [parse_scene(prompt) for prompt in prompts]
        except ValueError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        found = find_sprites(self.network, images.to(self.device))
        return torch.tensor([self.rate(each, scene) for each, scene in zip(found, scenes, strict=True)])


class SceneCorrect(SceneScore):
    """1 where an image is entirely right, else 0."""

    scale = "1 right, 0 wrong"

    def rate(self, found: Findings, scene: Scene) -> float:
        """The score of one image."""
        return float(scene_facts(found, scene).all)


class SceneLooks(ClipReward):
    """exp(logit_scale) cos(text, image) by a judge that was taught looks alone.

    A difference of 1 is log-odds of 1 that the higher one is preferred (Bradley and Terry). The judge read
    prompts that had nothing to do with its images, so what a prompt asks for hardly matters to it.
    """

    has_image_features = False  # its vectors tell good from bad, not one thing from another
