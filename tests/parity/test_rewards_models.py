"""Scorers with networks against their official code's formulas, written out again in float64 on the official names.

Nothing of transformers or of our code is used in a derivation: the networks are plain functions on a state dict, the resizing is a
sum over cubic weights. The checkpoints are tiny and random, their layout is that of the published files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from diffexpo.rewards.aesthetic import AestheticReward
from diffexpo.rewards.hps import HpsReward
from diffexpo.rewards.imagereward import ImageRewardScorer
from diffexpo.rewards.images import longest_side_pad, shortest_side_crop, to_bytes
from tests.tiny import MAX_TOKENS, tiny_judge, tiny_tokenizer
from tests.unit.rewards.checkpoints import (
    BLIP_TEXT,
    BLIP_VISION,
    TEXT,
    VISION,
    WORDS,
    aesthetic_checkpoint,
    aesthetic_tensors,
    hps_checkpoint,
    imagereward_checkpoint,
    imagereward_tensors,
    openclip_tensors,
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a cat", "red dog", "", "a cat on the moon, and much more than sixteen", "fish &amp; cats"]
State = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 45, 33, generator=torch.Generator().manual_seed(0))


def norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def dense(state: State, name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v by head, (B,N,W)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


# --- preprocessing


def cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(inputs: int, outputs: int) -> np.ndarray:
    """Antialiased bicubic interpolation along one axis, (outputs, inputs)."""
    ratio = inputs / outputs
    stretch = max(ratio, 1.0)
    centres = (np.arange(outputs) + 0.5) * ratio
    weights = cubic((np.arange(inputs) + 0.5 - centres[:, None]) / stretch)
    return weights / weights.sum(1, keepdims=True)


def official_hps_pixels(images: Tensor, size: int) -> np.ndarray:
    """To float, longest side to `size`, black to a square, normalise."""
    pixels = to_bytes(images).astype(np.float64) / 255
    height, width = pixels.shape[1:3]
    scale = size / max(height, width)
    new = round(height * scale), round(width * scale)
    resized = np.einsum(
        "yh,xw,bhwc->byxc", resize_matrix(height, new[0]), resize_matrix(width, new[1]), pixels
    )
    square = np.zeros((len(pixels), size, size, 3))
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    square[:, top : top + new[0], left : left + new[1]] = resized
    return ((square - MEAN) / STD).transpose(0, 3, 1, 2)


def official_clip_pixels(images: Tensor, size: int) -> np.ndarray:
    """torchvision's Resize(size, bicubic) and CenterCrop(size) on a PIL picture, ToTensor, Normalize."""
    out = []
    for picture in map(Image.fromarray, to_bytes(images)):
        wide, high = picture.size
        long = int(size * max(wide, high) / min(wide, high))
        picture = picture.resize((size, long) if wide <= high else (long, size), Image.Resampling.BICUBIC)
        left, top = (int(round((side - size) / 2.0)) for side in picture.size)  # noqa: RUF046 - as it stands there
        cropped = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
        out.append(((cropped - MEAN) / STD).transpose(2, 0, 1))
    return np.stack(out)


@pytest.mark.parametrize("shape", [(45, 33), (28, 28), (28, 20), (17, 64), (300, 300), (9, 9)])
@pytest.mark.parametrize(
    ("ours", "official", "tolerance"),
    [(longest_side_pad, official_hps_pixels, 3e-5), (shortest_side_crop, official_clip_pixels, 1e-6)],
)
def test_pixels_are_the_official_ones(
    ours: Callable[[Tensor, int], Tensor],
    official: Callable[[Tensor, int], np.ndarray],
    tolerance: float,
    shape: tuple[int, int],
) -> None:
    # Padded pictures are resized in float32: sums over up to 2 x 43 neighbours, each rounded by 6e-8, over
    # STD. Cropped ones are resized in bytes, which leaves the rounding of the division alone.
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(ours(images, 28).numpy(), official(images, 28), atol=tolerance, rtol=0)


# --- HPS: OpenCLIP


def openclip_block(state: State, block: str, x: Tensor, heads: int, mask: Tensor | float) -> Tensor:
    inside = norm(state, f"{block}.ln_1", x)
    q, k, v = linear(
        inside, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]
    ).chunk(3, -1)
    x = x + dense(state, f"{block}.attn.out_proj", attention(q, k, v, heads, mask))
    inside = norm(state, f"{block}.ln_2", x)
    return x + dense(state, f"{block}.mlp.c_proj", gelu(dense(state, f"{block}.mlp.c_fc", inside)))


