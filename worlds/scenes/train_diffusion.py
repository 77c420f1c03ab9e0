"""Trains the diffusion base: text encoder and UNet together, on latents that are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexpo.worlds.scenes.compose import BACKGROUNDS, CELL, Placed, compose, paste
from diffexpo.worlds.scenes.grammar import OPPOSITE, Scene
from worlds.emoji.fit import autocast, choose_device
from worlds.emoji.layout import save_diffusion
from worlds.emoji.train_diffusion import TextGrounding, read_weights, shuffled, stratified
from worlds.emoji.train_vae import encode_images
from worlds.scenes.captions import caption, draw_scene
from worlds.scenes.fit import Schedule, fit, group
from worlds.scenes.models import make_schedule, make_text_encoder, make_tokenizer, make_unet
from worlds.scenes.train_reader import Reading, read_from

BATCH, PAIRS = 144, 16
"""Images of a step, and pairs of images besides that differ in the order or the names of two things."""
LEARNING_RATE = 8e-4
IMAGES = 100_000
GROUNDING_WEIGHT = 0.05
READING_WEIGHT = 0.01
ORDER_WEIGHT = 0.15
"""Counts the pairs about as often as as many other images. With weight 1 the few pairs outweigh all else at
high noise: what a caption changes of the prediction there became twice as large as it is true."""


def true_scenes(num: int, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """Draw training scenes: images (num, 64, 64, 3) of uint8 and what they show."""
    rng = np.random.default_rng([seed, 1])
    scenes = [draw_scene(rng) for _ in range(num)]
    return np.stack([compose(scene, rng)[0] for scene in scenes]), scenes


def exchanged(num: int, seed: int) -> tuple[np.ndarray, list[tuple[Scene, Scene]]]:
    """Draw scenes of two things twice, the second time exchanged: images (2 num, 64, 64, 3) of uint8, all
    first ones before all second ones, and what both show."""
    rng = np.random.default_rng([seed, 8])
    firsts, seconds, scenes = [], [], []
    while len(scenes) < num:
        scene = draw_scene(rng)
        other = exchange(scene)
        if other is None or other.is_heldout:
            continue
        image, placed = compose(scene, rng)
        firsts.append(image)
        seconds.append(_exchanged_image(image, scene, placed))
        scenes.append((scene, other))
    return np.stack([*firsts, *seconds]), scenes


def exchange(scene: Scene) -> Scene | None:
    """The scene with both things in each other's place, or, where no relation is asked for, with each other's
    name: "a blue bell left of a red hat" and "... right of ...", "two blue bells and a red hat" and "two blue
    hats and a red bell". None where there are not two things or the exchange changes nothing."""
    if len(scene.things) != 2:
        return None
    if scene.relation is not None:
        return replace(scene, relation=OPPOSITE[scene.relation])
    a, b = scene.things
    if a.count == b.count and a.colour == b.colour:
        return None
    return replace(scene, things=(replace(a, name=b.name), replace(b, name=a.name)))


