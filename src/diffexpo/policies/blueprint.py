"""A base model without its weights: every network as its configuration describes it, on the meta device,
where tensors have a shape and no memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from diffexpo.config.families import FAMILIES, Family
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import PolicyError
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.copies import tensors_of
from diffexpo.policies.family import class_of
from diffexpo.policies.loading import DTYPES, ModelFolder, component_folder, read_json
from diffexpo.policies.sizes import Shape, Size, bucket_shapes, latent_shape
from diffexpo.policies.text import read_sequence_length

Described = Mapping[str, tuple[str, Mapping[str, object]]]
"""Component -> (class, settings)."""


@dataclass(frozen=True)
class Component:
    """What one network occupies: parameters, and bytes of parameters and buffers in their precision."""

    name: str
    parameters: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Blueprint:
    """A base model on the meta device.

    Args:
        source: Where the settings come from, in words.
        dtype: Precision of denoiser and text encoders; the autoencoder is always float32.
        latent_shape: (C, h, w) of one latent, the largest where images have several sizes.
        text_tokens: Length of the text that the denoiser sees.
        image_sizes: (height, width) of all sizes in pixels, the first one first.
        components: What each network occupies without adapters.
    """

    card: Family
    source: str
    networks: Mapping[str, ModelMixin]
    dtype: torch.dtype
    latent_shape: Shape
    text_tokens: int
    image_sizes: tuple[Size, ...]
    components: tuple[Component, ...]

    @property
    def denoiser(self) -> ModelMixin:
        return self.networks[self.card.denoiser[0]]

    @property
    def image_size(self) -> Size:
        """The largest of all sizes."""
        return max(self.image_sizes, key=math.prod)


def read_described(index: ModelFolder, card: Family) -> Described:
    """Classes and settings of the networks of a folder, from its JSON files."""
    names = [name for name in card.parts if index.has(name) or name not in (*card.text_encoders,)[1:]]
    files = {name: component_folder(index, name) / "config.json" for name in names}
    return {name: (index.index[name][1], read_json(file)) for name, file in files.items()}


def make_blueprint(
    card: Family, described: Described, model: ModelConfig, where: str, source: str
) -> Blueprint:
    """Every network of a base model on the meta device, in its precision. `where` names the model; a folder
    may say how many tokens of text it was trained with.

    Raises:
        PolicyError: a configuration that its class refuses.
        ConfigError: a size that the model cannot draw.
    """
    dropped = card.optional if model.drop_t5 else ()
    networks = {
        name: build_network(name, *described[name])
        for name in card.parts
        if name in described and name not in dropped
    }
    denoiser, vae, folder = networks[card.denoiser[0]], networks["vae"], Path(where).expanduser()
    factor = vae_factor(vae)
    # Where no file names a size the pipeline's default is 1024 pixels (FLUX).
    sample = denoiser.config.get("sample_size") or 1024 // factor
    shape = latent_shape(card, denoiser, vae, model, where, sample)
    shapes = bucket_shapes(card, denoiser, shape, factor, model, where)
    text_tokens = read_sequence_length(folder, model, card.text_tokens)
    if card.has_clip_states:
        text_tokens += networks["text_encoder"].config.max_position_embeddings
    dtype, components = DTYPES[model.dtype], []
    for name, network in networks.items():
        own = torch.float32 if name == "vae" else dtype
        network.to(own).eval().requires_grad_(False)
        held = sum(tensor.nbytes for tensor in tensors_of(network))
        components.append(Component(name, network.num_parameters(), held, str(own).removeprefix("torch.")))
    return Blueprint(
        card=card,
        source=source,
        networks=networks,
        dtype=dtype,
        latent_shape=max(shapes, key=math.prod),
        text_tokens=text_tokens,
        image_sizes=tuple((height * factor, width * factor) for _, height, width in shapes),
        components=tuple(components),
    )


def denoiser_inputs(blueprint: Blueprint, rows: int) -> dict[str, Any]:
    """Arguments of the denoiser's forward for a number of rows: shapes without values."""

    def empty(*shape: int, dtype: torch.dtype = blueprint.dtype) -> Tensor:
        return torch.empty(rows, *shape, device="meta", dtype=dtype)

    family = import_module(f"diffexpo.policies.{blueprint.card.name}")
    inputs = family.denoiser_inputs(
        blueprint.denoiser.config, blueprint.latent_shape, blueprint.text_tokens, empty
    )
    return {**inputs, "timestep": empty(dtype=torch.float32)}


def make_trainable(blueprint: Blueprint, tuning: TuningConfig) -> int:
    """Ask for gradients as a run would, in place: of float32 LoRA factors on the frozen denoiser, or of the
    denoiser itself.

    Returns:
        Number of trained elements; 6,377,472 for rank 32 on SD 1.5.
    Raises:
        PolicyError: no module matches the adapters' targets.
    """
    network = blueprint.denoiser
    if tuning.kind == "full":
        named = dict(network.named_parameters())
        inert = blueprint.card.inert_parameters(network.config, named)
        trained = [value for name, value in named.items() if name not in inert]
    else:
        targets = tuning.lora.target_modules or blueprint.card.lora_targets
        config = LoraConfig(r=tuning.lora.rank, lora_alpha=tuning.lora.rank, target_modules=list(targets))
        try:
            inject_adapter_in_model(config, network, "current", low_cpu_mem_usage=True)
        except ValueError as error:
            raise PolicyError(f"tuning.lora.target_modules={list(targets)}: {error}") from error
        trained = [value for name, value in network.named_parameters() if ".lora_" in name]
        for parameter in trained:
            parameter.data = parameter.data.float()
    for parameter in trained:
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in trained)


def merged_bytes(blueprint: Blueprint) -> int:
    """Bytes of the weights that adapters are folded into, after `make_trainable`; 0 without adapters."""
    layers = (layer for layer in blueprint.denoiser.modules() if isinstance(layer, LoraLayer))
    return sum(layer.get_base_layer().weight.nbytes for layer in layers)


def highest_rank(blueprint: Blueprint) -> int:
    """The highest rank that an adapted layer has, the smaller of its sides, after `make_trainable`."""
    layers = (layer for layer in blueprint.denoiser.modules() if isinstance(layer, LoraLayer))
    weights = [layer.get_base_layer().weight for layer in layers]
    return max(min(weight.shape[0], weight[0].numel()) for weight in weights)


def build_network(name: str, class_name: str, settings: Mapping[str, object]) -> ModelMixin:
    """A network on the meta device, as its configuration describes it."""
    known = sorted({found for card in FAMILIES.values() for found in card.parts.values()})
    if class_name not in known:
        raise PolicyError(f"{name}: class {class_name!r} cannot be estimated; expected {', '.join(known)}")
    network_class = class_of(class_name)
    try:
        with torch.device("meta"):
            if hasattr(network_class, "from_config"):
                return network_class.from_config(dict(settings))
            return network_class(network_class.config_class.from_dict(dict(settings)))
    except (TypeError, ValueError, KeyError) as error:
        raise PolicyError(f"{name}: {class_name} refuses its config.json ({error})") from error
