"""The flow base: what a teacher's prediction of v says of the velocity, and the folder that is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError
from diffexpo.policies.base import load_policy
from worlds.emoji.layout import save_diffusion
from worlds.emoji.models import make_vae
from worlds.scenes import train_flow
from worlds.scenes.fit import Schedule
from worlds.scenes.models import make_schedule, make_text_encoder, make_tokenizer, make_unet
from worlds.scenes.train_flow import (
    LONGEST_TAUGHT,
    FlowModel,
    Teacher,
    flow_times,
    noisier,
    teacher_timesteps,
    teacher_x0,
)

CAPTIONS = ["", "three red keys", "a blue bell left of an orange hat"]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "diffusion"
    tokenizer = make_tokenizer()
    save_diffusion(make_vae(), make_text_encoder(tokenizer), tokenizer, make_unet(), folder, make_schedule())
    return folder


def test_the_velocity_of_an_exact_teacher_is_eps_minus_x0() -> None:
    rng = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 8, 8, 8, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.02, LONGEST_TAUGHT, 6, dtype=torch.float64)
    share = t.view(-1, 1, 1, 1)
    x_t = (1 - share) * x0 + share * eps
    scale = ((1 - share).square() + share.square()).sqrt()
    v = ((1 - share) * eps - share * x0) / scale
    velocity = (x_t - teacher_x0(v, x_t, t)) / share
    torch.testing.assert_close(velocity, eps - x0, rtol=1e-12, atol=1e-12)


def test_a_teacher_of_gaussian_data_says_its_conditional_mean(teacher_folder: Path) -> None:
    """For x0 ~ N(0, s^2) the variance-preserving optimum is v_hat(z) = alpha sigma (1 - s^2) z / (alpha^2 s^2
    + sigma^2), and flow matching's E[x0 | x_t] = (1 - t) s^2 x_t / ((1 - t)^2 s^2 + t^2): derived apart, in float64."""
    s, teacher = 0.7, Teacher(teacher_folder, is_compiled=False)
    levels = make_schedule().alphas_cumprod.double().numpy()

    def denoise(z: Tensor, timesteps: Tensor, states: Tensor) -> SimpleNamespace:
        odds = np.interp(timesteps.double().numpy(), np.arange(1000), np.log(levels / (1 - levels)))
        alpha_bar = torch.from_numpy(1 / (1 + np.exp(-odds))).view(-1, 1, 1, 1)
        both = (alpha_bar * (1 - alpha_bar)).sqrt()
        return SimpleNamespace(sample=both * (1 - s**2) * z / (alpha_bar * s**2 + 1 - alpha_bar))

    teacher.denoise = denoise
    t = torch.linspace(0.04, LONGEST_TAUGHT, 3)
    x_t = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    share = t.double().view(-1, 1, 1, 1)
    expected = (1 - share) * s**2 * x_t.double() / ((1 - share) ** 2 * s**2 + share**2)
    # Timesteps are float32 numbers of up to 1000, the prediction is divided by 1 - t.
    torch.testing.assert_close(teacher.x0(x_t, t, CAPTIONS).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_of_noise_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save_diffusion(make_vae(), make_text_encoder(tokenizer), tokenizer, make_unet(), tmp_path / "base")
    with pytest.raises(ConfigError, match="predicts 'epsilon' - expected"):
        Teacher(tmp_path / "base", is_compiled=False)


def test_timesteps_are_those_of_the_schedule_and_end_with_it() -> None:
    alpha_bars = make_schedule().alphas_cumprod.double()
    deviation = ((1 - alpha_bars) / alpha_bars).sqrt()
    t = deviation / (1 + deviation)
    found = teacher_timesteps(t, alpha_bars)
    torch.testing.assert_close(found, torch.arange(1000, dtype=torch.float64), rtol=1e-9, atol=1e-6)
    ends = teacher_timesteps(torch.tensor([1e-4, 0.999], dtype=torch.float64), alpha_bars)
    assert ends.tolist() == [0.0, 999.0]
    assert float(t.max()) > LONGEST_TAUGHT


def test_noise_added_later_gives_the_state_of_the_later_time() -> None:
    t, later = torch.tensor([0.87, 0.5]).double(), torch.tensor([0.95, 0.5]).double()
    one, nothing = torch.ones(2, 1, 1, 1).double(), torch.zeros(2, 1, 1, 1).double()
    of_x0 = noisier((1 - t).view(-1, 1, 1, 1), t, later, nothing).flatten()
    of_eps = noisier(t.view(-1, 1, 1, 1), t, later, nothing).flatten()
    of_added = noisier(nothing, t, later, one).flatten()
    torch.testing.assert_close(of_x0, 1 - later)
    torch.testing.assert_close(of_eps.square() + of_added.square(), later.square())
    assert of_added[1] == 0 and of_added[0] > 0


def test_times_are_one_in_each_slice_of_a_logit_normal_distribution() -> None:
    t = flow_times(1000, torch.Generator().manual_seed(0)).double().sort().values
    odds = (torch.log(t / (1 - t)) - train_flow.TIME_MEAN) / train_flow.TIME_DEVIATION
    slices = torch.special.ndtr(odds)[(t > train_flow.SHORTEST + 1e-6)] * 1000
    whole = torch.arange(1000 - len(slices), 1000)
    assert (slices > whole - 1e-2).all() and (slices < whole + 1.01).all()


def test_the_text_is_read_as_the_teacher_reads_it(teacher_folder: Path) -> None:
    teacher, model = Teacher(teacher_folder, is_compiled=False), FlowModel(make_tokenizer())
    model.read_like(teacher.text_encoder)
    norm = model.text_encoder.text_model.final_layer_norm
    with torch.no_grad():
        context, pooled = model.encode(CAPTIONS)
        ids = train_flow.token_ids(teacher.tokenizer, CAPTIONS)
        wanted = teacher.text_encoder(ids)
        torch.testing.assert_close(norm(context[..., :128]), wanted.last_hidden_state)
        torch.testing.assert_close(pooled[:, :128], model.text_encoder.text_projection(wanted.pooler_output))


def trained(out: Path, teacher: Path | None, steps: int = 2) -> None:
    torch.manual_seed(1)
    train_flow.train_flow(steps, out, 0, make_vae(), None, teacher, num_images=16)


def test_the_folder_loads_in_diffusers_and_here(teacher_folder: Path, tmp_path: Path) -> None:
    trained(tmp_path / "flow", teacher_folder, steps=1)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "flow", text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(CAPTIONS[1], num_inference_steps=1, output_type="np", max_sequence_length=0).images
    assert drawn.shape == (1, 64, 64, 3) and np.isfinite(drawn).all()
    model = FlowModel(make_tokenizer())
    model.start_from(tmp_path / "flow")
    model.eval()
    with torch.no_grad():
        context, pooled = model.encode(CAPTIONS)
        given = pipeline.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
    torch.testing.assert_close(context, given[0])
    torch.testing.assert_close(pooled, given[2])
    folder = str(tmp_path / "flow")
    policy = load_policy(ModelConfig(path=folder), TuningConfig(kind="full"), folder_or_id=folder, seed=0)
    assert policy.sequence_length == 0
    told = policy.encode_prompt(CAPTIONS[2])
    torch.testing.assert_close(told["clip_states"][-1], context[2])


@pytest.mark.parametrize("is_taught", [True, False])
def test_a_stopped_training_goes_on_bit_for_bit(
    is_taught: bool, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_folder if is_taught else None
    trained(tmp_path / "whole", teacher, steps=3)
    monkeypatch.setattr(train_flow, "Schedule", partial(Schedule, minutes_between_saves=0.0))
    monkeypatch.setattr(train_flow, "save_flow", stopping_after(2, train_flow.save_flow))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", teacher, steps=3)
    trained(tmp_path / "parts", teacher, steps=3)
    whole, parts = (
        (tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert whole == parts


def stopping_after(num: int, save: Callable[..., None]) -> Callable[..., None]:
    """A writer of folders that is interrupted at its call number `num`, once."""
    calls = []

    def saves(*parts: object) -> None:
        calls.append(None)
        if len(calls) == num:
            raise KeyboardInterrupt
        save(*parts)

    return saves
