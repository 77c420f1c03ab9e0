"""A tiny improvement model memorises pairs: given a loser it draws that loser's winner, with one prompt for all, and so by the image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import Improvement
from diffexpo.config.schema import ImproverConfig, ModelConfig, SamplerConfig, TrainingConfig, TuningConfig
from diffexpo.diffusion import NoiseSource
from diffexpo.diffusion.guidance import DoubleGuidance
from diffexpo.diffusion.sampling import sample_double_guided
from diffexpo.policies.base import load_policy
from diffexpo.policies.improver import Improver, make_improver
from diffexpo.rng import torch_generator
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter, read_metrics
from diffexpo.types import PairBatch
from tests.tiny import tiny_diffusion

PAIRS, COPIES, STEPS = 3, 4, 360
PROMPT = "a cat"


class Memory:
    """All pairs, several times over, at every step."""

    def __init__(self, improver: Improver) -> None:
        low = torch.randn(2, PAIRS, improver.latent_shape[0], 2, 2, generator=torch_generator("memory"))
        self.winner, self.loser = torch.nn.functional.interpolate(
            low.flatten(0, 1), scale_factor=4
        ).unflatten(0, (2, PAIRS))
        self.texts = improver.encode_prompts([PROMPT] * PAIRS * COPIES)

    def batch(self, step: int) -> PairBatch:
        keys = tuple(f"pair {row % PAIRS} copy {row // PAIRS}" for row in range(PAIRS * COPIES))
        return PairBatch(
            self.winner.repeat(COPIES, 1, 1, 1), self.loser.repeat(COPIES, 1, 1, 1), self.texts, keys
        )


def draw(improver: Improver, images: Tensor, prompt: str, scales: DoubleGuidance) -> Tensor:
    rows = len(images)
    return sample_double_guided(
        improver,
        improver.encode_prompts([prompt] * rows),
        improver.encode_prompts([""] * rows),
        images,
        SamplerConfig(name="ddim", steps=10, guidance=1.0),
        NoiseSource([torch_generator("draw", row) for row in range(rows)], improver.latent_shape),
        scales,
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Improver, Memory, Path]:
    folder = tmp_path_factory.mktemp("improver")
    # A network that predicts v says at pure noise what the image is, so that a short training suffices.
    base = load_policy(
        ModelConfig(device="cpu"),
        TuningConfig(),
        folder_or_id=str(tiny_diffusion(folder / "base", prediction_type="v_prediction")),
        seed=0,
    )
    improver = make_improver(base)
    memory = Memory(improver)
    rows = PAIRS * COPIES
    settings = TrainingConfig(
        batch_size=rows, micro_batch_size=rows, learning_rate=3e-3, warmup_fraction=0.05, ema_decay=0.95
    )
    method = Improvement(ImproverConfig(task_probabilities=(0.55, 0.35, 0.1)), improver.encode_prompts([""]))
    engine = Engine(improver, method, settings, MetricsWriter(folder / "metrics.jsonl"))
    engine.train_iteration(0, memory, steps=STEPS, checkpoint_dir=folder / "c", run_seed=0)
    return improver, memory, folder / "metrics.jsonl"


def distances(drawn: Tensor, targets: Tensor) -> Tensor:
    """Mean squared distance (N, M) of every drawn latent to every target."""
    return torch.cdist(drawn.flatten(1), targets.flatten(1)).square() / drawn[0].numel()


def test_every_loser_becomes_its_own_winner(learned: tuple[Improver, Memory, Path]) -> None:
    improver, memory, _ = learned
    improved = draw(improver, memory.loser, PROMPT, DoubleGuidance(1.0, 1.0))
    to_winners, before = distances(improved, memory.winner), distances(memory.loser, memory.winner)
    assert (to_winners.argmin(dim=1) == torch.arange(PAIRS)).all()
    assert (to_winners.diagonal() < 0.2 * before.diagonal()).all()


def test_without_text_an_image_stays_what_it_is(learned: tuple[Improver, Memory, Path]) -> None:
    improver, memory, _ = learned
    both = torch.cat([memory.winner, memory.loser])
    kept = draw(improver, both, PROMPT, DoubleGuidance(1.0, 0.0))
    table, own = distances(kept, both), torch.eye(2 * PAIRS, dtype=torch.bool)
    assert table[own].mean() < 0.2 * table[~own].mean()


def test_every_task_was_learned(learned: tuple[Improver, Memory, Path]) -> None:
    rows = read_metrics(learned[2])
    for task in ("improve", "reconstruct", "unconditional"):
        values = [row[f"train/error_{task}"] for row in rows if row.get(f"train/error_{task}") is not None]
        first, last = sum(values[:10]) / 10, sum(values[-50:]) / 50
        assert last < 0.5 * first, task
