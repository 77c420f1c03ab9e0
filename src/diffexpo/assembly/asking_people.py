"""People in the loop of a run: what was drawn becomes questions of a book, its votes become answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from diffexpo.assembly.rating import LABELS
from diffexpo.assembly.tournaments import (
    choose_fields,
    next_round,
    rounds_asked,
    said_in_the_end,
    with_votes,
)
from diffexpo.config import RunConfig
from diffexpo.config.people import Asking
from diffexpo.data.images import encode_png
from diffexpo.data.latents import pixel_decoder
from diffexpo.data.rows import Sample
from diffexpo.data.store import Store
from diffexpo.errors import WaitingError
from diffexpo.labelling.asking import missing_votes
from diffexpo.labelling.book import VOTE, Book
from diffexpo.labelling.counting import left_out, verdicts
from diffexpo.labelling.making import Couple, add_couples, open_book
from diffexpo.online.credit import stack_rewards
from diffexpo.online.loop import Ranking
from diffexpo.online.pairing import best_and_worst
from diffexpo.online.people import HUMAN, AskPeople, Said
from diffexpo.rewards.mixture import most_disputed
from diffexpo.rng import keyed_order
from diffexpo.types import Policy

Groups = Sequence[Sequence[Sample]]


def ask_people(
    config: RunConfig, run_dir: Path, policy: Policy, store: Store, ranking: Ranking
) -> AskPeople | None:
    """How a run asks people; None where no reward does."""
    asking = next((reward.asking for reward in config.rewards if reward.asking is not None), None)
    if asking is None:
        return None

    def ask(groups: Groups, iteration: int) -> Mapping[int, Said]:
        name = (config.seed, iteration)

        def add(couples: Mapping[int, tuple[int, int]]) -> None:
            shown = _pictures(store, policy, groups, couples)
            first = len(book.items(iteration, VOTE))
            add_couples(book, iteration, shown, [asking.question], asking.votes, first)
            names = [[sample.sample_id for sample in group] for group in groups]
            book.set_facts({"candidates": names})

        with open_book(run_dir / LABELS, config.name, asking.rating, {}) as book:
            if asking.couples == "tournament":
                return _hold_tournament(asking, book, groups, name, run_dir, add)
            if not book.items(iteration):
                add(choose_couples(asking, groups, name, ranking, _weights(config)))
            return read_answers(book, groups, iteration, run_dir)

    return AskPeople(f"{HUMAN}:{asking.question}", asking.min_agreement, ask)


def _weights(config: RunConfig) -> dict[str, float]:
    """Weights of the other rewards that rank."""
    return {one.name: one.weight for one in config.rewards if one.role == "train" and not one.asks_people}


# Many parameters because a round is asked with all of them.
def _hold_tournament(
    asking: Asking,
    book: Book,
    groups: Groups,
    name: tuple[int, int],
    run_dir: Path,
    add: Callable[[Mapping[int, tuple[int, int]]], None],
) -> dict[int, Said]:
    """What people said once all rounds are over; a WaitingError before, with the next round in the book."""
    _, iteration = name
    chosen = _chosen_prompts(asking, groups, name)
    fields = choose_fields(asking, groups, chosen, name)
    rounds = rounds_asked(book, iteration, len(chosen))
    if rounds:
        without = left_out(book)
        _refuse_missing(book, iteration, run_dir, without)
        fields = with_votes(fields, groups, chosen, book, iteration, without)
    if rounds < asking.rounds:
        add(next_round(fields, chosen, name, rounds))
        _refuse_missing(book, iteration, run_dir, left_out(book))
    return said_in_the_end(fields, chosen)


def _chosen_prompts(asking: Asking, groups: Groups, name: tuple[int, int]) -> list[int]:
    """Numbers of the prompts that people judge, by key."""
    numbers = keyed_order([str(number) for number in range(len(groups))], *name, "people")
    return sorted(int(number) for number in numbers[: asking.num_prompts(len(groups))])


def choose_couples(
    asking: Asking,
    groups: Groups,
    name: tuple[int, int],
    ranking: Ranking,
    weights: Mapping[str, float],
) -> dict[int, tuple[int, int]]:
    """Which prompts people judge, by number of the group, and which two of its images they see.

    Prompts are chosen by key, and so is the couple: one image of each agent where there are two, else any
    two. With `extremes` it is the best and the worst under the other rewards; a prompt that these cannot
    rank gets a couple by key. With `disputed` it is the couple that they dispute most, of the prompts where
    they dispute most. `name` is the run's seed and the iteration, `weights` are those of the other rewards.
    """
    if asking.couples == "disputed":
        scores = {reward: values for reward, values in stack_rewards(groups).items() if reward in weights}
        places, disputes = most_disputed(scores, weights)
        order = np.argsort(-disputes, kind="stable")[: asking.num_prompts(len(groups))]
        return {
            number: (int(places[number, 0]), int(places[number, 1]))
            if np.isfinite(disputes[number])
            else _by_key(groups[number], name, number)
            for number in sorted(int(number) for number in order)
        }
    chosen = _chosen_prompts(asking, groups, name)
    couples = {number: _by_key(groups[number], name, number) for number in chosen}
    if asking.couples == "extremes":
        mixed = ranking.mix(stack_rewards(groups))
        best, worst, valid = best_and_worst(torch.as_tensor(np.asarray(mixed, dtype=np.float64)))
        couples |= {number: (int(best[number]), int(worst[number])) for number in chosen if valid[number]}
    return couples


def _by_key(group: Sequence[Sample], name: tuple[int, int], number: int) -> tuple[int, int]:
    order = keyed_order([sample.sample_id for sample in group], *name, "couple", number)
    place = {sample.sample_id: position for position, sample in enumerate(group)}
    first = group[place[order[0]]]
    others = [group[place[sample_id]] for sample_id in order[1:]]
    second = next((sample for sample in others if sample.agent != first.agent), others[0])
    return place[first.sample_id], place[second.sample_id]


def _pictures(
    store: Store, policy: Policy, groups: Groups, couples: Mapping[int, tuple[int, int]]
) -> list[Couple]:
    """The couples with their images, decoded once each."""
    decode, found = pixel_decoder(policy), []
    for number, (a, b) in couples.items():
        first, second = groups[number][a], groups[number][b]
        pngs = [
            encode_png(pixels)
            for latents in store.stretches([first.sample_id, second.sample_id])
            for pixels in decode(latents)
        ]
        texts = (first.prompt_id, first.prompt, first.sample_id, second.sample_id)
        found.append(Couple(*texts, pngs[0], pngs[1]))
    return found


def read_answers(book: Book, groups: Groups, iteration: int, run_dir: Path) -> dict[int, Said]:
    """What people said, by number of the group; votes of raters who are left out do not count.

    Raises:
        WaitingError: votes are missing.
    """
    without = left_out(book)
    _refuse_missing(book, iteration, run_dir, without)
    place = {
        sample.sample_id: (number, position)
        for number, group in enumerate(groups)
        for position, sample in enumerate(group)
    }
    said = {}
    for verdict in verdicts(book, iteration, without):
        (number, a), (_, b) = place[verdict.item.name_a], place[verdict.item.name_b]
        said[number] = Said((a, b), (verdict.wins_a, verdict.wins_b), verdict.ties)
    return said


def _refuse_missing(book: Book, iteration: int, run_dir: Path, without: frozenset[int]) -> None:
    """A WaitingError while votes are missing."""
    missing = missing_votes(book, iteration, without)
    if missing:
        raise WaitingError(waiting_text(book, iteration, missing, run_dir, len(without)))


def waiting_text(book: Book, iteration: int, missing: int, run_dir: Path, without: int) -> str:
    """How many votes are missing, and how they are had."""
    items = book.items(iteration, VOTE)
    wanted = sum(item.wanted for item in items)
    most = max((item.wanted for item in items), default=0)
    people = sum(rater.revoked is None for rater in book.raters())
    gap = f"{missing} of {wanted} votes on {len(items)} pairs are missing"
    lines = [
        f"iteration {iteration} waits for people: {gap}",
        f"  serve the rating page:  diffexpo label serve {run_dir}",
        f"  make links for raters:  diffexpo label links {run_dir} --raters {most}",
        f"  go on afterwards:       diffexpo run --resume {run_dir}",
    ]
    if without:
        lines.append(
            f"  {without} raters are left out by the rule of `rating.exclude`; their votes do not count"
        )
    if people < most:
        lines.append(f"  {people} raters have links, but each pair needs the votes of {most}")
    return "\n".join(lines)
