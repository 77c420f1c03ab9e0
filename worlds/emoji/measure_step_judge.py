"""Measures a step-aware judge: does it know what a noisy latent shows, and which of two branches will end
better?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffexpo.config.schema import ModelConfig, SamplerConfig, TuningConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.diffusion.path import Path as NoisePath
from diffexpo.diffusion.sampling import NoiseSource, predict_guided
from diffexpo.diffusion.transitions import Transition, sampler_transitions, step_moments
from diffexpo.policies.base import load_policy
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.step_judge import LatentStepJudge
from diffexpo.rng import torch_generator
from diffexpo.types import Policy
from diffexpo.worlds.emoji import asset_path, keyed_fraction, load_images, load_rows, train_prompts
from worlds.emoji.attributes import is_train
from worlds.emoji.quality import Interval, bootstrap, retrieval
from worlds.emoji.train_step_judge import Latents, noise_paths

TIMES = tuple(round(0.1 * number, 1) for number in range(1, 10))
SAMPLER = SamplerConfig(name="ddim", steps=8, eta=1.0, guidance=4.0)  # that of recipes/emoji/spo.yaml
TRAIN_JUDGE, OTHER_JUDGE = "judge_train", "judge_heldout"


def load_step_judge(folder: Path | None = None) -> LatentStepJudge:
    """Return the shipped step judge, or the one in `folder`."""
    return LatentStepJudge(folder or asset_path("step_judge"), _resolve)


def _resolve(path: str) -> str:
    return str(asset_path(path.removeprefix("emoji:"))) if path.startswith("emoji:") else path


def split_rows(num: int) -> dict[str, list[dict[str, Any]]]:
    """Return up to `num` rows of each kind: seen by the bases, combinations that are held out, concepts that
    are."""
    kinds = {
        "seen": is_train,
        "held-out combination": lambda row: (
            row["split_concept"] == "train" and row["split_attributes"] == "heldout"
        ),
        "held-out concept": lambda row: row["split_concept"] == "heldout",
    }
    return {
        kind: sorted(filter(keep, load_rows()), key=lambda row: keyed_fraction("quality", row["id"]))[:num]
        for kind, keep in kinds.items()
    }


def measure_retrieval(judge: LatentStepJudge, num: int = 400) -> dict[tuple[str, str, float], Interval]:
    """Return retrieval@1 among 50 captions of noised latents, by (kind of image, path, t).

    The noise of an image is the same at every time and on both paths.
    """
    vae = AutoencoderKL.from_pretrained(asset_path("diffusion") / "vae", local_files_only=True)
    found = {}
    for kind, rows in split_rows(num).items():
        latents = Latents.of(vae, load_images([row["id"] for row in rows])).means
        texts = judge.embed_prompts([f"{row['style']} {row['caption']}" for row in rows])
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=torch_generator("measure", row["id"])) for row in rows]
        )
        for name, path in noise_paths().items():
            for t in TIMES:
                alpha, sigma = path.alpha_sigma(torch.full((len(rows),), t))
                x_t = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
                vectors, _ = judge.embed_states(x_t, alpha, sigma)
                found[kind, name, t] = retrieval(vectors @ texts.T)
    return found


@torch.no_grad()
def measure_branches(judge: LatentStepJudge, num_prompts: int = 128) -> dict[int, dict[str, Any]]:
    """Return, by step of the recipe's sampler, how often a verdict on two branches is the training judge's in
    the end.

    Two candidates of one x_t, drawn by the diffusion base, are each finished without further noise; the
    training judge says which image is better. Verdicts: the step judge on the candidates, the training judge
    on the images of their predicted x0 (what SPO does without a step judge), the held-out judge on the
    finished images (no verdict can be expected to agree more than another judge of the same images).
    """
    policy = load_policy(
        ModelConfig(device="cpu"),
        TuningConfig(),
        folder_or_id=str(asset_path("diffusion")),
        seed=0,
        gradient_checkpointing=False,
    )
    clips = {name: ClipReward(name, str(asset_path(name))) for name in (TRAIN_JUDGE, OTHER_JUDGE)}
    prompts = sorted(train_prompts(), key=lambda prompt: keyed_fraction("branches", prompt.id))[:num_prompts]
    walk = _Walk(policy, [prompt.text for prompt in prompts])
    noise = NoiseSource([torch_generator("branches", prompt.id) for prompt in prompts], policy.latent_shape)
    x, found = noise.draw(), {}
    for place, step in enumerate(walk.grid[:-1]):
        mean, std = step_moments(policy.path, step, walk.predict(x, step.t), x)
        shape = (-1, *[1] * (mean.ndim - 1))
        two = [mean + std.reshape(shape) * noise.draw() for _ in range(2)]
        ends = [policy.decode_latents(walk.finish(candidate, place + 1)) for candidate in two]
        guesses = [policy.decode_latents(walk.guess(candidate, place + 1)) for candidate in two]
        truth = _gap([clips[TRAIN_JUDGE].score(end, walk.texts) for end in ends])
        verdicts = {
            "step judge": _gap([judge.score(one, step.alpha_s, step.sigma_s, walk.texts) for one in two]),
            "training judge, predicted x0": _gap(
                [clips[TRAIN_JUDGE].score(one, walk.texts) for one in guesses]
            ),
            "held-out judge, finished image": _gap(
                [clips[OTHER_JUDGE].score(end, walk.texts) for end in ends]
            ),
        }
        names = [prompt.id for prompt in prompts]
        found[place] = {"t": step.t_next} | {
            name: bootstrap(((gap > 0) == (truth > 0)).astype(float).tolist(), names)
            for name, gap in verdicts.items()
        }
        x = two[0]
    return found


class _Walk:
    """The diffusion base on its way from noise to images of some prompts."""

    def __init__(self, policy: Policy, texts: list[str]) -> None:
        self.policy, self.texts = policy, texts
        self.grid = sampler_transitions(policy.path, SAMPLER)
        self.certain = sampler_transitions(policy.path, SAMPLER.model_copy(update={"eta": 0.0}))
        embeddings = PromptEmbeddings(policy)
        self.conditioning, self.negative = embeddings.select(texts), embeddings.select([""] * len(texts))

    def predict(self, x: Tensor, t: float) -> Tensor:
        """The guided prediction."""
        return predict_guided(self.policy, x, t, self.conditioning, self.negative, SAMPLER.guidance)

    def finish(self, x: Tensor, place: int) -> Tensor:
        """The latents of the image, without further noise, from before the step `place`."""
        for step in self.certain[place:]:
            x, _ = step_moments(self.policy.path, step, self.predict(x, step.t), x)
        return x

    def guess(self, x: Tensor, place: int) -> Tensor:
        """The predicted x0."""
        step: Transition = self.grid[place]
        return x0_of(self.policy.path, self.predict(x, step.t), x, step)


def x0_of(path: NoisePath, prediction: Tensor, x: Tensor, step: Transition) -> Tensor:
    """Return the x0 that a prediction at the beginning of a step implies."""
    return path.x0_eps_at(prediction, x, step.alpha_t, step.sigma_t)[0]


def _gap(two: Sequence[Tensor]) -> np.ndarray:
    return (two[0] - two[1]).numpy()


def render(judge: LatentStepJudge, num: int, num_prompts: int) -> str:
    """Return the measurements as Markdown tables; intervals are 95% bootstrap over images or prompts."""
    found = measure_retrieval(judge, num)
    kinds = list(dict.fromkeys((kind, path) for kind, path, _ in found))
    lines = [
        "| retrieval@1 among 50 | " + " | ".join(f"t {t:g}" for t in TIMES) + " |",
        "|---|" + "---|" * len(TIMES),
    ]
    for kind, path in kinds:
        cells = " | ".join(f"{100 * found[kind, path, t][0]:.0f}%" for t in TIMES)
        lines.append(f"| {kind}, {path} | {cells} |")
    branches = measure_branches(judge, num_prompts)
    verdicts = [name for name in branches[0] if name != "t"]
    lines += [
        "",
        "| step (t of the candidates) | " + " | ".join(verdicts) + " |",
        "|---|" + "---|" * len(verdicts),
    ]
    for place, row in branches.items():
        cells = " | ".join(
            "{:.0f}% [{:.0f}, {:.0f}]".format(*(100 * x for x in row[name])) for name in verdicts
        )
        lines.append(f"| {place} ({row['t']:.2f}) | {cells} |")
    return "\n".join(lines) + "\n"
