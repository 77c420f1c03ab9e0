"""A rater's whole way in a real browser: by mouse and by keys alone, on a desk and on a phone, and through a killed server."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffexpo.config.people import QUESTIONS, CareConfig, RatingConfig
from diffexpo.labelling.book import Book
from diffexpo.labelling.links import make_links
from tests.commands import Command, start
from tests.raters import make_book
from tests.webdriver import Browser, why_absent

pytestmark = pytest.mark.skipif(bool(why_absent()), reason=why_absent() or "a browser is there")
DESK, PHONE = (1280, 900), (390, 844)
PLAIN = RatingConfig(checks_every=0, repeats_every=0, exclude=CareConfig(seconds_below=0))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[tuple[Command, str]]:
    running = start("label", "serve", folder, "--port", str(port))
    try:
        found = None
        while found is None:
            assert running.poll() is None, running.err.read_text()
            found = re.search(
                r"rating page at (\S+)", running.out.read_text() if running.out.exists() else ""
            )
        yield running, found[1]
    finally:
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
        running.wait()


def links(folder: Path, *names: str) -> list[str]:
    with Book(folder) as book:
        return [f"/r/{link.token}" for link in make_links(book, list(names))]


def answers(folder: Path) -> list[str]:
    with Book(folder) as book:
        return [vote.answer for vote in book.votes()]


def task(browser: Browser) -> str:
    """The task on the page; "" where there is none."""
    found = browser.script(
        "const e = document.querySelector('#task input[name=task]'); return e ? e.value : ''"
    )
    return str(found)


def after(browser: Browser, act: object, *arguments: str) -> None:
    """Do something that answers, and wait until the next task's page is there with its scripts."""
    before = task(browser)
    act(*arguments)  # type: ignore[operator]
    browser.wait(lambda: task(browser) != before and loaded(browser))


def loaded(browser: Browser) -> bool:
    """Whether the page's scripts have run and have seen what was swapped in, so that its keys work: pressed
    earlier, a button sends its form without them, and the page comes as a whole."""
    return bool(
        browser.script(
            "return document.readyState === 'complete' && "
            "!document.querySelector('.htmx-added, .htmx-settling, .htmx-swapping, .htmx-request')"
        )
    )


def fits(browser: Browser) -> bool:
    """Whether nothing lies beyond the right edge, and both images have loaded side by side."""
    return bool(
        browser.script(
            "const i = [...document.querySelectorAll('.pair img')];"
            "return document.documentElement.scrollWidth <= window.innerWidth"
            " && i.length === 2 && i.every(e => e.complete && e.naturalWidth > 0)"
            " && Math.abs(i[0].getBoundingClientRect().top - i[1].getBoundingClientRect().top) < 1"
        )
    )


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_whole_way_by_mouse(browser: Browser, size: tuple[int, int], tmp_path: Path) -> None:
    make_book(tmp_path, pairs=5, wanted=1, rating=PLAIN).close()
    (link,) = links(tmp_path, "ann")
    with served(tmp_path) as (_, address):
        browser.resize(*size)
        browser.open(address + link)
        assert "Kept are your answers" in browser.text()
        browser.click("button.go")
        browser.wait(lambda: fits(browser))
        for answer in ("left", "right", "tie", "neither"):
            after(browser, browser.click, f"button[value={answer}]")
        after(browser, browser.click, "form.undo button")  # "neither" is taken back
        after(browser, browser.click, "button[value=right]")
        browser.click("button[value=left]")
        browser.wait(lambda: "Thank you" in browser.text())
    assert answers(tmp_path) == ["left", "right", "tie", "right", "left"]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_whole_way_by_keys_alone(browser: Browser, size: tuple[int, int], tmp_path: Path) -> None:
    make_book(tmp_path, pairs=6, wanted=1, rating=PLAIN).close()
    (link,) = links(tmp_path, "ann")
    with served(tmp_path) as (_, address):
        browser.resize(*size)
        browser.open(address + link)
        # The button that agrees gets the focus, at the latest when the page is first painted.
        browser.wait(lambda: bool(browser.script("return document.activeElement.matches('button.go')")))
        browser.press("enter")
        browser.wait(lambda: fits(browser))
        for key in ("left", "right", "t", "down"):
            after(browser, browser.press, key)
            # The new question is read out: it gets the focus, at the latest when it is first painted.
            browser.wait(lambda: bool(browser.script("return document.activeElement.id === 'question'")))
        after(browser, browser.press, "u")
        after(browser, browser.press, "n")
        browser.reload()  # in the middle: the same task is there, and no vote twice
        browser.wait(lambda: task(browser) != "")
        after(browser, browser.press, "s")
        # Tab and Enter reach the images too.
        browser.press("tab", "enter")
        browser.wait(lambda: "Thank you" in browser.text())
    assert answers(tmp_path) == ["left", "right", "tie", "neither", "skip", "left"]


