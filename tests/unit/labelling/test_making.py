"""New questions: equal images are kept once, checks are ruined copies, and names of files tell nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from diffexpo.config.people import RatingConfig
from diffexpo.labelling.making import Couple, add_couples, open_book, ruined
from tests.raters import PLAIN, couples, png


def test_names_of_images_are_random_and_equal_images_are_kept_once(tmp_path: Path) -> None:
    names = []
    for folder in ("one", "two"):
        book = open_book(tmp_path / folder, "study", PLAIN, {})
        same = Couple("p", "prompt", "base", "other", png(0), png(1))
        add_couples(book, 1, [same, Couple("p", "prompt", "base", "third", png(0), png(2))], ["quality"], 1)
        first, second = book.items()
        assert first.image_a == second.image_a and len({first.image_b, second.image_b, first.image_a}) == 3
        assert book.image_path(first.image_a).read_bytes() == png(0)
        names.append(first.image_a)
    assert names[0] != names[1], "the same image has another name in another book"


def test_checks_are_a_ruined_copy_of_an_image(tmp_path: Path) -> None:
    book = open_book(tmp_path, "study", RatingConfig(checks_every=3), {})
    add_couples(book, 1, couples(10), ["quality", "alignment"], 1)
    checks = book.items(kind="check")
    assert len(checks) == 7, "10 pairs x 2 questions, one check in three"
    originals = {png(2 * number) for number in range(10)}
    for check in checks:
        assert book.image_path(check.image_a).read_bytes() in originals
        assert check.name_b == "one (ruined)" and check.wanted == 0
    none = open_book(tmp_path / "none", "study", PLAIN, {})
    add_couples(none, 1, couples(10), ["quality"], 1)
    assert not none.items(kind="check")


def test_a_ruined_copy_has_the_size_and_little_else_of_the_image() -> None:
    for size in ((64, 64), (50, 30), (3, 3)):
        out = io.BytesIO()
        ramp = np.tile(np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None], (size[1], 1, 3))
        Image.fromarray(ramp).save(out, "PNG")
        copy = Image.open(io.BytesIO(ruined(out.getvalue(), "key")))
        assert copy.size == size and ruined(out.getvalue(), "key") == ruined(out.getvalue(), "key")
        if size == (64, 64):
            pixels = np.asarray(copy, dtype=np.float64).mean(axis=2).ravel()
            assert abs(np.corrcoef(pixels, ramp.mean(axis=2).ravel())[0, 1]) < 0.5
