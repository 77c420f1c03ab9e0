"""Tournaments among the images of a prompt: rounds of couples in a run's book, and who has won at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffexpo.config.people import Asking
from diffexpo.data.rows import Sample
from diffexpo.labelling.book import VOTE, Book
from diffexpo.labelling.counting import verdicts
from diffexpo.labelling.tournaments import next_couple, standing
from diffexpo.online.people import Said
from diffexpo.rng import keyed_order

Groups = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Field:
    """A prompt's tournament: places of its candidates in the group, who was preferred to whom, and votes."""

    places: tuple[int, ...]
    wins: np.ndarray
    ties: int


def choose_fields(
    asking: Asking, groups: Groups, chosen: Sequence[int], name: tuple[int, int]
) -> list[Field]:
    """The candidates of each prompt that people judge, by key, before any vote; `name` is the run's seed and
    the iteration."""
    fields = []
    for number in chosen:
        group = groups[number]
        order = keyed_order([sample.sample_id for sample in group], *name, "candidates", number)
        kept = set(order[: asking.candidates])
        places = tuple(place for place, sample in enumerate(group) if sample.sample_id in kept)
        fields.append(Field(places, np.zeros((len(places), len(places))), 0))
    return fields


def with_votes(
    fields: Sequence[Field],
    groups: Groups,
    chosen: Sequence[int],
    book: Book,
    iteration: int,
    without: frozenset[int],
) -> list[Field]:
    """The fields with every vote so far."""
    wins, ties = [field.wins.copy() for field in fields], [field.ties for field in fields]
    where = {
        groups[number][place].sample_id: (at, row)
        for at, (number, field) in enumerate(zip(chosen, fields, strict=True))
        for row, place in enumerate(field.places)
    }
    for verdict in verdicts(book, iteration, without):
        (at, a), (_, b) = where[verdict.item.name_a], where[verdict.item.name_b]
        wins[at][a, b] += verdict.wins_a + 0.5 * verdict.ties
        wins[at][b, a] += verdict.wins_b + 0.5 * verdict.ties
        ties[at] += verdict.ties
    return [Field(field.places, w, t) for field, w, t in zip(fields, wins, ties, strict=True)]


def rounds_asked(book: Book, iteration: int, prompts: int) -> int:
    """How many rounds of an iteration are in the book."""
    return len(book.items(iteration, VOTE)) // prompts


def next_round(
    fields: Sequence[Field], chosen: Sequence[int], name: tuple[int, int], number: int
) -> dict[int, tuple[int, int]]:
    """The couple of each prompt that is asked in a round (0: the first), by places in its group."""
    found = {}
    for group, field in zip(chosen, fields, strict=True):
        a, b = next_couple(field.wins, *name, "round", number, group)
        found[group] = field.places[a], field.places[b]
    return found


def said_in_the_end(fields: Sequence[Field], chosen: Sequence[int]) -> dict[int, Said]:
    """The best and the worst image of each prompt."""
    said = {}
    for number, field in zip(chosen, fields, strict=True):
        end = standing(field.wins)
        total = round(float(field.wins.sum())) - field.ties
        for_best = round(float(field.wins[end.best].sum()))
        said[number] = Said(
            (field.places[end.best], field.places[end.worst]),
            (min(for_best, total), total - min(for_best, total)),
            field.ties,
            end.probability,
        )
    return said
