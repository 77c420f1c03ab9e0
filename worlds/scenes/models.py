"""The shapes of the models of the scenes: plain diffusers and transformers configurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from diffexpo.worlds.scenes.grammar import all_scenes
from worlds.emoji.models import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, make_ddim

PROMPT_LENGTH = 16
TEXT_WIDTH, TEXT_LAYERS = 128, 3
FLOW_SECOND_WIDTH = 32
"""Width of the second text encoder of the flow base, which its layout asks for: the first one reads."""
FLOW_WIDTH, FLOW_LAYERS, FLOW_HEAD = 160, 4, 32
LOOKS_TEXT_WIDTH, LOOKS_PROJECTION = 32, 32
START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
OTHER_WORDS = ("blurry", "half", "broken", "extra", "many", "missing", "wrong", "mixed", "faded", "messy")
"""Words of negative prompts, which no caption uses."""


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that make each word one token: the most frequent pair first, of equally
    frequent ones the first in the alphabet, so that every machine learns the same."""
    spelt = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges = []
    while counts := Counter(pair for word in spelt for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelt = [_merged(word, best) for word in spelt]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def make_tokenizer() -> CLIPTokenizer:
    """Return a CLIPTokenizer with one token for every word of the grammar."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges([*(word for scene in all_scenes() for word in scene.text.split()), *OTHER_WORDS])
    vocabulary: dict[str, int] = {}
    endings, joined = (letter + END_OF_WORD for letter in alphabet), ("".join(pair) for pair in merges)
    for token in [*alphabet, *endings, *joined, START, END]:
        vocabulary.setdefault(token, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=PROMPT_LENGTH,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the text encoder of the diffusion base, half a million parameters."""
    return CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH, TEXT_LAYERS))


def make_schedule() -> DDIMScheduler:
    """Return the diffusion base's schedule: levels of Stable Diffusion 1.5, prediction of v as in 2.1.

    Where things lie is decided at high noise. There the noise is nearly all that is seen, an error of the
    image counts in an error of the noise by the factor snr only, and what the noise prediction says of the
    image is its error over sqrt(snr). v = alpha eps - sigma x0 asks for the image itself there.
    """
    return DDIMScheduler.from_config(make_ddim().config, prediction_type="v_prediction")


def make_unet() -> UNet2DConditionModel:
    """Return the denoiser of the diffusion base, 4.3 million parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_flow_text_encoders(
    tokenizer: CLIPTokenizer,
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Return the text encoders of the flow base: that of the diffusion base with a layer more, since the
    layout reads the states before the last layer, and a small second one."""
    sizes = ((TEXT_WIDTH, TEXT_LAYERS + 1), (FLOW_SECOND_WIDTH, 2))
    first, second = (CLIPTextModelWithProjection(_text_config(tokenizer, *size)) for size in sizes)
    return first, second


def make_flow_transformer() -> SD3Transformer2DModel:
    """Return the velocity network of the flow base: 64 image tokens and 16 of the prompt attend jointly."""
    width = TEXT_WIDTH + FLOW_SECOND_WIDTH
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=FLOW_LAYERS,
        attention_head_dim=FLOW_HEAD,
        num_attention_heads=FLOW_WIDTH // FLOW_HEAD,
        caption_projection_dim=FLOW_WIDTH,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )


@dataclass(frozen=True)
class LooksShape:
    """Vision tower of a judge of looks: side of a patch in pixels, width, layers, heads."""

    patch: int
    width: int
    layers: int
    heads: int


def make_looks_judge(tokenizer: CLIPTokenizer, shape: LooksShape) -> CLIPModel:
    """Return a judge of looks, a CLIPModel whose text tower is as small as the layout allows: prompts do not
    say what looks good."""
    vision = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=IMAGE_SIZE,
        patch_size=shape.patch,
        projection_dim=LOOKS_PROJECTION,
        hidden_act="gelu",
    )
    text = _text_config(tokenizer, LOOKS_TEXT_WIDTH, 1)
    text.projection_dim = LOOKS_PROJECTION
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=LOOKS_PROJECTION,
            logit_scale_init_value=2.6592,
        )
    )
