"""A LoRA merged into its base: the weights are the base's plus the update, whatever layout the file has; others are refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.errors import MissingError, PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import KOHYA_FILE, LORA_FILE, PEFT_FILE, export_policy
from diffexpo.policies.loading import read_model_folder
from diffexpo.policies.lora_files import require_lora
from diffexpo.policies.merging import merge_lora
from tests.tiny import tiny_diffusion

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_diffusion(tmp_path_factory.mktemp("merging") / "model", levels=1)


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """An exported LoRA, its factors by the names of their modules."""
    settings = TuningConfig(kind="lora", lora=LoraConfig(rank=2, alpha=4.0))
    policy = load_policy(ModelConfig(path=str(base), device="cpu"), settings, folder_or_id=str(base), seed=0)
    generator = np.random.default_rng(0)
    factors = {
        name: torch.from_numpy(generator.normal(0, 0.2, value.shape).astype(np.float32))
        for name, value in policy.weights.state("current").items()
    }
    policy.weights.load("current", factors)
    folder = tmp_path_factory.mktemp("lora")
    export_policy(policy, "current", folder)
    return folder, factors


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_merged_weights_are_the_base_and_the_update(base, lora, file, scale, tmp_path):
    folder, factors = lora
    merge_lora(read_model_folder(base), folder / file, scale, "float32", tmp_path / "merged")
    before, after = load_file(base / UNET), load_file(tmp_path / "merged" / UNET)
    assert before.keys() == after.keys()
    changed = {name.partition(".lora_")[0] for name in factors}
    for name, value in before.items():
        module = name.removesuffix(".weight")
        if module in changed:
            update = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            expected = value + scale * 4.0 / 2 * update.reshape(value.shape)
            assert torch.allclose(after[name], expected, atol=1e-6)
            assert scale == 0.0 or not torch.equal(after[name], value)
        else:
            assert torch.equal(after[name], value), name


def test_a_lora_is_found_by_file_and_by_folder(lora, tmp_path):
    folder, _ = lora
    assert require_lora(str(folder)).name == LORA_FILE
    assert require_lora(str(folder / KOHYA_FILE)).name == KOHYA_FILE
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        MissingError, match=r"expected one \.safetensors file.*one\.safetensors, two\.safetensors"
    ):
        require_lora(str(tmp_path))
    with pytest.raises(MissingError, match="expected a .safetensors file"):
        require_lora(str(tmp_path / "none.safetensors"))
    with pytest.raises(MissingError, match=r"LoRA 'nobody/none': no such file, and the hub did not give it"):
        require_lora("nobody/none")
    # A folder with both layouts: the one that diffusers reads.
    for name in (PEFT_FILE, LORA_FILE):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
        assert require_lora(str(tmp_path)) == tmp_path / name


@pytest.mark.parametrize("harm", ["another width", "other modules", "no LoRA", "damaged"])
def test_a_lora_of_another_model_is_refused(base, lora, harm, tmp_path):
    tensors = load_file(lora[0] / LORA_FILE)
    if harm == "another width":
        tensors = {
            name: torch.zeros(len(value), 7) if "lora_A" in name else value for name, value in tensors.items()
        }
    elif harm == "other modules":
        tensors = {name.replace("attentions.0", "attentions.5"): value for name, value in tensors.items()}
    elif harm == "no LoRA":
        tensors = {"weight": torch.zeros(2)}
    file = tmp_path / "bad.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    if harm == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PolicyError, match="bad.safetensors"):
        merge_lora(read_model_folder(base), file, 1.0, "float32", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
