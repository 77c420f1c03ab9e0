"""The report says what the files say, is one file, and survives whatever is missing."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from diffexpo.errors import DataError, MissingError
from diffexpo.evaluation.figures import Absent, add_legend, fit
from diffexpo.evaluation.grid import data_uri, image_grid
from diffexpo.evaluation.page import page_values
from diffexpo.evaluation.records import (
    choose_pair_examples,
    load_run,
    load_suite,
    save_pair_examples,
    save_suite,
    series,
)
from diffexpo.evaluation.report import FIGURES, write_report
from diffexpo.evaluation.summary import summarise
from diffexpo.evaluation.templates import HERE
from diffexpo.evaluation.verdict import give_verdict
from diffexpo.files import checksum_of
from diffexpo.rewards.images import to_bytes
from diffexpo.training.metrics import read_metrics
from tests.rows import pair_row
from tests.unit.evaluation.synthetic_run import make_config, make_run, make_suite, train_lines, write_lines


class Page(HTMLParser):
    """Tags that are open, what is referred to, and the text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images_without_alt = 0
        self.ids: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [str(values[name]) for name in ("src", "href", "xlink:href") if values.get(name)]
        self.images_without_alt += tag == "img" and not values.get("alt")
        self.ids += [str(values["id"])] if values.get("id") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += " " + data


def read(run_dir: Path) -> tuple[str, Page, str]:
    source = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(source)
    return source, page, re.sub(r"\s+", " ", page.text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def rendered(finished: Path) -> tuple[str, Page, str]:
    return read(finished)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "synthetic"))


def test_one_self_contained_well_formed_file(finished: Path, rendered: tuple[str, Page, str]) -> None:
    source, page, _ = rendered
    assert page.open == []
    assert len(source) < 3_000_000
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert source.count("<script") == 1 and "<script src" not in source
    assert "@import" not in source and "url(http" not in source
    assert page.images_without_alt == 0
    assert len(page.ids) == len(set(page.ids))
    assert source.count('role="img"') == 12 and source.count("aria-label=") >= 12
    for link in page.links:
        assert not link.startswith("#") or link[1:] in page.ids
    assert (finished / "eval" / "grid.png").is_file()


def test_the_same_files_give_the_same_bytes(finished: Path, rendered: tuple[str, Page, str]) -> None:
    assert write_report(finished).read_text(encoding="utf-8") == rendered[0]


def test_verdict_quotes_the_numbers_that_the_suites_hold(
    finished: Path, rendered: tuple[str, Page, str]
) -> None:
    base, last = (load_suite(finished / "eval" / name) for name in ("base", "iteration-3"))
    share = float((last.scores["judge_heldout"] > base.scores["judge_heldout"]).mean())
    text = rendered[2]
    assert "Better than the base model" in text
    assert f"{100 * share:.1f}% of comparisons" in text
    assert "at equal network evaluations (70,656 against 70,656)" in text
    assert "None raised." in text and "Unfinished." not in text
    change = np.mean([last.vendi[name] - base.vendi[name] for name in base.vendi])
    assert f"changed by {change:+.2f}" in text


def test_derived_cost_counts_what_was_done(finished: Path) -> None:
    summary = summarise(load_run(finished))
    rows = {row.phase: row for row in summary.costs}
    assert rows["collect"].evaluations == 1024 * 12 * 2
    assert rows["train"].evaluations == 180 * 32 * 8
    assert summary.method_cost == rows["collect"].evaluations + rows["train"].evaluations
    assert summary.baseline_cost == 276 * 32 * 8


def test_recorded_cost_wins_over_the_derived_one(copied: Path) -> None:
    lines = read_metrics(copied / "metrics.jsonl")
    for line in lines:
        if line["phase"] == "train_summary":
            line |= {"cost/network_evaluations": 100, "cost/backward_evaluations": 10}
    write_lines(copied / "metrics.jsonl", lines)
    rows = {row.phase: row for row in summarise(load_run(copied)).costs}
    assert rows["train"].evaluations == 3 * (100 + 2 * 10)


def test_says_so_when_offline_dpo_is_better(copied: Path) -> None:
    save_suite(make_suite("baseline", shift=3.0, kl=7.0), copied / "eval" / "baseline")
    assert "Offline DPO is better than EXPO here" in " ".join(
        give_verdict(summarise(load_run(copied))).sentences
    )


def test_unequal_cost_is_called_unfair(copied: Path) -> None:
    write_lines(copied / "baseline" / "metrics.jsonl", train_lines(1, 100))
    assert "this is not a fair comparison" in " ".join(give_verdict(summarise(load_run(copied))).sentences)


@pytest.mark.parametrize(
    ("shift", "title"),
    [(-1.5, "Not better: worse than the base model"), (0.0, "Undecided: no clear difference")],
)
def test_bad_and_unclear_results_are_called_that(copied: Path, shift: float, title: str) -> None:
    save_suite(make_suite("iteration-3", shift=shift, kl=9.0, vendi=4.0), copied / "eval" / "iteration-3")
    assert give_verdict(summarise(load_run(copied))).title.startswith(title)


