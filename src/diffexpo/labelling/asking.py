"""What a rater is asked next, and what becomes of the answer.

Order and sides are keyed, so they depend on nothing but the book's key, the rater and what was asked before:

    next    = of the questions that lack most answers, the first in the rater's own keyed order
    swapped = (keyed coin of the pair + number of raters who were shown it before) mod 2

so the sides of each pair are balanced to within one rater. All questions on a pair come one after another,
and its sides stay as they are meanwhile.
Two tasks of a rater are open at any time: the one that is shown, and the next, whose images load meanwhile.
With `rating.at_once` it is all questions on one pair and on the next, and no check comes between them.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from diffexpo.errors import ConfigError
from diffexpo.labelling.book import ANSWERS, CHECK, COUNTED, REPEAT, VOTE, Book
from diffexpo.labelling.counting import left_out, reasons_of
from diffexpo.rng import keyed_choice, keyed_seed

OPEN_TASKS = 2
# A task that was handed out and not answered stands for an answer this long; then others are asked too.
RESERVED_S = 900.0
_TASK = """
SELECT tasks.task, tasks.kind, tasks.swapped, items.question, items.prompt, items.image_a, items.image_b,
    items.pair
FROM tasks JOIN items USING (item) WHERE tasks.rater = ? AND is_open ORDER BY tasks.place LIMIT ?
"""
_DONE = "SELECT count(*) FROM tasks WHERE rater = ? AND NOT is_open"
_OWN = f"SELECT item, is_open FROM tasks WHERE rater = ? AND kind = '{VOTE}'"
_ITEMS = f"SELECT item, pair, wanted, given FROM items WHERE kind = '{VOTE}'"
# Tasks that others have before their eyes, by question.
_RESERVED = f"""
SELECT item, count(*) FROM tasks
WHERE is_open AND kind = '{VOTE}' AND made > ?1 AND rater <> ?2
    AND rater NOT IN (SELECT value FROM json_each(?3)) GROUP BY item
"""
# Answers of raters who are left out, by question.
_LEFT_OUT = f"""
SELECT item, count(*) FROM tasks JOIN votes USING (task)
WHERE tasks.rater IN (SELECT value FROM json_each(?)) AND kind = '{VOTE}' AND undone IS NULL
    AND answer <> 'skip' GROUP BY item
"""
_LAST = """
SELECT vote, task, pair, tasks.kind FROM votes JOIN tasks USING (task) JOIN items USING (item)
WHERE rater = ? AND undone IS NULL ORDER BY place DESC LIMIT ?
"""
_MOST_QUESTIONS = 8
_NEW_CHECKS = f"""
SELECT item FROM items WHERE kind = '{CHECK}'
    AND NOT EXISTS (SELECT 1 FROM tasks WHERE tasks.item = items.item AND tasks.rater = ?) ORDER BY item
"""
_TO_REPEAT = f"""
SELECT item, swapped FROM tasks JOIN votes USING (task)
WHERE rater = ?1 AND kind = '{VOTE}' AND undone IS NULL AND answer <> 'skip'
    AND item NOT IN (SELECT item FROM tasks WHERE rater = ?1 AND kind = '{REPEAT}') ORDER BY place LIMIT 1
"""
# The other questions on a question's pair that lack answers and that the rater was not asked.
_SAME_PAIR = f"""
SELECT item FROM items WHERE kind = '{VOTE}' AND given < wanted
    AND NOT EXISTS (SELECT 1 FROM tasks WHERE tasks.item = items.item AND rater = ?1)
    AND pair = (SELECT pair FROM items WHERE item = ?2) AND item <> ?2 ORDER BY item
"""
_HANDED = "SELECT kind, count(*) FROM tasks WHERE rater = ? GROUP BY kind"
LOOK_EVERY = 10
"""Whose answers are left out is looked at after this many answers of a rater, and after each check."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is shown to a rater: images by name, sides as they are shown."""

    task: int
    question: str
    prompt: str
    left: str
    right: str
    pair: str = ""
    kind: str = VOTE


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rater is: tasks answered, and about how many more there are."""

    done: int
    left: int
    can_undo: bool


def open_tasks(book: Book, rater: int) -> list[Task]:
    """The rater's next tasks, those of two pages, the first of which is to be shown; none: nothing left."""
    if book.fact("state") != "open":
        return []
    now, at_once = time.time(), bool(book.fact("rating").get("at_once"))
    most = _MOST_QUESTIONS * OPEN_TASKS if at_once else OPEN_TASKS
    with book.change() as connection:

        def look() -> list[Task]:
            return [_shown(*row) for row in connection.execute(_TASK, (rater, most)).fetchall()]

        found = look()
        while len(pages_of(found, at_once)) < OPEN_TASKS and _add_task(book, connection, rater, now):
            found = look()
        for task in pages_of(found, at_once)[0] if found else []:
            mark = "UPDATE tasks SET shown = ? WHERE task = ? AND shown IS NULL"
            connection.execute(mark, (now, task.task))
    return found


