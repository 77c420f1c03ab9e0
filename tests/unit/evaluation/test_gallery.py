"""One model's folder: whole batches, files that changed, scores by version and by the images they are of."""

import json
import math

import numpy as np
import pytest

from diffexpo.errors import ConfigError
from diffexpo.evaluation.gallery import Gallery, Rows
from diffexpo.types import Prompt

PROMPTS = tuple(Prompt(name, f"a {name}") for name in ("cat", "dog", "cow"))
ROWS = Rows(PROMPTS, images_per_prompt=2, batch_size=4)


def picture(value):
    return np.full((3, 5, 3), value, np.uint8)


@pytest.fixture
def gallery(tmp_path):
    made = Gallery(tmp_path / "model", ROWS)
    made.keep(0, [picture(value) for value in range(4)], seconds=1.5, evaluations=8)
    return made


def again(gallery):
    """The same folder, as another process sees it."""
    return Gallery(gallery.folder, ROWS)


def test_rows_are_cut_into_batches_prompt_by_prompt():
    assert len(ROWS) == 6
    assert [list(ROWS.of(batch)) for batch in ROWS.batches] == [[0, 1, 2, 3], [4, 5]]
    assert [(ROWS.prompt(row).id, ROWS.index(row)) for row in (1, 2, 5)] == [
        ("cat", 1),
        ("dog", 0),
        ("cow", 1),
    ]
    assert ROWS.prompt_ids == ["cat", "cat", "dog", "dog", "cow", "cow"]


def test_a_batch_is_there_when_its_file_is(gallery):
    assert gallery.missing() == [1]
    assert (again(gallery).read(3) == picture(3)).all()
    assert gallery.read(4) is None
    gallery.keep(1, [picture(9), None])
    assert again(gallery).missing() == []
    assert again(gallery).read(5) is None
    assert (gallery.spent("seconds"), gallery.spent("evaluations")) == (1.5, 8.0)


@pytest.mark.parametrize("harm", ["cut", "gone", "other", "record"])
def test_a_file_that_is_not_what_was_written_makes_its_batch_missing(gallery, harm):
    image, record = gallery.folder / "images" / "00002.png", gallery.folder / "drawn" / "00000.json"
    if harm == "cut":
        image.write_bytes(image.read_bytes()[:-1])
    elif harm == "gone":
        image.unlink()
    elif harm == "other":
        image.write_bytes((gallery.folder / "images" / "00001.png").read_bytes())
    else:
        record.write_text('{"images": ["x"]}')
    seen = again(gallery)
    assert seen.missing() == [0, 1]
    assert seen.is_damaged(0) and not seen.is_damaged(1)


def test_images_without_their_batchs_file_do_not_count(gallery):
    (gallery.folder / "drawn" / "00000.json").unlink()
    assert again(gallery).missing() == [0, 1]
    assert not again(gallery).is_damaged(0)


def test_scores_belong_to_the_images_and_to_the_version(gallery):
    gallery.keep_scores("judge-1", 0, [1.0, math.nan, math.inf, 4.0])
    assert again(gallery).scores_of("judge-1", 0) == [
        1.0,
        pytest.approx(math.nan, nan_ok=True),
        pytest.approx(math.nan, nan_ok=True),
        4.0,
    ]
    assert again(gallery).scores_of("judge-2", 0) is None
    found = again(gallery).scores("judge-1")
    assert np.isfinite(found).tolist() == [True, False, False, True, False, False]
    gallery.keep(0, [picture(value + 1) for value in range(4)])
    assert again(gallery).scores_of("judge-1", 0) is None, "these were other images"


def test_scores_are_json_without_nan(gallery):
    gallery.keep_scores("judge", 0, [math.nan] * 4)
    text = (gallery.folder / "scores" / "judge" / "00000.json").read_text()
    assert json.loads(text)["scores"] == [None] * 4


def test_a_folder_is_one_models(gallery):
    facts = {"identity": "a", "guidance": None, "label": "x"}
    gallery.claim(facts, "do this")
    gallery.claim(facts | {"label": "y"}, "do this")
    with pytest.raises(
        ConfigError, match=r"holds images of another model: its identity was 'a', now 'b'; do this"
    ):
        gallery.claim(facts | {"identity": "b"}, "do this")
    with pytest.raises(ConfigError, match="its guidance was None, now 2.5"):
        gallery.claim(facts | {"guidance": 2.5}, "do this")
