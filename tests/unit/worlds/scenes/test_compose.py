"""True images of scenes: what they show, and that every machine draws the same."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np

from diffexpo.worlds.scenes.compose import (
    CELL,
    DRAWN_CLARITY,
    IMAGE_SIZE,
    PERSON_CELL,
    clarity,
    compose,
    sprites,
)
from diffexpo.worlds.scenes.grammar import OBJECTS, scenes_of


def test_an_image_shows_exactly_its_scene() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes_of("heldout")[:300]:
        image, placed = compose(scene, rng)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
        if scene.person is not None:
            looks = {scene.person.gender, scene.person.tone} - {None}
            assert len(placed) == 1 and looks <= set(placed[0].look.split())
            continue
        wanted = Counter(thing.name for thing in scene.things for _ in range(thing.count))
        assert Counter(sprite.name for sprite in placed) == wanted
        for thing in scene.things:
            colours = {sprite.look for sprite in placed if sprite.name == thing.name}
            assert len(colours) == 1 and thing.colour in (None, *colours)
        apart = [max(abs(a.y - b.y), abs(a.x - b.x)) for a in placed for b in placed if a is not b]
        assert all(distance >= CELL for distance in apart)
        if scene.relation is not None:
            first, second = ((sprite.y, sprite.x) for sprite in placed)
            assert clarity(scene.relation, first, second) > DRAWN_CLARITY


def test_sprites_are_multiplied_by_their_opacity_and_fill_their_cells() -> None:
    for (name, _), sprite in sprites().items():
        size = CELL if name in OBJECTS else PERSON_CELL
        assert sprite.shape == (size, size, 4)
        assert (sprite[..., :3] <= sprite[..., 3:]).all()
        rows, columns = np.where(sprite[..., 3] > 127)
        extent = max(rows.max() - rows.min(), columns.max() - columns.min())
        assert size - 4 <= extent < size


def test_prompts_and_images_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib, sys\nimport numpy as np\n"
        "from diffexpo.worlds.scenes.compose import compose\n"
        "from diffexpo.worlds.scenes.grammar import scenes_of\n"
        "rng, digest = np.random.default_rng(3), hashlib.sha256()\n"
        "for scene in scenes_of('heldout')[:100]:\n"
        "    digest.update(scene.text.encode() + compose(scene, rng)[0].tobytes())\n"
        "print(digest.hexdigest(), 'torch' in sys.modules)"
    )
    rng, digest = np.random.default_rng(3), hashlib.sha256()
    for scene in scenes_of("heldout")[:100]:
        digest.update(scene.text.encode() + compose(scene, rng)[0].tobytes())
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [digest.hexdigest(), "False"]
