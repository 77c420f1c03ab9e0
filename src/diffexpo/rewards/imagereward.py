"""ImageReward: BLIP reads image and prompt together, a head turns its first text vector into a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diffexpo.bounded.texts import read_json
from diffexpo.config.rewards.imagereward import ImageRewardCard
from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.dual_encoder import NetworkReward, Texts
from diffexpo.rewards.heads import STACK, apply_stack, read_stack
from diffexpo.rewards.images import shortest_side_crop
from diffexpo.rewards.weights import (
    PRECISIONS,
    Device,
    check_keys,
    fill,
    find_folder,
    find_weights,
    fingerprint,
    read_part,
    read_tensors,
    renamed,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw output over the training set: scores have mean 0 and standard deviation 1 there."""
MAX_TOKENS = 35
HEAD_WIDTH = 64
"""Width of an attention head in BLIP's towers of any size; the weights do not tell the number of heads."""
# Of med_config.json, BLIP's text configuration, where there is no such file next to the weights.
MED_CONFIG = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
MED_KEYS = ("hidden_act", "layer_norm_eps", "num_attention_heads")

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
# Name in BLIP's image tower -> BlipVisionModel name.
_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
    ".norm": ".layer_norm",
    ".attn.": ".self_attn.",
    ".proj.": ".projection.",
}


class ImageRewardScorer(NetworkReward):
    """(head(BLIP(image, prompt)) - mean) / std, about -2 to 2.

    `path` is ImageReward's state dict as safetensors (a file, a folder with one, or a hub id; a
    med_config.json next to it is read), `base` a folder or hub id with the tokenizer of bert-base-uncased.

    Raises:
        MissingError: weights or tokenizer are missing.
        RewardError: the file is damaged, or holds the weights of another model.
    Source: ImageReward (arXiv 2304.05977) and its code's `score`, which scores one image at a time; this one
        batches, and the numbers are the same.
    """

    scale = "standardised reward, about -2 to 2"

    def __init__(
        self, name: str, path: str | None, device: Device = "cpu", *, base: str, precision: str = "float32"
    ) -> None:
        file = find_weights(name, ImageRewardCard, path)
        folder = find_folder(name, base, ImageRewardCard.base_is)
        tokenizer = _read_tokenizer(name, folder)
        self._dtype, self._device = PRECISIONS[precision], torch.device(device)
        self._vision, self._text, head = _load(name, file)
        for tower in (self._vision, self._text):
            tower.to(self._device, self._dtype).eval().requires_grad_(False)
        self._head = [(weight.to(device), bias.to(device)) for weight, bias in head]
        self._size = int(self._vision.config.image_size)
        longest = min(MAX_TOKENS, int(self._text.config.max_position_embeddings))
        self._texts = Texts(tokenizer, longest)
        super().__init__(name, self._texts)
        self.version = fingerprint([file], (file.parent, folder), precision=precision)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = shortest_side_crop(images, self._size).to(self._device, self._dtype)
        self._texts.note_cut(prompts)
        tokens = self._texts.tokens(prompts).to(self._device)
        with torch.no_grad():
            patches = self._vision(pixel_values=pixels).last_hidden_state
            states = self._text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=patches,
                is_decoder=False,
            ).last_hidden_state
            return (apply_stack(states[:, 0].float(), self._head) - MEAN) / STD


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of a part, float32, without its prefix."""
    return {
        key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)
    }


def _load(name: str, file: Path) -> tuple[BlipVisionModel, BlipTextModel, list[tuple[Tensor, Tensor]]]:
    """Both towers and the head; sizes are read off the tensors."""
    tensors = read_tensors(name, file)
    med_config = _med_config(name, file.parent)
    needed = [
        f"{_VISION}pos_embed",
        f"{_VISION}patch_embed.proj.weight",
        f"{_VISION}blocks.0.mlp.fc1.weight",
        f"{_TEXT}embeddings.word_embeddings.weight",
        f"{_TEXT}embeddings.position_embeddings.weight",
        f"{_TEXT}encoder.layer.0.intermediate.dense.weight",
        f"{_TEXT}encoder.layer.0.crossattention.self.key.weight",
        *(f"{_HEAD}{place}.{kind}" for place in STACK for kind in ("weight", "bias")),
    ]
    check_keys(name, file, [key for key in needed if key not in tensors], (), "ImageReward")
    seen = {renamed(key, _NAMES): tensor for key, tensor in _below(tensors, _VISION).items()}
    vision = fill(name, file, BlipVisionModel(_vision_config(tensors)), seen, "ImageReward")
    read = _below(tensors, _TEXT)
    read.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a constant that older libraries saved
    text = BlipTextModel(_text_config(tensors, med_config), add_pooling_layer=False)
    return vision, fill(name, file, text, read, "ImageReward"), read_stack(tensors, _HEAD)


def _vision_config(tensors: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = tensors[f"{_VISION}patch_embed.proj.weight"].shape
    patches = tensors[f"{_VISION}pos_embed"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors[f"{_VISION}blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(tensors, f"{_VISION}blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        # The official image tower has 1e-6, the class's default is another.
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )


def _text_config(tensors: Mapping[str, Tensor], med_config: Mapping[str, object]) -> BlipTextConfig:
    vocabulary, width = tensors[f"{_TEXT}embeddings.word_embeddings.weight"].shape
    settings = {**MED_CONFIG, "num_attention_heads": width // HEAD_WIDTH, **med_config}
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=tensors[f"{_TEXT}encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=tensors[f"{_TEXT}encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(tensors, f"{_TEXT}encoder.layer."),
        max_position_embeddings=tensors[f"{_TEXT}embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # the class's word for "has cross-attention"; the mask stays bidirectional
        **{key: settings[key] for key in MED_KEYS},
    )


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix))


def _med_config(name: str, folder: Path) -> dict[str, object]:
    """Heads, activation and epsilon of the text tower from med_config.json, if there is one."""
    file = folder / "med_config.json"
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        return {key: found[key] for key in MED_KEYS if key in found}
    except (ValueError, TypeError) as error:
        raise RewardError(f"reward {name!r}: {file} is not BLIP's text configuration ({error})") from error


def _read_tokenizer(name: str, folder: Path) -> BertTokenizer:
    if not any((folder / file).is_file() for file in ("vocab.txt", "tokenizer.json")):
        reason = f"{folder} holds no tokenizer (vocab.txt or tokenizer.json)"
        raise MissingError(f"reward {name!r}: {reason}; set base to a copy of bert-base-uncased")
    return read_part(name, folder, BertTokenizer)
