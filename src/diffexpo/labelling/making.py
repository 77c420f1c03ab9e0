"""New questions in a book: pairs of images, and attention checks made from them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffexpo.bounded.images import pixels_of
from diffexpo.config.people import RatingConfig
from diffexpo.labelling.book import CHECK, VOTE, Book, Item
from diffexpo.rng import keyed_choice, keyed_order, numpy_generator

MOST_CHECKS = 50
_TILES = 4


@dataclass(frozen=True)
class Couple:
    """Two images of a prompt as PNG files, by sample id or model."""

    prompt_id: str
    prompt: str
    name_a: str
    name_b: str
    png_a: bytes
    png_b: bytes


def open_book(folder: Path, name: str, rating: RatingConfig, facts: Mapping[str, object]) -> Book:
    """The book of a folder, made if it is new.

    Args:
        name: What raters see above the questions.
        rating: How pairs are shown; a book that is there keeps its own.
        facts: Others that a new book is made with.
    """
    return Book(folder, {"name": name, "rating": rating.model_dump(mode="json"), **facts})


def add_couples(
    book: Book, batch: int, couples: Sequence[Couple], questions: Sequence[str], wanted: int, first: int = 0
) -> None:
    """Ask every question on every couple, and add attention checks; all of it or, where that fails, nothing.

    Args:
        batch: Number by which the questions are found again, e.g. an iteration.
        wanted: Answers for each question on each couple.
        first: Number of the first couple, if the batch has some already.
    """
    key, every = str(book.fact("key")), int(book.fact("rating")["checks_every"])
    names = iter(book.add_images([png for couple in couples for png in (couple.png_a, couple.png_b)]))
    items = []
    for number, couple in enumerate(couples, start=first):
        pair = f"{batch:04d}-{number:06d}"
        a, b = next(names), next(names)
        items += [
            _item(f"{pair}-{question}", batch, pair, VOTE, question, couple, a, b, wanted)
            for question in questions
        ]
    items += _checks(book, batch, couples, questions, key, every, first)
    book.add_items(items)


def ruined(png: bytes, *key: str | int) -> bytes:
    """A copy of an image that nobody who looks would prefer: its tiles exchanged, under noise."""
    image = Image.fromarray(pixels_of(png))
    side = max(1, image.width // _TILES), max(1, image.height // _TILES)
    pixels = np.asarray(image.resize((side[0] * _TILES, side[1] * _TILES)), dtype=np.float64)
    generator = numpy_generator(*key, "ruined")
    tiles = (
        pixels.reshape(_TILES, side[1], _TILES, side[0], 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, side[1], side[0], 3)
    )
    mixed = tiles[generator.permutation(len(tiles))].reshape(_TILES, _TILES, side[1], side[0], 3)
    whole = mixed.transpose(0, 2, 1, 3, 4).reshape(pixels.shape)
    noisy = 0.5 * whole + 0.5 * generator.uniform(0.0, 255.0, size=pixels.shape)
    out = io.BytesIO()
    Image.fromarray(noisy.round().astype(np.uint8)).resize(image.size).save(out, "PNG")
    return out.getvalue()


# Many parameters because checks are made of the same things as couples.
def _checks(
    book: Book,
    batch: int,
    couples: Sequence[Couple],
    questions: Sequence[str],
    key: str,
    every: int,
    first: int,
) -> list[Item]:
    """As many attention checks as one who answers everything meets."""
    if every == 0 or not couples:
        return []
    count = min(MOST_CHECKS, len(couples), math.ceil(len(couples) * len(questions) / every))
    numbers = keyed_order([str(number) for number in range(len(couples))], key, batch, CHECK)[:count]
    chosen = [couples[int(number)] for number in numbers]
    pngs = [png for couple in chosen for png in (couple.png_a, ruined(couple.png_a, key, couple.name_a))]
    names = iter(book.add_images(pngs))
    items = []
    for number, couple in enumerate(chosen, start=first):
        name = f"{batch:04d}-check-{number:04d}"
        question = questions[keyed_choice(len(questions), key, name)]
        items.append(_item(name, batch, name, CHECK, question, couple, next(names), next(names), 0))
    return items


# Many parameters because an item has as many columns.
def _item(
    name: str, batch: int, pair: str, kind: str, question: str, couple: Couple, a: str, b: str, wanted: int
) -> Item:
    return Item(
        item=name,
        batch=batch,
        pair=pair,
        kind=kind,
        question=question,
        prompt_id=couple.prompt_id,
        prompt=couple.prompt,
        image_a=a,
        image_b=b,
        name_a=couple.name_a,
        name_b=couple.name_b if kind == VOTE else f"{couple.name_a} (ruined)",
        wanted=wanted,
    )
