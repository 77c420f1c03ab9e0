"""Broken model folders: each is a message that names the file and the cure."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, DiffexpoError, MissingError, PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import export_policy

UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(diffusion_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(diffusion_folder, tmp_path / "model"))


def refuse(folder: Path | str, kind: type[DiffexpoError], match: str, **model: str) -> None:
    settings = ModelConfig(**{"device": "cpu", **model})
    with pytest.raises(kind, match=match):
        load_policy(settings, TuningConfig(kind="lora"), folder_or_id=str(folder), seed=0)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_truncated_weights_are_named(broken: Path, component: str, keep: float) -> None:
    file = next((broken / component).glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    refuse(broken, PolicyError, rf"{component}/{file.name}: damaged safetensors file of \d+ bytes")


def test_missing_weights_are_named(broken: Path) -> None:
    (broken / "unet" / UNET).rename(broken / "unet" / "diffusion_pytorch_model.bin")
    refuse(broken, MissingError, r"unet: no safetensors weights \(plain variant\); pickled")


def test_missing_variant_is_named(broken: Path) -> None:
    refuse(broken, MissingError, "variant 'fp16'", variant="fp16")


def test_a_component_without_the_variant_is_read_from_its_plain_file(broken: Path) -> None:
    (broken / "unet" / UNET).rename(broken / "unet" / UNET.replace(".safetensors", ".fp16.safetensors"))
    settings = ModelConfig(path=str(broken), device="cpu", variant="fp16")
    policy = load_policy(settings, TuningConfig(kind="lora"), folder_or_id=str(broken), seed=0)
    assert policy.weights.kind == "lora"
    refuse(broken, MissingError, r"unet: no safetensors weights \(plain variant\)")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component_is_named(broken: Path, component: str) -> None:
    shutil.rmtree(broken / component)
    refuse(broken, MissingError, f"component '{component}' is missing.*does not exist")


def test_component_absent_from_the_index_is_named(broken: Path) -> None:
    edit(broken / "model_index.json", vae=[None, None])
    refuse(broken, MissingError, "component 'vae' is missing.*model_index.json does not name it")


def test_folder_of_something_else(tmp_path: Path) -> None:
    refuse(tmp_path, PolicyError, "not a diffusers pipeline folder.*model_index.json")


def test_file_instead_of_a_folder(broken: Path) -> None:
    refuse(broken / "unet" / UNET, PolicyError, "not a diffusers pipeline folder")


def test_no_such_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", MissingError, "no such folder.*hub id")


def test_a_local_folder_has_no_revisions(diffusion_folder: Path) -> None:
    refuse(diffusion_folder, ConfigError, "model.revision=v9.*is a local folder", revision="v9")


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_here_is_named(diffusion_folder: Path, device: str) -> None:
    refuse(
        diffusion_folder, ConfigError, f"model.device={device}: .*expected auto, cpu.*machine", device=device
    )


def test_unknown_family(broken: Path) -> None:
    edit(broken / "model_index.json", _class_name="WaveletPipeline")
    refuse(broken, PolicyError, "'WaveletPipeline' is unknown; expected one of StableDiffusionPipeline")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_damaged_index(broken: Path, text: str) -> None:
    (broken / "model_index.json").write_text(text)
    refuse(broken, PolicyError, "model_index.json")


def test_damaged_component_config(broken: Path) -> None:
    (broken / "unet" / "config.json").write_text("{")
    refuse(broken, PolicyError, "unet/config.json: not readable as JSON")


def test_lacking_tensor_is_not_filled_with_noise(broken: Path) -> None:
    tensors = load_file(broken / "unet" / UNET)
    del tensors["conv_in.weight"]
    save_file(tensors, broken / "unet" / UNET)
    refuse(broken, PolicyError, r"unet.*conv_in\.weight")


def test_lacking_text_tensor_is_not_filled_with_noise(broken: Path) -> None:
    file = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("token_embedding.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    refuse(broken, PolicyError, r"text_encoder.*token_embedding\.weight")


def test_tensor_of_another_shape(broken: Path) -> None:
    tensors = load_file(broken / "unet" / UNET)
    tensors["conv_in.weight"] = torch.zeros(3)
    save_file(tensors, broken / "unet" / UNET)
    refuse(broken, PolicyError, r"unet.*conv_in\.weight")


def test_components_of_two_models(broken: Path) -> None:
    edit(broken / "unet" / "config.json", in_channels=9)
    refuse(broken, PolicyError, "unet")


def test_flow_scheduler_beside_a_unet(broken: Path, flow_folder: Path) -> None:
    name = "scheduler/scheduler_config.json"
    shutil.copy(flow_folder / name, broken / name)
    refuse(broken, PolicyError, "scheduler_config.json: describes a 'flow' path, expected 'vp'")


def test_damaged_tokenizer(broken: Path) -> None:
    (broken / "tokenizer" / "tokenizer.json").write_text("{}")
    refuse(broken, PolicyError, "tokenizer: CLIPTokenizer cannot be loaded")


def test_full_tuning_of_half_precision_is_refused(diffusion_folder: Path) -> None:
    with pytest.raises(ConfigError, match="model.dtype=bfloat16.*float32"):
        load_policy(
            ModelConfig(device="cpu", dtype="bfloat16"),
            TuningConfig(kind="full"),
            folder_or_id=str(diffusion_folder),
            seed=0,
        )


def test_half_precision_files_load_as_float32(broken: Path) -> None:
    file = broken / "unet" / UNET
    tensors = load_file(file)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    policy = load_policy(
        ModelConfig(device="cpu"), TuningConfig(kind="full"), folder_or_id=str(broken), seed=0
    )
    for key, parameter in policy.weights.trainable().items():
        assert torch.equal(parameter, tensors[key].half().float()), key


def test_fingerprint_follows_the_weights(broken: Path, diffusion_folder: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return load_policy(
            ModelConfig(device="cpu"), TuningConfig(kind="lora"), folder_or_id=str(folder), seed=0
        ).fingerprint

    assert fingerprint(broken) == fingerprint(diffusion_folder)
    tensors = load_file(broken / "vae" / UNET)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, broken / "vae" / UNET, metadata={"format": "pt"})
    assert fingerprint(broken) != fingerprint(diffusion_folder)


def test_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuse(
        "nobody/no-such-model",
        MissingError,
        "'nobody/no-such-model': not a local folder, and the hub did not",
    )


def test_quantised_weights_are_refused_with_advice(broken: Path) -> None:
    edit(broken / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refuse(broken, PolicyError, r"quantised \(bitsandbytes\).*take the model's unquantised weights")


def test_a_tokenizer_without_a_longest_text_takes_the_encoders(
    broken: Path, diffusion_folder: Path, tmp_path: Path
) -> None:
    expected = load_policy(
        ModelConfig(device="cpu"), TuningConfig(kind="lora"), folder_or_id=str(diffusion_folder), seed=0
    )
    file = broken / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("model_max_length")
    file.write_text(json.dumps(settings))
    policy = load_policy(
        ModelConfig(device="cpu"), TuningConfig(kind="lora"), folder_or_id=str(broken), seed=0
    )
    assert policy.max_tokens == expected.max_tokens
    for name, value in expected.encode_prompts(["a cat"]).tensors.items():
        assert torch.equal(policy.encode_prompts(["a cat"]).tensors[name], value)
    export_policy(policy, "current", tmp_path / "out")


def test_a_token_that_the_encoder_does_not_know_is_named(broken: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(broken / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(broken / "tokenizer")
    refuse(broken, PolicyError, "the token '<my-cat>', number .* its text encoder knows")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_max_length": "77"},
            "model_max_length is '77' in tokenizer_config.json; expected an integer",
        ),
        ({"model_max_length": -3}, "model_max_length is -3 in tokenizer_config.json; expected an integer"),
        ({"model_max_length": 2.5}, "model_max_length is 2.5 in tokenizer_config.json; expected an integer"),
        ({"pad_token": None}, "has no padding token; name one"),
    ],
)
def test_settings_of_a_tokenizer_that_cannot_be(
    broken: Path, changes: dict[str, object], message: str
) -> None:
    edit(broken / "tokenizer" / "tokenizer_config.json", **changes)
    refuse(broken, PolicyError, message)


@pytest.mark.parametrize("longest", [10**6, 10**30])
def test_a_tokenizer_reads_no_more_than_its_encoder(broken: Path, longest: int) -> None:
    edit(broken / "tokenizer" / "tokenizer_config.json", model_max_length=longest)
    policy = load_policy(
        ModelConfig(device="cpu"), TuningConfig(kind="lora"), folder_or_id=str(broken), seed=0
    )
    assert policy.max_tokens == policy.text_encoder.config.max_position_embeddings
    policy.encode_prompts(["a cat"])


def test_a_tokenizer_without_its_vocabulary_is_missed(broken: Path) -> None:
    (broken / "tokenizer" / "tokenizer.json").unlink()
    refuse(broken, MissingError, "tokenizer/tokenizer.json: file is missing")


def test_a_tokenizer_nested_too_deep_is_refused(broken: Path) -> None:
    (broken / "tokenizer" / "tokenizer.json").write_text("[" * 5000 + "]" * 5000)
    refuse(broken, PolicyError, "tokenizer.json: nested deeper than 64 levels")


def test_an_unknown_scheduler_is_named_with_its_file(broken: Path) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", _class_name="MyOwnScheduler")
    refuse(broken, PolicyError, "scheduler_config.json: scheduler 'MyOwnScheduler' is not known")


def test_a_network_of_too_many_layers_is_not_built(broken: Path) -> None:
    edit(broken / "unet" / "config.json", layers_per_block=100_000)
    refuse(broken, PolicyError, "layers_per_block is 100000; expected at most 1000")


def test_weights_that_are_a_pipe_are_refused(broken: Path) -> None:
    (broken / "unet" / UNET).unlink()
    os.mkfifo(broken / "unet" / UNET)
    refuse(broken, PolicyError, f"{UNET}: not a regular file")
