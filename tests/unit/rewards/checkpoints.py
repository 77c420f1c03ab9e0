"""Tiny random checkpoints in the official layouts: names, shapes and dtypes as in the published files, sizes not."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig

from tests.tiny import MAX_TOKENS, tiny_tokenizer

VISION = {"width": 40, "layers": 2, "heads": 4, "patch": 7, "image": 28}
TEXT = {"width": 32, "layers": 3, "heads": 4}
PROJECTION = 24
BLIP_VISION = {"width": 128, "layers": 2, "patch": 8, "image": 32}
BLIP_TEXT = {"width": 64, "layers": 2, "inner": 96, "positions": 40}
HEAD = (24, 12, 8, 4, 1)
WORDS = ("a", "cat", "dog", "red", "fish", "on", "the", "moon", "##s")


class Maker:
    """Named random tensors; matrices keep the size of what goes through them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def random(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        self.tensors[name] = shift + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.random(f"{name}.weight", outputs, inputs, scale=1.5 * inputs**-0.5)
        self.random(f"{name}.bias", outputs, scale=0.2)

    def norm(self, name: str, width: int) -> None:
        self.random(f"{name}.weight", width, scale=0.1, shift=1.0)
        self.random(f"{name}.bias", width, scale=0.1)


def openclip_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The `state_dict` of an OpenCLIP CLIP."""
    make = Maker(seed)
    vocabulary = len(tiny_tokenizer())
    for prefix, sizes in (("visual.", VISION), ("", TEXT)):
        width = sizes["width"]
        for number in range(sizes["layers"]):
            block = f"{prefix}transformer.resblocks.{number}"
            make.norm(f"{block}.ln_1", width)
            make.random(f"{block}.attn.in_proj_weight", 3 * width, width, scale=1.5 * width**-0.5)
            make.random(f"{block}.attn.in_proj_bias", 3 * width, scale=0.2)
            make.linear(f"{block}.attn.out_proj", width, width)
            make.norm(f"{block}.ln_2", width)
            make.linear(f"{block}.mlp.c_fc", 4 * width, width)
            make.linear(f"{block}.mlp.c_proj", width, 4 * width)
    patches = (VISION["image"] // VISION["patch"]) ** 2
    make.random("visual.class_embedding", VISION["width"], scale=0.5)
    make.random("visual.positional_embedding", patches + 1, VISION["width"], scale=0.5)
    make.random("visual.conv1.weight", VISION["width"], 3, VISION["patch"], VISION["patch"], scale=0.1)
    make.norm("visual.ln_pre", VISION["width"])
    make.norm("visual.ln_post", VISION["width"])
    make.random("visual.proj", VISION["width"], PROJECTION, scale=0.2)
    make.random("token_embedding.weight", vocabulary, TEXT["width"], scale=0.5)
    make.random("positional_embedding", MAX_TOKENS, TEXT["width"], scale=0.5)
    make.norm("ln_final", TEXT["width"])
    make.random("text_projection", TEXT["width"], PROJECTION, scale=0.2)
    make.tensors["logit_scale"] = torch.tensor(3.0)
    return make.tensors


def hps_checkpoint(folder: Path, *, activation: str = "gelu", seed: int = 0) -> tuple[Path, Path]:
    """(weights, base): half precision weights as in the compressed HPS files, and a folder with configuration and tokenizer."""
    base = folder / "base"
    tokenizer = tiny_tokenizer()
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT["width"],
            "intermediate_size": 4 * TEXT["width"],
            "num_hidden_layers": TEXT["layers"],
            "num_attention_heads": TEXT["heads"],
            "max_position_embeddings": MAX_TOKENS,
            "hidden_act": activation,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": VISION["width"],
            "intermediate_size": 4 * VISION["width"],
            "num_hidden_layers": VISION["layers"],
            "num_attention_heads": VISION["heads"],
            "image_size": VISION["image"],
            "patch_size": VISION["patch"],
            "hidden_act": activation,
        },
        projection_dim=PROJECTION,
    )
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    file = folder / "HPS.safetensors"
    save_file({key: tensor.half() for key, tensor in openclip_tensors(seed).items()}, file)
    return file, base


def imagereward_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The state dict of ImageReward: BLIP's two towers, the unused contrastive projections, and the head."""
    make = Maker(seed)
    width, patch = BLIP_VISION["width"], BLIP_VISION["patch"]
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    make.random(f"{vision}.cls_token", 1, 1, width, scale=0.5)
    make.random(f"{vision}.pos_embed", 1, (BLIP_VISION["image"] // patch) ** 2 + 1, width, scale=0.5)
    make.random(f"{vision}.patch_embed.proj.weight", width, 3, patch, patch, scale=0.1)
    make.random(f"{vision}.patch_embed.proj.bias", width, scale=0.2)
    for number in range(BLIP_VISION["layers"]):
        block = f"{vision}.blocks.{number}"
        make.norm(f"{block}.norm1", width)
        make.linear(f"{block}.attn.qkv", 3 * width, width)
        make.linear(f"{block}.attn.proj", width, width)
        make.norm(f"{block}.norm2", width)
        make.linear(f"{block}.mlp.fc1", 4 * width, width)
        make.linear(f"{block}.mlp.fc2", width, 4 * width)
    make.norm(f"{vision}.norm", width)
    _bert(make, text, width)
    make.linear("blip.vision_proj", 16, width)
    make.linear("blip.text_proj", 16, BLIP_TEXT["width"])
    inputs = BLIP_TEXT["width"]
    for place, outputs in zip((0, 2, 4, 6, 7), HEAD, strict=True):
        make.linear(f"mlp.layers.{place}", outputs, inputs)
        inputs = outputs
    return make.tensors


def _bert(make: Maker, text: str, image_width: int) -> None:
    inner, width = BLIP_TEXT["inner"], BLIP_TEXT["width"]
    make.tensors[f"{text}.embeddings.position_ids"] = torch.arange(BLIP_TEXT["positions"])[None]
    make.random(f"{text}.embeddings.word_embeddings.weight", 7 + len(WORDS), width, scale=0.5)
    make.random(f"{text}.embeddings.position_embeddings.weight", BLIP_TEXT["positions"], width, scale=0.5)
    make.norm(f"{text}.embeddings.LayerNorm", width)
    for number in range(BLIP_TEXT["layers"]):
        layer = f"{text}.encoder.layer.{number}"
        for attention, source in (("attention", width), ("crossattention", image_width)):
            make.linear(f"{layer}.{attention}.self.query", width, width)
            make.linear(f"{layer}.{attention}.self.key", width, source)
            make.linear(f"{layer}.{attention}.self.value", width, source)
            make.linear(f"{layer}.{attention}.output.dense", width, width)
            make.norm(f"{layer}.{attention}.output.LayerNorm", width)
        make.linear(f"{layer}.intermediate.dense", inner, width)
        make.linear(f"{layer}.output.dense", width, inner)
        make.norm(f"{layer}.output.LayerNorm", width)


def imagereward_checkpoint(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """(weights, base): the state dict, and a folder with a BERT vocabulary."""
    base = folder / "bert"
    base.mkdir(parents=True)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (base / "vocab.txt").write_text("\n".join((*special, *WORDS)) + "\n")
    file = folder / "ImageReward.safetensors"
    save_file(imagereward_tensors(seed), file)
    return file, base


def aesthetic_tensors(width: int, version: int, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of LAION's head: one linear map, or five."""
    make = Maker(seed)
    if version == 1:
        make.linear("head", 1, width)
        return {key.removeprefix("head."): tensor for key, tensor in make.tensors.items()}
    inputs = width
    for place, outputs in zip((0, 2, 4, 6, 7), HEAD, strict=True):
        make.linear(f"layers.{place}", outputs, inputs)
        inputs = outputs
    return make.tensors


def aesthetic_checkpoint(folder: Path, width: int, version: int) -> Path:
    """The head's file."""
    file = folder / f"aesthetic-v{version}.safetensors"
    save_file(aesthetic_tensors(width, version), file)
    return file
