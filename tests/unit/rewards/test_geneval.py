"""GenEval's scorer: masks to detections, colours by CLIP, and what is refused; networks are tiny and random."""

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from diffexpo.config.worlds import WORLDS
from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.geneval import Found, GenEvalReward, detections
from diffexpo.rewards.geneval_rules import COLOURS, NAMES, Detection
from diffexpo.worlds import local_path

CLIP = "emoji:judge_heldout"


def network(classes=80):
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=32,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_labels=classes,
    )
    return Mask2FormerForUniversalSegmentation(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector")
    network().save_pretrained(path)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder):
    assert "emoji" in WORLDS
    return GenEvalReward("geneval", str(folder), base=local_path(CLIP))


def test_a_mask_becomes_a_box_and_a_confidence():
    classes, masks = torch.full((2, 81), -20.0), torch.full((2, 8, 8), -9.0)
    classes[0, NAMES.index("cup")], classes[1, 80] = 20.0, 20.0  # the second query says "nothing"
    masks[0, 2:4, 4:8] = 2.0
    masks[1] = 9.0
    (one,) = detections(classes, masks, 8, 8)
    assert one.detection.name == "cup"
    assert one.detection.box == (4.0, 2.0, 8.0, 4.0)
    assert one.detection.confidence == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=1e-6)
    assert one.mask.sum() == 8
    # Twice as large an image has a mask twice as large.
    (larger,) = detections(classes, masks, 16, 16)
    assert larger.detection.box[2] == 16.0
    # Without a pixel above zero, or below the threshold, there is nothing.
    assert detections(classes, torch.full((2, 8, 8), -1.0), 8, 8) == []
    classes[0, 80] = 21.0
    assert detections(classes, masks, 8, 8) == []


def test_two_classes_of_a_query_are_two_detections():
    classes, masks = torch.full((2, 81), -20.0), torch.full((2, 4, 4), 30.0)
    classes[0, 0], classes[0, 1], classes[1, 80] = 5.0, 5.0, 30.0
    assert [one.detection.name for one in detections(classes, masks, 4, 4)] == ["person", "bicycle"]


def test_the_background_does_not_colour_a_thing(scorer):
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[3:9, 3:9] = (220, 20, 20)
    mask = np.zeros((12, 12), bool)
    mask[3:9, 3:9] = True
    seen = scorer.colour(pixels, Found(Detection("car", 0.9, (3.0, 3.0, 9.0, 9.0)), mask))
    pixels[~mask] = (20, 220, 20)
    assert seen in COLOURS
    assert scorer.colour(pixels, Found(Detection("car", 0.9, (3.0, 3.0, 9.0, 9.0)), mask)) == seen


def test_scores_are_right_or_wrong_and_no_image_depends_on_another(scorer):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 40, 48, generator=generator)
    prompts = ["a photo of a bench", "a photo of two cups", "a photo of a red car left of a dog"]
    prompts[2] = "a photo of a red car and a blue dog"
    together = scorer.score(images, prompts)
    assert set(together.tolist()) <= {0.0, 1.0}
    alone = [scorer.score(images[row : row + 1], prompts[row : row + 1]).item() for row in range(3)]
    assert together.tolist() == alone


def test_what_is_found_makes_an_image_right(scorer, monkeypatch):
    box = (0.0, 0.0, 4.0, 4.0)
    found = [Found(Detection("bench", 0.95, box), np.ones((8, 8), bool))]
    monkeypatch.setattr(scorer, "find", lambda pixels: found)
    image = torch.rand(1, 3, 8, 8)
    assert scorer.score(image, ["a photo of a bench"]).tolist() == [1.0]
    assert scorer.score(image, ["a photo of two benchs"]).tolist() == [0.0]
    assert scorer.score(image, ["a photo of a bench and a dog"]).tolist() == [0.0]
    colour = scorer.colour((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), found[0])
    assert scorer.score(image, [f"a photo of a {colour} bench"]).tolist() == [1.0]


def test_what_cannot_be_is_refused(scorer, folder, tmp_path):
    with pytest.raises(RewardError, match="none of GenEval's"):
        scorer.score(torch.rand(1, 3, 8, 8), ["a cat"])
    network(classes=5).save_pretrained(tmp_path)
    with pytest.raises(MissingError, match=r"preprocessor_config\.json is missing"):
        GenEvalReward("geneval", str(tmp_path), base=local_path(CLIP))
    Mask2FormerImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="knows 5 classes; expected the 80 of COCO"):
        GenEvalReward("geneval", str(tmp_path), base=local_path(CLIP))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RewardError, match="damaged"):
        GenEvalReward("geneval", str(tmp_path), base=local_path(CLIP))
