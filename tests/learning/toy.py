"""A toy world with a known truth: a policy that draws standard normal latents, and pairs ranked along one axis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path as Folder

import torch
from torch import Tensor

from diffexpo.algorithms import algorithm_class
from diffexpo.algorithms.diffusion_dpo import pair_margin
from diffexpo.algorithms.pairs import measure_errors
from diffexpo.config import RunConfig
from diffexpo.config.methods import MethodConfig
from diffexpo.config.rewards import read_card
from diffexpo.config.schema import SamplerConfig, TrainingConfig, TuningConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store
from diffexpo.diffusion import Path, sample
from diffexpo.diffusion.kernels import add_noise
from diffexpo.diffusion.objectives import NoiseDraw
from diffexpo.online.loop import Loop, Ranking
from diffexpo.policies.toy import TOY_FULL, TOY_LORA, ToyNetwork, ToyPolicy
from diffexpo.policies.weights import make_weights
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.mixture import mix_rewards
from diffexpo.rewards.scoring import check_rewards, score_drawn
from diffexpo.rng import torch_generator
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.types import PairBatch, Prompt

PATHS = {"vp": Path.vp(torch.linspace(0.9995, 0.98, 200).cumprod(0)), "flow": Path.flow()}
TUNINGS: dict[str, TuningConfig] = {"full": TOY_FULL, "lora": TOY_LORA}
SAMPLERS = {
    "vp": SamplerConfig(name="ddim", steps=12, guidance=1.0, eta=1.0),
    "flow": SamplerConfig(name="flow_euler", steps=12, guidance=1.0),
}
PROMPTS = tuple(Prompt(f"p{index}", f"word {index}") for index in range(24))


@cache
def pretrained(kind: str, steps: int = 500) -> dict[str, Tensor]:
    """Weights of a toy network that was fitted to N(0, 1) latents under every prompt."""
    path, network = PATHS[kind], ToyNetwork(2, 32, 0)
    texts = ToyPolicy(path).encode_prompts(["", *(prompt.text for prompt in PROMPTS)]).tensors["text"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch_generator("pretrain", kind)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2.0 * (1 - step / steps))
        x0, eps = torch.randn(2, 256, 2, 1, 1, generator=generator)
        t = path.training_t(256, generator)
        text = texts[torch.randint(len(texts), (256,), generator=generator)]
        precise = t.double()
        target = path.target(x0, eps, precise)
        x_t = add_noise(x0, eps, *path.alpha_sigma(precise))
        loss = (network(x_t.float(), t.float(), text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def make_policy(kind: str, tuning: str) -> ToyPolicy:
    """A fresh policy whose base, reference and current draw N(0, 1)."""
    policy = ToyPolicy(PATHS[kind], tuning=TUNINGS[tuning])
    network = ToyNetwork(2, 32, 0)
    network.load_state_dict(pretrained(kind))
    policy.weights = make_weights(network, TUNINGS[tuning], 0)
    return policy


class Rows:
    """Noise of many rows from one generator: quick, where nobody asks for a row by name."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.generator = count, torch_generator("draw", seed)

    def __len__(self) -> int:
        return self.count

    def draw(self) -> Tensor:
        return torch.randn(self.count, 2, 1, 1, generator=self.generator)


def draw(policy: ToyPolicy, version: str, count: int = 4096, seed: int = 0) -> Tensor:
    """Latents (count, 2) that a version draws, over all prompts in turn."""
    texts = [PROMPTS[index % len(PROMPTS)].text for index in range(count)]
    conditioning = PromptEmbeddings(policy).select(texts)
    with policy.weights.use(version):
        latents = sample(policy, conditioning, None, SAMPLERS[policy.path.kind], Rows(count, seed))
    return latents[:, :, 0, 0]


