"""Networks without weights: counts are those of the real ones, activations those that autograd really keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffexpo.assembly.aliases import resolve
from diffexpo.config.families import checkpoints, find_checkpoint
from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.estimate.activations import forward_flops, measure_decoder, measure_denoiser
from diffexpo.estimate.networks import published_settings, read_blueprint
from diffexpo.policies.base import load_policy
from diffexpo.policies.blueprint import Blueprint, denoiser_inputs, make_trainable

# Denoisers as their papers, cards and repositories print them, in millions.
PUBLISHED = {
    "sd15": 860,
    "sd21": 866,
    "sdxl": 2567,
    "sd3-medium": 2028,
    "sd35-medium": 2243,
    "flux1-dev": 11901,
    "flux1-schnell": 11891,
    "pixart-sigma": 611,
}
TEXTS = {
    "sd15": [123],
    "sd21": [340],
    "sdxl": [123, 695],
    "sd3-medium": [124, 695, 4762],
    "sd35-medium": [124, 695, 4762],
    "flux1-dev": [123, 4762],
    "flux1-schnell": [123, 4762],
    "pixart-sigma": [4762],
}


def emoji(name: str, **settings: object) -> Blueprint:
    return read_blueprint(resolve(f"emoji:{name}"), ModelConfig(**settings))


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_architectures_have_their_published_size(name: str) -> None:
    blueprint = read_blueprint(name, ModelConfig(dtype="bfloat16"), architecture=name)
    _, known = checkpoints()[name]
    assert blueprint.denoiser.num_parameters() == known.parameters
    counts = {part.name: round(part.parameters / 1e6) for part in blueprint.components}
    assert counts.pop(blueprint.card.denoiser[0]) == PUBLISHED[name]
    assert counts.pop("vae") == 84
    assert list(counts.values()) == TEXTS[name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
        ("CompVis/stable-diffusion-v1-4", "sd15"),
        ("stabilityai/stable-diffusion-2-1", "sd21"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3-medium"),
        ("stabilityai/stable-diffusion-3.5-medium", "sd35-medium"),
        ("black-forest-labs/FLUX.1-dev", "flux1-dev"),
        ("black-forest-labs/FLUX.1-schnell", "flux1-schnell"),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "pixart-sigma"),
        ("somebody/a-model", None),
    ],
)
def test_hub_ids_tell_the_architecture(path: str, name: str | None) -> None:
    found = find_checkpoint(path)
    assert (found[1].name if found else None) == name


def test_names_of_architectures_mean_themselves_and_have_settings_for_every_part() -> None:
    for name, (family, known) in checkpoints().items():
        assert find_checkpoint(name) == (family, known)
        assert published_settings(name).keys() == family.parts.keys()


@pytest.mark.parametrize(("name", "texts"), [("diffusion", 1), ("flow", 2)])
def test_the_embedded_models_have_exactly_their_real_bytes(name: str, texts: int) -> None:
    policy = load_policy(
        ModelConfig(device="cpu"), TuningConfig(), folder_or_id=resolve(f"emoji:{name}"), seed=0
    )
    encoders = [policy.text_encoder] if texts == 1 else list(policy.text_encoders)
    real = [*encoders, policy.weights.base_module, policy.vae]

    def size(network: nn.Module) -> tuple[int, int]:
        held = [*network.parameters(), *network.buffers()]
        return sum(p.numel() for p in network.parameters()), sum(t.numel() * t.element_size() for t in held)

    parts = emoji(name).components
    assert [(part.parameters, part.bytes) for part in parts] == [size(network) for network in real]
    trained = sum(parameter.numel() for parameter in policy.weights.trainable().values())
    assert make_trainable(emoji(name), TuningConfig(kind="full")) == trained


def test_half_precision_halves_all_but_the_autoencoder() -> None:
    whole, half = emoji("diffusion").components, emoji("diffusion", dtype="bfloat16").components
    for before, after in zip(whole, half, strict=True):
        # Positions are integers whatever the precision.
        assert after.bytes == before.bytes if after.name == "vae" else after.bytes < 0.51 * before.bytes


def saved_bytes(network: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """What autograd saves in a real forward pass, each storage once, weights and inputs apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    own |= {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(**inputs, return_dict=False)[0]
    assert output.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("name", ["diffusion", "flow"])
@pytest.mark.parametrize("tuning", [TuningConfig(kind="full"), TuningConfig(kind="lora")])
def test_activations_are_those_that_autograd_keeps(name: str, tuning: TuningConfig) -> None:
    rows = 3
    policy = load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=resolve(f"emoji:{name}"), seed=0)
    blueprint = emoji(name)
    make_trainable(blueprint, tuning)
    shapes = denoiser_inputs(blueprint, rows)
    inputs = {key: torch.rand(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    real = saved_bytes(policy.weights.network, inputs)
    estimated = measure_denoiser(blueprint, rows=rows, has_gradient=True)
    assert estimated.held == pytest.approx(real, rel=0.25)
    assert estimated.peak >= estimated.held


def test_activations_grow_with_rows_and_shrink_with_checkpointing() -> None:
    blueprint = emoji("diffusion")
    make_trainable(blueprint, TuningConfig(kind="full"))
    one, four = (measure_denoiser(blueprint, rows=rows, has_gradient=True) for rows in (1, 4))
    assert four.held == 4 * one.held
    again = measure_denoiser(blueprint, has_gradient=True, gradient_checkpointing=True)
    assert again.held < again.peak < 0.7 * one.peak
    assert not blueprint.denoiser.is_gradient_checkpointing
    assert measure_denoiser(blueprint, has_gradient=False).peak < 0.25 * one.peak
    assert all(parameter.grad is None for parameter in blueprint.denoiser.parameters())


def test_autocast_keeps_a_copy_of_each_weight_of_a_matrix_product() -> None:
    blueprint = emoji("diffusion")
    make_trainable(blueprint, TuningConfig(kind="full"))
    one, two = (
        measure_denoiser(blueprint, rows=rows, has_gradient=True, autocast=torch.bfloat16) for rows in (1, 2)
    )
    copies = 2 * one.held - two.held
    products = (nn.Linear, nn.Conv2d)
    weights = [
        parameter.numel()
        for module in blueprint.denoiser.modules()
        if isinstance(module, products)
        for parameter in module.parameters()
    ]
    # Biases, and weights whose input needs no gradient (the text's projections, the first convolution), are not kept.
    assert 0.9 * 2 * sum(weights) < copies < 2 * sum(weights)


def test_tiles_need_less_memory_than_whole_pictures() -> None:
    whole = read_blueprint("sd15", ModelConfig(resolution=1024), architecture="sd15")
    tiled = read_blueprint("sd15", ModelConfig(resolution=1024), architecture="sd15")
    assert measure_decoder(tiled, is_tiled=True).peak < 0.5 * measure_decoder(whole).peak


@pytest.mark.parametrize(
    ("name", "resolution", "teraflop"),
    [("sd15", 512, 0.803), ("sdxl", 1024, 6.76), ("sd35-medium", 512, 2.44), ("flux1-dev", 512, 21.5)],
)
def test_operations_are_those_that_others_counted(name: str, resolution: int, teraflop: float) -> None:
    model = ModelConfig(dtype="bfloat16", resolution=resolution)
    blueprint = read_blueprint(name, model, architecture=name)
    assert forward_flops(blueprint) / 1e12 == pytest.approx(teraflop, rel=0.03)


def test_resolution_decides_the_latents() -> None:
    assert emoji("diffusion").latent_shape == (8, 8, 8)
    assert emoji("diffusion").image_size == (64, 64)
    assert emoji("diffusion", resolution=(64, 128)).latent_shape == (8, 8, 16)
    with pytest.raises(ConfigError, match="multiples of 8"):
        emoji("diffusion", resolution=63)


def test_dropping_t5_leaves_it_out() -> None:
    names = [
        part.name
        for part in read_blueprint(
            "sd3-medium", ModelConfig(drop_t5=True), architecture="sd3-medium"
        ).components
    ]
    assert names == ["text_encoder", "text_encoder_2", "transformer", "vae"]


def test_unknown_models_and_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="sd35-medium"):
        read_blueprint("somebody/a-model", ModelConfig())
    with pytest.raises(PolicyError, match="nonsense"):
        make_trainable(
            emoji("diffusion"), TuningConfig(kind="lora", lora=LoraConfig(target_modules=("nonsense",)))
        )
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(PolicyError, match="KandinskyPipeline"):
        read_blueprint(str(tmp_path), ModelConfig())