def pages_of(tasks: Sequence[Task], at_once: bool) -> list[list[Task]]:
    """Tasks in order as the pages that show them: those on one pair together, or each by itself."""
    pages: list[list[Task]] = []
    for task in tasks:
        before = pages[-1][0] if pages and at_once else None
        if before is not None and (before.pair, before.kind, before.left) == (
            task.pair,
            task.kind,
            task.left,
        ):
            pages[-1].append(task)
        else:
            pages.append([task])
    return pages


def answer(book: Book, rater: int, task: int, given: str) -> bool:
    """Take down an answer; it is on the disk when this returns.

    Returns:
        False where the task has an answer already (a page sent twice): the first one stands.
    Raises:
        ConfigError: no such answer, or no such task of this rater.
    """
    if given not in ANSWERS:
        raise ConfigError(f"answer {given!r:.40}: expected one of {', '.join(ANSWERS)}")
    now = time.time()
    with book.change() as connection:
        found = connection.execute(
            "SELECT shown, kind FROM tasks WHERE task = ? AND rater = ?", (task, rater)
        ).fetchone()
        if found is None:
            raise ConfigError(f"task {task}: expected one that was shown to this rater")
        if connection.execute("SELECT 1 FROM votes WHERE task = ? AND undone IS NULL", (task,)).fetchone():
            return False
        # A clock that was set back gives no time rather than a wrong one.
        seconds = None if found[0] is None or now < found[0] else now - found[0]
        entry = "INSERT INTO votes (task, answer, at, seconds) VALUES (?, ?, ?, ?)"
        connection.execute(entry, (task, given, now, seconds))
        done = connection.execute(_DONE, (rater,)).fetchone()[0]
    if found[1] == CHECK or done % LOOK_EVERY == 0:
        _note_one(book, rater)
    return True


def _note_one(book: Book, rater: int) -> None:
    """`note_left_out`, of one rater."""
    noted = set(book.fact("left_out") or [])
    is_out = bool(reasons_of(book.votes(rater=rater), book.fact("rating")["exclude"]))
    changed = noted | {rater} if is_out else noted - {rater}
    if changed != noted:
        book.set_facts({"left_out": sorted(changed)})


def note_left_out(book: Book) -> None:
    """Look whose answers the rule leaves out, so that others are asked in their place."""
    book.set_facts({"left_out": sorted(left_out(book))})


def _left_out(book: Book) -> str:
    """Raters whose answers were last found to be left out, as JSON."""
    return json.dumps(book.fact("left_out") or [])


def undo(book: Book, rater: int) -> bool:
    """Take back the rater's last answer, whose task is shown again, or all answers of the last page; False
    where there is none."""
    at_once = bool(book.fact("rating").get("at_once"))
    with book.change() as connection:
        last = connection.execute(_LAST, (rater, _MOST_QUESTIONS if at_once else 1)).fetchall()
        for vote, task, pair, kind in last:
            if (pair, kind) != last[0][2:]:
                break
            connection.execute("UPDATE votes SET undone = ? WHERE vote = ?", (time.time(), vote))
            connection.execute("UPDATE tasks SET shown = NULL WHERE task = ?", (task,))
    return bool(last)


def progress(book: Book, rater: int) -> Progress:
    """How far a rater is."""
    done = int(book.rows(_DONE, rater)[0][0])
    answered = {item for item, is_open in book.rows(_OWN, rater) if not is_open}
    without = dict(book.rows(_LEFT_OUT, _left_out(book)))
    left = sum(
        given - without.get(item, 0) < wanted and item not in answered
        for item, _, wanted, given in book.rows(_ITEMS)
    )
    return Progress(done, left, done > 0)


def missing_votes(book: Book, batch: int | None = None, without: frozenset[int] = frozenset()) -> int:
    """Answers that are still wanted, those of raters who are left out not counted."""
    counts: dict[str, int] = {}
    for vote in book.votes(batch):
        if vote.kind == VOTE and vote.answer in COUNTED and vote.rater not in without:
            counts[vote.item] = counts.get(vote.item, 0) + 1
    return sum(max(0, item.wanted - counts.get(item.item, 0)) for item in book.items(batch, VOTE))


