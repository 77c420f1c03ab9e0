"""Commands on what people are asked: serve the page, make links, take votes in and out. Loads without
torch."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffexpo.config.people import majority_right, votes_for
from diffexpo.errors import ConfigError, MissingError
from diffexpo.labelling.asking import missing_votes
from diffexpo.labelling.book import FILE, VOTE, Book
from diffexpo.labelling.counting import left_out, rater_reports, verdicts
from diffexpo.labelling.export import export_votes as write_votes
from diffexpo.labelling.foreign import import_votes as read_votes
from diffexpo.labelling.links import free_names, make_links, revoke
from diffexpo.labelling.tournaments import simulate

LABELS = "labels"
"""Folder of a run with what people are asked."""
Say = Callable[[str], None]


def find_book(folder: Path) -> Path:
    """The folder of a study, or that of a run's questions; a MissingError where people are asked nothing."""
    for place in (folder, folder / LABELS):
        if (place / FILE).is_file():
            return place
    raise MissingError(
        f"{folder} has nothing to rate: there is no {LABELS}/{FILE}. A run with a reward of type human "
        "writes it when its first images are drawn (`diffexpo run` ends with exit code 76 then); "
        "`diffexpo study new` makes a study of images that are there"
    )


def serve_rating(folder: Path, settings: dict[str, Any], say: Say, until_complete: bool = False) -> None:
    """Serve the rating page of a book until interrupted, or until every vote is in.

    Args:
        folder: Of the book.
        settings: Those of `labelling.serving.Site`: host, port, certificate, key.
    Raises:
        MissingError: the packages of the page are not installed. StoreError: an image has changed.
    """
    try:
        from diffexpo.labelling.serving import Site, address_of, bind, serve
    except ModuleNotFoundError as error:
        raise MissingError(
            f'the rating page needs {error.name}, which is not installed: pip install "diffexpo[label]"'
        ) from None
    site = Site(**settings)
    with Book(folder) as book:
        book.verify_images()
        listening = bind(site)
        with listening:
            owner = secrets.token_urlsafe(32)
            address = address_of(site, listening)
            for warning in [*site.warnings, *_warnings(book, folder)]:
                say(f"warning: {warning}")
            say(describe_rating(folder))
            say(f"rating page at {address} (raters need a personal link: diffexpo label links {folder})")
            say(f"owner's page, for you alone: {address}/o/{owner}")
            is_done = (lambda: missing_votes(book, without=left_out(book)) == 0) if until_complete else None
            serve(book, site, listening, owner, is_done)


def _warnings(book: Book, folder: Path) -> list[str]:
    """What would keep the votes from coming in."""
    people = sum(rater.revoked is None for rater in book.raters())
    most = max((item.wanted for item in book.items(kind=VOTE)), default=0)
    if people >= most:
        return []
    gap = f"{people} raters have links, but each pair is to get the votes of {most} people"
    return [f"{gap}: make more with `diffexpo label links {folder} --raters {most - people}`"]


def describe_rating(folder: Path) -> str:
    """One line: pairs, votes, what is missing."""
    with Book(folder) as book:
        without = left_out(book)
        found = verdicts(book, without=without)
        votes, missing = sum(verdict.votes for verdict in found), missing_votes(book, without=without)
        out = f"; {len(without)} raters are left out" if without else ""
        return f"{book.fact('name')}: {len(found)} questions, {votes} votes, {missing} missing{out}"


def make_rater_links(
    folder: Path, names: list[str], count: int, days: float | None, site: str
) -> list[tuple[str, str]]:
    """(name, address) of new links: of the names given, and of `count` raters without one."""
    with Book(folder) as book:
        links = make_links(book, [*names, *free_names(book, count)], days)
        return [(link.name, link.address(site)) for link in links]


def revoke_link(folder: Path, name: str) -> None:
    """End a rater's link."""
    with Book(folder) as book:
        revoke(book, name)


def export_votes(folder: Path, target: Path) -> int:
    """Write the votes without names; returns how many."""
    with Book(folder) as book:
        return write_votes(book, target)


def import_votes(folder: Path, source: Path, kind: str) -> str:
    """Take votes that were given elsewhere; returns a line on what became of them."""
    with Book(folder) as book:
        return read_votes(book, source, kind).describe()


def vote_costs(certainty: float, preference: float, candidates: int) -> list[tuple[str, str, str]]:
    """What votes buy: (what is asked of a prompt, votes, how often it is right), a row each.

    Raises:
        ConfigError: a certainty or preference that no number of votes gives.
    """
    if not 0.5 < preference < 1 or not 0.5 < certainty < 1:
        told = f"certainty {certainty:g}, preference {preference:g}"
        raise ConfigError(f"{told}: expected numbers above 0.5 and below 1")
    wanted = votes_for(certainty, preference)
    shown = sorted({1, 3, 5, 7, 9, *([] if wanted is None else [wanted])})
    rows = [
        (
            "one pair" + (f", for {certainty:.0%}" if votes == wanted else ""),
            str(votes),
            f"{majority_right(votes, preference):.1%} right",
        )
        for votes in shown
    ]
    for rounds in (candidates - 1, 2 * (candidates - 1), 4 * (candidates - 1)):
        right, best = simulate(candidates, rounds, 1)
        told = f"{right:.0%} right, the best of {candidates} wins {best:.0%}"
        rows.append((f"a tournament of {candidates}, {rounds} rounds of one vote", str(rounds), told))
    return rows


def raters_of(folder: Path) -> list[dict[str, Any]]:
    """Every rater's care, as JSON values."""
    with Book(folder) as book:
        return [asdict(report) | {"is_left_out": report.is_left_out} for report in rater_reports(book)]
