"""A two-layer policy on single-pixel latents: real weight versions and a real path, milliseconds per step, no
model file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffexpo.config.schema import LoraConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.policies.weights import fingerprint_state, make_weights
from diffexpo.rng import torch_generator
from diffexpo.types import Conditioning

TEXT_WIDTH = 8
TOY_LORA = TuningConfig(kind="lora", lora=LoraConfig(rank=4, target_modules=("first", "second")))
TOY_FULL = TuningConfig(kind="full")


class ToyNetwork(nn.Module):
    """MLP on (x_t, t, prompt embedding) with keyed initial weights."""

    def __init__(self, channels: int, width: int, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels + 3 + TEXT_WIDTH, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, channels)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                value = torch.randn(parameter.shape, generator=torch_generator(seed, "toy", name))
                parameter.copy_(
                    value / max(parameter.shape[-1], 1) ** 0.5 if parameter.dim() > 1 else 0.1 * value
                )

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        clock = torch.stack([t, torch.sin(torch.pi * t), torch.cos(torch.pi * t)], dim=-1)
        hidden = torch.cat([x_t.flatten(1), clock, text], dim=-1)
        hidden = nn.functional.silu(self.first(hidden))
        hidden = nn.functional.silu(self.second(hidden))
        return self.last(hidden).reshape(x_t.shape)


class ToyPolicy:
    """A policy whose image is one colour: latents (C,1,1), images (3,8,8) of sigmoid(first three channels).

    It takes any noise path, tuning and device; the seed keys the network's weights.
    """

    max_tokens = 16

    def __init__(
        self,
        path: DiffusionPath,
        *,
        channels: int = 2,
        tuning: TuningConfig = TOY_FULL,
        seed: int = 0,
        width: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        network = ToyNetwork(channels, width, seed).to(device)
        self.path = path
        self.latent_shape = (channels, 1, 1)
        self.device = torch.device(device)
        self.dtype = network.first.weight.dtype
        self.fingerprint = fingerprint_state(network.state_dict())
        self.weights = make_weights(network, tuning, seed)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Words plus the two marks."""
        return [len(prompt.split()) + 2 for prompt in prompts]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """A fixed normal vector (B, 8) for each text; the empty prompt is zero."""
        rows = [
            torch.randn(TEXT_WIDTH, generator=torch_generator("toy text", prompt)) * bool(prompt)
            for prompt in prompts
        ]
        return Conditioning({"text": torch.stack(rows)}).to(self.device)

    def encode_images(self, images: Tensor) -> Tensor:
        """Inverse of `decode_latents`; channels beyond three are 0."""
        colour = images.to(self.device, self.dtype).mean(dim=(2, 3)).clamp(1e-4, 1 - 1e-4)
        latents = torch.zeros(len(images), *self.latent_shape, dtype=self.dtype, device=self.device)
        latents[:, :3, 0, 0] = torch.logit(colour[:, : self.latent_shape[0]])
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """One colour (B,3,8,8); absent channels are grey."""
        colour = torch.full((len(latents), 3), 0.5, device=self.device)
        colour[:, : self.latent_shape[0]] = torch.sigmoid(
            latents.detach().to(self.device).float()[:, :3, 0, 0]
        )
        return colour[:, :, None, None].expand(-1, -1, 8, 8).clone()

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output for x_t (B,C,1,1) at t (B,)."""
        latents, text = x_t.to(self.device), conditioning.tensors["text"]
        return self.weights.network(latents, t.to(latents), text.to(latents))
