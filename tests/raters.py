"""Books of small images, and raters who answer by a rule instead of people; without torch."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from diffexpo.config.people import CareConfig, RatingConfig
from diffexpo.labelling.app import make_app
from diffexpo.labelling.asking import answer, open_tasks
from diffexpo.labelling.book import CHECK, Book, Rater
from diffexpo.labelling.links import make_links, rater_of
from diffexpo.labelling.making import Couple, add_couples, open_book

OWNER = "secret-of-the-owner"
# Rules answer at once, so the rule on time is off.
PLAIN = RatingConfig(checks_every=0, repeats_every=0, exclude=CareConfig(seconds_below=0))


def png(number: int, side: int = 16) -> bytes:
    """A random image."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def couples(count: int, prompt: str = "prompt {}") -> list[Couple]:
    """Couples of images, those of models "one" and "two"."""
    return [
        Couple(f"p{number}", prompt.format(number), "one", "two", png(2 * number), png(2 * number + 1))
        for number in range(count)
    ]


def make_book(
    folder: Path,
    pairs: int = 4,
    questions: tuple[str, ...] = ("quality",),
    wanted: int = 2,
    rating: RatingConfig = PLAIN,
    prompt: str = "prompt {}",
) -> Book:
    """A book with pairs of small images."""
    book = open_book(folder, "a study", rating, {})
    book.set_facts({"key": "tests"})  # else by chance, and with it every order and side
    book.rows("PRAGMA synchronous = OFF")  # what a power cut would do is not tested with it
    add_couples(book, 1, couples(pairs, prompt), questions, wanted)
    return book


def join(book: Book, name: str) -> tuple[Rater, str]:
    """A new rater who has agreed, and the token of the link."""
    (link,) = make_links(book, [name])
    rater = rater_of(book, link.token)
    assert rater is not None
    book.consent(rater.rater)
    return rater, link.token


def client(book: Book, **limits: float) -> TestClient:
    """A browser without scripts, that does not follow redirects."""
    return TestClient(make_app(book, OWNER, **limits), follow_redirects=False)  # type: ignore[arg-type]


def task_number(page: str) -> int | None:
    """The task that a page shows."""
    found = re.search(r'name="task" value="(\d+)"', page)
    return int(found[1]) if found else None


Judge = Callable[[str, str, str], str]
"""Names of the left and the right image and the kind of the task ("vote", "check", "repeat") to an answer."""


def answer_all(book: Book, rater: Rater, judge: Judge, most: int = 10_000) -> int:
    """Answer tasks by a rule until none is left; returns how many."""
    items = {item.item: item for item in book.items()}
    for done in range(most):
        tasks = open_tasks(book, rater.rater)
        if not tasks:
            return done
        ((item, swapped, kind),) = book.rows(
            "SELECT item, swapped, kind FROM tasks WHERE task = ?", tasks[0].task
        )
        names = [items[item].name_a, items[item].name_b]
        assert answer(book, rater.rater, tasks[0].task, judge(*(names[::-1] if swapped else names), kind))
    return most


def careful(better: str, noise: float = 0.0, seed: int = 0) -> Judge:
    """Prefers images of a name, errs with a probability, and always sees through checks."""
    generator = random.Random(seed)

    def judge(left: str, right: str, kind: str) -> str:
        if kind == CHECK:
            return "right" if left.endswith("(ruined)") else "left"
        wins = "left" if left == better else "right"
        other = "left" if wins == "right" else "right"
        return other if generator.random() < noise else wins

    return judge


def careless(seed: int = 0) -> Judge:
    """Answers by chance."""
    generator = random.Random(seed)
    return lambda left, right, kind: generator.choice(["left", "right"])
