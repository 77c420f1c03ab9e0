"""Personal links: only a hash is kept, and a link that ended lets nobody in."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffexpo.errors import ConfigError, MissingError
from diffexpo.labelling.links import free_names, make_links, rater_of, revoke
from tests.raters import make_book


def test_only_a_hash_of_the_secret_is_on_the_disk(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    links = make_links(book, ["Ann", "Bob"])
    book.close()
    data = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Ann" in data and not any(link.token.encode() in data for link in links)
    assert len({link.token for link in links}) == 2 and all(len(link.token) >= 43 for link in links)


def test_a_link_opens_until_it_ends_or_is_revoked(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    always, short = make_links(book, ["always"]) + make_links(book, ["short"], days=-1)
    rater = rater_of(book, always.token)
    assert rater is not None and rater.name == "always" and rater_of(book, short.token) is None
    assert rater_of(book, always.token + "x") is None and rater_of(book, "") is None
    assert always.address("http://h:1/") == f"http://h:1/r/{always.token}"
    revoke(book, "always")
    assert rater_of(book, always.token) is None


def test_names_are_new_and_none_is_made_up_twice(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    make_links(book, ["rater-2"])
    assert free_names(book, 3) == ["rater-1", "rater-3", "rater-4"]
    for names, reason in (
        (["rater-2"], "has a link already"),
        (["x", "x"], "given twice"),
        ([" "], "is empty"),
    ):
        with pytest.raises(ConfigError, match=reason):
            make_links(book, names)
    with pytest.raises(MissingError, match="no rater 'nobody'; there are: rater-2"):
        revoke(book, "nobody")
    assert [rater.name for rater in book.raters()] == ["rater-2"]
