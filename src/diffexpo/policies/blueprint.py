"""A base model without its weights: every network as its configuration describes it, on the meta device,
where tensors have a shape and no memory. Weights are counted exactly; activations are measured by running the
network there and adding up what is alive.

    held = bytes alive when the forward pass has ended (what the backward pass needs)
    peak = most bytes alive at once, forward and backward

Counted are all tensors but weights, gradients and inputs. Attention counts as on accelerators and the CPU,
whose kernels keep no matrix of probabilities (queries, keys, values, output and one number a row). Under
autocast the precisions of CUDA's lists hold: matrix products in half precision, with a cast copy of each
weight, normalisation in float32. Not counted: workspace inside kernels.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Gemma2Model, T5EncoderModel

from diffexpo.config.architectures import ARCHITECTURES, find_architecture
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import MissingError, PolicyError
from diffexpo.policies.flux import FLUX_LORA_TARGETS
from diffexpo.policies.loading import DTYPES, ModelFolder, component_folder, read_json, read_model_folder
from diffexpo.policies.pixart import inert_parameters as inert_in_pixart
from diffexpo.policies.sana import inert_parameters as inert_in_sana
from diffexpo.policies.sd3 import inert_parameters as inert_in_sd3
from diffexpo.policies.sizes import bucket_shapes, patch_of, vae_factor
from diffexpo.policies.unet import latent_size
from diffexpo.policies.weights import LORA_TARGETS

CLASSES: dict[str, type] = {
    found.__name__: found
    for found in (
        AutoencoderDC,
        AutoencoderKL,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        FluxTransformer2DModel,
        Gemma2Model,
        PixArtTransformer2DModel,
        SanaTransformer2DModel,
        SD3Transformer2DModel,
        T5EncoderModel,
        UNet2DConditionModel,
    )
}
# Pipeline class -> (denoiser, text encoders in the order of the pipeline).
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": ("unet", ("text_encoder",)),
    "StableDiffusionXLPipeline": ("unet", ("text_encoder", "text_encoder_2")),
    "StableDiffusion3Pipeline": ("transformer", ("text_encoder", "text_encoder_2", "text_encoder_3")),
    "FluxPipeline": ("transformer", ("text_encoder", "text_encoder_2")),
    "PixArtSigmaPipeline": ("transformer", ("text_encoder",)),
    "SanaPipeline": ("transformer", ("text_encoder",)),
}
# Tokens that a T5 encoder, or the zeros in its place, or Gemma gives the denoiser.
T5_TOKENS = {
    "StableDiffusion3Pipeline": 256,
    "FluxPipeline": 512,
    "PixArtSigmaPipeline": 300,
    "SanaPipeline": 300,
}
LOWER = (
    functional.linear,
    functional.conv2d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
)
RAISED = (functional.group_norm, functional.layer_norm, functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Component:
    """What one network occupies: number of parameters, and bytes of parameters and buffers in their
    precision."""

    name: str
    parameters: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Activations:
    """Bytes beside weights, gradients and inputs, see the head of this file."""

    held: int
    peak: int


@dataclass(frozen=True)
class Blueprint:
    """A base model on the meta device.

    Args:
        pipeline_class: Name of its diffusers pipeline.
        source: Where the settings come from, in words.
        networks: Component name -> network.
        dtype: Precision of denoiser and text encoders; the autoencoder is always float32.
        latent_shape: (C, h, w) of one latent, the largest where pictures have several sizes.
        text_tokens: Length of the text that the denoiser sees.
        picture_sizes: (height, width) of all sizes in pixels, the first one first.
    """

    pipeline_class: str
    source: str
    networks: Mapping[str, nn.Module]
    dtype: torch.dtype
    latent_shape: tuple[int, int, int]
    text_tokens: int
    picture_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def denoiser_name(self) -> str:
        return PARTS[self.pipeline_class][0]

    @property
    def denoiser(self) -> nn.Module:
        return self.networks[self.denoiser_name]

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        factor = vae_factor(self.networks["vae"])
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    def components(self) -> list[Component]:
        """What is held in memory while a run lasts."""
        return [
            Component(
                name,
                sum(parameter.numel() for parameter in network.parameters()),
                network_bytes(network),
                str(next(network.parameters()).dtype).removeprefix("torch."),
            )
            for name, network in self.networks.items()
        ]


def read_blueprint(path: str, model: ModelConfig, *, architecture: str | None = None) -> Blueprint:
    """The networks of a base model, from the JSON files of its folder or, where there is no folder, from
    public settings.

    Args:
        path: A diffusers folder, or a hub id that `find_architecture` knows (nothing is downloaded).
        model: Precision, resolution and text encoders.
        architecture: Name in `ARCHITECTURES` to take whatever the path says.
    Returns:
        Every network on the meta device, in its precision.
    Raises:
        MissingError: neither a folder nor a known architecture.
        PolicyError: a family that no policy reads, or a configuration that its class refuses.
    """
    folder = Path(path).expanduser()
    if architecture is None and folder.is_dir():
        index = read_model_folder(folder)
        pipeline, source = index.pipeline_class, str(folder)
        described = _described_by_folder(index)
    else:
        known = find_architecture(architecture or path)
        if known is None:
            names = ", ".join(entry.name for entry in ARCHITECTURES)
            raise MissingError(
                f"model.path={path!r}: no such folder, and its name tells no known architecture; name one "
                f"with "
                f"--architecture ({names}), or a folder"
            )
        pipeline, source = known.pipeline, f"public settings of {known.name}"
        described = dict(known.components)
    if pipeline not in PARTS:
        raise PolicyError(
            f"{path}: model family {pipeline!r} cannot be estimated; expected one of {', '.join(PARTS)}"
        )
    denoiser, texts = PARTS[pipeline]
    wanted = [
        name for name in (*texts, denoiser, "vae") if name in described and not _is_dropped(name, model)
    ]
    networks = {name: _build(name, *described[name]) for name in wanted}
    dtype = DTYPES[model.dtype]
    shape = _latent_shape(networks[denoiser], networks["vae"], model, path)
    factor = vae_factor(networks["vae"])
    shapes = bucket_shapes(networks[denoiser], shape, factor, model, path)
    for name, network in networks.items():
        network.to(torch.float32 if name == "vae" else dtype).eval().requires_grad_(False)
    return Blueprint(
        pipeline,
        source,
        networks,
        dtype,
        max(shapes, key=math.prod),
        _text_tokens(pipeline, networks, model, folder),
        tuple((height * factor, width * factor) for _, height, width in shapes),
    )


def network_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers())
    )


def make_trainable(blueprint: Blueprint, tuning: TuningConfig) -> int:
    """Ask for gradients as a run would: of float32 LoRA factors on the frozen denoiser, or of the denoiser
    itself.

    Args:
        blueprint: Changed in place.
        tuning: LoRA or full fine-tuning.
    Returns:
        Number of trained elements; 6,377,472 for rank 32 on SD 1.5.
    Raises:
        PolicyError: no module matches the adapters' targets.
    """
    network = blueprint.denoiser
    if tuning.kind == "full":
        inert = _inert_parameters(network)
        trained = [value for name, value in network.named_parameters() if not name.startswith(inert)]
    else:
        default = FLUX_LORA_TARGETS if isinstance(network, FluxTransformer2DModel) else LORA_TARGETS
        targets = tuning.lora.target_modules or default
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
    weights = [
        layer.get_base_layer().weight
        for layer in blueprint.denoiser.modules()
        if isinstance(layer, LoraLayer)
    ]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _inert_parameters(network: nn.Module) -> tuple[str, ...]:
    if isinstance(network, SD3Transformer2DModel):
        return inert_in_sd3(network.config)
    if isinstance(network, SanaTransformer2DModel):
        return inert_in_sana(network)
    return inert_in_pixart(network) if isinstance(network, PixArtTransformer2DModel) else ()


def measure_denoiser(
    blueprint: Blueprint,
    *,
    has_gradient: bool,
    rows: int = 1,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
) -> Activations:
    """Activations of the denoiser.

    Args:
        blueprint: Its parameters that ask for a gradient get one.
        rows: Latents that pass at once.
        has_gradient: Forward and backward, or forward alone.
        autocast: Precision of autocast; None is off.
        gradient_checkpointing: Blocks are computed again in the backward pass.
    Returns:
        Activations. Without autocast they are in proportion to the rows; casts of weights do not grow with
        them.
    """
    network = blueprint.denoiser
    mode = _Substitutes(autocast)
    if gradient_checkpointing and has_gradient:
        network.enable_gradient_checkpointing(mode.checkpointed)
    try:
        return _measure(network, denoiser_inputs(blueprint, rows), mode, has_gradient)
    finally:
        if gradient_checkpointing and has_gradient:
            network.disable_gradient_checkpointing()


def measure_decoder(blueprint: Blueprint, *, is_tiled: bool = False) -> Activations:
    """Activations of decoding one latent to a picture, at once or in tiles."""
    vae = blueprint.networks["vae"]
    (vae.enable_tiling if is_tiled else vae.disable_tiling)()
    latents = torch.empty(1, vae.config.latent_channels, *blueprint.latent_shape[1:], device="meta")
    return _measure(vae.decode, {"z": latents}, _Substitutes(None), False, owner=vae)


def forward_flops(blueprint: Blueprint) -> int:
    """Floating-point operations of the denoiser's forward on one row, a multiplication and an addition
    counting two; 0.80e12 for SD 1.5 at 512 pixels.
    """
    mode = _Substitutes(None)
    with mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        blueprint.denoiser(**denoiser_inputs(blueprint, 1), return_dict=False)
    return counter.get_total_flops() + mode.attention_flops


def denoiser_inputs(blueprint: Blueprint, rows: int) -> dict[str, Any]:
    """Arguments of the denoiser's forward for so many rows: shapes without values."""
    network, dtype = blueprint.denoiser, blueprint.dtype
    channels, height, width = blueprint.latent_shape
    config = network.config

    def empty(*shape: int) -> Tensor:
        return torch.empty(rows, *shape, device="meta", dtype=dtype)

    timestep = torch.empty(rows, device="meta")
    if isinstance(network, UNet2DConditionModel):
        inputs = {
            "sample": empty(channels, height, width),
            "timestep": timestep,
            "encoder_hidden_states": empty(blueprint.text_tokens, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
        return inputs
    if isinstance(network, SD3Transformer2DModel):
        return {
            "hidden_states": empty(channels, height, width),
            "timestep": timestep,
            "encoder_hidden_states": empty(blueprint.text_tokens, config.joint_attention_dim),
            "pooled_projections": empty(config.pooled_projection_dim),
        }
    if isinstance(network, FluxTransformer2DModel):
        tokens = height // 2 * (width // 2)
        return {
            "hidden_states": empty(tokens, config.in_channels),
            "timestep": timestep,
            "encoder_hidden_states": empty(blueprint.text_tokens, config.joint_attention_dim),
            "pooled_projections": empty(config.pooled_projection_dim),
            "img_ids": torch.empty(tokens, 3, device="meta"),
            "txt_ids": torch.empty(blueprint.text_tokens, 3, device="meta"),
            "guidance": torch.empty(rows, device="meta") if config.guidance_embeds else None,
        }
    inputs = {
        "hidden_states": empty(channels, height, width),
        "timestep": timestep,
        "encoder_hidden_states": empty(blueprint.text_tokens, config.caption_channels),
        "encoder_attention_mask": empty(blueprint.text_tokens),
    }
    if isinstance(network, SanaTransformer2DModel):
        return inputs
    return inputs | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


# ---- measuring ---------------------------------------------------------------------------------------------


def _measure(
    run: Callable[..., Any],
    inputs: Mapping[str, Any],
    mode: _Substitutes,
    has_gradient: bool,
    owner: nn.Module | None = None,
) -> Activations:
    ledger = Ledger()
    network = owner if owner is not None else run
    gradients = []
    for tensor in (*network.parameters(), *network.buffers(), *tree_leaves(inputs)):
        if isinstance(tensor, Tensor):
            ledger.leave_out(tensor)
            if has_gradient and tensor.requires_grad:
                tensor.grad = torch.empty_like(tensor)
                ledger.leave_out(tensor.grad)
                gradients.append(tensor)
    with ledger, torch.set_grad_enabled(has_gradient):
        with mode:
            output = run(**inputs, return_dict=False)[0]
        held = ledger.live
        if has_gradient:
            output.float().square().mean().backward()
    for tensor in gradients:
        tensor.grad = None
    return Activations(held, ledger.peak)


class Ledger(TorchDispatchMode):
    """Adds up the storages that operations make while they are alive, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._left_out: list[Any] = []
        self._alive: dict[int, weakref.ref[Any] | None] = {}

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this tensor's storage."""
        storage = tensor.untyped_storage()
        self._left_out.append(storage)
        self._alive[storage._cdata] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self.live += size
        self._alive[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and the log of the sum of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Substitutes(TorchFunctionMode):
    """Fused attention, and autocast's choice of precision, which the meta device does not have."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.attention_flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (self._to(given[name], self.autocast) for name in ("query", "key", "value"))
            # Scores and their product with the values.
            self.attention_flops += 2 * query.numel() * key.shape[-2] + 2 * query.numel() * value.shape[-2]
            return _FusedAttention.apply(query, key, value)
        if self.autocast is not None and func in LOWER:
            return func(*self._all(args, self.autocast), **self._all(kwargs, self.autocast))
        if self.autocast is not None and func in RAISED:
            return func(*self._all(args, torch.float32), **self._all(kwargs, torch.float32))
        return func(*args, **kwargs)

    def checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """A block that is computed again in the backward pass, where this mode is off and has to be entered
        anew."""

        def run(*values: Any) -> Any:
            with nullcontext() if torch.overrides._is_torch_function_mode_enabled() else self:
                return block(*values)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _all(self, values: Any, dtype: torch.dtype) -> Any:
        if isinstance(values, dict):
            return {name: self._to(value, dtype) for name, value in values.items()}
        return tuple(self._to(value, dtype) for value in values)

    def _to(self, value: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype)


# ---- reading -----------------------------------------------------------------------------------------------


def _described_by_folder(index: ModelFolder) -> dict[str, tuple[str, Mapping[str, object]]]:
    if index.pipeline_class not in PARTS:
        return {}
    denoiser, texts = PARTS[index.pipeline_class]
    found = {}
    for name in (*texts, denoiser, "vae"):
        if name in texts[1:] and not index.has(name):
            continue
        class_name = str((index.index.get(name) or [None, name])[1])
        found[name] = (class_name, read_json(component_folder(index, name) / "config.json"))
    return found


def _is_dropped(name: str, model: ModelConfig) -> bool:
    return name == "text_encoder_3" and model.drop_t5


def _build(name: str, class_name: str, settings: Mapping[str, object]) -> nn.Module:
    if class_name not in CLASSES:
        raise PolicyError(f"{name}: class {class_name!r} cannot be estimated; expected {', '.join(CLASSES)}")
    network_class = CLASSES[class_name]
    try:
        with torch.device("meta"):
            if hasattr(network_class, "from_config"):
                return network_class.from_config(dict(settings))
            return network_class(network_class.config_class.from_dict(dict(settings)))
    except (TypeError, ValueError, KeyError) as error:
        raise PolicyError(f"{name}: {class_name} refuses its config.json ({error})") from error


def _latent_shape(
    denoiser: nn.Module, vae: nn.Module, model: ModelConfig, where: str
) -> tuple[int, int, int]:
    # FLUX has no size of its own: its pipeline's default is 1024 pixels.
    sample = denoiser.config.get("sample_size") or 1024 // vae_factor(vae)
    size = latent_size(sample, vae, where, model.resolution, patch_of(denoiser))
    return (vae.config.latent_channels, *size)


def _text_tokens(pipeline: str, networks: Mapping[str, nn.Module], model: ModelConfig, folder: Path) -> int:
    chosen = model.max_sequence_length
    settings = folder / "diffexpo.json"
    if chosen is None and settings.is_file():
        chosen = read_json(settings).get("max_sequence_length")
    t5 = T5_TOKENS.get(pipeline, 0) if chosen is None else int(chosen)
    if pipeline in ("FluxPipeline", "PixArtSigmaPipeline", "SanaPipeline"):
        return t5
    clip = networks["text_encoder"].config.max_position_embeddings
    return clip + (t5 if pipeline == "StableDiffusion3Pipeline" else 0)
