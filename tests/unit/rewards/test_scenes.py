"""The checkers of scenes: which facts they find in true images, and how facts become scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffexpo.assembly.aliases import resolve
from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.scenes import (
    CONFIG,
    FLOOR,
    LOOKS,
    NAMES,
    Findings,
    SceneCorrect,
    SceneLooks,
    SceneScore,
    Sprite,
    load_checker,
    scene_facts,
    scene_score,
)
from diffexpo.worlds.scenes.compose import BACKGROUNDS, compose, paste
from diffexpo.worlds.scenes.grammar import parse_scene, scenes_of

JUDGES = ("scenes:looks_train", "scenes:looks_heldout")
CHECKERS = ("scenes:checker_train", "scenes:checker_heldout")
SCENES = scenes_of("heldout")[:200]


def true_images() -> Tensor:
    rng = np.random.default_rng(5)
    return as_images([compose(scene, rng)[0] for scene in SCENES])


def as_images(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def found(name: str, look: str, y: float = 20.0, x: float = 20.0, probability: float = 0.99) -> Sprite:
    """A sprite that is surely of this name and look."""
    names, looks = np.zeros(len(NAMES)), np.zeros(len(LOOKS))
    names[NAMES.index(name)] = looks[LOOKS.index(look)] = 1.0
    return Sprite(probability, y, x, names, looks)


@pytest.mark.parametrize("path", CHECKERS)
def test_true_images_are_right_and_those_of_other_prompts_wrong(path: str) -> None:
    correct, texts = SceneCorrect("checker", resolve(path)), [scene.text for scene in SCENES]
    images = true_images()
    # At least 99% of facts right is what the checkers promise: 2 of 200 images may fail.
    assert correct.score(images, texts).sum() >= 198
    # No two of the shifted prompts ask for the same scene, though one may be a looser wording of another.
    assert correct.score(images, [*texts[1:], texts[0]]).sum() <= 4
    score = SceneScore("checker", resolve(path))
    assert (score.score(images, texts) > score.score(images, [*texts[1:], texts[0]])).float().mean() > 0.98


@pytest.mark.parametrize("path", CHECKERS)
def test_each_fact_fails_by_itself(path: str) -> None:
    image = np.empty((64, 64, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[0]
    paste(image, "key", "red", (8, 0))
    paste(image, "hat", "blue", (8, 40))
    crowded = image.copy()
    paste(crowded, "bell", "green", (40, 16))
    verdicts = {
        "a red key and a blue hat": (True, image),
        "a red key left of a blue hat": (True, image),
        "a hat right of a key": (True, image),
        "a red key right of a blue hat": (False, image),
        "a green key and a blue hat": (False, image),
        "two keys and a hat": (False, image),
        "a key": (False, image),
        "a car and a hat": (False, image),
        "a red key and a blue hat ": (False, crowded),
    }
    correct = SceneCorrect("checker", resolve(path))
    images = as_images([shown for _, shown in verdicts.values()])
    scores = correct.score(images, [text.strip() for text in verdicts])
    assert scores.tolist() == [float(right) for right, _ in verdicts.values()]


def test_the_score_is_the_sum_of_the_facts_logarithms() -> None:
    scene = parse_scene("a red key and a blue hat")
    pair = (found("key", "red", x=10.0), found("hat", "blue", x=50.0))
    sure = 2 * math.log(0.99)
    assert scene_score(Findings(pair, ()), scene) == pytest.approx(sure, abs=1e-12)
    # A third sprite costs the probability that it is none, a spoilt one likewise.
    extra = found("bell", "red", y=50.0, probability=0.7)
    assert scene_score(Findings((*pair, extra), (0.4,)), scene) == pytest.approx(
        sure + math.log(0.3) + math.log(0.6), abs=1e-12
    )
    # A missing thing costs the floor, and what lies there instead is one too many.
    wrong = (pair[0], found("hat", "green", x=50.0))
    assert scene_score(Findings(wrong, ()), scene) == pytest.approx(
        math.log(0.99) + 2 * math.log(FLOOR), abs=1e-12
    )


def test_an_open_look_sums_over_all_of_them() -> None:
    person = found("judge", "woman dark")
    assert scene_score(Findings((person,), ()), parse_scene("a judge")) == pytest.approx(
        math.log(0.99), abs=1e-12
    )
    assert scene_facts(Findings((person,), ()), parse_scene("a woman judge")).all
    assert not scene_facts(Findings((person,), ()), parse_scene("a judge with light skin")).all


def test_a_relation_is_read_from_the_centres() -> None:
    pair = (found("key", "red", y=20, x=10), found("hat", "blue", y=20, x=50))
    for relation, is_right in (("left of", True), ("right of", False), ("above", False), ("below", False)):
        facts = scene_facts(Findings(pair, ()), parse_scene(f"a key {relation} a hat"))
        assert facts.position == facts.all == is_right
        assert facts.objects and facts.count and facts.look and facts.clean


def test_a_spoilt_sprite_is_not_clean() -> None:
    facts = scene_facts(Findings((found("key", "red"),), (0.9,)), parse_scene("a key"))
    assert not facts.clean and not facts.all and facts.objects


def test_rows_are_scored_alone() -> None:
    score, images = SceneScore("checker", resolve(CHECKERS[0])), true_images()[:8]
    texts = [scene.text for scene in SCENES[:8]]
    alone = torch.cat([score.score(images[i : i + 1], texts[i : i + 1]) for i in range(8)])
    # Convolutions of another batch size may sum in another order: 1e-5 of scores of up to 20.
    assert torch.allclose(score.score(images, texts), alone, atol=1e-4)


def test_other_prompts_sizes_and_folders_are_refused(tmp_path: Path) -> None:
    correct = SceneCorrect("checker", resolve(CHECKERS[0]))
    with pytest.raises(RewardError, match="no prompt of a scene"):
        correct.score(torch.zeros(1, 3, 64, 64), ["a photo of a cat"])
    with pytest.raises(RewardError, match="64 x 64 pixels"):
        correct.score(torch.zeros(1, 3, 32, 32), ["a cat"])
    with pytest.raises(MissingError, match="expected a checker's folder"):
        load_checker("checker", str(tmp_path / "none"))
    (tmp_path / CONFIG).write_text('{"architecture": "transformer"}')
    with pytest.raises(RewardError, match="expected one of convolutional, mixer"):
        load_checker("checker", str(tmp_path))


@pytest.mark.parametrize("path", JUDGES)
def test_looks_are_the_scaled_cosine_of_a_clip_model(path: str) -> None:
    folder, images = resolve(path), true_images()[:6]
    texts = [scene.text for scene in SCENES[:6]]
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = CLIPTokenizer.from_pretrained(folder, local_files_only=True)(
        texts, padding="max_length", return_tensors="pt"
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        logits = model(**tokens, pixel_values=(images - mean) / std).logits_per_image
    scores = SceneLooks("looks", folder).score(images, texts)
    # The towers are the same float32 code; sums may run in another order: 1e-5 of scores of up to 100.
    assert torch.allclose(scores, logits.diagonal(), atol=1e-3)


@pytest.mark.parametrize("path", JUDGES)
def test_spoilt_images_look_worse_and_those_of_another_prompt_do_not(path: str) -> None:
    looks, images = SceneLooks("looks", resolve(path)), true_images()
    texts = [scene.text for scene in SCENES]
    scores = looks.score(images, texts)
    small = torch.nn.functional.interpolate(images, scale_factor=0.25, mode="area")
    blurred = torch.nn.functional.interpolate(small, size=64, mode="bilinear")
    for spoilt in (blurred, 0.6 + 0.4 * images):
        assert (scores > looks.score(spoilt, texts)).float().mean() > 0.95
    # What the prompt asks for hardly matters: the share is 1/2 up to 4 deviations of 200 draws.
    others = looks.score(images.roll(1, 0), texts)
    assert abs((scores > others).float().mean() - 0.5) < 4 * 0.5 / len(SCENES) ** 0.5


def test_the_heldout_judge_of_looks_sees_noise() -> None:
    looks, images = SceneLooks("looks", resolve("scenes:looks_heldout")), true_images()
    texts = [scene.text for scene in SCENES]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    spoilt = (images + 0.1 * noise).clamp(0, 1)
    assert (looks.score(images, texts) > looks.score(spoilt, texts)).float().mean() > 0.95


def test_vectors_of_looks_are_no_features_for_diversity() -> None:
    assert not SceneLooks("looks", resolve(JUDGES[0])).has_image_features
