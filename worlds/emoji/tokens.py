"""Trains the byte-pair vocabulary of the emoji world's captions, in the file layout of CLIP."""

from __future__ import annotations

import json

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffexpo.worlds.emoji import load_rows
from worlds.emoji.attributes import STYLES, is_train
from worlds.emoji.models import PROMPT_LENGTH

VOCABULARY = 2048
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Return a CLIPTokenizer whose merges were learned from the train captions and keywords (equally frequent
    pairs may fall in either order, so go on with a model's own tokenizer when its weights are trained
    further)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    empty = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    core = empty.backend_tokenizer
    texts = []
    for row in load_rows():
        if is_train(row):
            texts.append(f"{row['style']} {row['caption']}")
            texts.append(" ".join(row["keywords"]))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(alphabet),
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens last.
    vocabulary: dict[str, int] = {}
    for token in [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)
    assert tokenizer.unk_token_id == tokenizer.eos_token_id and STYLES[0] in tokenizer.decode(
        tokenizer(f"{STYLES[0]} cat").input_ids
    )
    return tokenizer