def openclip_image(state: State, pixels: Tensor) -> Tensor:
    x = conv2d(pixels, state["visual.conv1.weight"], stride=VISION["patch"]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(state, "visual.ln_pre", x + state["visual.positional_embedding"])
    for number in range(VISION["layers"]):
        x = openclip_block(state, f"visual.transformer.resblocks.{number}", x, VISION["heads"], 0.0)
    x = norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    return x / x.norm(dim=-1, keepdim=True)


def openclip_text(state: State, ids: Tensor) -> Tensor:
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((MAX_TOKENS, MAX_TOKENS), -torch.inf, dtype=x.dtype).triu(1)
    for number in range(TEXT["layers"]):
        x = openclip_block(state, f"transformer.resblocks.{number}", x, TEXT["heads"], mask)
    x = norm(state, "ln_final", x)[torch.arange(len(x)), ids.argmax(-1)] @ state["text_projection"]
    return x / x.norm(dim=-1, keepdim=True)


def openclip_ids(prompts: list[str]) -> Tensor:
    """Zeros behind the end mark; a long text keeps its first tokens and gets the mark as the last."""
    tokenizer = tiny_tokenizer()
    rows = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = tokenizer(prompt.replace("&amp;", "&"), verbose=False).input_ids[:MAX_TOKENS]
        row[: len(ids)] = torch.tensor(ids)
        if len(ids) == MAX_TOKENS:
            row[-1] = tokenizer.eos_token_id
    return rows


@pytest.mark.parametrize(
    ("scale", "factor"), [("raw", 1.0), ("percent", 100.0), ("logit", float(np.exp(3.0)))]
)
def test_hps_is_openclips_cosine(tmp_path: Path, images: Tensor, scale: str, factor: float) -> None:
    file, base = hps_checkpoint(tmp_path)
    state = {key: tensor.half().double() for key, tensor in openclip_tensors().items()}
    pixels = torch.from_numpy(official_hps_pixels(images, VISION["image"]))
    cosines = (openclip_image(state, pixels) * openclip_text(state, openclip_ids(PROMPTS))).sum(-1)
    scores = HpsReward("hps", str(file), base=str(base), scale=scale).score(images, PROMPTS)
    np.testing.assert_allclose(scores.numpy(), factor * cosines.numpy(), rtol=1e-4, atol=factor * 1e-5)
    assert cosines.std() > 0.02


# --- ImageReward: BLIP


def blip_image(state: State, pixels: Tensor, heads: int) -> Tensor:
    prefix = "blip.visual_encoder"
    kernel, bias = state[f"{prefix}.patch_embed.proj.weight"], state[f"{prefix}.patch_embed.proj.bias"]
    x = conv2d(pixels, kernel, bias, stride=BLIP_VISION["patch"]).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{prefix}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{prefix}.pos_embed"]
    for number in range(BLIP_VISION["layers"]):
        block = f"{prefix}.blocks.{number}"
        q, k, v = dense(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + dense(state, f"{block}.attn.proj", attention(q, k, v, heads))
        inside = gelu(dense(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + dense(state, f"{block}.mlp.fc2", inside)
    return norm(state, f"{prefix}.norm", x, 1e-6)


def bert_attention(
    state: State, name: str, x: Tensor, source: Tensor, heads: int, mask: Tensor | float
) -> Tensor:
    q = dense(state, f"{name}.self.query", x)
    k, v = dense(state, f"{name}.self.key", source), dense(state, f"{name}.self.value", source)
    mixed = dense(state, f"{name}.output.dense", attention(q, k, v, heads, mask))
    return norm(state, f"{name}.output.LayerNorm", mixed + x, 1e-12)


def blip_text(state: State, ids: Tensor, present: Tensor, patches: Tensor, heads: int) -> Tensor:
    prefix = "blip.text_encoder"
    words = state[f"{prefix}.embeddings.word_embeddings.weight"][ids]
    places = state[f"{prefix}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(state, f"{prefix}.embeddings.LayerNorm", words + places, 1e-12)
    mask = (1.0 - present.double())[:, None, None, :] * -10000.0
    for number in range(BLIP_TEXT["layers"]):
        layer = f"{prefix}.encoder.layer.{number}"
        x = bert_attention(state, f"{layer}.attention", x, x, heads, mask)
        x = bert_attention(state, f"{layer}.crossattention", x, patches, heads, 0.0)
        inside = gelu(dense(state, f"{layer}.intermediate.dense", x))
        x = norm(state, f"{layer}.output.LayerNorm", dense(state, f"{layer}.output.dense", inside) + x, 1e-12)
    return x[:, 0]


def bert_ids(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """[CLS] words [SEP], at most 35, padded with 0; and which of them are there."""
    vocabulary = {word: 5 + index for index, word in enumerate(WORDS)}
    ids, present = torch.zeros(len(prompts), 35, dtype=torch.long), torch.zeros(len(prompts), 35)
    for row, prompt in enumerate(prompts):
        found = []
        for word in prompt.split():
            stem = word.removesuffix("s") if word not in vocabulary and word.endswith("s") else word
            found += [vocabulary[stem], vocabulary["##s"]] if stem != word else [vocabulary.get(word, 1)]
        marked = [2, *found[:33], 3]
        ids[row, : len(marked)], present[row, : len(marked)] = torch.tensor(marked), 1.0
    return ids, present


@pytest.mark.parametrize(("heads", "faintness"), [(None, 1.0), (4, 1.0), (None, 3e-3)])
def test_imagereward_is_blip_and_its_head(
    tmp_path: Path, images: Tensor, heads: int | None, faintness: float
) -> None:
    file, base = imagereward_checkpoint(tmp_path)
    # Faint embeddings make the epsilon of the image tower's first norm count: 1e-6, not the 1e-5 of BlipVisionModel's default.
    tensors = imagereward_tensors()
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors[f"blip.visual_encoder.{name}"] *= faintness
    save_file(tensors, file)
    if heads is not None:
        (tmp_path / "med_config.json").write_text(f'{{"num_attention_heads": {heads}, "hidden_act": "gelu"}}')
    prompts = ["a cat", "red dogs on the moon", "", "zebra fish", " ".join(["red fish"] * 30)]
    state = {key: tensor.double() for key, tensor in tensors.items() if "position_ids" not in key}
    pixels = torch.from_numpy(official_clip_pixels(images, BLIP_VISION["image"]))
    patches = blip_image(state, pixels, BLIP_VISION["width"] // 64)
    x = blip_text(state, *bert_ids(prompts), patches, heads or BLIP_TEXT["width"] // 64)
    for place in (0, 2, 4, 6, 7):
        x = dense(state, f"mlp.layers.{place}", x)
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    scorer = ImageRewardScorer("reward", str(file), base=str(base))
    scores = scorer.score(images, prompts)
    # float32 against float64: some ten layers, whose sums of up to a few hundred terms lose about 1e-6 each.
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), rtol=1e-4, atol=5e-5)
    assert expected.std() > 0.05 and scorer.num_cut_prompts == 1


# --- LAION aesthetic


@pytest.mark.parametrize("version", [1, 2])
def test_aesthetic_is_a_map_of_the_unit_vector(tmp_path: Path, images: Tensor, version: int) -> None:
    from transformers import CLIPModel

    folder = tiny_judge(tmp_path / "clip")
    pixels = torch.from_numpy(official_clip_pixels(images[:, :, :33], 16)).float()
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=pixels).pooler_output
    file = aesthetic_checkpoint(tmp_path, features.shape[1], version)
    x = features.double() / features.double().norm(dim=-1, keepdim=True)
    state = {key: tensor.double() for key, tensor in aesthetic_tensors(features.shape[1], version).items()}
    for name in ("",) if version == 1 else tuple(f"layers.{place}." for place in (0, 2, 4, 6, 7)):
        x = linear(x, state[f"{name}weight"], state[f"{name}bias"])
    scorer = AestheticReward("taste", str(file), base=str(folder))
    scores = scorer.score(images[:, :, :33], PROMPTS)
    np.testing.assert_allclose(scores.numpy(), x[:, 0].numpy(), rtol=1e-4, atol=1e-6)
    assert torch.equal(scores, scorer.score(images[:, :, :33], [""] * 5)) and scores.std() > 1e-4
