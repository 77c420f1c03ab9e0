"""Damages in degrees: nothing at 0, each where it belongs, and more the stronger it is."""

from __future__ import annotations

import numpy as np
import pytest

from diffexpo.worlds.scenes.compose import BACKGROUNDS, compose
from diffexpo.worlds.scenes.grammar import parse_scene
from worlds.scenes.damage import KINDS, blur, draw_damaged

SCENES = [
    parse_scene(text)
    for text in ("a red key", "two blue hats", "three fish and a green bell", "a woman judge", "four cats")
]


def drawn(damage: dict[str, float], seed: int) -> np.ndarray:
    scene = SCENES[seed % len(SCENES)]
    return draw_damaged(scene, damage, np.random.default_rng(seed), np.random.default_rng(seed + 1000))


def test_without_damage_it_is_the_true_image_on_one_of_the_backgrounds() -> None:
    for seed in range(20):
        image = drawn({}, seed)
        true = compose(SCENES[seed % len(SCENES)], np.random.default_rng(seed))[0]
        # Only the background's colour may be another one: every pixel between sprites is of one of them.
        flat = image.reshape(-1, 3) * 255
        colours, counts = np.unique(flat.round(3), axis=0, return_counts=True)
        assert tuple(colours[counts.argmax()].astype(int)) in BACKGROUNDS
        opaque = np.abs(true.astype(float) - true[0, 0]).max(-1) > 120
        assert np.abs(image[opaque] * 255 - true[opaque]).mean() < 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_stronger_damage_changes_more(kind: str) -> None:
    changes = {strength: [] for strength in (0.25, 0.5, 1.0)}
    for seed in range(40):
        before = drawn({kind: 1e-9}, seed)
        for strength, found in changes.items():
            found.append(np.abs(drawn({kind: strength}, seed) - before).mean())
    means = [float(np.mean(found)) for found in changes.values()]
    assert 0 < means[0] < means[1] < means[2]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_again(kind: str) -> None:
    first, again = (drawn({kind: 0.6}, 3) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.min() >= 0 and first.max() <= 1 and first.shape == (64, 64, 3)


def test_a_blur_keeps_the_mean_and_leaves_flat_images_alone() -> None:
    flat = np.full((8, 8, 3), 0.3)
    assert np.allclose(blur(flat, 1.0), flat, atol=1e-12)
    # One pass of a box of 3 x 3: a point in the middle becomes nine ninths.
    point = np.zeros((9, 9, 1))
    point[4, 4] = 1.0
    once = blur(point, 1 / 6)
    assert np.allclose(once[3:6, 3:6], 1 / 9, atol=1e-12) and abs(once.sum() - 1) < 1e-12


def test_damages_of_sprites_leave_the_background_alone() -> None:
    for seed in range(20):
        clean = drawn({}, seed)
        colours, counts = np.unique(clean.reshape(-1, 3), axis=0, return_counts=True)
        is_background = np.abs(clean - colours[counts.argmax()]).max(-1) < 1e-6
        for kind in ("holes", "fade"):
            changed = np.abs(drawn({kind: 1.0}, seed) - clean).max(-1) > 1e-5
            assert changed.any() and not (changed & is_background).any(), kind
