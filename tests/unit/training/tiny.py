"""A policy, a DPO loss and a loader in a few lines of torch: the engine is tested against these and knows no
difference."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from diffexpo.config.methods import MethodConfig
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.schema import TrainingConfig
from diffexpo.rng import torch_generator
from diffexpo.training.distributed import start_world, stop_world
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.types import Conditioning, LossOutput, PairBatch
from tests.double import in_double

LN2 = math.log(2.0)
BETA = 20.0


class TinyWeights:
    """Versions of a module's parameters as plain dicts; the module holds the version in use."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stand_in: str | None = None
        self.versions = {"reference": self.state("current")}

    def names(self) -> list[str]:
        return ["current", *self.versions]

    @contextmanager
    def standing_in(self, name: str) -> Iterator[None]:
        self.stand_in = name
        yield
        self.stand_in = None

    @contextmanager
    def use(self, name: str, *, merged: bool = False) -> Iterator[None]:
        if (self.stand_in or name) == "current":
            yield
            return
        parameters = self.trainable()
        kept = {key: value.data for key, value in parameters.items()}
        for key, value in parameters.items():
            value.data = self.versions[name][key]
        yield
        for key, value in parameters.items():
            value.data = kept[key]

    def copy(self, source: str, target: str) -> None:
        self.load(target, self.state(source))

    def drop(self, name: str) -> None:
        del self.versions[name]

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def state(self, name: str) -> dict[str, Tensor]:
        values = self.trainable() if name == "current" else self.versions[name]
        return {key: value.detach().clone() for key, value in values.items()}

    def fingerprint(self, name: str) -> str:
        values = self.state(name).values()
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        if name != "current":
            self.versions[name] = {key: value.clone() for key, value in state.items()}
            return
        with torch.no_grad():
            for key, value in self.trainable().items():
                value.copy_(state[key])


class TinyPolicy:
    """Predicts from (x_t, t, conditioning) with two linear layers."""

    latent_shape = (1, 1, 4)
    device = torch.device("cpu")
    fingerprint = "tiny"
    path = None

    def __init__(self, module: nn.Module | None = None) -> None:
        if module is None:
            module = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 4))
            with torch.no_grad():
                for name, value in module.named_parameters():
                    value.copy_(0.3 * torch.randn(value.shape, generator=torch_generator("tiny", name)))
        self.module = module
        self.weights = TinyWeights(module)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(torch.cat([x_t, t[:, None], conditioning.tensors["text"]], dim=1))


class TinyDpo:
    """Sigmoid DPO on mean squared errors, with keyed noise, pair weights and a linear term over contrast
    pairs."""

    settings: MethodConfig = DiffusionDpoConfig()

    def loss(self, policy: TinyPolicy, batch: PairBatch, noise_key: tuple[str | int, ...]) -> LossOutput:
        generators = [torch_generator(*noise_key, key) for key in batch.keys]
        eps = torch.stack([torch.randn(4, generator=generator) for generator in generators])
        t = torch.cat([torch.rand(1, generator=generator) for generator in generators])

        def gap() -> Tensor:
            winner = (policy.predict(batch.winner + eps, t, batch.conditioning) - eps).square().mean(1)
            return winner - (policy.predict(batch.loser + eps, t, batch.conditioning) - eps).square().mean(1)

        with policy.weights.use("current"):
            current = gap()
        with torch.no_grad(), policy.weights.use("reference"):
            reference = gap()
        margin = -0.5 * BETA * (current - reference)
        loss = -nn.functional.logsigmoid(margin)
        if batch.weight is not None:
            loss = loss * batch.weight
        total = loss.mean()
        metrics = {
            "train/loss": (loss.detach().sum(), len(batch)),
            "train/margin": (margin.detach().sum(), len(batch)),
            "train/winner_reference_error": (reference.sum(), len(batch)),
        }
        if batch.contrast_keys:
            clock = batch.explored.new_zeros(len(batch.explored))
            bonus = policy.predict(batch.explored - batch.main, clock, batch.contrast_conditioning).mean(1)
            total = total + bonus.mean()
            metrics["train/bonus"] = (bonus.detach().sum(), len(bonus))
        return LossOutput(total, metrics)


class TinyLoader:
    """Keyed batches; `damage` may replace the batch of a step."""

    def __init__(
        self,
        size: int,
        contrast: int = 0,
        damage: Callable[[int, PairBatch], PairBatch] = lambda _, batch: batch,
    ) -> None:
        self.size, self.contrast, self.damage = size, contrast, damage

    def batch(self, step: int) -> PairBatch:
        generator = torch_generator("batch", step)
        rows = torch.randn(4, self.size, 4, generator=generator)
        text = torch.randn(2, self.size, 2, generator=generator)
        extra = slice(0, self.contrast)
        batch = PairBatch(
            winner=rows[0],
            loser=rows[1],
            conditioning=Conditioning({"text": text[0]}),
            keys=tuple(f"pair-{step}-{row}" for row in range(self.size)),
            explored=rows[2, extra] if self.contrast else None,
            main=rows[3, extra] if self.contrast else None,
            contrast_conditioning=Conditioning({"text": text[1, extra]}) if self.contrast else None,
            contrast_keys=tuple(f"contrast-{row}" for row in range(self.contrast)),
        )
        return self.damage(step, batch)


def settings(**changes: object) -> TrainingConfig:
    """Ten-pair batches in micro-batches of four, steps large enough that a wrong one shows."""
    values = {
        "batch_size": 10,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 3,
        "max_grad_norm": 0.5,
    }
    return TrainingConfig.model_validate(values | changes)


def main(folder: Path, contrast: int, stop_rank: int, start: float, moved: float) -> None:
    """One of several processes: train six steps and leave the result in files named by rank. Weights are
    `start` apart between the processes, and in all of them `moved` away from the reference."""
    from diffexpo.errors import Interrupted
    from diffexpo.training.checkpoint import write_tensors

    world = start_world(device="cpu")
    assert world.gather_objects([world.rank, 0.1]) == [
        item for rank in range(world.size) for item in (rank, 0.1)
    ]
    assert world.broadcast_object({"from": world.rank}) == {"from": 0}

    policy = TinyPolicy()
    if start or moved:
        with torch.no_grad():
            policy.module[0].bias[0] += start * world.rank + moved
    writer = MetricsWriter(folder / "metrics.jsonl", active=world.rank == 0)
    engine = Engine(policy, TinyDpo(), settings(), writer, world=world)
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if world.rank == stop_rank and ticks >= 5:
            raise Interrupted("stopped by SIGTERM")

    arguments = {"steps": 6, "checkpoint_dir": folder / "checkpoints", "run_seed": 3}
    try:
        engine.train_iteration(1, TinyLoader(10, contrast), tick=tick, **arguments)
        write_tensors(folder / f"weights-{world.rank}.safetensors", policy.weights.state("current"))
    except Interrupted as stopped:
        (folder / f"stopped-{world.rank}.txt").write_text(str(stopped))
    finally:
        stop_world(world)


if __name__ == "__main__":
    with in_double():
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