class SidePairs:
    """Pairs of N(0, 1) latents whose winner lies further along the first axis; any number of batches.

    `flipped` prefers the other side, `blind` prefers at random. With `contrast` > 0 each batch also has that many couples of an "explored" latent far along the second axis and
    a "main" one.
    """

    def __init__(
        self,
        policy: ToyPolicy,
        size: int,
        *,
        contrast: int = 0,
        name: str = "train",
        blind: bool = False,
        flipped: bool = False,
    ) -> None:
        self.embeddings = PromptEmbeddings(policy)
        self.size, self.contrast, self.name, self.blind, self.flipped = size, contrast, name, blind, flipped

    def batch(self, step: int) -> PairBatch:
        generator = torch_generator("pairs", self.name, step)
        two = torch.randn(2, self.size, 2, 1, 1, generator=generator)
        order = two[:, :, 0, 0, 0].argsort(dim=0, descending=not self.flipped)
        if self.blind:
            order = torch.tensor([[0], [1]]).expand(2, self.size)
        rows = torch.arange(self.size)
        texts = [PROMPTS[index % len(PROMPTS)].text for index in range(self.size)]
        extra = self.contrast
        explored, main = torch.randn(2, max(extra, 1), 2, 1, 1, generator=generator)
        explored[:, 1] += 1.0
        main[:, 1] -= 1.0
        return PairBatch(
            winner=two[order[0], rows],
            loser=two[order[1], rows],
            conditioning=self.embeddings.select(texts),
            keys=tuple(f"{self.name}-{step}-{row}" for row in range(self.size)),
            explored=explored if extra else None,
            main=main if extra else None,
            contrast_conditioning=self.embeddings.select(texts[:extra]) if extra else None,
            contrast_keys=tuple(f"{self.name}-contrast-{step}-{row}" for row in range(extra)),
        )


def train_offline(
    policy: ToyPolicy, settings: MethodConfig, loader: SidePairs, folder: Folder, steps: int, rate: float
) -> None:
    """The engine itself, one iteration."""
    training = TrainingConfig(
        steps=steps, batch_size=loader.size, micro_batch_size=loader.size, learning_rate=rate, weight_decay=0.0,
        checkpoint_every=10**6,
    )  # fmt: skip
    algorithm = algorithm_class(settings.type)(settings, PromptEmbeddings(policy).select([""]))
    engine = Engine(policy, algorithm, training, MetricsWriter(folder / "metrics.jsonl"))
    engine.train_iteration(1, loader, steps=steps, checkpoint_dir=folder / "checkpoints", run_seed=0)


def margins(policy: ToyPolicy, batch: PairBatch, draws: int = 8) -> Tensor:
    """Implicit reward differences (B,) at beta 1, averaged over noises: preference pairs."""
    return _margins(policy, batch.winner, batch.loser, batch, batch.keys, draws)


def contrast_margins(policy: ToyPolicy, batch: PairBatch, draws: int = 8) -> Tensor:
    """h_ex (E,) at beta 1, averaged over noises: explored against main."""
    assert batch.explored is not None and batch.main is not None and batch.contrast_conditioning is not None
    return _margins(policy, batch.explored, batch.main, batch, batch.contrast_keys, draws)


def _margins(
    policy: ToyPolicy, first: Tensor, second: Tensor, batch: PairBatch, keys: tuple[str, ...], draws: int
) -> Tensor:
    conditioning = batch.conditioning.select(slice(0, len(keys)))
    found = []
    for number in range(draws):
        noise = NoiseDraw.keyed(keys, ("margins", number), policy.path, first.shape[1:])
        with torch.no_grad():
            errors = measure_errors(policy, first, second, noise, conditioning)
        found.append(pair_margin(errors.winner, errors.loser, errors.winner_ref, errors.loser_ref, beta=1.0))
    return torch.stack(found).mean(dim=0)


class Silent:
    """A console that nobody reads."""

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Silent]:
        yield self

    def advance(self, count: int = 1) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        raise AssertionError(text)


TARGET = 0.8
REWARD = f"""
def near(images, prompts):
    return -(images[:, 0].mean(dim=(1, 2)) - {TARGET}) ** 2
"""


