"""SANA: the instruction before a prompt, two schedulers of one path, Gemma's precision, inert biases, the estimate, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, SanaPipeline

from diffexpo.config.families import find_checkpoint
from diffexpo.config.schema import LoraConfig, ModelConfig, SamplerConfig, TuningConfig
from diffexpo.diffusion import NoiseSource, sample
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.estimate.activations import forward_flops, measure_decoder, measure_denoiser
from diffexpo.estimate.networks import read_blueprint
from diffexpo.policies.blueprint import denoiser_inputs, make_trainable
from diffexpo.policies.export import call_arguments, export_policy
from diffexpo.policies.sana import SanaPolicy, as_flow_match, pipeline_instruction
from diffexpo.types import Conditioning
from tests.contract.sana_families import (
    SHIFT,
    TEXT_WIDTH,
    TOKENS,
    build_sana,
    flow_solver,
    tiny_deep_autoencoder,
    tiny_gemma,
    tiny_gemma_tokenizer,
)
from tests.unit.estimate.test_networks import saved_bytes
from tests.unit.policies.families import (
    FULL,
    LORA,
    SCHEDULER,
    check_checkpointing,
    copy,
    edit,
    gradient_sizes,
    inert_parameters,
    load,
    network_calls,
    noise,
    refuse,
)

LONG = "two dogs and a very long tail that is cut"
PLAIN = {"use_resolution_binning": False, "max_sequence_length": TOKENS}


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sana") / "solver"
    build_sana(folder, 0)
    return folder


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sana") / "normalised"
    build_sana(folder, 0, is_solver=False, qk_norm="rms_norm_across_heads")
    return folder


@pytest.fixture
def broken(sana: Path, tmp_path: Path) -> Path:
    return copy(sana, tmp_path)


# ---- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["A Cat ", "dog", LONG])
def test_texts_and_masks_are_the_pipelines(sana: Path, prompt: str) -> None:
    policy, plain = load(sana), SanaPipeline.from_pretrained(sana)
    with torch.no_grad():
        states, mask, empty_states, empty_mask = plain.encode_prompt(
            prompt,
            negative_prompt="",
            max_sequence_length=TOKENS,
            complex_human_instruction=pipeline_instruction().split("\n"),
        )
    ours = policy.encode_prompts([prompt, ""]).tensors
    assert torch.equal(ours["encoder_hidden_states"], torch.cat([states, empty_states]))
    assert torch.equal(ours["encoder_attention_mask"], torch.cat([mask, empty_mask]))
    counts = policy.count_tokens([prompt, ""])
    assert [min(count, TOKENS) for count in counts] == [int(mask.sum()), int(empty_mask.sum())]
    assert (counts[0] > TOKENS) == (prompt == LONG) and counts[1] == 1


def test_the_instruction_is_the_pipelines_own_and_changes_the_states(sana: Path) -> None:
    instruction = pipeline_instruction()
    assert instruction.endswith("User Prompt: ") and instruction.count("\n") == 7
    policy = load(sana)
    with_it = policy.encode_prompts(["a cat"]).tensors["encoder_hidden_states"]
    policy.instruction, policy._hidden = "", 0
    without = policy.encode_prompts(["a cat"]).tensors["encoder_hidden_states"]
    # The start mark sees nothing but itself.
    torch.testing.assert_close(with_it[:, 0], without[:, 0])
    assert float((with_it[:, 1:3] - without[:, 1:3]).abs().max()) > 1e-2


def test_padding_changes_nothing(sana: Path) -> None:
    policy = load(sana)
    text = policy.encode_prompts(["a cat"]).tensors
    is_token = text["encoder_attention_mask"].bool()[..., None]
    assert 0 < int(is_token.sum()) < TOKENS
    wild = text | {"encoder_hidden_states": torch.where(is_token, text["encoder_hidden_states"], 9.0)}
    x_t, t = noise(policy, 1), torch.tensor([0.5])
    with torch.no_grad():
        plain, other = (policy.predict(x_t, t, Conditioning(given)) for given in (text, wild))
    assert torch.equal(plain, other)


# ---- the path -----------------------------------------------------------------------------------------------------


def test_both_schedulers_give_one_path(sana: Path, normalised: Path) -> None:
    paths = [load(folder).path for folder in (sana, normalised)]
    for path in paths:
        assert (path.kind, path.shift, path.lowest_level, path.num_train_timesteps) == (
            "flow",
            SHIFT,
            "shifted",
            1000,
        )
    assert as_flow_match({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0})["shift"] == 2.0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_the_solvers_levels_lie_on_the_path() -> None:
    scheduler = flow_solver()
    scheduler.set_timesteps(10)
    even = 1 - np.linspace(1, 1 / 1000, 11)[:0:-1]
    expected = SHIFT * even / (1 + (SHIFT - 1) * even)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, atol=1e-6)
    x0, eps = torch.randn(2, 4), torch.randn(2, 4)
    scheduler._step_index = 3
    sigma = scheduler.sigmas[3]
    found = scheduler.convert_model_output(eps - x0, sample=(1 - sigma) * x0 + sigma * eps)
    torch.testing.assert_close(found, x0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_more_steps_bring_our_picture_to_the_solvers(sana: Path) -> None:
    """Another solver of the same equation: the difference is that of the steps, and vanishes with them."""
    policy, plain = load(sana), SanaPipeline.from_pretrained(sana)
    plain.set_progress_bar_config(disable=True)

    class Given(NoiseSource):
        def draw(self) -> torch.Tensor:
            return noise(policy, 1)

    def difference(steps: int) -> float:
        with torch.no_grad():
            theirs = plain(
                "a cat",
                latents=noise(policy, 1),
                num_inference_steps=steps,
                guidance_scale=1.0,
                height=32,
                width=32,
                output_type="latent",
                **PLAIN,
            ).images
        sampler = SamplerConfig(name="flow_euler", steps=steps, guidance=1.0)
        given = Given([torch.Generator()], policy.latent_shape)
        ours = sample(policy, policy.encode_prompts(["a cat"]), None, sampler, given)
        return float((ours - theirs).abs().mean() / theirs.abs().mean())

    few, many = difference(6), difference(48)
    assert many < 0.3 * few and many < 0.02


@pytest.mark.parametrize("size", [32, (64, 32)])
def test_calls_of_the_network_with_positions_at_any_size(tmp_path: Path, size: int | tuple[int, int]) -> None:
    build_sana(tmp_path / "model", 0, is_solver=False, interpolation_scale=1, timestep_scale=0.001)
    policy = load(tmp_path / "model", resolution=size)
    height, width = (side * 4 for side in policy.latent_shape[1:])
    assert (height, width) == (size if isinstance(size, tuple) else (size, size))
    calls = network_calls(
        SanaPipeline.from_pretrained(tmp_path / "model"),
        prompt="a cat",
        latents=noise(policy, 1),
        num_inference_steps=2,
        guidance_scale=1.0,
        height=height,
        width=width,
        **PLAIN,
    )
    for given, output in calls:
        t = given["timestep"].double() / float(calls[0][0]["timestep"])
        with torch.no_grad():
            ours = policy.predict(given["hidden_states"], t, policy.encode_prompts(["a cat"]))
        assert torch.equal(ours, output)


# ---- precision, training, export -----------------------------------------------------------------------------------


def trained(folder: Path, kind: str, **model: object) -> SanaPolicy:
    policy = load(folder, TuningConfig(kind=kind, lora=LoraConfig(rank=4, alpha=16.0)), **model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_export_reloads_without_a_difference(sana: Path, tmp_path: Path, kind: str) -> None:
    policy = trained(sana, kind)
    report = export_policy(policy, "current", tmp_path / "export")
    assert (report["forward_difference"], report["image_difference"]) == (0, 0)
    files = {Path(str(file)).name for file in report["files"]}
    assert files == {"pytorch_lora_weights.safetensors" if kind == "lora" else "export"}


def test_the_call_is_told_the_size_which_the_pipeline_would_not_take_from_the_checkpoint(sana: Path) -> None:
    arguments = call_arguments(load(sana, resolution=(64, 32)))
    assert arguments == {**PLAIN, "height": 64, "width": 32}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_gemma_stays_out_of_float16(sana: Path, tmp_path: Path) -> None:
    for dtype, text in (
        ("float16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
    ):
        policy = load(sana, dtype=dtype)
        assert policy.weights.network.dtype == getattr(torch, dtype)
        assert (policy.text_encoder.dtype, policy.vae.dtype) == (text, torch.float32)
    policy = trained(sana, "lora", dtype="float16")
    report = export_policy(policy, "current", tmp_path / "export")
    assert report["forward_difference"] < 1e-2


def test_biases_of_keys_are_inert_where_nothing_normalises_them(sana: Path, normalised: Path) -> None:
    policy = load(sana, FULL)
    inert = inert_parameters(policy)
    assert inert == tuple(f"transformer_blocks.{block}.attn2.to_k.bias" for block in range(2))
    sizes = gradient_sizes(policy)
    assert set(sizes) - set(inert) == set(policy.weights.trainable())
    assert max(sizes[name] for name in inert) < 1e-4 * min(sizes[name] for name in set(sizes) - set(inert))
    other = load(normalised, FULL)
    assert inert_parameters(other) == ()
    assert min(gradient_sizes(other).values()) > 1e-4 * max(gradient_sizes(other).values())


def test_gradient_checkpointing_changes_no_gradient(sana: Path) -> None:
    check_checkpointing(sana)


# ---- the estimate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("Efficient-Large-Model/Sana_600M_1024px_diffusers", 592),
        ("Efficient-Large-Model/Sana_1600M_512px_MultiLing_diffusers", 1604),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1605),
        ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 4722),
    ],
)
def test_public_architectures_have_their_published_size(name: str, millions: int) -> None:
    """The papers' tables print 0.6, 1.6 and 4.8 billion; the files of the denoiser hold 4 bytes for each of these."""
    blueprint = read_blueprint(name, ModelConfig(dtype="bfloat16"))
    known = find_checkpoint(name)
    assert known is not None and blueprint.denoiser.num_parameters() == known[1].parameters
    counts = {part.name: round(part.parameters / 1e6) for part in blueprint.components}
    assert counts == {"text_encoder": 2614, "transformer": millions, "vae": 312}
    assert blueprint.latent_shape == (32, 32, 32) and blueprint.image_size == (1024, 1024)
    assert blueprint.text_tokens == 300