def test_the_back_button_sends_nothing_twice(browser: Browser, tmp_path: Path) -> None:
    make_book(tmp_path, pairs=3, wanted=1, rating=PLAIN).close()
    (link,) = links(tmp_path, "ann")
    with served(tmp_path) as (_, address):
        browser.resize(*DESK)
        browser.open(address + link)
        browser.click("button.go")
        browser.wait(lambda: fits(browser))
        after(browser, browser.press, "left")
        browser.back()
        browser.open(address + link)
        browser.wait(lambda: task(browser) != "")
        after(browser, browser.press, "right")
    assert answers(tmp_path) == ["left", "right"]


def test_two_raters_at_once(browser: Browser, tmp_path: Path) -> None:
    make_book(tmp_path, pairs=3, wanted=2, rating=PLAIN).close()
    with served(tmp_path) as (_, address):
        browser.resize(*DESK)
        windows = []
        for link in links(tmp_path, "ann", "bob"):
            windows.append(browser.new_window())
            browser.open(address + link)
            browser.click("button.go")
            browser.wait(lambda: fits(browser))
        for turn in range(6):
            browser.use(windows[turn % 2])
            before = task(browser)
            browser.press(("left", "right")[turn % 2])
            browser.wait(lambda before=before: task(browser) != before)  # type: ignore[misc]
        for window in windows:
            browser.use(window)
            assert "Thank you" in browser.text()
    with Book(tmp_path) as book:
        assert (
            sorted((vote.rater, vote.answer) for vote in book.votes())
            == [(1, "left")] * 3 + [(2, "right")] * 3
        )


def test_a_server_killed_in_the_middle_loses_no_vote_and_counts_none_twice(
    browser: Browser, tmp_path: Path
) -> None:
    make_book(tmp_path, pairs=3, wanted=1, rating=PLAIN).close()
    (link,) = links(tmp_path, "ann")
    with served(tmp_path) as (running, address):
        browser.resize(*DESK)
        browser.open(address + link)
        browser.click("button.go")
        browser.wait(lambda: fits(browser))
        after(browser, browser.press, "left")
        os.kill(running.pid, signal.SIGKILL)
        browser.press("right")
        browser.wait(lambda: "was not confirmed" in browser.text())
    with served(tmp_path, int(address.rpartition(":")[2])):
        after(browser, browser.press, "right")  # the page is still there
        browser.press("t")
        browser.wait(lambda: "Thank you" in browser.text())
    assert answers(tmp_path) == ["left", "right", "tie"]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_all_three_questions_on_one_page(browser: Browser, size: tuple[int, int], tmp_path: Path) -> None:
    rating = PLAIN.model_copy(update={"at_once": True})
    questions = ("aesthetics", "alignment", "quality")
    make_book(tmp_path, pairs=2, questions=questions, wanted=1, rating=rating).close()
    (link,) = links(tmp_path, "ann")
    with served(tmp_path) as (_, address):
        browser.resize(*size)
        browser.open(address + link)
        browser.click("button.go")
        browser.wait(lambda: fits(browser))
        shown = browser.text()
        assert all(QUESTIONS[question] in shown for question in questions)
        browser.press("left", "t", "right")  # one key a question; the last one sends the page
        browser.wait(lambda: "3 answered" in browser.text() and fits(browser))
        for row, answer in enumerate(("tie", "neither", "left"), 1):
            browser.click(f"fieldset:nth-of-type({row}) input[value={answer}]")
        browser.click("button.go")
        browser.wait(lambda: "Thank you" in browser.text())
    with Book(tmp_path) as book:
        votes = sorted((vote.item[-8:], vote.answer) for vote in book.votes()[:3])
        assert sorted(answer for _, answer in votes) == ["left", "right", "tie"]
        assert sorted(vote.answer for vote in book.votes()[3:]) == ["left", "neither", "tie"]
