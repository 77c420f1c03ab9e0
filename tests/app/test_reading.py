"""The pages of evaluations and comparisons in a real browser: nothing leaves the screen of a desk or a phone, and every picture is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffexpo.evaluation.benchmark_page import SetNumbers, write_page
from diffexpo.evaluation.comparison import compare_runs
from diffexpo.evaluation.comparison_page import write_comparison
from diffexpo.evaluation.records import load_suite, save_suite
from tests.unit.evaluation.made_outcome import outcome
from tests.unit.evaluation.synthetic_run import make_run
from tests.webdriver import Browser, why_absent

pytestmark = pytest.mark.skipif(bool(why_absent()), reason=why_absent() or "a browser is there")
NARROWEST = 100


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six models with long names under two judges, with numbers of sets."""
    folder, draw = tmp_path_factory.mktemp("evaluation"), np.random.default_rng(0)
    labels = ["base", *(f"runs/a-long-name-of-a-run@{number}" for number in range(1, 6))]
    scores = {
        label.replace("/", "-"): {"right": draw.integers(0, 2, 24), "looks": draw.normal(0, 1, 24)}
        for label in labels
    }
    made = outcome(folder, scores)
    found = {"num": 24, "left_out": 1, "frechet": 12345.6, "cmmd": 0.01}
    models = {model.label: found for model in made.models}
    vendi = {"images": 4, "models": {label: {"32x32 pixels": (2.0, 1.5, 2.5)} for label in models}}
    real = {"folder": "real/" * 40, "num": 24, "left_out": 0, "features": "32x32 pixels", "models": models}
    command = f"diffexpo evaluate {' '.join(labels)} --suite made --real {'real/' * 40}"
    return write_page(made, folder, "base", command, SetNumbers(vendi, real))[0]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    run = make_run(folder)
    for file in sorted(run.glob("eval/*/suite.json")):
        suite = load_suite(file.parent)
        save_suite(replace(suite, scorers={name: f"{name}; cosine" for name in suite.scorers}), file.parent)
    return write_comparison(compare_runs([run]), folder / "out")[0]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["evaluation", "comparison"])
def test_a_page_fits_its_screen(
    page: str, width: int, browser: Browser, request: pytest.FixtureRequest
) -> None:
    browser.resize(width, 844)
    browser.open(f"file://{request.getfixturevalue(page)}")
    browser.script("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    browser.wait(lambda: bool(browser.script("return [...document.images].every(image => image.complete)")))
    assert browser.script("return document.images.length") > 0
    assert browser.script("return [...document.images].filter(image => !image.naturalWidth).length") == 0
    wide = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.script(wide), "something is wider than the screen and does not scroll by itself"
    cells = "return [...document.querySelectorAll('td.text')].map(cell => cell.getBoundingClientRect().width)"
    assert min(browser.script(cells)) >= NARROWEST, "words of a narrow cell are cut letter by letter"