def _exchanged_image(image: np.ndarray, scene: Scene, placed: Sequence[Placed]) -> np.ndarray:
    other = np.empty_like(image)
    other[:] = max(BACKGROUNDS, key=lambda colour: int((image == colour).all(-1).sum()))
    first, second = placed[0], placed[-1]
    for place in placed:
        twin = second if place.name == first.name else first
        look = twin.look if scene.relation is not None else place.look
        paste(other, twin.name, look, (place.y - CELL // 2, place.x - CELL // 2))
    return other


class ExchangedScenes:
    """Scaled latents of scenes of two things and of the same exchanged (`exchange`).

    Which of two things is left, or of which there are two, is little of an image's variance, and through a
    loss on single images it is learned late or never: "left of" and "right of" became synonyms. Of two images
    that differ in nothing else, seen through the same noise, the difference of both predictions is about the
    exchange alone.
    """

    def __init__(self, vae: AutoencoderKL, num: int, seed: int) -> None:
        images, self.scenes = exchanged(num, seed)
        with autocast(choose_device()):
            means, _ = encode_images(vae, images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        self.means = means.half() * float(vae.config.scaling_factor)

    def draw(self, num: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Return latents (2 num, C, h, w) and captions, those of the exchanged scenes in the second half.
        Half of the pairs whose exchange needs no colours are told without them."""
        chosen = rng.integers(0, len(self.scenes), num)
        pairs = [self.scenes[int(i)] for i in chosen]
        plain = [exchange(first.without_colours()) is not None and rng.random() < 0.5 for first, _ in pairs]
        captions = [
            (scene.without_colours() if is_plain else scene).text
            for half in zip(*pairs, strict=True)
            for scene, is_plain in zip(half, plain, strict=True)
        ]
        return self.means[np.concatenate([chosen, chosen + len(self.scenes)])].float(), captions


class LatentScenes:
    """Scaled latents of training scenes with captions drawn anew each time."""

    def __init__(self, vae: AutoencoderKL, num: int, seed: int) -> None:
        means, stds = [], []
        self.scenes: list[Scene] = []
        for part in range(-(-num // 10_000)):
            images, scenes = true_scenes(min(10_000, num - 10_000 * part), seed + 1000 * part)
            with autocast(choose_device()):
                pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
                mean, std = encode_images(vae, pixels)
            means.append(mean.half())
            stds.append(std.half())
            self.scenes += scenes
        self.means, self.stds = torch.cat(means), torch.cat(stds)
        self.scale = float(vae.config.scaling_factor)

    def draw(self, num: int, rng: np.random.Generator, noise: torch.Generator) -> tuple[Tensor, list[str]]:
        """Return latents (num, C, h, w) of unit deviation and their captions."""
        chosen = rng.integers(0, len(self.scenes), num)
        means, stds = self.means[chosen].float(), self.stds[chosen].float()
        latents = (means + stds * torch.randn(means.shape, generator=noise)) * self.scale
        return latents, [caption(self.scenes[int(i)], rng) for i in chosen]


def start_from(folder: Path, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: nn.Module) -> None:
    """Take a base's weights; its text encoder may have fewer words and fewer layers."""
    unet.load_state_dict(read_weights(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    read_from(folder, text_encoder, tokenizer)


def order_error(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """|(x0_hat_1 - x0_hat_2) - (x0_1 - x0_2)|^2, a mean over pairs and elements, of rows whose second half
    holds the exchanged scenes."""
    first, second = (x0_hat - x0).chunk(2)
    return (first - second).square().mean()


def draw_step(
    data: LatentScenes,
    num: int,
    pairs: ExchangedScenes,
    num_pairs: int,
    rng: np.random.Generator,
    noise: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Latents, noise, timesteps and captions of `num` images at all timesteps, then of pairs at those from
    500 on, both images of a pair at the same noise and timestep."""
    x0, captions = data.draw(num, rng, noise)
    eps = torch.randn(x0.shape, generator=noise)
    t = shuffled((stratified(num, noise) * 1000).long().clamp(max=999), noise)
    ordered, said = pairs.draw(num_pairs, rng)
    both = torch.randn(num_pairs, *x0.shape[1:], generator=noise).repeat(2, 1, 1, 1)
    high = (500 + stratified(num_pairs, noise) * 500).long().clamp(max=999).repeat(2)
    return torch.cat([x0, ordered]), torch.cat([eps, both]), torch.cat([t, high]), captions + said


def train_diffusion(
    steps: int,
    out: Path,
    seed: int,
    vae: AutoencoderKL,
    start: Path | None,
    num_images: int = IMAGES,
    learning_rate: float = LEARNING_RATE,
    reader: Path | None = None,
) -> None:
    """Train text encoder and UNet for so many steps of `BATCH` and save the StableDiffusionPipeline folder.

    The loss is the squared error of v (`make_schedule`), and three small ones: latents have to be told from
    a caption's states (`TextGrounding`, times `GROUNDING_WEIGHT`), what the caption says has to be read from
    them (`Reading`, times `READING_WEIGHT`), and the `order_error` of `ExchangedScenes` at the noisier half
    of the times (times `ORDER_WEIGHT`). `reader` is the folder, if there is one, of a text encoder that can
    read (`train_reader`) in place of the start's. Under `torchrun` the processes share every batch. The
    state for going on lies beside the folder, in `<out>.state.safetensors`.
    """
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    if start is not None:
        start_from(start, text_encoder, tokenizer, unet)
    if reader is not None and reader.is_dir():
        text_encoder.load_state_dict(read_weights(reader / "model.safetensors"))
    text_encoder.set_attn_implementation("eager")
    width = text_encoder.config.hidden_size
    grounding, reading = TextGrounding(width), Reading(width)
    parts = nn.ModuleDict(
        {"text_encoder": text_encoder, "unet": unet, "grounding": grounding, "reading": reading}
    ).to(device)
    # Never compiled: on a CPU the compiled UNet (torch 2.13, bfloat16) has gradients of exactly 0 in all that
    # lies below its uppermost resolution. Uncompiled, float32 is no slower there than bfloat16.
    rank, world = group()
    share, num_pairs = BATCH // world, PAIRS // world
    data = LatentScenes(vae.to(device).eval(), num_images // world, seed + 10**6 * rank)
    pairs = ExchangedScenes(vae, num_images // world // 5, seed + 10**6 * rank)
    schedule = make_schedule()
    alpha_bars = schedule.alphas_cumprod.to(device)

    def loss_of(step: int) -> Tensor:
        rng, noise = (
            np.random.default_rng([seed, 2, step, rank]),
            torch.Generator().manual_seed((seed * 10**7 + step) * world + rank),
        )
        x0, eps, t, captions = draw_step(data, share, pairs, num_pairs, rng, noise)
        eps, t = eps.to(device), t.to(device)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ids, x0 = ids.to(device), x0.to(device)
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x_t, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
        with autocast(device):
            states = text_encoder(ids).last_hidden_state
            guess = grounding(states, ids, tokenizer.eos_token_id)
            misread = reading.loss(states, ids, tokenizer.eos_token_id, captions)
        prediction = unet(x_t, t, states.float()).sample
        error = (prediction.float() - v).square().mean()
        x0_hat = alpha * x_t - sigma * prediction.float()
        disorder = order_error(x0_hat[share:], x0[share:])
        tied = (guess.float() - x0).square().mean()
        return error + GROUNDING_WEIGHT * tied + READING_WEIGHT * misread + ORDER_WEIGHT * disorder

    fit(
        "diffusion",
        parts,
        loss_of,
        Schedule(steps, learning_rate, muon=2.0),
        out.with_name(f"{out.name}.state.safetensors"),
        lambda: save_diffusion(vae, text_encoder, tokenizer, unet, out, schedule),
        matrices_of=("unet.down_blocks.", "unet.mid_block.", "unet.up_blocks."),
    )