def test_collapse_and_a_better_baseline_are_on_the_page(copied: Path) -> None:
    save_suite(make_suite("baseline", shift=3.0, kl=7.0), copied / "eval" / "baseline")
    write_lines(copied / "metrics.jsonl", train_lines(1, 60, rise=0.7, accuracy=0.97))
    _, _, text = read(copied)
    assert "critical: collapse" in text
    assert "Offline DPO is the better model here." in text


def test_a_large_common_part_is_on_the_page_where_accuracy_alone_would_not_tell(copied: Path) -> None:
    write_lines(copied / "metrics.jsonl", train_lines(1, 60, rise=0.9, accuracy=0.7))
    _, _, text = read(copied)
    assert "critical: common" in text
    assert "errors of winners and losers together lie 90% above the reference's" in text


def test_without_baseline_kl_vendi_judge_and_pairs_it_says_what_is_absent(tmp_path: Path) -> None:
    run_dir = tmp_path / "bare"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(make_config()), encoding="utf-8")
    for name, shift in (("base", 0.0), ("iteration-3", 0.5)):
        save_suite(make_suite(name, shift=shift, vendi=0.0, judge=False), run_dir / "eval" / name)
    _, page, text = read(run_dir)
    assert page.open == []
    for sentence in (
        "No verdict yet",
        "No held-out judge is configured",
        "No win rate:",
        "No reward-KL curve:",
        "No Vendi score:",
        "No training step with train/loss",
        "No collecting iteration",
        "No pairing line",
        "No example pairs:",
        "No comparison: offline Diffusion-DPO was not trained",
        "The environment was not recorded",
    ):
        assert sentence in text, sentence


def test_a_damaged_example_is_named_and_the_report_is_written(copied: Path) -> None:
    path = min((copied / "eval" / "pairs").glob("*.png"))
    path.write_bytes(path.read_bytes()[:50])
    _, _, text = read(copied)
    assert f"{path.name} is no image that can be read (truncated or damaged); copy it again." in text


