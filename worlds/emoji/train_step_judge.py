"""Trains the step-aware judge: noised latents of the train images against their captions, and noised
offline pairs."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from diffexpo.diffusion.path import Path as NoisePath
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.step_judge import StepJudgeNetwork, StepJudgeShape, noise_level, text_sample
from diffexpo.worlds.emoji import asset_path, load_images, load_rows
from worlds.emoji.attributes import is_train
from worlds.emoji.corrupt import augment
from worlds.emoji.fit import Average, Schedule, choose_device, fit
from worlds.emoji.layout import save_step_judge
from worlds.emoji.models import LATENT_CHANNELS, LATENT_SIZE, make_ddim
from worlds.emoji.train_judge import retrieval_at_1
from worlds.emoji.train_vae import encode_images

TEXT = "judge_train"  # its text tower is the caption side
# A batch is so many groups, each of one noise level: only states of one level are ever compared.
GROUPS, GROUP = 4, 64
NUM_VARIANTS = 16  # of a group: variants of few concepts, four each
NUM_PAIRS = 32
PAIR_WEIGHT = 0.25
LEARNING_RATE = 2e-3
PATHS = ("vp", "flow")


def noise_paths() -> dict[str, NoisePath]:
    """Return the noising paths of the two bases by their kinds."""
    scheduler = {**make_ddim().config, "_class_name": "DDIMScheduler"}
    return {"vp": NoisePath.from_scheduler_config(scheduler), "flow": NoisePath.flow()}


def make_shape(sample: tuple[float, ...]) -> StepJudgeShape:
    """Return the shipped judge's sizes: 143 thousand parameters, 0.3 MB as float16."""
    return StepJudgeShape(
        latent_shape=(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE),
        paths=PATHS,
        text=f"emoji:{TEXT}",
        text_sample=sample,
        embedding=128,
        patch=2,
        width=96,
        hidden=160,
        blocks=2,
    )


def train_rows() -> list[dict[str, Any]]:
    """Return the rows whose images the judge learns from: those that the bases may see."""
    return [row for row in load_rows() if is_train(row)]


@dataclass(frozen=True)
class Latents:
    """Scaled latents of images: mean and std (N, C, h, w)."""

    means: Tensor
    stds: Tensor

    @staticmethod
    def of(vae: AutoencoderKL, images: np.ndarray) -> Latents:
        """Encode images (N, 3, H, W) in [0, 1]."""
        scale = float(vae.config.scaling_factor)
        means, stds = encode_images(vae, images)
        return Latents(means * scale, stds * scale)

    def draw(self, indices: list[int] | Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw of the posterior for each index."""
        means = self.means[indices]
        return means + self.stds[indices] * torch.randn(means.shape, generator=generator)


class _Captioned:
    """Train images (as they are, and moved or re-coloured) with the embeddings of their captions."""

    def __init__(self, vae: AutoencoderKL, clip: ClipReward, seed: int) -> None:
        self.draws = np.random.default_rng([seed, 7])
        rows = train_rows()
        images = load_images([row["id"] for row in rows])
        changed = augment(torch.from_numpy(images), torch.Generator().manual_seed(seed + 41), 0.7).numpy()
        self.versions = [Latents.of(vae, version) for version in (images, changed)]
        captions = [f"{row['style']} {row['caption']}" for row in rows]
        self.texts = torch.cat(
            [clip.embed_prompts(captions[i : i + 256]) for i in range(0, len(captions), 256)]
        )
        members: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            members[row["concept"]].append(index)
        self.members = list(members.values())
        weights = np.array([len(indices) ** 0.5 for indices in self.members])
        self.weights = weights / weights.sum()

    def group(self) -> list[int]:
        """Return GROUP rows: one each of many concepts, and NUM_VARIANTS of few."""
        number = GROUP - NUM_VARIANTS
        concepts = self.draws.choice(len(self.members), size=number, p=self.weights, replace=False)
        rows = [self.members[c][int(self.draws.integers(len(self.members[c])))] for c in concepts]
        rich = [c for c in concepts if len(self.members[c]) > 4]
        while len(rows) < GROUP:
            variants = self.members[int(self.draws.choice(rich or concepts))]
            rows.extend(
                int(i) for i in self.draws.choice(variants, size=min(4, len(variants)), replace=False)
            )
        return rows[:GROUP]

    def latents(self, indices: list[int], generator: torch.Generator) -> Tensor:
        """Return latents of the rows, half of them of the changed images."""
        two = [version.draw(indices, generator) for version in self.versions]
        return torch.where(torch.rand(len(indices), 1, 1, 1, generator=generator) < 0.5, *two)


class _Pairs:
    """The offline pairs as latents, with the probability that the first is preferred."""

    def __init__(self, vae: AutoencoderKL, clip: ClipReward, path: Path) -> None:
        rows = parquet.read_table(path).to_pylist()
        places: dict[str, int] = {}
        images = []
        for row in rows:
            for side in ("0", "1"):
                if places.setdefault(row[f"image_{side}_uid"], len(images)) == len(images):
                    images.append(_read_jpeg(row[f"jpg_{side}"]))
        self.latents = Latents.of(vae, np.stack(images))
        self.first, self.second = (
            torch.tensor([places[row[f"image_{side}_uid"]] for row in rows]) for side in ("0", "1")
        )
        self.label = torch.tensor([float(row["label_0"]) for row in rows])
        distinct = list(dict.fromkeys(row["caption"] for row in rows))
        texts = clip.embed_prompts(distinct)
        self.texts = texts[[distinct.index(row["caption"]) for row in rows]]


def _read_jpeg(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255


class _Levels:
    """Draws noise levels: half of them uniform times of the diffusion path, half of the flow path."""

    def __init__(self) -> None:
        self.paths = noise_paths()

    def draw(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma), each (num,), of states of unit variance; one time in each of num/2 equal
        slices a path."""
        found = []
        for path in self.paths.values():
            each = num // len(self.paths)
            t = (torch.arange(each) + torch.rand(each, generator=generator)) / each
            found.append(torch.stack(path.alpha_sigma(t)))
        alpha, sigma = torch.cat(found, dim=1)
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm


def contrast_loss(vectors: Tensor, scale: Tensor, texts: Tensor, same: Tensor) -> Tensor:
    """Return CLIP's symmetric loss within each group, averaged over groups.

    Args:
        vectors: (G, n, D) unit vectors of states.
        scale: (G,) of each group.
        texts: (G, n, D) unit vectors of their captions.
        same: (G, n, n) bool, the two captions are one: such couples off the diagonal are left out.

    Returns:
        A scalar; log n where all cosines are equal.
    """
    logits = scale[:, None, None] * vectors @ texts.transpose(1, 2)
    diagonal = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same & ~diagonal, -1e4)
    target = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits.transpose(1, 2), target) + F.cross_entropy(logits, target)) / 2


