"""Numbers of sets of images: kept by the images that they are of, and without images that have no features."""

import json

import numpy as np
import pytest
import torch

from diffexpo.assembly.measuring import diversities, vendi_of
from diffexpo.config.suites import Suite
from diffexpo.evaluation.benchmark import Judged, Outcome
from diffexpo.evaluation.gallery import Gallery, Rows
from diffexpo.evaluation.metrics import vendi_score
from diffexpo.evaluation.suites import Embedder
from diffexpo.types import Prompt


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def made(tmp_path):
    """Three prompts with two images each, the same one twice for the first."""
    rows = Rows(tuple(Prompt(name, name, "", {}) for name in "abc"), 2, 4)
    gallery = Gallery(tmp_path, rows)
    gallery.keep(0, [picture(0), picture(0), picture(1), picture(2)])
    gallery.keep(1, [picture(3), picture(4)])
    suite = Suite(name="made", title="made", prompts="made.txt", images_per_prompt=2, batch_size=4)
    return Outcome(suite, rows, (Judged("m", "m", gallery, {}),), (), {})


class Counting:
    """Features of the images' upper rows, and how often they were asked for."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images):
        self.asked += len(images)
        return images[:, :, :2].flatten(1)


def test_the_score_is_the_mean_over_prompts_and_is_kept_by_its_images(made, tmp_path):
    counting = Counting()
    embedder = Embedder(counting, "judge image features")
    features = [
        counting(torch.from_numpy(picture(seed).transpose(2, 0, 1)[None] / np.float32(255)))
        for seed in range(5)
    ]
    counting.asked = 0
    pairs = [(0, 0), (1, 2), (3, 4)]
    expected = np.mean(
        [vendi_score(torch.cat([features[a], features[b]]).double().numpy()) for a, b in pairs]
    )
    first = diversities(made, embedder, "v1")
    assert first["models"]["m"]["judge image features"][0] == pytest.approx(expected)
    assert counting.asked == 6
    assert diversities(made, embedder, "v1") == first and counting.asked == 6
    [gallery] = [model.gallery for model in made.models]
    gallery.keep(1, [picture(3), picture(3)])
    assert (
        diversities(made, embedder, "v1")["models"]["m"]["judge image features"]
        < first["models"]["m"]["judge image features"]
    )
    assert counting.asked == 8, "only the prompt whose image is another"
    assert diversities(made, embedder, "v2") is not None and counting.asked == 14, "another version sees all"
    for path in tmp_path.glob("vendi-*.json"):
        assert set(json.loads(path.read_text())) == {"a", "b", "c"}


def test_one_colour_has_no_features_and_a_lost_image_no_prompt(made):
    [model] = made.models
    model.gallery.keep(0, [np.full((8, 8, 3), 7, np.uint8), picture(0), None, picture(2)])
    mean, low, high = vendi_of(made, model)
    assert 1.0 <= mean <= 2.0 and np.isnan(low) and np.isnan(high), "one prompt is left"
