"""Entries of papers.bib are whole, different and read as one line."""

from __future__ import annotations

import re

import pytest

from diffexpo.config.papers import FILE, WORKS, read_works, readable, short_authors


def test_bibtex_entries_are_whole():
    text = "\n\n".join(work.entry for work in WORKS.values())
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    assert text.isascii()
    keys = re.findall(r"^@[a-z]+\{([^,]+),$", text, re.MULTILINE)
    assert keys == list(WORKS) and len(keys) == len(set(keys))
    for entry in text.split("\n\n"):
        assert "\n  author = {" in entry and "\n  title = {{" in entry and "= {}" not in entry
        assert entry.splitlines()[-1] == "}"


def test_no_two_works_are_the_same_and_identifiers_have_their_form():
    titles = [work.title.lower() for work in WORKS.values()]
    identifiers = [work.arxiv for work in WORKS.values() if work.arxiv]
    assert len(set(titles)) == len(titles) and len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", identifier) for identifier in identifiers)
    for work in WORKS.values():
        # An identifier begins with year and month: nothing is published before it was written.
        assert not work.arxiv or work.year is None or work.year >= 2000 + int(work.arxiv[:2])


def test_a_work_reads_as_one_line():
    assert readable(WORKS["ho2022guidance"]) == (
        "Ho and Salimans (2022). Classifier-Free Diffusion Guidance. arXiv 2207.12598."
    )
    assert (
        short_authors("Ray Chowdhury, Sayak and Anush Kini and Nagarajan Natarajan") == "Ray Chowdhury et al."
    )
    assert short_authors("Junzhe Li and others") == "Li et al."
    assert short_authors("{Twitter, Inc. and other contributors}") == "Twitter, Inc. and other contributors"
    assert all("\n" not in readable(work) and ".." not in readable(work) for work in WORKS.values())


def test_special_characters_are_read_as_they_are_meant():
    assert WORKS["rombach2022ldm"].authors.endswith("Björn Ommer")
    assert WORKS["mitchell2023cdpo"].title == "A note on DPO with noisy preferences & relationship to IPO"
    assert not any("\\" in f"{work.authors}{work.title}{work.note}" for work in WORKS.values())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("@misc{a,\n  author = {A},\n}", "missing"),
        ("@misc{a,\n  author = {A},\n  title = {{T}},\n  publisher = {P},\n}", "unknown"),
        (FILE.read_text(encoding="utf-8").split("\n\n")[1], "repeated"),
        ("@misc{a,\n  author = {A}\n}", "one field a line"),
        ("@book{a,\n  author = {A},\n  title = {{T}},\n}", "one field a line"),
        ("a stray line", "one field a line"),
    ],
)
def test_a_file_with_anything_else_is_refused(entry, reason):
    with pytest.raises(ValueError, match=reason):
        read_works(FILE.read_text(encoding="utf-8") + "\n" + entry)