def test_unfinished_runs_are_reported_as_far_as_they_are(copied: Path) -> None:
    shutil.rmtree(copied / "eval" / "iteration-3")
    shutil.rmtree(copied / "eval" / "baseline")
    (copied / "eval" / "iteration-2" / "suite.json").unlink()
    (copied / "status.json").write_text(json.dumps({"state": "interrupted"}), encoding="utf-8")
    with (copied / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 3, "step": 61, "pha')
    _, _, text = read(copied)
    assert "Unfinished." in text and "interrupted" in text and "of 3 planned iterations" in text
    assert "This is iteration 1 of 3 planned" in text
    assert "evaluation of 'iteration-2' did not finish" in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: begun\n", encoding="utf-8")
    _, page, text = read(tmp_path)
    assert page.open == []
    assert "No iterate has been evaluated yet" in text and "No pictures:" in text
    with pytest.raises(MissingError, match="not a run folder"):
        write_report(tmp_path / "nowhere")


def test_prompts_cannot_inject_markup(copied: Path) -> None:
    suite = load_suite(copied / "eval" / "base")
    evil = '<script>alert("x")</script> & "quotes"'
    path = copied / "eval" / "base" / "suite.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["prompts"][0]["text"] = evil
    path.write_text(json.dumps(stored), encoding="utf-8")
    source, page, _ = read(copied)
    assert "<script>alert" not in source and source.count("<script") == 1 and page.open == []
    assert suite.prompts[1].text in source


def test_only_rows_that_both_models_drew_are_compared(copied: Path) -> None:
    save_suite(make_suite("iteration-3", shift=1.1, kl=9.0, count=30), copied / "eval" / "iteration-3")
    summary = summarise(load_run(copied))
    assert summary.wins["iteration-3"].num == 30
    assert any("share 30 of 48 images" in problem for problem in summary.problems)


def test_verdict_without_files_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: begun\n", encoding="utf-8")
    assert give_verdict(summarise(load_run(tmp_path))).kind == "unknown"


def test_metrics_keep_order_and_report_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    rows = [
        f'{{"iteration": {number}, "step": null, "phase": "train_summary", "a": {value}}}\n'
        for number, value in enumerate(("2", "null", "NaN"), start=1)
    ]
    path.write_text("".join(rows) + '{"iter', encoding="utf-8")
    assert series(read_metrics(path), "a") == [(1, 2.0)]
    path.write_text(f"{rows[0]}rubbish\n{rows[1]}", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_example_pairs_follow_the_rule_and_can_be_written_twice(tmp_path: Path) -> None:
    pairs = [pair_row(str(i), "w", "l", margin=margin) for i, margin in enumerate([0.5, 3.0, 1.0, 2.0, 0.1])]
    assert [(rule, pair.pair_id) for rule, pair in choose_pair_examples(pairs)] == [
        ("first", "0"),
        ("median margin", "2"),
        ("largest margin", "1"),
    ]
    assert [rule for rule, _ in choose_pair_examples(pairs[:1])] == ["first"]
    assert choose_pair_examples([]) == []
    run_dir = make_run(tmp_path)
    before = load_run(run_dir).examples
    save_pair_examples(run_dir, 2, [])
    after = load_run(run_dir).examples
    assert [example for example in before if example.iteration == 1] == after


def test_images_are_rounded_labelled_and_encoded() -> None:
    images = torch.tensor([0.0, 0.4999, 1.2, -3.0]).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
    assert to_bytes(images)[:, 0, 0, 0].tolist() == [0, 127, 255, 0]
    red = np.zeros((8, 8, 3), dtype=np.uint8) + np.array([255, 0, 0], dtype=np.uint8)
    sheet = np.asarray(image_grid([[red, None]], ["a very long prompt " * 9], ["base", "EXPO"], tile=64))
    assert (sheet == [255, 0, 0]).all(axis=2).sum() == 64 * 64
    assert data_uri(red).startswith("data:image/png")
    assert data_uri(np.zeros((512, 512, 3), dtype=np.uint8)).startswith("data:image/jpeg")
    with pytest.raises(DataError, match="row labels"):
        image_grid([[red]], [], ["base"])


def test_charts_show_paired_gains_which_an_unpaired_band_would_hide(finished: Path) -> None:
    summary = summarise(load_run(finished))
    base, last = (load_suite(finished / "eval" / name) for name in ("base", "iteration-3"))
    gain, low, high = summary.gains["judge_heldout"]["iteration-3"]
    difference = last.scores["judge_heldout"] - base.scores["judge_heldout"]
    assert gain == pytest.approx(difference.mean()) and low < gain < high
    assert summary.gains["judge_heldout"]["base"] == (0.0, 0.0, 0.0)
    # Prompts differ far more than models: the interval of the difference is the narrower one.
    _, below, above = summary.rewards["judge_heldout"]["iteration-3"]
    assert high - low < above - below
    source = (finished / "report.html").read_text(encoding="utf-8")
    assert f"3: {gain:+.3g}" in source and "gain in judge_heldout" in source


def test_the_biggest_wins_and_losses_stand_beside_those_chosen_by_rule(finished: Path) -> None:
    record = load_run(finished)
    page = page_values(record, summarise(record))
    base, last = (load_suite(finished / "eval" / name) for name in ("base", "iteration-3"))
    order = np.argsort(base.scores["judge_heldout"] - last.scores["judge_heldout"])
    wins, losses = page["extremes"]["wins"], page["extremes"]["losses"]
    assert [card["prompt"] for card in wins] == [last.prompts[index].text for index in order[:6]]
    assert losses[0]["prompt"] == last.prompts[order[-1]].text
    before, after = (float(picture["score"]) for picture in losses[0]["pictures"])
    assert after < before
    text = read(finished)[2]
    assert "Rose most" in text and "Fell most" in text and "extremes and no sample" in text


def test_pictures_are_as_large_as_they_are_and_can_be_opened(finished: Path) -> None:
    large = np.random.default_rng(0).integers(0, 256, size=(300, 300, 3), dtype=np.uint8)
    data = base64.b64decode(data_uri(large).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (300, 300)
    source, page, _ = read(finished)
    assert "large" in page.ids and source.count('class="card flip"') >= 8


def test_no_hash_stands_in_running_text(copied: Path) -> None:
    path = copied / "eval" / "base" / "suite.json"
    digest = "0123456789abcdef" * 4
    fields = json.loads(path.read_text(encoding="utf-8").replace("clip-0123", digest))
    del fields["sha256"]
    path.write_text(json.dumps(fields | {"sha256": checksum_of(fields)}), encoding="utf-8")
    source, _, text = read(copied)
    assert digest not in source and digest[:12] in text


def test_words_are_explained_before_they_are_used(rendered: tuple[str, Page, str]) -> None:
    text = rendered[2]
    verdict = text.index("Better than the base model", text.index("In short"))
    for word in ("held-out judge scores images", "win rate is how often", "95% interval says", "Vendi score"):
        assert text.index(word) < verdict, word


def test_ticks_of_the_win_rate_stand_where_they_say(finished: Path) -> None:
    record = load_run(finished)
    axes = Figure().add_subplot()
    FIGURES["win_rate"](axes, record, summarise(record))
    assert axes.yaxis.get_major_formatter()(0.575, 0) == "57.5%"
    assert axes.yaxis.get_major_formatter()(0.6, 0) == "60%"


@pytest.mark.parametrize("name", FIGURES)
def test_no_legend_lies_over_data(name: str, finished: Path) -> None:
    record = load_run(finished)
    with matplotlib.style.context(HERE / "figures.mplstyle"):
        canvas = Figure(figsize=(3.8, 2.6))
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        try:
            FIGURES[name](axes, record, summarise(record))
        except Absent:
            return
        add_legend(axes)
        fit(canvas, axes)
    legend = axes.get_legend()
    if legend is not None:
        box, inside = legend.get_window_extent(), axes.get_window_extent()
        assert box.y0 >= inside.y1 - 1
        assert box.x0 >= -1 and box.x1 <= canvas.bbox.x1 + 1 and box.y1 <= canvas.bbox.y1 + 1
