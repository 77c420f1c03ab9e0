"""Trains the two judges of looks: dual encoders (CLIPModel) that prefer the less damaged of two images.

A pair's better image is known by construction: the other one has the same damages and one of them stronger,
or comes from the same noise by fewer steps of the sampler. The two may show different scenes, and the prompt
that the judge reads with them has nothing to do with either, so nothing about correctness can be learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffexpo.worlds import asset_path
from diffexpo.worlds.keyed import keyed_fraction
from diffexpo.worlds.scenes.grammar import scenes_of
from worlds.emoji.draw import draw_images, to_float
from worlds.emoji.fit import autocast, choose_device, save_tensors
from worlds.emoji.layout import save_judge
from worlds.emoji.train_judge import MAX_SCALE, embed_images, embed_texts
from worlds.scenes.captions import draw_scene
from worlds.scenes.damage import KINDS, draw_damaged
from worlds.scenes.fit import Schedule, fit
from worlds.scenes.models import LooksShape, make_looks_judge, make_tokenizer
from worlds.scenes.quality import load_base

FRESH, RECOVERED, LATENT, DRAWN = 30, 18, 6, 10
"""Pairs of a batch: as drawn, through the autoencoder, with noise in the latents, and drawn by the base."""
POOL = {"recovered": 900, "latent": 300, "drawn": 400}
"""Pairs (of the base's images: prompts) that are made before training."""
STEPS = (3, 6, 20)
"""Steps of the sampler of the base's images of a prompt, from the worst-looking to the best."""
CLEAN_SHARE, SECOND_SHARE, TIE_SHARE = 0.55, 0.3, 0.12
"""Better images without damage, worse ones with two damages more, and pairs of two undamaged images, which
no judge should tell apart."""
LEAST, MOST_OF_BETTER = 0.25, 0.6
"""Least difference in strength within a pair, and largest strength in its better image."""


@dataclass(frozen=True)
class Judge:
    """Vision tower and seed of a judge; `half`: its half of the prompts that the base draws for it."""

    shape: LooksShape
    seed: int
    half: int


JUDGES = {
    "looks_train": Judge(LooksShape(patch=8, width=48, layers=6, heads=3), seed=22, half=1),
    "looks_heldout": Judge(LooksShape(patch=8, width=64, layers=4, heads=4), seed=21, half=0),
}


def draw_damages(rng: np.random.Generator) -> tuple[dict[str, float], dict[str, float]]:
    """Strengths of the damages of a better and a worse image: those of the better one, and more."""
    kinds = [str(kind) for kind in rng.permutation(list(KINDS))]
    better = {} if rng.random() < CLEAN_SHARE else {kinds[0]: float(rng.uniform(0, MOST_OF_BETTER))}
    worse = dict(better)
    raised = kinds[int(rng.integers(2)) :][: 1 + int(rng.random() < SECOND_SHARE)]
    for kind in raised:
        worse[kind] = float(rng.uniform(better.get(kind, 0.0) + LEAST, 1.0))
    return better, worse


def draw_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """A better and a worse image (64, 64, 3) and how often the first should win: 1, or 0.5 of a tie.

    They show the same scene in the same places, elsewhere, or, as two undamaged ones always, different
    scenes.
    """
    is_tie = rng.random() < TIE_SHARE
    better, worse = ({}, {}) if is_tie else draw_damages(rng)
    first, layouts = draw_scene(rng), [int(seed) for seed in rng.integers(2**31, size=2)]
    likeness = 1.0 if is_tie else rng.random()
    second = first if likeness < 0.65 else draw_scene(rng)
    if likeness < 0.45:
        layouts[1] = layouts[0]
    images = [
        draw_damaged(scene, damage, np.random.default_rng(layout), rng)
        for scene, damage, layout in zip((first, second), (better, worse), layouts, strict=True)
    ]
    return images[0], images[1], 0.5 if is_tie else 1.0


def draw_pairs(num: int, key: list[int]) -> tuple[Tensor, Tensor]:
    """Pairs of images (num, 2, 3, 64, 64), the better one first, and their labels (num,), keyed."""
    rng = np.random.default_rng(key)
    drawn = [draw_pair(rng) for _ in range(num)]
    images = torch.from_numpy(np.stack([[better, worse] for better, worse, _ in drawn]))
    return images.permute(0, 1, 4, 2, 3).contiguous(), torch.tensor([label for *_, label in drawn])


@torch.no_grad()
def through_autoencoder(
    vae: AutoencoderKL,
    images: Tensor,
    levels: Tensor | None = None,
    noise: torch.Generator | None = None,
) -> Tensor:
    """Images (N, 3, 64, 64) in [0, 1], encoded and decoded; with `levels` (N,) after normal noise of these
    standard deviations was added to the scaled latents."""
    parts = []
    levels = torch.zeros(len(images)) if levels is None else levels
    for part, level in zip(images.split(64), levels.split(64), strict=True):
        latents = vae.encode(part * 2 - 1).latent_dist.mean
        eps = torch.randn(latents.shape, generator=noise) / float(vae.config.scaling_factor)
        decoded = vae.decode(latents + level.view(-1, 1, 1, 1) * eps).sample
        parts.append(((decoded.float() + 1) / 2).clamp(0, 1))
    return torch.cat(parts)


def make_pool(judge: Judge, vae: AutoencoderKL, base: Path) -> dict[str, Tensor]:
    """The pairs that cost a network: uint8 (N, 2, 3, 64, 64), the better image first, and their labels.

    Of the images that a base draws, (prompts, len(STEPS), 3, 64, 64), the later ones are the better ones.
    """
    noise = torch.Generator().manual_seed(judge.seed)
    images, labels = draw_pairs(POOL["recovered"], [judge.seed, 1])
    slight = 0.05 + 0.05 * torch.rand(len(images), generator=noise)
    with autocast(torch.device("cpu")):
        recovered = through_autoencoder(vae, images.flatten(0, 1), slight.repeat_interleave(2), noise)
        clean = draw_pairs(POOL["latent"], [judge.seed, 2])[0][:, :1].expand(-1, 2, -1, -1, -1)
        low = 0.3 * torch.rand(len(clean), generator=noise)
        high = low + 0.15 + 0.45 * torch.rand(len(clean), generator=noise)
        noisy = through_autoencoder(
            vae, clean.flatten(0, 1), torch.stack([low, high], dim=1).flatten(), noise
        )
    ordered = sorted(scenes_of("train"), key=lambda scene: keyed_fraction("looks", scene.text))
    texts = [scene.text for scene in ordered[judge.half :: 2][: POOL["drawn"]]]
    pipeline = load_base(base)
    drawn = [to_float(draw_images(pipeline, texts, texts, steps=steps, guidance=1.0)) for steps in STEPS]
    found = {
        "recovered": recovered.unflatten(0, (-1, 2)),
        "latent": noisy.unflatten(0, (-1, 2)),
        "drawn": torch.stack(drawn, dim=1),
    }
    return {name: (each * 255).round().byte() for name, each in found.items()} | {"labels": labels}


class _Batches:
    """Batches of pairs by the number of the step."""

    def __init__(self, judge: Judge, pool: Mapping[str, Tensor]) -> None:
        self.judge, self.pool = judge, pool
        self.texts = [scene.text for scene in scenes_of("train")]

    def __call__(self, step: int) -> tuple[Tensor, Tensor, list[str]]:
        """Images (B, 2, 3, 64, 64), labels (B,) and prompts (B)."""
        noise = torch.Generator().manual_seed(self.judge.seed * 10**7 + step)
        fresh, labels = draw_pairs(FRESH, [self.judge.seed, 3, step])
        parts, wanted = [fresh], [labels]
        for name, num in (("recovered", RECOVERED), ("latent", LATENT)):
            rows = torch.randint(len(self.pool[name]), (num,), generator=noise)
            parts.append(self.pool[name][rows].float() / 255)
            wanted.append(self.pool["labels"][rows] if name == "recovered" else torch.ones(num))
        rows = torch.randint(len(self.pool["drawn"]), (DRAWN,), generator=noise)
        worse, apart = (torch.randint(len(STEPS) - 1, (DRAWN,), generator=noise) for _ in range(2))
        better = (worse + 1 + apart).clamp(max=len(STEPS) - 1)
        drawn = self.pool["drawn"]
        parts.append(torch.stack([drawn[rows, better], drawn[rows, worse]], dim=1).float() / 255)
        wanted.append(torch.ones(DRAWN))
        images = torch.cat(parts)
        turned = torch.rand(len(images), 1, 1, 1, 1, generator=noise) < 0.5
        chosen = torch.randint(len(self.texts), (len(images),), generator=noise)
        return (
            torch.where(turned, images.flip(-1), images),
            torch.cat(wanted),
            [self.texts[int(index)] for index in chosen],
        )


def looks_scores(judge: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, texts: list[str]) -> Tensor:
    """exp(logit_scale) cos(text, image) of images (B, N, 3, 64, 64) in [0, 1], N of each text: (B, N)."""
    embedded = embed_images(judge, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    text = embed_texts(judge, tokenizer, texts)
    return judge.logit_scale.exp().clamp(max=MAX_SCALE) * (embedded * text[:, None]).sum(-1)


@torch.no_grad()
def accuracy(judge: CLIPModel, tokenizer: CLIPTokenizer, num: int = 500, seed: int = 9) -> float:
    """How often a judge prefers the better image of pairs that it never saw (ties left out)."""
    images, labels = draw_pairs(num, [seed, 4])
    images = images[labels == 1]
    texts = [scene.text for scene in scenes_of("validation")]
    texts = [texts[index % len(texts)] for index in range(len(images))]
    parts = [
        looks_scores(judge, tokenizer, part, texts[start * 50 : start * 50 + len(part)])
        for start, part in enumerate(images.split(50))
    ]
    scores = torch.cat(parts)
    return float((scores[:, 0] > scores[:, 1]).float().mean())


def train_looks(name: str, steps: int, out: Path, vae: AutoencoderKL, base: Path | None = None) -> None:
    """Train one of `JUDGES` for so many steps and write it as a folder in the layout of PickScore.

    The loss is that of Bradley and Terry, -log sigmoid(s_better - s_worse), and of a tie its mean over both
    orders. The pairs that cost a network are kept in a file beside the folder.

    Args:
        base: draws some of the pairs; by default the shipped `scenes:diffusion`.
    """
    judge, device = JUDGES[name], choose_device()
    torch.manual_seed(judge.seed)
    tokenizer = make_tokenizer()
    network = make_looks_judge(tokenizer, judge.shape).to(device)
    network.set_attn_implementation("eager")
    file = out / f"{name}.pool.safetensors"
    if not file.is_file():
        pool = make_pool(judge, vae.cpu().eval(), base or asset_path("scenes", "diffusion"))
        save_tensors(pool, file)
    batches = _Batches(judge, load_file(file))

    def loss_of(step: int) -> Tensor:
        images, labels, texts = batches(step)
        with autocast(device):
            scores = looks_scores(network, tokenizer, images.to(device), texts).float()
        margins = scores[:, 0] - scores[:, 1]
        return F.binary_cross_entropy_with_logits(margins, labels.to(device))

    def snapshot() -> None:
        network.eval()
        print(f"{name}: {accuracy(network, tokenizer):.1%} of unseen pairs right", flush=True)
        save_judge(network, tokenizer, out / name)
        network.train()

    fit(
        name,
        network,
        loss_of,
        Schedule(steps, 2e-3, average=0.99, weight_decay=0.01),
        out / f"{name}.state.safetensors",
        snapshot,
        matrices_of="vision_model.encoder.",
    )