def test_distilled_models_are_not_taken_for_their_teachers() -> None:
    assert find_checkpoint("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers") is None


@pytest.mark.parametrize("tuning", [FULL, LORA])
def test_a_folder_is_estimated_as_it_is(sana: Path, tuning: TuningConfig) -> None:
    policy, blueprint = load(sana, tuning), read_blueprint(str(sana), ModelConfig())
    real = (policy.text_encoder, policy.weights.base_module, policy.vae)
    held = [network.num_parameters() for network in real]
    adapters = sum(p.numel() for n, p in policy.weights.network.named_parameters() if ".lora_" in n)
    held[1] -= adapters
    assert [part.parameters for part in blueprint.components] == held
    assert make_trainable(blueprint, tuning) == sum(p.numel() for p in policy.weights.trainable().values())
    assert (blueprint.latent_shape, blueprint.text_tokens) == (policy.latent_shape, TOKENS)
    inputs = {name: torch.rand(value.shape) for name, value in denoiser_inputs(blueprint, 2).items()}
    with torch.no_grad():
        output = policy.weights.network(**inputs, return_dict=False)[0]
    assert output.shape == (2, *policy.latent_shape)
    two, four = (measure_denoiser(blueprint, rows=rows, has_gradient=True) for rows in (2, 4))
    assert four.held == 2 * two.held and two.peak >= two.held
    assert two.held == pytest.approx(saved_bytes(policy.weights.network, inputs), rel=0.25)
    assert measure_decoder(blueprint).peak > 0 and forward_flops(blueprint) > 0


