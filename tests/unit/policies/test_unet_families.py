"""What sets Stable Diffusion 2 and XL apart; what all families promise is in tests/contract."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffexpo.config.schema import ModelConfig, SamplerConfig, TuningConfig
from diffexpo.diffusion import add_noise, v_target
from diffexpo.errors import DiffexpoError, MissingError, PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.sdxl import SDXLPolicy
from diffexpo.policies.unet import UNetPolicy
from tests.contract.unet_families import build_sd2, build_sdxl

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "model"
    build_sdxl(folder, 0)
    return folder


@pytest.fixture(scope="module")
def zero_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero") / "model"
    build_sd2(folder, 0, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return folder


def load(folder: Path, **model: object) -> UNetPolicy | SDXLPolicy:
    return load_policy(
        ModelConfig(device="cpu", **model), TuningConfig(kind="lora"), folder_or_id=str(folder), seed=0
    )


def edit(file: Path, **changes: object) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "model"))


# ---- Stable Diffusion 2 ------------------------------------------------------------------------------------------


def test_at_zero_signal_v_is_learned_and_inverted(zero_folder: Path) -> None:
    path = load(zero_folder).path
    t = torch.ones(2)
    alpha_t, sigma_t = path.alpha_sigma(t)
    assert alpha_t.tolist() == [0, 0] and sigma_t.tolist() == [1, 1]
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x_t = add_noise(x0, eps, alpha_t, sigma_t)
    target = path.target(x0, eps, t)
    assert torch.equal(x_t, eps) and torch.equal(target, -x0)
    assert torch.equal(target, v_target(x0, eps, alpha_t, sigma_t))
    found_x0, found_eps = path.x0_eps(target, x_t, t)
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_eps, eps)


def test_at_zero_signal_eps_is_refused_with_the_reason(
    zero_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(zero_folder)
    edit(folder / SCHEDULER, prediction_type="epsilon")
    with pytest.raises(PolicyError, match="ends at 0.*x0 cannot be had from eps.*expected v_prediction"):
        load(folder)


def test_fields_that_early_files_lack_are_read_as_the_pipeline_reads_them(
    diffusion_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(diffusion_folder)
    lacking = ("clip_sample", "clip_sample_range", "set_alpha_to_one", "steps_offset", "prediction_type",
               "timestep_spacing", "rescale_betas_zero_snr", "trained_betas")  # fmt: skip
    edit(folder / SCHEDULER, **dict.fromkeys(lacking))
    path = load(folder).path
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    found = pipeline.scheduler.config
    # The scheduler's own defaults, which the pipeline overrules.
    assert DDIMScheduler().config.clip_sample and DDIMScheduler().config.steps_offset == 0
    assert path.clip_sample_range is None and not found.clip_sample
    assert path.steps_offset == found.steps_offset == 1
    assert path.set_alpha_to_one == found.set_alpha_to_one
    assert path.prediction_type == found.prediction_type == "epsilon"
    assert path.timestep_spacing == found.timestep_spacing == "leading"
    torch.testing.assert_close(path.alphas_cumprod.float(), pipeline.scheduler.alphas_cumprod)


def test_xl_files_are_read_as_they_stand(xl_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(xl_folder)
    edit(folder / SCHEDULER, clip_sample=None, steps_offset=None)
    path = load(folder).path
    found = StableDiffusionXLPipeline.from_pretrained(folder).scheduler.config
    assert found.clip_sample and path.clip_sample_range == found.clip_sample_range
    assert path.steps_offset == found.steps_offset == 0


def test_the_first_releases_sizes_are_corrected_as_the_pipeline_does(
    diffusion_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(diffusion_folder)
    edit(folder / "unet" / "config.json", _diffusers_version="0.8.1")
    with pytest.warns(FutureWarning, match="sample_size"):
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert load(folder).latent_shape[1:] == (pipeline.unet.config.sample_size,) * 2 == (64, 64)
    assert load(diffusion_folder).latent_shape[1:] == (8, 8)


# ---- Stable Diffusion XL -----------------------------------------------------------------------------------------


def test_xl_is_told_the_size_of_the_image(xl_folder: Path) -> None:
    policy = load(xl_folder)
    text = {"add_text_embeds": torch.zeros(2, 1)}
    told = policy.further_inputs(torch.zeros(2, 4, 8, 12), text)["added_cond_kwargs"]
    # Original height and width, crop at the corner, target height and width; two pixels are a latent.
    assert told["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert set(policy.encode_prompts(["a cat"]).tensors) == {"encoder_hidden_states", "add_text_embeds"}


@pytest.mark.parametrize("is_zero", [True, False])
def test_xl_reads_an_empty_prompt_as_the_pipelines_default_negative(
    xl_folder: Path, is_zero: bool, copied: Callable[[Path], Path]
) -> None:
    folder = copied(xl_folder)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=is_zero)
    policy, pipeline = load(folder), StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.no_grad():
        states, negative, pooled, negative_pooled = pipeline.encode_prompt("a cat", device="cpu")
    ours = policy.encode_prompts(["a cat", ""]).tensors
    assert torch.equal(ours["encoder_hidden_states"], torch.cat([states, negative]))
    assert torch.equal(ours["add_text_embeds"], torch.cat([pooled, negative_pooled]))
    assert bool((negative == 0).all()) is is_zero


def test_xl_encodes_a_negative_prompt_as_the_pipeline(xl_folder: Path) -> None:
    policy, pipeline = load(xl_folder), StableDiffusionXLPipeline.from_pretrained(xl_folder)
    with torch.no_grad():
        _, negative, _, pooled = pipeline.encode_prompt("a cat", device="cpu", negative_prompt="blurry")
    ours = policy.encode_prompts(["blurry"]).tensors
    assert torch.equal(ours["encoder_hidden_states"], negative)
    assert torch.equal(ours["add_text_embeds"], pooled)


def test_xl_predictions_depend_on_text_vector_and_size(xl_folder: Path) -> None:
    policy = load(xl_folder)
    x_t = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    given = policy.encode_prompts(["a cat"])
    with torch.no_grad():
        plain = policy.predict(x_t, torch.tensor([0.5]), given)
        for name, tensor in given.tensors.items():
            changed = type(given)({**given.tensors, name: tensor + 1})
            assert not torch.equal(policy.predict(x_t, torch.tensor([0.5]), changed), plain), name


def refuse(folder: Path, kind: type[DiffexpoError], match: str) -> None:
    with pytest.raises(kind, match=match):
        load(folder)


@pytest.mark.parametrize("component", ["text_encoder_2", "tokenizer_2"])
def test_xl_without_its_second_encoder_is_named(
    xl_folder: Path, component: str, copied: Callable[[Path], Path]
) -> None:
    folder = copied(xl_folder)
    edit(folder / "model_index.json", **{component: [None, None]})
    refuse(folder, MissingError, f"component '{component}' is missing.*model_index.json does not name it")


def test_a_refiner_is_refused_by_its_class_and_by_its_network(
    xl_folder: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(xl_folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    refuse(
        folder, PolicyError, "XLImg2ImgPipeline' is unknown.*image-to-image model or a refiner; take the text"
    )
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    # A network that takes five sizes, as the refiner's, which ends with an aesthetic score.
    unet = folder / "unet" / "config.json"
    edit(unet, addition_time_embed_dim=16)
    refuse(folder, PolicyError, "the UNet is told 64 numbers.*6 sizes give 112.*refiner takes 5")


def test_xl_in_the_clothes_of_version_1(xl_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(xl_folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    refuse(folder, PolicyError, "cross_attention_dim=48.*gives 32")


def test_version_1_in_the_clothes_of_xl(diffusion_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(diffusion_folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    refuse(folder, MissingError, "component 'text_encoder_2' is missing")


def test_latents_shifted_by_channel_are_refused(xl_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(xl_folder)
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    refuse(folder, PolicyError, "latents_mean is set.*not supported")


@pytest.mark.parametrize(
    ("name", "what"),
    [("StableDiffusionInpaintPipeline", "inpainting"), ("StableDiffusionInstructPix2PixPipeline", "editing")],
)
def test_models_for_other_tasks_say_so(
    diffusion_folder: Path, name: str, what: str, copied: Callable[[Path], Path]
) -> None:
    folder = copied(diffusion_folder)
    edit(folder / "model_index.json", _class_name=name)
    refuse(folder, PolicyError, f"'{name}' is unknown.*This one is an {what} model")


def test_distilled_guidance_is_refused(diffusion_folder: Path, copied: Callable[[Path], Path]) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, safety_checker=None)
    config = dict(pipeline.unet.config) | {"time_cond_proj_dim": 16}
    folder = copied(diffusion_folder)
    with torch.random.fork_rng():
        type(pipeline.unet).from_config(config).save_pretrained(folder / "unet")
    refuse(folder, PolicyError, "time_cond_proj_dim=16.*also fed a guidance scale")


def test_xl_adapters_that_bind_to_nothing(xl_folder: Path) -> None:
    tuning = TuningConfig(kind="lora", lora={"target_modules": ("to_x",)})
    with pytest.raises(
        PolicyError, match=r"target_modules=\['to_x'\]: no module of UNet2DConditionModel.*to_"
    ):
        load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(xl_folder), seed=0)


def test_xl_counts_the_longer_of_two_tokenizers(xl_folder: Path) -> None:
    policy = load(xl_folder)
    assert policy.max_tokens == 16
    assert policy.count_tokens(["", "cat", "x" * 40]) == [2, 3, 42]


@pytest.mark.parametrize("name", ["ddpm", "dpmpp"])
def test_other_samplers_stay_finite_at_zero_signal(zero_folder: Path, name: str) -> None:
    from diffexpo.diffusion import NoiseSource, sample

    policy = load(zero_folder)
    noise = NoiseSource([torch.Generator().manual_seed(0)], policy.latent_shape)
    latents = sample(
        policy,
        policy.encode_prompts(["a cat"]),
        policy.encode_prompts([""]),
        SamplerConfig(name=name, steps=4, guidance=3.0),
        noise,
    )
    assert bool(torch.isfinite(latents).all()) and float(latents.std()) > 0.1
