"""The tokenizer can be made again and is the same in every folder."""

from __future__ import annotations

from transformers import CLIPTokenizer

from diffexpo.worlds import emoji
from worlds.emoji.tokens import make_tokenizer


def test_the_tokenizer_can_be_made_again_and_is_the_same_everywhere() -> None:
    made = make_tokenizer()
    texts = ["noto woman firefighter: dark skin tone", "twemoji flag: c\u00f4te d\u2019ivoire", ""]
    folders = [
        emoji.asset_path("diffusion") / "tokenizer",
        emoji.asset_path("flow") / "tokenizer_2",
        emoji.asset_path("judge_train"),
        emoji.asset_path("judge_heldout"),
    ]
    for folder in folders:
        loaded = CLIPTokenizer.from_pretrained(folder)
        assert loaded(texts).input_ids == made(texts).input_ids
        assert loaded.model_max_length == 24
    longest = max(
        len(ids) for ids in made([f"{r['style']} {r['caption']}" for r in emoji.load_rows()]).input_ids
    )
    assert longest <= 24