def _add_task(book: Book, connection: sqlite3.Connection, rater: int, now: float) -> bool:
    """Hand out one more task, or all on one pair; False where nothing is left for this rater."""
    key = str(book.fact("key"))
    place = connection.execute("SELECT count(*) FROM tasks WHERE rater = ?", (rater,)).fetchone()[0]
    chosen = _choose(connection, _left_out(book), key, rater, now)
    if chosen is None:
        return False
    rating = book.fact("rating")
    handed = dict(connection.execute(_HANDED, (rater,)).fetchall())
    if _turns(rating["checks_every"], place, key, rater, CHECK) > handed.get(CHECK, 0):
        checks = [row[0] for row in connection.execute(_NEW_CHECKS, (rater,))]
        if checks:
            check = checks[keyed_choice(len(checks), key, "check", rater, place)]
            _insert(connection, rater, place, check, CHECK, _side(connection, key, rater, check), now)
            return True
    if _turns(rating["repeats_every"], place, key, rater, REPEAT) > handed.get(REPEAT, 0):
        earlier = connection.execute(_TO_REPEAT, (rater,)).fetchone()
        if earlier is not None:
            _insert(connection, rater, place, earlier[0], REPEAT, 1 - earlier[1], now)
            return True
    others = connection.execute(_SAME_PAIR, (rater, chosen)).fetchall() if rating.get("at_once") else []
    side = _side(connection, key, rater, chosen)
    for number, item in enumerate([chosen, *(row[0] for row in others)]):
        _insert(connection, rater, place + number, item, VOTE, side, now)
    return True


def _side(connection: sqlite3.Connection, key: str, rater: int, item: str) -> int:
    """1 where b of a question is to be shown on the left."""
    pair = connection.execute("SELECT pair FROM items WHERE item = ?", (item,)).fetchone()[0]
    seen = connection.execute(
        "SELECT rater, min(swapped) FROM tasks JOIN items USING (item) WHERE pair = ? AND tasks.kind <> ? "
        "GROUP BY rater",
        (pair, REPEAT),
    ).fetchall()
    own = dict(seen).get(rater)
    return (keyed_choice(2, key, "side", pair) + len(seen)) % 2 if own is None else int(own)


def _choose(connection: sqlite3.Connection, left_out: str, key: str, rater: int, now: float) -> str | None:
    """The question that the rater is asked next; None: none is left."""
    own = {item for item, _ in connection.execute(_OWN, (rater,))}
    reserved = dict(connection.execute(_RESERVED, (now - RESERVED_S, rater, left_out)).fetchall())
    without = dict(connection.execute(_LEFT_OUT, (left_out,)).fetchall())
    begun = _begun_pair(connection, rater)
    best: tuple[int, int, int, str, str] | None = None
    for item, pair, wanted, given in connection.execute(_ITEMS):
        lacking = wanted - given + without.get(item, 0) - reserved.get(item, 0)
        if item in own or lacking <= 0:
            continue
        # The questions on a pair that the rater has before the eyes come first.
        rank = (0 if pair == begun else 1, -lacking)
        if best is not None and rank > best[:2]:
            continue
        order = (*rank, keyed_seed(key, "order", rater, pair), pair, item)
        if best is None or order < best:
            best = order
    return None if best is None else best[-1]


def _begun_pair(connection: sqlite3.Connection, rater: int) -> str | None:
    found = connection.execute(
        f"SELECT pair FROM tasks JOIN items USING (item) WHERE rater = ? AND tasks.kind = '{VOTE}' ORDER "
        "BY place DESC LIMIT 1",
        (rater,),
    ).fetchone()
    return found[0] if found else None


def _turns(every: int, place: int, key: str, rater: int, what: str) -> int:
    """How many checks or repeats are due by a place: one at the keyed place among each `every`.

    One that could not be handed out at its place, because the other kind was or for want of an answer to
    repeat, comes next.
    """
    if every == 0:
        return 0
    window, within = divmod(place, every)
    return window + (within >= keyed_choice(every, key, what, "turn", rater, window))


def _insert(
    connection: sqlite3.Connection, rater: int, place: int, item: str, kind: str, swapped: int, now: float
) -> None:
    connection.execute(
        "INSERT INTO tasks (rater, place, item, kind, swapped, made) VALUES (?, ?, ?, ?, ?, ?)",
        (rater, place, item, kind, swapped, now),
    )


def _shown(task: int, kind: str, swapped: int, question: str, prompt: str, a: str, b: str, pair: str) -> Task:
    left, right = (b, a) if swapped else (a, b)
    return Task(task, question, prompt, left, right, pair, kind)
