"""Every network that scores, on the accelerator: the CPU's scores, on the CPU, of images and latents from either side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffexpo.assembly.aliases import resolve
from diffexpo.config.rewards import SelfJudgeConfig
from diffexpo.policies.toy import TOY_LORA, ToyPolicy
from diffexpo.rewards.aesthetic import AestheticReward
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.hps import HpsReward
from diffexpo.rewards.imagereward import ImageRewardScorer
from diffexpo.rewards.jpeg import JpegIncompressibility
from diffexpo.rewards.scenes import SceneScore
from diffexpo.rewards.scoring import score_drawn
from diffexpo.rewards.self_judging import DenoisingReward, ImplicitReward
from diffexpo.rewards.step_judge import LatentStepJudge
from diffexpo.rewards.text_similarity import TextSimilarity
from diffexpo.types import Drawn
from diffexpo.worlds.scenes.grammar import scenes_of
from tests.learning.toy import PATHS
from tests.tiny import WIDTH, tiny_judge
from tests.tiny_step_judge import tiny_step_judge
from tests.unit.rewards.checkpoints import (
    aesthetic_checkpoint,
    hps_checkpoint,
    imagereward_checkpoint,
    imagereward_tensors,
)

PROMPTS = ["a cat", "red dogs", ""]
SCENES = [scene.text for scene in scenes_of("heldout")[:3]]
Build = Callable[[Path, torch.device | str], object]


def imagereward(folder: Path, device: torch.device | str) -> ImageRewardScorer:
    file, base = imagereward_checkpoint(folder)
    save_file(imagereward_tensors(), file)
    return ImageRewardScorer("reward", str(file), device, base=str(base))


def hps(folder: Path, device: torch.device | str) -> HpsReward:
    file, base = hps_checkpoint(folder)
    return HpsReward("hps", str(file), device, base=str(base))


def aesthetic(folder: Path, device: torch.device | str) -> AestheticReward:
    base = tiny_judge(folder / "clip")
    return AestheticReward("taste", str(aesthetic_checkpoint(folder, WIDTH, 2)), device, base=str(base))


NETWORKS: dict[str, Build] = {
    "clip": lambda folder, device: ClipReward("clip", str(tiny_judge(folder / "clip")), device),
    "hps": hps,
    "imagereward": imagereward,
    "aesthetic": aesthetic,
    "a file's size": lambda folder, device: JpegIncompressibility("kilobytes"),
    "scenes": lambda folder, device: SceneScore("scenes", resolve("scenes:checker_train"), device),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_images_score_as_on_the_cpu(name: str, device: torch.device, tmp_path: Path) -> None:
    side, prompts = (64, SCENES) if name == "scenes" else (32, PROMPTS)
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    scores = {}
    for place in ("cpu", device):
        folder = tmp_path / str(place).replace(":", "-")
        folder.mkdir()
        scorer = NETWORKS[name](folder, place)
        drawn = Drawn(torch.zeros(3, 4, 8, 8, device=place), images.to(place))
        (scores[place],) = score_drawn([scorer], drawn, prompts).values()
    ours, expected = (torch.from_numpy(scores[place]) for place in (device, "cpu"))
    assert bool(torch.isfinite(expected).all())
    # Attention sums in another order.
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [DenoisingReward, ImplicitReward])
def test_a_model_judges_itself_as_on_the_cpu(kind: type, device: torch.device) -> None:
    def scores(place: torch.device | str) -> Tensor:
        policy = ToyPolicy(PATHS["vp"], tuning=TOY_LORA, device=place)
        noise = torch.Generator().manual_seed(3)
        state = policy.weights.state("current")
        moved = {key: value + 0.1 * torch.randn(value.shape, generator=noise) for key, value in state.items()}
        policy.weights.load("current", moved)
        latents = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1)).to(place)
        return kind("own", policy, SelfJudgeConfig(draws=3)).score(latents, PROMPTS)

    torch.testing.assert_close(scores(device), scores("cpu"), rtol=1e-4, atol=1e-6)


def test_a_step_judge_scores_states_of_either_side(device: torch.device, tmp_path: Path) -> None:
    folder = tiny_step_judge(tmp_path / "judge")
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    expected = LatentStepJudge(folder).score(x_t, (1 - sigma**2).sqrt(), sigma, PROMPTS)
    judge = LatentStepJudge(folder, device=device)
    for given in (x_t, x_t.to(device)):
        scores = judge.score(given, (1 - sigma**2).sqrt(), sigma, PROMPTS)
        torch.testing.assert_close(scores, expected, rtol=2e-4, atol=2e-5)


def test_texts_are_compared_there(device: torch.device, tmp_path: Path) -> None:
    folder = str(tiny_judge(tmp_path / "clip"))
    found = [
        TextSimilarity("vlm", folder, device=place).compare("a cat", "dogs") for place in (device, "cpu")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
