"""What is exported is what plain diffusers draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.errors import PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import KOHYA_FILE, LORA_FILE, attach_lora, export_policy, kohya_tensors
from diffexpo.policies.sd3 import SD3Policy
from diffexpo.policies.unet import UNetPolicy
from tests.contract.family import Family


def trained(folder: Path, kind: str, alpha: float | None = None) -> UNetPolicy | SD3Policy:
    tuning = TuningConfig(kind=kind, lora=LoraConfig(rank=4, alpha=alpha))
    policy = load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(folder), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("name", ["diffusion_folder", "v_folder", "flow_folder"])
@pytest.mark.parametrize(("kind", "alpha"), [("lora", None), ("lora", 16.0), ("full", None)])
def test_reloaded_model_is_equal(
    name: str, kind: str, alpha: float | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    policy = trained(request.getfixturevalue(name), kind, alpha)
    report = export_policy(policy, "current", tmp_path / "export")
    assert report["forward_difference"] == 0 and report["image_difference"] == 0
    assert report["kind"] == kind and report["base_fingerprint"] == policy.fingerprint


@pytest.mark.parametrize("name", ["diffusion_folder", "flow_folder"])
def test_odd_scale_costs_one_rounding(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    policy = trained(request.getfixturevalue(name), "lora", 5.0)
    report = export_policy(policy, "current", tmp_path)
    assert report["forward_difference"] < 1e-5 and report["image_difference"] < 1e-5


def test_alpha_is_folded_and_the_header_says_so(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = trained(diffusion_folder, "lora", 16.0)
    export_policy(policy, "current", tmp_path)
    state, tensors = policy.weights.state("current"), load_file(tmp_path / LORA_FILE)
    assert len(tensors) == len(state)
    for key, value in state.items():
        assert torch.equal(tensors[f"unet.{key}"], value * 4 if ".lora_B." in key else value)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        header = file.metadata()
    adapter = json.loads(header["lora_adapter_metadata"])
    assert adapter["unet.r"] == adapter["unet.lora_alpha"] == 4
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert header["modelspec.resolution"] == "16x16"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert policy.fingerprint in header["ss_training_comment"]


def test_a_user_gets_the_versions_picture(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = trained(diffusion_folder, "lora")
    policy.weights.copy("current", "best")
    policy.weights.copy("base", "current")
    export_policy(policy, "best", tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, safety_checker=None)
    x_t, t = torch.randn(1, *policy.latent_shape), torch.tensor([0.4])
    conditioning = policy.encode_prompts(["a cat"])
    states = conditioning.tensors["encoder_hidden_states"]

    def plain() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.unet(x_t, policy.path.timestep(t), encoder_hidden_states=states).sample

    with torch.no_grad(), policy.weights.use("base"):
        assert torch.equal(plain(), policy.predict(x_t, t, conditioning))
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad(), policy.weights.use("best"):
        assert torch.equal(plain(), policy.predict(x_t, t, conditioning))


def test_unknown_version_and_base_folder_are_refused(diffusion_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="'nobody'"):
        export_policy(trained(diffusion_folder, "lora"), "nobody", tmp_path)
    with pytest.raises(PolicyError, match="own folder"):
        export_policy(trained(diffusion_folder, "full"), "current", diffusion_folder)


def test_an_export_that_differs_is_refused_and_removed(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = trained(diffusion_folder, "lora")
    # The base in memory is no longer the base on disk.
    with torch.no_grad():
        policy.weights.network.conv_in.weight.mul_(1.01)
    with pytest.raises(PolicyError, match="another result after reloading"):
        export_policy(policy, "current", tmp_path)
    assert not (tmp_path / LORA_FILE).exists()


def test_half_precision_base_exports(flow_folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(device="cpu", dtype="bfloat16")
    policy = load_policy(model, TuningConfig(kind="lora"), folder_or_id=str(flow_folder), seed=0)
    report = export_policy(policy, "current", tmp_path)
    assert report["forward_difference"] < 1e-2
    assert {tensor.dtype for tensor in load_file(tmp_path / LORA_FILE).values()} == {torch.float32}


def test_folder_may_state_its_text_length(flow_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flow_folder, tmp_path / "model"))
    (folder / "diffexpo.json").write_text('{"max_sequence_length": 0}')
    policy = trained(folder, "full")
    report = export_policy(policy, "current", tmp_path / "export")
    assert report["forward_difference"] == 0 and report["image_difference"] == 0
    again = trained(tmp_path / "export", "full")
    assert (
        policy.sequence_length == again.sequence_length == 0
        and trained(flow_folder, "full").sequence_length == 256
    )
    (folder / "diffexpo.json").write_text('{"max_sequence_length": -1}')
    with pytest.raises(PolicyError, match="max_sequence_length=-1"):
        trained(folder, "full")


def families() -> list[Family]:
    """One small model of each way to export: two encoders, a file for ComfyUI, packed latents, no loader of its own."""
    from tests.contract.transformer_families import FAMILIES as TRANSFORMERS
    from tests.contract.unet_families import FAMILIES as UNETS

    wanted = ("sdxl", "sd3_t5", "flux_dev", "pixart_sigma")
    return [family for family in (*UNETS, *TRANSFORMERS) if family.name in wanted]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_kind_of_pipeline_reloads_without_a_difference(family: Family, tmp_path: Path) -> None:
    family.build(tmp_path / "model", 0)
    policy = trained(tmp_path / "model", "lora", 16.0)
    report = export_policy(policy, "current", tmp_path / "lora")
    assert (report["forward_difference"], report["image_difference"]) == (0, 0)
    names = {Path(file).name for file in report["files"]}
    assert names == {
        "sdxl": {LORA_FILE, KOHYA_FILE},
        "pixart_sigma": {"adapter_model.safetensors"},
    }.get(family.name, {LORA_FILE})


def test_comfyui_file_has_alpha_equal_to_rank_and_three_tensors_a_module(
    diffusion_folder: Path, tmp_path: Path
) -> None:
    policy = trained(diffusion_folder, "lora", 16.0)
    export_policy(policy, "current", tmp_path)
    lora, kohya = load_file(tmp_path / LORA_FILE), load_file(tmp_path / KOHYA_FILE)
    assert len(kohya) == len(lora) // 2 * 3
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    flat = "lora_unet_" + module.replace(".", "_")
    assert torch.equal(kohya[f"{flat}.lora_down.weight"], lora[f"unet.{module}.lora_A.weight"])
    assert torch.equal(kohya[f"{flat}.lora_up.weight"], lora[f"unet.{module}.lora_B.weight"])
    assert kohya[f"{flat}.alpha"] == 4.0


def test_comfyui_file_draws_the_same_picture(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = trained(diffusion_folder, "lora")
    export_policy(policy, "current", tmp_path)
    x_t, t = torch.randn(1, *policy.latent_shape), torch.tensor([0.4])
    conditioning = policy.encode_prompts(["a cat"])
    states = conditioning.tensors["encoder_hidden_states"]
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
    with torch.no_grad(), policy.weights.use("current"):
        plain = pipeline.unet(x_t, policy.path.timestep(t), encoder_hidden_states=states).sample
        assert torch.equal(plain, policy.predict(x_t, t, conditioning))


def test_a_comfyui_file_that_cannot_be_read_back_is_left_out_with_a_warning(
    diffusion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: 2 * value if ".lora_up." in name else value
            for name, value in kohya_tensors(tensors).items()
        }

    monkeypatch.setattr("diffexpo.policies.export.kohya_tensors", wrong)
    policy = trained(diffusion_folder, "lora")
    report = export_policy(policy, "current", tmp_path)
    assert not (tmp_path / KOHYA_FILE).exists() and (tmp_path / LORA_FILE).exists()
    assert len(report["files"]) == 1 and "not written" in caplog.text


def test_attached_lora_is_the_files_own(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = trained(diffusion_folder, "lora")
    export_policy(policy, "current", tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, safety_checker=None)
    attach_lora(pipeline, tmp_path)
    own = {name: value for name, value in pipeline.unet.state_dict().items() if ".lora_A." in name}
    assert len(own) == len(policy.weights.state("current")) // 2


def test_what_was_not_trained_is_copied_byte_for_byte(diffusion_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(diffusion_folder, tmp_path / "base")
    old = {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n", "special_tokens_map.json": "{}"}
    for name, text in old.items():
        if not (base / "tokenizer" / name).exists():
            (base / "tokenizer" / name).write_text(text)
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"not taken over")
    export_policy(trained(base, "full"), "current", tmp_path / "out")
    for component in ("tokenizer", "scheduler", "text_encoder", "vae"):
        files = {path.name for path in (base / component).iterdir()} - {"pytorch_model.bin"}
        assert {path.name for path in (tmp_path / "out" / component).iterdir()} == files
        for name in files:
            assert (tmp_path / "out" / component / name).read_bytes() == (
                base / component / name
            ).read_bytes()


def test_a_variant_is_exported_under_plain_names(diffusion_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(diffusion_folder, tmp_path / "base")
    for file in base.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    tuning = TuningConfig(kind="full")
    model = ModelConfig(device="cpu", variant="fp16")
    policy = load_policy(model, tuning, folder_or_id=str(base), seed=0)
    export_policy(policy, "current", tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert found == {"model.safetensors", "diffusion_pytorch_model.safetensors"}


def test_a_whole_pipeline_of_lora_is_the_folded_model(diffusion_folder: Path, tmp_path: Path) -> None:
    policy = trained(diffusion_folder, "lora", 16.0)
    report = export_policy(policy, "current", tmp_path, whole=True)
    assert report["kind"] == "full" and report["forward_difference"] < 1e-5
    plain = load_policy(
        ModelConfig(device="cpu"), TuningConfig(kind="full"), folder_or_id=str(tmp_path), seed=0
    )
    folded, base = (
        plain.weights.state("base"),
        load_file(diffusion_folder / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    factors = policy.weights.state("current")
    for name, value in folded.items():
        path = name.removesuffix(".weight")
        update = torch.zeros_like(value)
        if f"{path}.lora_A.weight" in factors:
            update = 4.0 * factors[f"{path}.lora_B.weight"] @ factors[f"{path}.lora_A.weight"]
        torch.testing.assert_close(value, base[name] + update, rtol=1e-6, atol=1e-6)
