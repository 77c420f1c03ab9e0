"""The rating page as a browser without scripts meets it: a rater's whole way, who is let in, what is shown as text."""

from __future__ import annotations

import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from diffexpo.config.people import RatingConfig
from diffexpo.labelling.app import MAX_FORM
from diffexpo.labelling.links import make_links, revoke
from tests.raters import OWNER, PLAIN, client, join, make_book, task_number

HTMX = {"hx-request": "true"}


def test_a_whole_way_from_the_link_to_thanks(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=3, questions=("quality", "alignment"))
    (link,) = make_links(book, ["Ann"])
    browser, here = client(book), f"/r/{link.token}"
    page = browser.get(here).text
    assert "I agree" in page and task_number(page) is None and "/image/" not in page
    assert browser.post(f"{here}/vote", data={"task": "1", "answer": "left"}).status_code == 403
    done = browser.post(f"{here}/consent")
    assert (done.status_code, done.headers["location"]) == (303, here)
    seen = []
    for _ in range(6):
        page = browser.get(here).text
        seen.append(re.search(r'class="prompt">.*</span>(.*)</p>', page)[1])  # type: ignore[index]
        for image in re.findall(r'src="(/r/[^"]+)"', page):
            shown = browser.get(image)
            assert (
                shown.headers["content-type"] == "image/png" and "private" in shown.headers["cache-control"]
            )
        done = browser.post(f"{here}/vote", data={"task": task_number(page), "answer": "left"})
        assert (done.status_code, done.headers["location"]) == (303, here)
    assert [seen[0], seen[2], seen[4]] == [seen[1], seen[3], seen[5]], "both questions on a pair come in turn"
    assert sorted(seen[::2]) == ["prompt 0", "prompt 1", "prompt 2"]
    page = browser.get(here).text
    assert "Thank you" in page and "6 of your answers are kept" in page
    assert len(book.votes()) == 6


