"""The three tasks of the improvement model: who gets which, what each is trained on, and the loss, against
NumPy.

In float64, where both sides differ by the order of sums over a dozen rows: some tens of roundings of 1e-16.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import Improvement, improvement_rows, improvement_tasks
from diffexpo.config.schema import ImproverConfig
from diffexpo.diffusion.guidance import IMAGE_CONDITION
from diffexpo.diffusion.objectives import NoiseDraw
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import keyed_uniform
from diffexpo.types import Conditioning, PairBatch
from tests.unit.algorithms.methods import PATHS

pytestmark = pytest.mark.usefixtures("float64")
BOUND = 1e-13
KEY = (3, 0, "train", 5)
KEYS = tuple(f"pair {index}@0" for index in range(400))


class Linear(ToyPolicy):
    """Predicts 0.5 x_t + 2 image + the sum of the text, so that every input of the loss is seen in it."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.tensors["text"].sum(dim=1)[:, None, None, None]
        return 0.5 * x_t + 2.0 * conditioning.tensors[IMAGE_CONDITION] + text


def batch_of(policy: ToyPolicy, rows: int = 12) -> PairBatch:
    generator = torch.Generator().manual_seed(2)
    winner, loser = torch.randn(2, rows, *policy.latent_shape, generator=generator)
    texts = policy.encode_prompts([f"prompt {row}" for row in range(rows)])
    return PairBatch(winner, loser, texts, KEYS[:rows])


def test_shares_follow_the_probabilities_and_a_row_depends_on_its_name_alone() -> None:
    shares = (0.5, 0.3, 0.2)
    task, is_winner = improvement_tasks(KEYS, KEY, shares)
    counts = np.bincount(task.numpy(), minlength=3) / len(KEYS)
    assert np.abs(counts - shares).max() < 0.08 and abs(is_winner.double().mean() - 0.5) < 0.08
    again = improvement_tasks(KEYS[::-1], KEY, shares)
    assert torch.equal(again[0].flip(0), task) and torch.equal(again[1].flip(0), is_winner)
    assert not torch.equal(improvement_tasks(KEYS, (*KEY, "other"), shares)[0], task)
    drawn = np.array([keyed_uniform(*KEY, key, "task") for key in KEYS])
    assert (task.numpy() == np.where(drawn < 0.5, 0, np.where(drawn < 0.8, 1, 2))).all()


@pytest.mark.parametrize(
    ("shares", "tasks"), [((1, 0, 0), {0}), ((0, 1, 0), {1}), ((0, 0, 1), {2}), ((0.7, 0.3, 0), {0, 1})]
)
def test_a_task_without_probability_never_occurs(shares: tuple[float, float, float], tasks: set[int]) -> None:
    assert set(improvement_tasks(KEYS, KEY, shares)[0].tolist()) == tasks


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (0.5, 0.5)])
def test_other_probabilities_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        improvement_tasks(KEYS, KEY, shares)


def test_what_each_task_is_trained_on() -> None:
    winner, loser = torch.randn(
        2, 6, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    task = torch.tensor([0, 0, 1, 1, 2, 2])
    is_winner = torch.tensor([True, False] * 3)
    rows = improvement_rows(winner, loser, task, is_winner)
    assert rows.x0.dtype == torch.float64
    assert torch.equal(rows.x0, torch.stack([winner[0], winner[1], winner[2], loser[3], winner[4], loser[5]]))
    zero = torch.zeros_like(winner[0])
    assert torch.equal(rows.image, torch.stack([loser[0], loser[1], winner[2], loser[3], zero, zero]))
    assert rows.has_text.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("kind", PATHS)
def test_the_loss_is_the_papers_sum_over_tasks(kind: str) -> None:
    policy = Linear(PATHS[kind])
    batch = batch_of(policy)
    settings = ImproverConfig(task_probabilities=(0.4, 0.3, 0.3))
    empty = policy.encode_prompts([""])
    output = Improvement(settings, empty).loss(policy, batch, KEY)
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, policy.latent_shape)
    alpha, sigma = (value.numpy() for value in policy.path.alpha_sigma(draw.t.double()))
    errors, names = [], []
    for row, key in enumerate(batch.keys):
        drawn, winner_first = keyed_uniform(*KEY, key, "task"), keyed_uniform(*KEY, key, "which") < 0.5
        w, l, eps = (value[row].double().numpy() for value in (batch.winner, batch.loser, draw.eps))
        either = w if winner_first else l
        if drawn < 0.4:
            name, x0, image, text = (
                "improve",
                w,
                l,
                batch.conditioning.tensors["text"][row].double().numpy().sum(),
            )
        elif drawn < 0.7:
            name, x0, image, text = "reconstruct", either, either, 0.0
        else:
            name, x0, image, text = "unconditional", either, 0 * either, 0.0
        prediction = 0.5 * (alpha[row] * x0 + sigma[row] * eps) + 2 * image + text
        target = eps if kind == "vp" else eps - x0
        errors.append(float(((prediction - target) ** 2).mean()))
        names.append(name)
    assert set(names) == {"improve", "reconstruct", "unconditional"}
    assert float(output.loss) == pytest.approx(np.mean(errors), rel=BOUND)
    for name in set(names):
        total, count = output.metrics[f"train/error_{name}"]
        own = [error for error, other in zip(errors, names, strict=True) if other == name]
        assert count == len(own) and float(total) == pytest.approx(sum(own), rel=BOUND)


def test_weights_count_and_a_task_that_does_not_occur_has_no_metric() -> None:
    policy = Linear(PATHS["vp"])
    batch = batch_of(policy)
    method = Improvement(ImproverConfig(task_probabilities=(1.0, 0.0, 0.0)), policy.encode_prompts([""]))
    plain = method.loss(policy, batch, KEY)
    doubled = method.loss(
        policy,
        PairBatch(batch.winner, batch.loser, batch.conditioning, batch.keys, torch.full((12,), 2.0)),
        KEY,
    )
    assert float(doubled.loss) == pytest.approx(2 * float(plain.loss), rel=BOUND)
    assert set(plain.metrics) == {"train/loss", "train/error_improve"}


def test_a_batch_may_be_cut_anywhere() -> None:
    policy = Linear(PATHS["vp"])
    batch, method = batch_of(policy), Improvement(ImproverConfig(), policy.encode_prompts([""]))
    whole = float(method.loss(policy, batch, KEY).loss)
    parts = [
        PairBatch(batch.winner[part], batch.loser[part], batch.conditioning.select(part), batch.keys[part])
        for part in (slice(0, 5), slice(5, 12))
    ]
    losses = [float(method.loss(policy, part, KEY).loss) * len(part) / 12 for part in parts]
    assert sum(losses) == pytest.approx(whole, rel=BOUND)