def preference_loss(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """Return the mean Bradley-Terry cross-entropy of pairs, -p log sigmoid(d) - (1 - p) log sigmoid(-d), d =
    first - second.

    Args:
        first, second: (B,) scores.
        label: (B,) p, the probability that the first is preferred; 1/2 is a tie.

    Returns:
        A scalar; ln 2 where all scores are equal.
    """
    return F.binary_cross_entropy_with_logits(first - second, label)


def train_step_judge(minutes: float, out: Path, seed: int, vae: AutoencoderKL) -> None:
    """Train the step-aware judge on the train split and save it to `out`.

    loss = CLIP's loss within groups of one noise level + PAIR_WEIGHT x the preference loss of offline pairs,
    both images of a pair under the same noise. Concepts and combinations that are held out from the bases
    are in neither.
    """
    torch.manual_seed(seed)
    device = choose_device()
    clip = ClipReward("text tower", str(asset_path(TEXT)))
    captioned, pairs = _Captioned(vae, clip, seed), _Pairs(vae, clip, asset_path("offline"))
    levels, generator = _Levels(), torch.Generator().manual_seed(seed + 53)
    shape = make_shape(text_sample(clip))
    network = StepJudgeNetwork(shape).to(device)

    def judge(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
        return network(x.to(device), noise_level(alpha, sigma).to(device))

    def caption_loss() -> Tensor:
        rows = [captioned.group() for _ in range(GROUPS)]
        flat = [row for group in rows for row in group]
        x0 = captioned.latents(flat, generator)
        alpha, sigma = (each.repeat_interleave(GROUP) for each in levels.draw(GROUPS, generator))
        vectors, scale = judge(x0, torch.randn(x0.shape, generator=generator), alpha, sigma)
        same = torch.tensor(rows)[:, :, None] == torch.tensor(rows)[:, None, :]
        texts = captioned.texts[flat].to(device)
        return contrast_loss(
            vectors.unflatten(0, (GROUPS, GROUP)),
            scale[::GROUP],
            texts.unflatten(0, (GROUPS, GROUP)),
            same.to(device),
        )

    def pair_loss() -> Tensor:
        chosen = torch.randint(len(pairs.label), (NUM_PAIRS,), generator=generator)
        alpha, sigma = levels.draw(NUM_PAIRS, generator)
        noise = torch.randn((NUM_PAIRS, *shape.latent_shape), generator=generator)
        both = torch.cat(
            [pairs.latents.draw(side[chosen], generator) for side in (pairs.first, pairs.second)]
        )
        vectors, scale = judge(
            both, torch.cat([noise, noise]), torch.cat([alpha, alpha]), torch.cat([sigma, sigma])
        )
        texts = pairs.texts[chosen].to(device)
        scores = scale * (vectors * torch.cat([texts, texts])).sum(-1)
        return preference_loss(scores[:NUM_PAIRS], scores[NUM_PAIRS:], pairs.label[chosen].to(device))

    def loss_of(progress: float) -> Tensor:
        return caption_loss() + PAIR_WEIGHT * pair_loss()

    def snapshot() -> None:
        network.eval()
        found = _retrieval(network, captioned.versions[0].means, captioned.texts)
        print(f"step_judge: retrieval@1 among 50 {found}", flush=True)
        save_step_judge(network, shape, out)
        network.train()

    fit(
        "step_judge",
        loss_of,
        network.parameters(),
        Schedule(minutes, LEARNING_RATE, weight_decay=0.05, warmup=0.04),
        averages=[Average(network, 0.998)],
        snapshot=snapshot,
        snapshot_minutes=2.5,
    )


@torch.no_grad()
def _retrieval(network: StepJudgeNetwork, latents: Tensor, texts: Tensor, num: int = 300) -> dict[str, Any]:
    """Retrieval@1 of train images at three times of the diffusion path, to follow a training."""
    draw = np.random.default_rng(0)
    chosen = torch.from_numpy(draw.permutation(len(latents))[:num])
    noise = torch.randn(latents[chosen].shape, generator=torch.Generator().manual_seed(0))
    device = next(network.parameters()).device
    found = {}
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = noise_paths()["vp"].alpha_sigma(torch.full((num,), t))
        x = alpha.view(-1, 1, 1, 1) * latents[chosen] + sigma.view(-1, 1, 1, 1) * noise
        vectors, _ = network(x.to(device), noise_level(alpha, sigma).to(device))
        found[f"t {t}"] = round(retrieval_at_1(vectors.cpu() @ texts[chosen].T, draw), 3)
    return found