# ---- what does not fit --------------------------------------------------------------------------------------------


def test_settings_that_cannot_act(sana: Path) -> None:
    refuse(sana, ConfigError, "model.drop_t5=true: a SanaPipeline has no T5", drop_t5=True)
    refuse(sana, ConfigError, "nothing of a prompt would be read; expected 3 to 512", max_sequence_length=2)
    refuse(sana, ConfigError, "expected multiples of 4 for", resolution=30)
    refuse(sana, ConfigError, "is no UNet and gains nothing", channels_last=True)
    short = load(sana, max_sequence_length=3)
    assert short.max_tokens == 3
    assert short.encode_prompts(["a cat", ""]).tensors["encoder_hidden_states"].shape == (2, 3, TEXT_WIDTH)


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae", "tokenizer", "scheduler"])
def test_a_component_that_is_not_there(broken: Path, component: str) -> None:
    edit(broken / "model_index.json", **{component: [None, None]})
    refuse(broken, MissingError, f"component '{component}' is missing .*a SanaPipeline needs it")


def test_components_of_other_models(broken: Path) -> None:
    tiny_gemma(tiny_gemma_tokenizer(), TEXT_WIDTH + 8).save_pretrained(str(broken / "text_encoder"))
    refuse(broken, PolicyError, "text encoder gives states of 32, the transformer takes 24")
    tokenizer = tiny_gemma_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tiny_gemma(tiny_gemma_tokenizer()).save_pretrained(str(broken / "text_encoder"))
    tokenizer.save_pretrained(str(broken / "tokenizer"))
    refuse(broken, PolicyError, "the token '<one>', number .*, and its text encoder knows")
    tiny_gemma_tokenizer().save_pretrained(str(broken / "tokenizer"))
    tiny_deep_autoencoder(channels=8).save_pretrained(str(broken / "vae"))
    refuse(broken, PolicyError, "takes 4 and gives 4 channels, the autoencoder has 8")
    (broken / "tokenizer" / "tokenizer.json").unlink()
    refuse(broken, MissingError, "tokenizer.json: file is missing")


def test_distilled_networks_are_refused(tmp_path: Path) -> None:
    build_sana(tmp_path / "fed", 0, guidance_embeds=True)
    refuse(tmp_path / "fed", PolicyError, "also fed a guidance scale")
    edit(tmp_path / "fed" / "model_index.json", _class_name="SanaSprintPipeline")
    refuse(tmp_path / "fed", PolicyError, "'SanaSprintPipeline' is unknown; expected one of .*SanaPipeline")


def test_schedulers_of_another_path(broken: Path) -> None:
    refused = {
        "use_karras_sigmas": "scheduler use_karras_sigmas is True",
        "use_flow_sigmas": "prediction_type is 'flow_prediction'",
    }
    plain = (broken / SCHEDULER).read_text()
    for key, message in refused.items():
        edit(broken / SCHEDULER, **{key: not json.loads(plain)[key]})
        refuse(broken, PolicyError, message)
        (broken / SCHEDULER).write_text(plain)
    DDIMScheduler().save_pretrained(str(broken / "scheduler"))
    refuse(broken, PolicyError, "describes a 'vp' path, expected 'flow' for a SanaPipeline")
