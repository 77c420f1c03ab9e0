"""Trains a judge: a small dual encoder (CLIPModel) that also learns to prefer clean images."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffexpo.worlds.emoji import load_images, load_rows
from worlds.emoji.attributes import judge_keywords, judge_of
from worlds.emoji.corrupt import augment, spoil
from worlds.emoji.fit import Average, Schedule, autocast, choose_device, fit
from worlds.emoji.layout import save_judge
from worlds.emoji.models import make_judge
from worlds.emoji.tokens import make_tokenizer
from worlds.emoji.train_vae import decode_latents, encode_images

BATCH = 96
NUM_SPOILED = 32
MAX_SCALE = 100.0
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(images: Tensor) -> Tensor:
    """Return images in [0, 1] in the units that the judges' vision tower expects (CLIP's mean and
    deviation)."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def embed_images(judge: CLIPModel, images: Tensor) -> Tensor:
    """Return unit image embeddings (B, D) of images in [0, 1]."""
    output = judge.vision_model(pixel_values=normalize(images))
    return F.normalize(judge.visual_projection(output.pooler_output).float(), dim=-1)


def embed_texts(judge: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return unit caption embeddings (B, D)."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    device = judge.logit_scale.device
    output = judge.text_model(
        input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
    )
    return F.normalize(judge.text_projection(output.pooler_output).float(), dim=-1)


class _JudgeData:
    """One judge's share of the images and words, with reconstructions and noisy decodes by the
    autoencoder."""

    def __init__(self, name: str, vae: AutoencoderKL, seed: int) -> None:
        self.draws = np.random.default_rng([seed, 1])
        self.generator = torch.Generator().manual_seed(seed + 17)
        self.rows = [row for row in load_rows() if judge_of(row) == name]
        self.words = [judge_keywords(row, name) for row in self.rows]
        clean = load_images([row["id"] for row in self.rows])
        latents, _ = encode_images(vae, clean)
        scale = float(vae.config.scaling_factor)
        noise = torch.randn(latents.shape, generator=self.generator) / scale
        level = 0.45 + 0.75 * torch.rand(len(latents), 1, 1, 1, generator=self.generator)
        slight = 0.12 * torch.rand(len(latents), 1, 1, 1, generator=self.generator)
        self.clean = (torch.from_numpy(clean) * 255).round().byte()
        self.recovered = (decode_latents(vae, latents + slight * noise) * 255).round().byte()
        mixed = (latents + level * noise) / (1 + level.square()).sqrt()
        self.noisy = (decode_latents(vae, mixed) * 255).round().byte()
        members = defaultdict(list)
        for index, row in enumerate(self.rows):
            members[row["concept"]].append(index)
        self.members = list(members.values())
        weights = np.array([len(indices) ** 0.5 for indices in self.members])
        self.weights = weights / weights.sum()

    def draw(self) -> tuple[list[int], list[str]]:
        """Return BATCH row indices and captions: 3/4 from all concepts, 1/4 variants of few concepts (hard
        negatives)."""
        concepts = self.draws.choice(len(self.members), size=BATCH * 3 // 4, p=self.weights, replace=False)
        indices = [self.members[c][int(self.draws.integers(len(self.members[c])))] for c in concepts]
        rich = [c for c in concepts if len(self.members[c]) > 4]
        while len(indices) < BATCH:
            variants = self.members[int(self.draws.choice(rich))]
            indices.extend(int(i) for i in self.draws.choice(variants, size=4, replace=False))
        indices = indices[:BATCH]
        return indices, [self._caption(self.rows[i], self.words[i]) for i in indices]

    def _caption(self, row: dict[str, Any], words: list[str]) -> str:
        kind = self.draws.random()
        if kind < 0.7:
            return f"{row['style']} {row['caption']}"
        if kind < 0.8 or not words:
            return row["caption"]
        chosen = ", ".join(words[int(i)] for i in self.draws.permutation(len(words))[:2])
        return f"{row['style']} {row['caption']}, {chosen}" if kind < 0.9 else f"{row['style']} {chosen}"

    def images(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return the augmented images (B) and spoiled ones (NUM_SPOILED) of the first of these rows."""
        real = torch.rand(len(indices), 1, 1, 1, generator=self.generator) < 0.4
        good = torch.where(real, self.clean[indices], self.recovered[indices]).float() / 255
        half = indices[: NUM_SPOILED // 2]
        bad = torch.cat(
            [self.noisy[half].float() / 255, spoil(self.recovered[half].float() / 255, self.generator)]
        )
        return augment(good, self.generator), augment(bad, self.generator, 0.5)


def train_judge(name: str, minutes: float, out: Path, seed: int, vae: AutoencoderKL) -> None:
    """Train the judge `name` ("judge_train" or "judge_heldout") on its half of the images and save it to
    `out`.

    The loss is CLIP's in both directions; the text-to-image softmax also holds spoiled images, half of
    them spoiled versions of the very image that the text describes, so a high score needs a clean image
    too.
    """
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer()
    data = _JudgeData(name, vae, seed)
    judge = make_judge(tokenizer).to(device)
    judge.set_attn_implementation("eager")  # in bfloat16 on a CPU twice as fast as the fused kernel
    average = Average(judge, 0.998)

    def loss_of(progress: float) -> Tensor:
        indices, captions = data.draw()
        good, bad = data.images(indices)
        with autocast(device):
            text = embed_texts(judge, tokenizer, captions)
            image = embed_images(judge, torch.cat([good, bad]).to(device))
        logits = judge.logit_scale.exp().clamp(max=MAX_SCALE) * text.float() @ image.float().T
        same = torch.tensor([[a == b for b in captions] for a in captions]) & ~torch.eye(
            BATCH, dtype=torch.bool
        )
        square = logits[:, :BATCH].masked_fill(same.to(device), -1e4)
        target = torch.arange(BATCH, device=device)
        to_image = F.cross_entropy(torch.cat([square, logits[:, BATCH:]], dim=1), target)
        return (to_image + F.cross_entropy(square.T, target)) / 2

    def snapshot() -> None:
        judge.eval()
        found = measure_retrieval(judge, tokenizer, name)
        print(
            f"{name}: retrieval@1 among 50, own images {found['own']:.3f}, the other judge's "
            f"{found['other']:.3f}; "
            f"scale {float(judge.logit_scale.exp()):.1f}",
            flush=True,
        )
        save_judge(judge, tokenizer, out)
        judge.train()

    fit(
        name,
        loss_of,
        judge.parameters(),
        Schedule(minutes, 2e-3, weight_decay=0.1, warmup=0.06),
        averages=[average],
        snapshot=snapshot,
        snapshot_minutes=2.5,
    )


@torch.no_grad()
def measure_retrieval(
    judge: CLIPModel, tokenizer: CLIPTokenizer, name: str, num: int = 400
) -> dict[str, float]:
    """Return retrieval@1 among 50 captions for real images the judge trained on, and for the other
    judge's."""
    draw = np.random.default_rng(0)
    result = {}
    for key, mine in (("own", True), ("other", False)):
        rows = [row for row in load_rows() if (judge_of(row) == name) == mine]
        rows = [rows[int(i)] for i in draw.permutation(len(rows))[:num]]
        captions = [f"{row['style']} {row['caption']}" for row in rows]
        images = embed_images(judge, torch.from_numpy(load_images([row["id"] for row in rows])))
        result[key] = retrieval_at_1(images @ embed_texts(judge, tokenizer, captions).T, draw)
    return result


def retrieval_at_1(scores: Tensor, draw: np.random.Generator, num_captions: int = 50) -> float:
    """Return how often an image's own caption (the diagonal of (N, N) scores) beats 49 others drawn at
    random."""
    num = len(scores)
    hits = 0
    for index in range(num):
        others = draw.choice(num - 1, size=min(num_captions, num) - 1, replace=False)
        others = others + (others >= index)
        hits += int(bool((scores[index, index] > scores[index, torch.from_numpy(others)]).all()))
    return hits / num