def test_reload_back_and_sending_twice_count_one_vote(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser, here = client(book), f"/r/{token}"
    first = browser.get(here).text
    number = task_number(first)
    assert task_number(browser.get(here).text) == number, "a reload shows the same task"
    browser.post(f"{here}/vote", data={"task": number, "answer": "left"})
    # The back button shows the old page, and its button is pressed again, with another answer.
    again = browser.post(f"{here}/vote", data={"task": number, "answer": "right"}, headers=HTMX)
    assert "the first one stands" in again.text and task_number(again.text) != number
    assert [vote.answer for vote in book.votes()] == ["left"]
    assert browser.get(here).headers["cache-control"] == "no-store"


def test_undo_shows_the_last_task_again_and_keeps_what_was_undone(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser, here = client(book), f"/r/{token}"
    number = task_number(browser.get(here).text)
    assert "no answer to take back" in browser.post(f"{here}/undo", headers=HTMX).text
    browser.post(f"{here}/vote", data={"task": number, "answer": "left"})
    page = browser.post(f"{here}/undo", headers=HTMX).text
    assert task_number(page) == number and "taken back" in page and not book.votes()
    browser.post(f"{here}/vote", data={"task": number, "answer": "tie"})
    assert [vote.answer for vote in book.votes()] == ["tie"]
    assert book.rows("SELECT answer, undone IS NULL FROM votes ORDER BY vote") == [("left", 0), ("tie", 1)]


def test_two_raters_at_once_share_the_work(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=4, wanted=1)
    browser = client(book)
    tokens = [join(book, name)[1] for name in ("ann", "bob")]
    for _ in range(6):
        for token in tokens:
            number = task_number(browser.get(f"/r/{token}").text)
            if number is not None:
                browser.post(f"/r/{token}/vote", data={"task": number, "answer": "right"})
    votes = book.votes()
    assert sorted(vote.item for vote in votes) == [item.item for item in book.items()]
    assert {vote.rater for vote in votes} == {1, 2}


def test_wrong_ended_revoked_and_other_links_get_nothing(tmp_path: Path) -> None:
    book, other = make_book(tmp_path / "one"), make_book(tmp_path / "two")
    _, token = join(book, "ann")
    page = client(book).get(f"/r/{token}").text
    image = re.search(r"/image/(\w+)", page)[1]  # type: ignore[index]
    browser = client(other)
    (short,) = make_links(other, ["bob"], days=1e-9)
    gone, gone_token = join(other, "cara")
    revoke(other, gone.name)
    time.sleep(0.01)
    for wrong in (token, short.token, gone_token, "x", "x" * 5000, OWNER):
        for path in ("", f"/image/{image}"):
            answer = browser.get(f"/r/{wrong}{path}")
            assert (
                answer.status_code == 404 and "personal link" in answer.text and "prompt" not in answer.text
            )
        for path in ("/vote", "/undo", "/consent"):
            assert browser.post(f"/r/{wrong}{path}", data={"task": "1", "answer": "left"}).status_code == 404
    assert not other.votes()
    browser = client(other)
    for wrong in (token, "owner", ""):
        assert browser.get(f"/o/{wrong}").status_code == 404
        assert browser.post(f"/o/{wrong}/state", data={"state": "stopped"}).status_code == 404
    assert other.fact("state") == "open"


OUT = [
    "../labels.sqlite",
    "labels.sqlite",
    "..",
    ".",
    "../../../etc/passwd",
    "/etc/passwd",
    "....//labels.sqlite",
]
OUT += [
    "%2e%2e/labels.sqlite",
    "%2e%2e%2flabels.sqlite",
    "..%2flabels.sqlite",
    "..%5clabels.sqlite",
    "%00",
    "a%00.png",
]
OUT += [
    "..%252flabels.sqlite",
    "~",
    "~root/.ssh/id_rsa",
    "file:///etc/passwd",
    "http://example.org/a.png",
    "C:\\a.png",
]
OUT += [
    "0" * 32,
    "f" * 32 + ".png",
    "A" * 32,
    "0" * 31,
    "0" * 33,
    "g" * 32,
    "0" * 32 + "/..",
    "0" * 32 + "%0a",
]
OUT += ["*", "?", "images", "images/", "..;/labels.sqlite", "\u2025/labels.sqlite", "0" * 32 + "?x=../a"]


@pytest.mark.parametrize("name", OUT)
def test_no_file_outside_of_the_study_is_had(name: str, tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser = client(book)
    for path in (f"/r/{token}/image/{name}", f"/r/{token}/image/{quote(name, safe='')}", f"/static/{name}"):
        answer = browser.get(path)
        # A browser itself takes "." and ".." out of a path; what is left is the rater's own page.
        assert answer.status_code in (307, 400, 404, 405) or name in (".", ".."), path
        assert answer.headers.get("content-type") != "image/png"
        assert b"SQLite" not in answer.content and b"root:" not in answer.content


def test_an_image_beside_the_studys_own_is_not_served(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    (tmp_path / "images" / f"{'0' * 32}.png").write_bytes(b"another")
    assert client(book).get(f"/r/{token}/image/{'0' * 32}").status_code == 404


def test_markup_in_prompts_and_names_is_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> \"quoted\" '{{{{7*7}}}}' <img src=x onerror=alert(2)> {}"
    book = make_book(tmp_path, prompt=bad)
    book.set_facts({"name": "<b>study</b>"})
    _, token = join(book, "<i>Ann</i>")
    browser = client(book)
    for page in (browser.get(f"/r/{token}").text, browser.get(f"/o/{OWNER}").text):
        assert "<script>alert" not in page and "<img src=x" not in page and "<b>study" not in page
        assert "<i>Ann" not in page and "49" not in page.partition("<body>")[2][:0] + re.sub(
            r"\w{32,}", "", page
        )
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in browser.get(f"/r/{token}").text


def test_raters_see_no_names_of_models(tmp_path: Path) -> None:
    book = make_book(tmp_path, rating=RatingConfig(checks_every=2, repeats_every=0))
    _, token = join(book, "ann")
    page = client(book).get(f"/r/{token}").text
    assert not re.search(r"\b(one|two|ruined|check|Ann|ann)\b", re.sub(r"/r/[^\"]+", "", page))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_forms_of_other_sites_are_refused(headers: dict[str, str], tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser = client(book)
    number = task_number(browser.get(f"/r/{token}").text)
    for path in (f"/r/{token}/vote", f"/r/{token}/undo", f"/o/{OWNER}/state", f"/o/{OWNER}/more"):
        data = {"task": number, "answer": "left", "state": "stopped"}
        assert browser.post(path, data=data, headers=headers).status_code == 403
    assert not book.votes() and book.fact("state") == "open"
    own = {"origin": "http://testserver", "sec-fetch-site": "same-origin"}
    data = {"task": number, "answer": "left"}
    assert browser.post(f"/r/{token}/vote", data=data, headers=own).status_code == 303


def test_bad_forms_are_refused_in_words(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    _, other = join(book, "bob")
    browser, here = client(book), f"/r/{token}/vote"
    number = task_number(browser.get(f"/r/{token}").text)
    bodies = [b"", b"task=x&answer=left", b"task=1e3&answer=left", b"\xff\xfe", b"&".join([b"a=1"] * 20)]
    for body in bodies:
        assert browser.post(here, content=body).status_code == 400
    assert browser.post(here, content=b"a" * (MAX_FORM + 1)).status_code == 413
    answer = browser.post(here, data={"task": number, "answer": "both"})
    assert answer.status_code == 400 and "expected one of left, right" in answer.text
    answer = browser.post(f"/r/{other}/vote", data={"task": number, "answer": "left"})
    assert answer.status_code == 400, "a task belongs to one rater"
    assert not book.votes()


def test_too_many_votes_and_wrong_links_are_slowed(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=12)
    _, token = join(book, "ann")
    browser = client(book, votes_per_second=0.001, burst=3)
    codes = []
    for _ in range(5):
        number = task_number(browser.get(f"/r/{token}").text)
        answer = browser.post(f"/r/{token}/vote", data={"task": number, "answer": "left"}, headers=HTMX)
        codes.append(answer.status_code)
    assert codes == [200, 200, 200, 429, 429] and "too fast" in answer.text and len(book.votes()) == 3
    wrong = [browser.get(f"/r/{number}").status_code for number in range(60)]
    assert wrong[0] == 404 and wrong[-1] == 429
    assert browser.get(f"/r/{token}").status_code == 200, "a right link is not slowed by wrong ones"


def test_every_answer_carries_the_headers_that_keep_scripts_and_frames_out(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser = client(book)
    for path in ("/", "/nowhere", "/r/wrong", f"/r/{token}", f"/o/{OWNER}", "/static/style.css"):
        headers = browser.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "unsafe" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "same-origin")
        assert "set-cookie" not in headers
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert browser.get(path).status_code == 404
    pages = browser.get(f"/r/{token}").text + browser.get(f"/o/{OWNER}").text
    assert not re.search(r"<script(?! src=\"/static/)| style=| on\w+=|javascript:|https?://", pages)


def test_a_page_can_be_used_by_keyboard_and_screen_reader(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser = client(book)
    page = browser.get(f"/r/{token}").text
    browser.post(f"/r/{token}/vote", data={"task": task_number(page), "answer": "left"})
    page = browser.get(f"/r/{token}").text
    assert '<html lang="en">' in page and page.count("<h1") == 1 and page.count("<main") == 1
    assert 'name="viewport"' in page and page.count('role="status"') == 1 and page.count('role="alert"') == 1
    keys = [key for keys in re.findall(r'data-keys="([^"]+)"', page) for key in keys.split()]
    assert sorted(keys) == sorted(
        ["ArrowLeft", "ArrowRight", "ArrowUp", "t", "ArrowDown", "n", "s", "u", "Backspace"]
    )
    assert page.count("data-keys") == page.count("aria-keyshortcuts") == 6
    assert all("alt=" in image for image in re.findall(r"<img[^>]*>", page))
    assert 'aria-label="The left image"' in page and 'aria-label="The right image"' in page
    coming = re.search(r'<div class="coming" aria-hidden="true">(.*)</div>', page)
    assert coming is not None and coming[1].count("<img") == 2, (
        "the next images load while these are looked at"
    )
    style = browser.get("/static/style.css").text
    assert "prefers-color-scheme:dark" in style and "@media (max-width:520px)" in style
    script = browser.get("/static/rating.js").text
    assert "htmx:sendError" in script and "htmx:responseError" in script


def test_a_missing_image_is_skipped_and_told_to_the_owner(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=2, wanted=1)
    _, token = join(book, "ann")
    browser = client(book)
    page = browser.get(f"/r/{token}").text
    first = task_number(page)
    book.image_path(re.search(r"/image/(\w+)", page)[1]).unlink()  # type: ignore[index]
    page = browser.get(f"/r/{token}").text
    assert task_number(page) not in (first, None)
    assert [vote.answer for vote in book.votes()] == ["skip"]
    assert "1 images are missing" in browser.get(f"/o/{OWNER}").text


def test_the_owner_sees_stops_and_extends(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=1, wanted=1)
    _, token = join(book, "ann")
    browser, owner = client(book), f"/o/{OWNER}"
    assert "0 votes count, 1 are still wanted" in browser.get(owner).text
    number = task_number(browser.get(f"/r/{token}").text)
    browser.post(f"{owner}/state", data={"state": "stopped"})
    assert "closed for now" in browser.get(f"/r/{token}").text
    browser.post(f"{owner}/state", data={"state": "open"})
    browser.post(f"/r/{token}/vote", data={"task": number, "answer": "left"})
    page = browser.get(owner).text
    assert "1 votes count, 0 are still wanted" in page and ">ann<" in page
    browser.post(f"{owner}/more")
    assert "1 votes count, 1 are still wanted" in browser.get(owner).text
    assert browser.post(f"{owner}/state", data={"state": "gone"}).status_code == 400
    votes = browser.get(f"{owner}/votes.csv").text
    assert votes.count("\n") == 2 and "ann" not in votes


def test_a_book_that_cannot_be_written_says_that_the_answer_is_lost(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    _, token = join(book, "ann")
    browser = client(book)
    number = task_number(browser.get(f"/r/{token}").text)
    pages = book.rows("PRAGMA page_count")[0][0]
    book.rows(f"PRAGMA max_page_count = {pages}")
    codes = set()
    for _ in range(4000):
        answer = browser.post(f"/r/{token}/vote", data={"task": number, "answer": "left"}, headers=HTMX)
        codes.add(answer.status_code)
        if answer.status_code == 503:
            break
        answer = browser.post(f"/r/{token}/undo", headers=HTMX)
        if answer.status_code == 503:
            break
        # The limits on pace are not what is tested here.
        browser = client(book)
    assert answer.status_code == 503 and "was not kept" in answer.text


def test_all_questions_on_a_pair_are_answered_by_one_form_without_scripts(tmp_path: Path) -> None:
    rating = PLAIN.model_copy(update={"at_once": True})
    with make_book(tmp_path, pairs=2, questions=("aesthetics", "quality"), wanted=1, rating=rating) as book:
        _, token = join(book, "ann")
        browser = client(book)
        page = browser.get(f"/r/{token}").text
        first, second = dict.fromkeys(re.findall(r'name="answer-(\d+)"', page))
        assert "Which image is more beautiful?" in page and "Which image is better, all in all?" in page
        sent = browser.post(f"/r/{token}/vote", data={f"answer-{first}": "left", f"answer-{second}": "tie"})
        assert sent.status_code == 303
        twice = browser.post(
            f"/r/{token}/vote", data={f"answer-{first}": "right"}, headers={"hx-request": "true"}
        )
        assert "the first one stands" in twice.text
        page = browser.get(f"/r/{token}").text
        (all_of_them,) = re.findall(r'name="all" value="(skip[-0-9]+)"', page)
        browser.post(f"/r/{token}/vote", data={"all": all_of_them})
        assert "Thank you" in browser.get(f"/r/{token}").text
        assert [vote.answer for vote in book.votes()] == ["left", "tie", "skip", "skip"]
        for wrong in ({"answer-x": "left"}, {"all": "skip-1-x"}, {"answer-99999": "left"}):
            assert browser.post(f"/r/{token}/vote", data=wrong).status_code == 400
