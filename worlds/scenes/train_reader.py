"""Teaches the text encoder to read before anything is drawn, as the text encoders of real models are.

Through the denoiser alone it hardly learns which of two things is meant to be left: a caption's first thing
has been read before the relation is, so that only the last states can hold both, and how much of the image's
variance that decides is small. A head that has to tell from these states what the caption says teaches it
in minutes, without an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexpo.worlds.scenes.grammar import (
    COLOURS,
    GENDERS,
    OBJECTS,
    OCCUPATIONS,
    OPPOSITE,
    RELATIONS,
    TONES,
    Scene,
    parse_scene,
)
from worlds.emoji.fit import choose_device
from worlds.emoji.layout import half_copy
from worlds.emoji.train_diffusion import read_weights
from worlds.scenes.captions import caption, draw_scene
from worlds.scenes.fit import Schedule, fit
from worlds.scenes.models import make_text_encoder, make_tokenizer

BATCH = 192
LEARNING_RATE = 1e-3
RELATED_SHARE = 0.6
"""Captions of which it is certain that their scene has a relation: which thing is where is learned last."""
STATED = {"count": 4, "colour": len(COLOURS), "place": len(RELATIONS)}
"""What a caption may say of each of `OBJECTS`: how many, which colour, on which side of the other thing."""


@lru_cache(maxsize=100_000)
def stated(text: str) -> tuple[int, ...]:
    """The indices of the facts that a caption states: objects x `STATED`, occupations, genders, tones."""
    scene = parse_scene(text) if text else Scene()
    width, found = sum(STATED.values()), []
    for index, thing in enumerate(scene.things):
        first = OBJECTS.index(thing.name) * width
        found.append(first + thing.count - 1)
        if thing.colour:
            found.append(first + STATED["count"] + COLOURS.index(thing.colour))
        if scene.relation:
            side = scene.relation if index == 0 else OPPOSITE[scene.relation]
            found.append(first + STATED["count"] + STATED["colour"] + RELATIONS.index(side))
    if person := scene.person:
        first = len(OBJECTS) * width
        for value, names in ((person.name, OCCUPATIONS), (person.gender, GENDERS), (person.tone, TONES)):
            if value:
                found.append(first + names.index(value))
            first += len(names)
    return tuple(found)


NUM_FACTS = len(OBJECTS) * sum(STATED.values()) + len(OCCUPATIONS) + len(GENDERS) + len(TONES)


class Reading(nn.Module):
    """Tells the facts that a caption states from its last text states; used in training only, not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(width, 384), nn.GELU(), nn.Linear(384, NUM_FACTS))

    def loss(self, states: Tensor, ids: Tensor, end: int, captions: Sequence[str]) -> Tensor:
        """Mean over captions of the summed cross-entropy of all facts, from states (B, L, D); the mean over
        the end token and the padding is read."""
        last = (ids == end).to(states.dtype).unsqueeze(-1)
        logits = self.head((states * last).sum(dim=1) / last.sum(dim=1)).float()
        wanted = torch.zeros(logits.shape)
        for row, text in enumerate(captions):
            wanted[row, list(stated(text))] = 1.0
        wanted = wanted.to(logits.device)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1).mean()


@torch.no_grad()
def read_from(folder: Path, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Take the text encoder of a base. Words are told apart by their tokens, so that a vocabulary may have
    grown; layers that it does not have start as the identity."""
    weights = read_weights(folder / "text_encoder" / "model.safetensors")
    old = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    own = text_encoder.state_dict()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    table = own[name].clone()
    for token, row in tokenizer.get_vocab().items():
        if token in old:
            table[row] = weights[name][old[token]]
    for key in own.keys() - weights.keys():
        if "out_proj" in key or "fc2" in key:
            own[key].zero_()
    text_encoder.load_state_dict(own | weights | {name: table})


def _scene(rng: np.random.Generator) -> Scene:
    wants_relation = rng.random() < RELATED_SHARE
    while True:
        scene = draw_scene(rng)
        if scene.relation or not wants_relation:
            return scene


def train_reader(steps: int, out: Path, seed: int, start: Path | None, learning_rate: float) -> None:
    """Train a text encoder, from nothing or from a base's, on so many batches of `BATCH` captions and save it
    to the folder `out`."""
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    if start is not None:
        read_from(start, text_encoder, tokenizer)
    text_encoder.set_attn_implementation("eager")
    parts = nn.ModuleDict({"text_encoder": text_encoder, "reading": Reading(text_encoder.config.hidden_size)})
    parts.to(device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 7, step])
        captions = [caption(_scene(rng), rng) for _ in range(BATCH)]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ids = ids.to(device)
        states = text_encoder(ids).last_hidden_state
        reading = parts["reading"]
        assert isinstance(reading, Reading)
        return reading.loss(states, ids, tokenizer.eos_token_id, captions)

    fit(
        "reader",
        parts,
        loss_of,
        Schedule(steps, learning_rate),
        out.with_name(f"{out.name}.state.safetensors"),
        lambda: half_copy(text_encoder).save_pretrained(out),
    )
