"""Reads gender presentation and skin tone from an image of a person (a small convolutional network)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from diffexpo.errors import MissingError
from diffexpo.worlds.emoji import asset_path, keyed_fraction, load_images, load_rows
from worlds.emoji.attributes import GENDERS, SKIN_TONES
from worlds.emoji.corrupt import augment
from worlds.emoji.fit import Average, Schedule, choose_device, fit, save_tensors

BATCH = 64
_WIDTHS = (16, 32, 48, 64)
_WEIGHTS, _FACTS = "model.safetensors", "facts.json"


class ProbeNetwork(nn.Module):
    """Four strided convolutions, a mean over the image, two linear heads; 62 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in _WIDTHS:
            layers += [nn.Conv2d(previous, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            previous = width
        self.body = nn.Sequential(*layers)
        # Two maps a head: the mean over the image alone loses where hair ends and a face begins.
        self.gender = nn.Linear(previous * 4, len(GENDERS))
        self.skin_tone = nn.Linear(previous * 4, len(SKIN_TONES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 3) and (B, 6) for images (B, 3, 64, 64) in [0, 1]."""
        features = F.adaptive_avg_pool2d(self.body(images * 2 - 1), 2).flatten(1)
        return self.gender(features), self.skin_tone(features)


@dataclass(frozen=True)
class Probe:
    """A trained probe; `facts` holds its accuracy on real images that it never saw."""

    network: ProbeNetwork
    facts: dict[str, Any]

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Return the probabilities that the probe reads from images of single people.

        Args:
            images: (B, 3, 64, 64) float in [0, 1]; other sizes are resized.

        Returns:
            "gender" (B, 3) in the order of `GENDERS` and "skin_tone" (B, 6) in that of `SKIN_TONES`; rows sum
            to 1.
        """
        images = images.float()
        if images.shape[-2:] != (64, 64):
            images = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
        gender, skin_tone = self.network(images)
        return {"gender": gender.softmax(-1), "skin_tone": skin_tone.softmax(-1)}


def load_probe(folder: Path | None = None) -> Probe:
    """Return the shipped probe, or the one in `folder`; raises MissingError where there is none."""
    folder = folder or asset_path("probe")
    if not (folder / _WEIGHTS).is_file():
        raise MissingError(
            f"probe: {folder / _WEIGHTS} is missing - expected the probe's weights - train it again"
        )
    network = ProbeNetwork()
    network.load_state_dict({name: value.float() for name, value in load_file(folder / _WEIGHTS).items()})
    return Probe(network.eval(), json.loads((folder / _FACTS).read_text(encoding="utf-8")))


def probe_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (train, held-out) rows of single people with both attributes; the split is keyed by the code
    point.

    Held out are 15% of the code points (both styles of each).
    """
    rows = [row for row in load_rows() if row["gender"] and row["skin_tone"]]
    held = [keyed_fraction("probe", row["hexcode"]) < 0.15 for row in rows]
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def _targets(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([GENDERS.index(row["gender"]) for row in rows]),
        torch.tensor([SKIN_TONES.index(row["skin_tone"]) for row in rows]),
    )


def measure_probe(probe: Probe, rows: list[dict[str, Any]], images: Tensor) -> dict[str, float]:
    """Return the probe's accuracies on images with known attributes."""
    read = probe.read(images)
    gender, tone = _targets(rows)
    return {
        "gender": float((read["gender"].argmax(-1) == gender).float().mean()),
        "skin_tone": float((read["skin_tone"].argmax(-1) == tone).float().mean()),
    }


def train_probe(minutes: float, out: Path, seed: int, vae: AutoencoderKL) -> None:
    """Train the probe on real images and their reconstructions; save weights and accuracies to `out`."""
    from worlds.emoji.train_vae import decode_latents, encode_images

    torch.manual_seed(seed)
    device = choose_device()
    draw = np.random.default_rng([seed, 3])
    generator = torch.Generator().manual_seed(seed + 5)
    train, held = probe_rows()
    clean = load_images([row["id"] for row in train])
    recovered = decode_latents(vae, encode_images(vae, clean)[0])
    both = torch.cat([torch.from_numpy(clean), recovered])
    gender, tone = (torch.cat([target, target]).to(device) for target in _targets(train))
    network = ProbeNetwork().to(device)
    average = Average(network, 0.995)

    def loss_of(progress: float) -> Tensor:
        chosen = torch.from_numpy(draw.choice(len(both), size=BATCH, replace=False))
        read_gender, read_tone = network(augment(both[chosen], generator, 0.8).to(device))
        smooth = 0.05
        return F.cross_entropy(read_gender, gender[chosen], label_smoothing=smooth) + F.cross_entropy(
            read_tone, tone[chosen], label_smoothing=smooth
        )

    fit("probe", loss_of, network.parameters(), Schedule(minutes, 3e-3), averages=[average])
    probe = Probe(network.cpu().eval(), {})
    unseen = load_images([row["id"] for row in held])
    facts = {
        "num_train": len(train),
        "num_heldout": len(held),
        "accuracy_heldout": measure_probe(probe, held, torch.from_numpy(unseen)),
        "accuracy_heldout_reconstructed": measure_probe(
            probe, held, decode_latents(vae, encode_images(vae, unseen)[0])
        ),
    }
    print(f"probe: {facts}", flush=True)
    save_tensors({name: value.half() for name, value in network.state_dict().items()}, out / _WEIGHTS)
    (out / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
