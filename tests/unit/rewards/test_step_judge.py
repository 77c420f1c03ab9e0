"""A step judge is what its formula says, whatever the batch; folders and models that do not fit are refused with the reason."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffexpo.errors import ConfigError, MissingError, RewardError
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.step_judge import (
    LatentStepJudge,
    StepJudgeNetwork,
    level_features,
    noise_level,
    read_shape,
    shape_as_json,
)
from tests.tiny import tiny_judge
from tests.tiny_step_judge import tiny_step_judge

PROMPTS = ["cat", "a dog", "cat", "", "thing 4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_step_judge(tmp_path_factory.mktemp("judges") / "judge")


@pytest.fixture(scope="module")
def judge(folder: Path) -> LatentStepJudge:
    return LatentStepJudge(folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "judge"))


def states(count: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_noise_level_is_the_angle_between_signal_and_noise() -> None:
    alpha = torch.tensor([1.0, 0.0, 0.3, 0.6], dtype=torch.float64)
    sigma = torch.tensor([0.0, 1.0, 0.3, 0.8], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0, 0.5, math.asin(0.8) * 2 / math.pi], dtype=torch.float64)
    torch.testing.assert_close(noise_level(alpha, sigma), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(noise_level(7 * alpha, 7 * sigma), expected, rtol=1e-15, atol=0)
    features = level_features(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert features[0].tolist() == [1.0] * 16
    assert features[1, :4] == pytest.approx([0, -1, 0, 1], abs=1e-15)
    assert features[2, :4].tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_score_is_the_scaled_cosine_of_state_and_prompt(folder: Path, judge: LatentStepJudge) -> None:
    network = StepJudgeNetwork(read_shape(folder))
    network.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    )
    texts = ClipReward("text", str(folder / "text")).embed_prompts(PROMPTS)
    x, alpha, sigma = states(), 0.6, 0.8
    with torch.no_grad():
        vectors, scale = network(x, torch.full((5,), math.asin(0.8) * 2 / math.pi))
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(5)) and torch.equal(scale, scale[:1].expand(5))
    scores = judge.score(x, alpha, sigma, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    torch.testing.assert_close(scores, scale * (vectors * texts).sum(-1), rtol=1e-5, atol=1e-5)
    assert float(scores.std()) > 1e-2


def test_states_of_a_flow_model_are_those_of_a_diffusion_model_on_another_scale(
    judge: LatentStepJudge,
) -> None:
    x_t, t = states(), 0.3
    norm = math.hypot(1 - t, t)
    flow = judge.score(x_t, 1 - t, t, PROMPTS)
    vp = judge.score(x_t / norm, (1 - t) / norm, t / norm, PROMPTS)
    torch.testing.assert_close(flow, vp, rtol=1e-5, atol=1e-5)


def test_the_noise_level_matters_and_may_differ_by_row(judge: LatentStepJudge) -> None:
    x = states(1).expand(3, -1, -1, -1)
    sigma = torch.tensor([0.0, 0.5, 1.0])
    alpha = (1 - sigma.square()).sqrt()
    scores = judge.score(x, alpha, sigma, ["cat"] * 3)
    assert len({round(value, 4) for value in scores.tolist()}) == 3
    alone = [judge.score(x[:1], float(a), float(s), ["cat"]) for a, s in zip(alpha, sigma, strict=True)]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_score_does_not_depend_on_the_batch(judge: LatentStepJudge, folder: Path) -> None:
    x = states()
    together = judge.score(x, 0.8, 0.6, PROMPTS)
    for split in ([1] * 5, [2, 3], [4, 1]):
        fresh = LatentStepJudge(folder)
        parts, start = [], 0
        for size in split:
            rows = slice(start, start + size)
            parts.append(fresh.score(x[rows], 0.8, 0.6, PROMPTS[rows]))
            start += size
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-5)
    assert judge.score(x[:0], 0.8, 0.6, []).shape == (0,)


def test_the_same_folder_gives_the_same_bits_also_within_a_lower_precision(
    folder: Path, judge: LatentStepJudge
) -> None:
    first = judge.score(states(), 0.8, 0.6, PROMPTS)
    assert torch.equal(first, LatentStepJudge(folder).score(states(), 0.8, 0.6, PROMPTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first, LatentStepJudge(folder).score(states(), 0.8, 0.6, PROMPTS))
    # A text's bits do not depend on the texts that were asked for before it.
    other = LatentStepJudge(folder)
    other.score(states(2), 0.8, 0.6, ["something else", "cat"])
    assert torch.equal(first, other.score(states(), 0.8, 0.6, PROMPTS))


def test_config_json_is_read_as_it_was_written(folder: Path) -> None:
    assert shape_as_json(read_shape(folder)) == (folder / "config.json").read_text()


def test_the_text_tower_may_be_an_alias(broken: Path) -> None:
    (broken / "text").rename(broken.parent / "elsewhere")
    with pytest.raises(MissingError, match="'text' is no folder"):
        LatentStepJudge(broken)
    again = LatentStepJudge(broken, {"text": str(broken.parent / "elsewhere")}.__getitem__)
    assert again.score(states(), 0.8, 0.6, PROMPTS).isfinite().all()


def test_a_folder_that_is_none_is_refused(tmp_path: Path, broken: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere: config\.json is missing.*emoji train step_judge"):
        LatentStepJudge(tmp_path / "nowhere")
    with pytest.raises(RewardError, match="kind 'clip', expected 'step_judge'"):
        LatentStepJudge(broken / "text")
    (broken / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"model\.safetensors is missing"):
        LatentStepJudge(broken)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"blocks": 3}, "does not hold the network of config.json"),
        ({"width": 16}, "does not hold the network of config.json"),
        ({"patch": 3}, "divisible by patch"),
        ({"patch": 0}, "whole numbers above 0"),
        ({"latent_shape": [8, 8]}, "latent_shape 8x8"),
        ({"latent_shape": 8}, "cannot be read"),
        ({"depth": 3}, "cannot be read.*depth"),
        ({"kind": "probe"}, "kind 'probe'"),
        ({"text_sample": [0.5] * 8}, "expected text_sample 0.5000, 0.5000, .*: it is not the tower"),
        ({"text_sample": [0.5]}, "it is not the tower"),
    ],
)
def test_settings_that_do_not_fit_the_files_are_refused(
    broken: Path, changes: dict[str, object], match: str
) -> None:
    values = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(RewardError, match=match):
        LatentStepJudge(broken)


def test_damaged_files_are_refused(broken: Path) -> None:
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(RewardError, match=r"model\.safetensors does not hold"):
        LatentStepJudge(broken)
    save_file({"stem.bias": torch.zeros(8)}, file)
    with pytest.raises(RewardError, match=r"model\.safetensors does not hold"):
        LatentStepJudge(broken)
    file.write_bytes(whole)
    (broken / "config.json").write_text("[1, 2")
    with pytest.raises(RewardError, match="cannot be read"):
        LatentStepJudge(broken)


def test_another_text_tower_is_refused(broken: Path) -> None:
    shutil.rmtree(broken / "text")
    tiny_judge(broken / "text", seed=1)
    with pytest.raises(
        RewardError, match="text tower 'text' embeds .* it is not the tower that the judge was trained with"
    ):
        LatentStepJudge(broken)


def test_models_whose_states_it_cannot_read_are_refused(judge: LatentStepJudge, tmp_path: Path) -> None:
    judge.check_fits((4, 8, 8), "vp", "algorithm.judge", "model")
    with pytest.raises(
        ConfigError, match="algorithm.judge = .* reads latents 4x8x8, but model has 4x64x64.*or null"
    ):
        judge.check_fits((4, 64, 64), "vp", "algorithm.judge", "model")
    only = LatentStepJudge(tiny_step_judge(tmp_path / "flow", paths=("flow",)))
    only.check_fits((4, 8, 8), "flow", "algorithm.judge", "model")
    with pytest.raises(ConfigError, match="trained on states of flow models, but model is a vp model"):
        only.check_fits((4, 8, 8), "vp", "algorithm.judge", "model")


def test_states_of_another_shape_or_number_are_refused(judge: LatentStepJudge) -> None:
    with pytest.raises(RewardError, match="5 states 4x8x4 for 5 prompts; expected one state 4x8x8"):
        judge.score(states()[..., :4], 0.8, 0.6, PROMPTS)
    with pytest.raises(RewardError, match="5 states 4x8x8 for 1 prompts"):
        judge.score(states(), 0.8, 0.6, ["cat"])
