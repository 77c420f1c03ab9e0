"""The pages as HTML: templates that escape everything they are given."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffexpo.config.people import QUESTIONS
from diffexpo.labelling.asking import Progress, Task, missing_votes
from diffexpo.labelling.book import VOTE, Book
from diffexpo.labelling.counting import left_out, rater_reports, verdicts

TEMPLATES = Path(__file__).parent / "templates"
HOURS = 24
_HOUR_S = 3600


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda value: "–" if value is None else f"{100 * value:.0f} %"
    return environment


def _render(file: str, /, **values: object) -> str:
    return _environment().get_template(file).render(**values)


def message(title: str, text: str) -> str:
    """A page with one sentence."""
    return _render("message.html.j2", title=title, text=text)


def consent(name: str, token: str, text: str) -> str:
    """The conditions, and a button that agrees to them."""
    return _render("consent.html.j2", name=name, token=token, text=text)


def rating(
    name: str,
    token: str,
    pages: Sequence[Sequence[Task]],
    far: Progress,
    *,
    is_open: bool,
    whole: bool,
    note: str,
) -> str:
    """The tasks on one pair that are to be answered, with the images of the next on their way; or thanks."""
    return _render(
        "rating.html.j2" if whole else "task.html.j2",
        name=name,
        token=token,
        tasks=[(task, QUESTIONS[task.question]) for task in pages[0]] if pages else [],
        coming=[page[0] for page in pages[1:]],
        far=far,
        is_open=is_open,
        note=note,
    )


def owner(book: Book, token: str) -> str:
    """How the rating goes: votes by the hour, agreement, raters, and the buttons that steer it."""
    without = left_out(book)
    found = verdicts(book, without=without)
    questions = []
    for question in dict.fromkeys(verdict.item.question for verdict in found):
        own = [verdict for verdict in found if verdict.item.question == question and verdict.votes > 1]
        questions.append(
            {
                "text": QUESTIONS[question],
                "pairs": len(own),
                "agreement": sum(verdict.agreement for verdict in own) / len(own) if own else None,
                "contradicted": sum(verdict.is_contradicted for verdict in own),
                "ties": sum(verdict.ties for verdict in own),
            }
        )
    now = time.time()
    ages = Counter(int((now - vote.at) // _HOUR_S) for vote in book.votes() if vote.kind == VOTE)
    hours = [(age, ages[age]) for age in range(HOURS) if ages[age]]
    gone = [
        image for (image,) in book.rows("SELECT image FROM images") if not book.image_path(image).is_file()
    ]
    return _render(
        "owner.html.j2",
        name=str(book.fact("name")),
        token=token,
        state=str(book.fact("state")),
        votes=sum(verdict.votes for verdict in found),
        missing=missing_votes(book, without=without),
        questions=questions,
        hours=hours,
        most=max((count for _, count in hours), default=1),
        raters=rater_reports(book),
        revoked={rater.rater for rater in book.raters() if rater.revoked is not None},
        gone=gone,
    )