def reward_of(latents: Tensor) -> Tensor:
    """What REWARD gives the pictures of latents (B, 2), before rounding to 8 bits: -(red - TARGET)^2."""
    return -((torch.sigmoid(latents[:, 0]) - TARGET) ** 2)


def online_config(kind: str, **changes: object) -> RunConfig:
    """Three iterations, two agents, 48 prompts x 4 images."""
    sampler = SAMPLERS[kind].model_dump()
    algorithm = {"beta": 10.0} | dict(changes.pop("algorithm", {}))
    explore = {
        "iterations": 3,
        "prompts_per_iteration": 48,
        "images_per_prompt": 2,
        "sampler": sampler,
        "batch_size": 64,
        "negatives": {"source": None},
    } | dict(changes.pop("explore", {}))
    training = {
        "steps": 100,
        "batch_size": 32,
        "micro_batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    } | dict(changes.pop("training", {}))
    assert not changes
    return RunConfig.model_validate(
        {"explore": explore, "algorithm": algorithm, "training": training, "tuning": {"kind": "full"}}
    )


def make_loop(
    config: RunConfig,
    policy: ToyPolicy,
    run_dir: Folder,
    *,
    offline_pairs: int = 192,
    world: World | None = None,
) -> Loop:
    """A whole run around the toy policy: a store with offline pairs of N(0, 1) latents ranked by the reward (unless the run
    has no offline source), a real engine, a reward from a Python file. `world`: the processes that run it together.
    """
    world = world or World()
    store = Store(run_dir / "store")
    if world.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "reward.py").write_text(REWARD)
        if config.offline.source is not None and not store.is_complete("offline", 0):
            add_offline_pairs(store, offline_pairs)
    world.barrier()
    rewards = load_rewards(
        [read_card(name="near", type="python", path=f"{run_dir}/reward.py:near")], str, "cpu"
    )
    embeddings = PromptEmbeddings(policy, [""])
    metrics = MetricsWriter(run_dir / "metrics.jsonl", active=world.rank == 0)
    algorithm = algorithm_class(config.algorithm.type)(config.algorithm, embeddings.select([""]))
    ranking = Ranking(
        "near", lambda scores: mix_rewards(scores, {"near": 1.0}, "zscore"), check_rewards, None, None
    )
    return Loop(
        config=config,
        run_dir=run_dir,
        policy=policy,
        engine=Engine(policy, algorithm, config.training, metrics, world=world),
        store=store,
        prompts=PROMPTS,
        negatives=[],
        embeddings=embeddings,
        score=lambda drawn, texts: score_drawn(rewards, drawn, texts),
        ranking=ranking,
        world=world,
        metrics=metrics,
        console=Silent(),
        check_signals=lambda: None,
        evaluate=lambda loop, name, iteration: None,
        initial=policy.weights.state("current"),
    )


def add_offline_pairs(store: Store, count: int) -> None:
    """D_off: pairs of N(0, 1) latents, the better one under the reward wins."""
    latents = torch.randn(count, 2, 2, 1, 1, generator=torch_generator("offline"))
    order = reward_of(latents.reshape(-1, 2)).reshape(count, 2).argsort(dim=1, descending=True)
    samples, pairs = [], []
    for row in range(count):
        prompt = PROMPTS[row % len(PROMPTS)]
        shared = {"prompt_id": prompt.id, "prompt": prompt.text, "source": "offline"}
        ids = [f"offline-{row:04d}-{place}" for place in range(2)]
        samples += [Sample(sample_id=name, agent="offline", **shared) for name in ids]
        winner, loser = (ids[int(place)] for place in order[row])
        pairs.append(
            Pair(pair_id=f"offline-{row:04d}", winner_id=winner, loser_id=loser, judge="truth", **shared)
        )
    store.append_unit(0, 0, 0, samples, latents.reshape(-1, 2, 1, 1).numpy(), stage="offline")
    store.append_pairs(0, 0, pairs, stage="offline")
    store.write_manifest("offline", 0, {})
