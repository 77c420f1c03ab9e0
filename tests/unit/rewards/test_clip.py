"""The CLIP scorer against CLIPModel's own forward, row by row; independent of its batch; honest about bad
folders.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from diffexpo.config.rewards import read_card
from diffexpo.errors import ConfigError, DiffexpoError, MissingError, RewardError
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.images import to_bytes
from tests.tiny import tiny_judge

PROMPTS = ["a cat", "dog", "", "a cat", "red fish"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_judge(tmp_path_factory.mktemp("judge") / "judge")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_score_is_the_diagonal_of_clips_own_logits(folder: Path, images: torch.Tensor) -> None:
    model = CLIPModel.from_pretrained(folder)
    pictures = [Image.fromarray(picture) for picture in to_bytes(images)]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image
    scores = ClipReward("judge", str(folder)).score(images, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    # Cosines in float32, rounded by about 1e-7, times CLIP's scale of 14.
    torch.testing.assert_close(scores, logits.diagonal(), rtol=0, atol=2e-5)
    assert float(scores.std()) > 1e-3


def test_score_does_not_depend_on_the_batch(folder: Path, images: torch.Tensor) -> None:
    reward = ClipReward("judge", str(folder))
    together = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score(images[row : row + 1], [PROMPTS[row]]) for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert reward.score(images[:0], []).shape == (0,)


def test_image_is_seen_at_8_bits(folder: Path, images: torch.Tensor) -> None:
    reward = ClipReward("judge", str(folder))
    saved = torch.from_numpy(to_bytes(images).astype(np.float32) / 255).permute(0, 3, 1, 2)
    assert torch.equal(reward.score(images, PROMPTS), reward.score(saved, PROMPTS))


def test_long_text_is_cut_as_the_tokenizer_cuts_and_counted(folder: Path, images: torch.Tensor) -> None:
    reward = ClipReward("judge", str(folder))
    long = ["x" * 14, "x" * 15, "x" * 40]
    scores = reward.score(images[:1].expand(3, -1, -1, -1), long)
    # Rows of a batch may lie in two threads' shares, which end differently: 100 roundings of 6e-8.
    assert torch.allclose(scores[1], scores[2], rtol=6e-6, atol=0)
    assert abs(scores[0] - scores[1]) > 1e-3 * abs(scores[1])
    assert reward.num_cut_prompts == 2
    reward.score(images[:1], ["x" * 40])
    assert reward.num_cut_prompts == 2


def test_version_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    other = tiny_judge(tmp_path / "other", seed=1)
    versions = {ClipReward("judge", str(path)).version for path in (folder, folder, other)}
    assert len(versions) == 2 and all(len(version) == 64 for version in versions)


def test_lengths_must_agree(folder: Path, images: torch.Tensor) -> None:
    with pytest.raises(RewardError, match="5 images but 1 prompts"):
        ClipReward("judge", str(folder)).score(images, ["cat"])


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "judge"))


def refuse(folder: Path | str, kind: type[DiffexpoError], match: str) -> None:
    with pytest.raises(kind, match=match):
        ClipReward("judge", str(folder))


def test_truncated_weights_are_named(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(broken, RewardError, "'judge'.*model.safetensors is a damaged")


def test_missing_pieces_are_named(broken: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", MissingError, "nowhere' is no folder")
    (broken / "preprocessor_config.json").unlink()
    refuse(broken, MissingError, "preprocessor_config.json is missing")
    (broken / "model.safetensors").unlink()
    refuse(broken, MissingError, "no model.safetensors")


def test_other_kind_of_model_is_refused(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.startswith("visual_projection")}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    refuse(broken, RewardError, "lacks 1 CLIPModel weights.*visual_projection")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config)[:-5])
    refuse(broken, RewardError, "cannot be loaded as a CLIPModel")


def test_load_rewards_follows_the_configuration(folder: Path) -> None:
    configs = [
        read_card(name="judge", type="clip", path="emoji:judge_train"),
        read_card(name="small", type="jpeg_compressibility"),
    ]
    rewards = load_rewards(configs, {"emoji:judge_train": str(folder)}.__getitem__, "cpu")
    assert [reward.name for reward in rewards] == ["judge", "small"]
    with pytest.raises(ConfigError, match="'judge' is used 2 times"):
        load_rewards([configs[0], configs[0]], str, "cpu")
    with pytest.raises(ConfigError, match="'mine' has type python but no path"):
        load_rewards([read_card(name="mine", type="python")], str, "cpu")


def test_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuse(
        "nobody/no-such-judge",
        MissingError,
        "'nobody/no-such-judge' is no folder, and the hub did not give it",
    )
