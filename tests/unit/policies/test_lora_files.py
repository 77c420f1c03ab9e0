"""A LoRA file of any tool is the model that plain diffusers makes of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig as PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import KOHYA_FILE, LORA_FILE, PEFT_CONFIG, PEFT_FILE, export_policy
from diffexpo.policies.lora_files import find_lora, lora_rank, read_lora
from diffexpo.policies.unet import UNetPolicy
from tests.contract.transformer_families import build_pixart

KEY = "tuning.start"
TARGETS = ["to_q", "to_v"]


def policy_of(folder: Path, rank: int, alpha: float | None = None, **more: object) -> UNetPolicy:
    tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=rank, alpha=alpha, **more))
    return load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(folder), seed=0)


def foreign(folder: Path, out: Path, rank: int = 3, alpha: float = 5.0) -> Path:
    """What another trainer writes with plain diffusers and peft: some modules only, alpha unlike rank."""
    unet = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet
    unet.add_adapter(PeftConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return out / LORA_FILE


def as_kohya(file: Path, out: Path, alpha: float = 5.0, **more: Tensor) -> Path:
    """The same factors as kohya's tools write them: the scale is in `.alpha`."""
    renamed: dict[str, Tensor] = dict(more)
    for name, tensor in load_file(file).items():
        path, _, side = name.removeprefix("unet.").rpartition(".lora_")
        module = "lora_unet_" + path.replace(".", "_")
        renamed[f"{module}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = tensor.clone()
        renamed[f"{module}.alpha"] = torch.tensor(alpha)
    out.mkdir()
    save_file(renamed, out / "some_style.safetensors")
    return out / "some_style.safetensors"


def prediction(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    states = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(torch.randn(shape, generator=generator), 300, encoder_hidden_states=states).sample


def of_plain_diffusers(folder: Path, file: Path) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    before = prediction(pipeline.unet)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    after = prediction(pipeline.unet)
    assert not torch.allclose(before, after, atol=1e-3)
    return after


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(("rank", "alpha"), [(3, None), (8, 2.0)])
def test_the_start_is_what_plain_diffusers_draws_with(
    layout: str, rank: int, alpha: float | None, diffusion_folder: Path, tmp_path: Path
) -> None:
    file = foreign(diffusion_folder, tmp_path / "a")
    file = file if layout == "diffusers" else as_kohya(file, tmp_path / "b")
    assert find_lora(file.parent) == find_lora(file) == file and lora_rank(file) == 3
    policy = policy_of(diffusion_folder, rank, alpha)
    policy.weights.load("current", read_lora(policy, file, KEY))
    with policy.weights.use("current"):
        ours = prediction(policy.weights.network)
    torch.testing.assert_close(ours, of_plain_diffusers(diffusion_folder, file), rtol=1e-5, atol=1e-5)
    # What the file lacks is a fresh adapter: it changes nothing and can be trained.
    state, fresh = policy.weights.state("current"), policy.weights.state("base")
    unnamed = [name for name in state if "to_k" in name]
    assert unnamed and all(torch.equal(state[name], fresh[name]) for name in unnamed)


def test_texts_of_a_kohya_file_are_left_out_with_a_word(
    diffusion_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    texts = {f"{name}.lora_down.weight": torch.ones(3, 8), f"{name}.lora_up.weight": torch.ones(8, 3)}
    file = as_kohya(foreign(diffusion_folder, tmp_path / "a"), tmp_path / "b", **texts)
    policy = policy_of(diffusion_folder, 3)
    with caplog.at_level(logging.WARNING, "diffexpo"):
        read_lora(policy, file, KEY)
    assert "2 tensors of text encoders are left out" in caplog.text


def test_our_own_files_are_read_back(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = policy_of(diffusion_folder, 4, 8.0)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05)
    export_policy(policy, "current", tmp_path)
    for name in (LORA_FILE, KOHYA_FILE):
        state = read_lora(policy, tmp_path / name, KEY)
        for key, value in policy.weights.state("current").items():
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)
    assert find_lora(tmp_path) == tmp_path / LORA_FILE


def test_peft_layout_of_a_pipeline_without_a_loader(tmp_path: Path) -> None:
    build_pixart(tmp_path / "model", 0)
    policy = policy_of(tmp_path / "model", 4)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05)
    export_policy(policy, "current", tmp_path / "out")
    state = read_lora(policy, tmp_path / "out" / PEFT_FILE, KEY)
    assert all(torch.equal(state[key], value) for key, value in policy.weights.state("current").items())
    (tmp_path / "out" / PEFT_CONFIG).unlink()
    with pytest.raises(MissingError, match="adapter_config.json: file is missing"):
        read_lora(policy, tmp_path / "out" / PEFT_FILE, KEY)


def test_files_that_cannot_be_a_start_are_refused(diffusion_folder: Path, tmp_path: Path) -> None:
    file = foreign(diffusion_folder, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"its rank is 3, tuning.lora.rank is 2; set tuning.lora.rank=3"):
        read_lora(policy_of(diffusion_folder, 2), file, KEY)
    with pytest.raises(ConfigError, match=r"have no adapter here .*target_modules to cover to_v"):
        read_lora(policy_of(diffusion_folder, 4, target_modules=("to_q",)), file, KEY)
    whole, wrong = load_file(file), tmp_path / "wrong.safetensors"
    name = next(name for name in whole if name.endswith("to_q.lora_A.weight"))
    save_file(whole | {name: torch.ones(3, 5)}, wrong)
    with pytest.raises(PolicyError, match="to_q has another shape here"):
        read_lora(policy_of(diffusion_folder, 4), wrong, KEY)
    save_file({key: value for key, value in whole.items() if key != name}, wrong)
    with pytest.raises(PolicyError, match="expected both factors"):
        read_lora(policy_of(diffusion_folder, 4), wrong, KEY)
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, wrong)
    with pytest.raises(PolicyError, match="holds LoKr factors; expected a LoRA"):
        lora_rank(wrong)
    save_file({"x.weight": torch.ones(2, 2)}, wrong)
    with pytest.raises(PolicyError, match="holds no LoRA factors"):
        lora_rank(wrong)
    wrong.write_bytes(b"cut")
    with pytest.raises(PolicyError, match="no readable safetensors file"):
        lora_rank(wrong)


def test_a_folder_of_several_files_names_none(tmp_path: Path) -> None:
    assert find_lora(tmp_path) is None
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert find_lora(tmp_path) is None and find_lora(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
