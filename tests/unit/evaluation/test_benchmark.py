"""What an evaluation came to, from made scores: totals, win rates, groups, disagreements, bounds, the page, and reading it all again."""

import json
import math

import numpy as np
import pytest

from diffexpo.config.paper_tables import TABLES
from diffexpo.errors import ConfigError, DataError, MissingError
from diffexpo.evaluation.benchmark import Outcome, failures, gates
from diffexpo.evaluation.benchmark_page import SetNumbers, table_rows, verdict, write_page
from diffexpo.evaluation.gallery import Rows
from diffexpo.evaluation.kept import keep_suite, read_outcome
from tests.unit.evaluation.made_outcome import LOOKS, RIGHT, outcome

BASE, MINE = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.fixture
def two(tmp_path):
    looks = {"base": np.arange(8.0), "mine": np.arange(8.0)[::-1]}
    return outcome(
        tmp_path,
        {"base": {"right": BASE, "looks": looks["base"]}, "mine": {"right": MINE, "looks": looks["mine"]}},
    )


def test_totals_and_win_rates(two):
    assert two.totals["base", "right"][0] == 0.25
    assert two.totals["mine", "right"][0] == 0.875
    win = two.wins("right", "base")["mine"]
    assert (win.wins, win.ties, win.losses) == (5, 3, 0)
    assert win.rate == (5 + 1.5) / 8
    assert two.wins("right", "mine")["base"].rate == 1 - win.rate
    with pytest.raises(ConfigError, match="no model is called 'other'; there are 'base', 'mine'"):
        two.wins("right", "other")


def test_groups_by_category_and_by_an_attribute(two):
    even, odd = two.groups["category"]
    assert (even.name, even.num_prompts, odd.name) == ("even", 4, "odd")
    assert even.means["mine", "right"][0] == 1.0
    assert [group.num_prompts for group in two.groups["size"]] == [2, 6]


def test_an_empty_category_is_shown_and_has_no_mean(tmp_path):
    made = outcome(tmp_path, {"base": {"right": BASE}}, count={"none": 3, "odd": 4})
    assert [group.name for group in made.groups["category"]] == ["odd", "even", "none"]
    empty = made.groups["category"][-1]
    assert (empty.num_prompts, empty.means["base", "right"]) == (0, None)
    write_page(made, tmp_path, "base", "diffexpo evaluate")
    assert "no score" in (tmp_path / "report.html").read_text()


def test_parts_follow_the_published_order(tmp_path):
    scores, categories = np.arange(40.0), ["one"] * 40
    made = outcome(tmp_path, {"base": {"looks": scores}}, rule="chunks", categories=categories)
    turned = Outcome(
        made.suite, made.rows, made.models, made.judges, {f"p{n}": (n * 7) % 40 for n in range(40)}
    )
    spread = made.groups["category"][0].spreads["base", "looks"]
    assert spread == pytest.approx(np.std([1.5 + 4 * k for k in range(10)]))
    assert turned.groups["category"][0].spreads["base", "looks"] != spread


def test_tasks_weigh_alike(tmp_path):
    made = outcome(tmp_path, {"base": {"right": [1, 0, 0, 0]}}, rule="tasks", categories=["a", "b", "b", "b"])
    assert made.totals["base", "right"][0] == 0.5


def test_images_without_a_score_are_counted_and_left_out(tmp_path):
    mine = [math.nan, 1.0, *MINE[2:]]
    made = outcome(tmp_path, {"base": {"right": BASE}, "mine": {"right": mine}})
    assert made.excluded(made.model("mine")) == {"right": 1}
    assert made.excluded(made.model("base")) == {}
    assert made.totals["mine", "right"][0] == pytest.approx(1.0)
    assert made.wins("right", "base")["mine"].num == 7
    nothing = outcome(tmp_path / "nothing", {"base": {"right": [math.nan] * 4}})
    assert nothing.totals["base", "right"] is None
    assert verdict(nothing, "base")[1] == "right could score no image"


def test_a_judge_that_trained_a_model_decides_nothing(tmp_path):
    made = outcome(tmp_path, {"base": {"right": BASE}, "mine": {"right": MINE}}, trained=[("mine", "right")])
    assert made.wins("right", "base") == {"mine": None}
    kind, title, _ = verdict(made, "base")
    assert (kind, title) == ("open", "mine scores highest by right, but not for sure")
    assert failures(made, {"win_rate": 0.0}, "base") == ["mine: win_rate is nan, below 0"]
    assert read_outcome(tmp_path).model("mine").trained_by == ("right",)


def test_the_verdict_needs_an_interval(two, tmp_path):
    kind, title, sentences = verdict(two, "base")
    assert (kind, title) == ("better", "mine scores highest by right")
    assert any("mine is better than base" in sentence for sentence in sentences)
    kind, title, _ = verdict(two, "mine")
    assert (kind, title) == ("worse", "mine scores highest by right")
    same = outcome(tmp_path / "same", {"base": {"right": BASE}, "twin": {"right": BASE}})
    assert verdict(same, "base")[:2] == ("open", "No model is shown to be better than base")
    assert "not to be told from" in verdict(same, "base")[2][-1]


def test_several_models_need_p_values_corrected_for_their_number(tmp_path):
    """Against eight prompts of score 0: 8 wins have p = 2/2^8, 6 wins and 2 ties 2/2^6, 1 win and 7 losses
    2 (1 + 8)/2^8. Holm takes them three, two and one times."""
    scores = {"base": [0] * 8, "all": [1] * 8, "most": [1] * 6 + [0] * 2, "few": [1] + [-1] * 7}
    made = outcome(tmp_path, {label: {"looks": values} for label, values in scores.items()})
    assert made.p_values("looks", "base") == {"all": 6 / 256, "most": 4 / 64, "few": 18 / 256}
    assert [win.verdict for win in made.wins("looks", "base").values()] == ["better", "better", "undecided"]
    assert made.verdicts("looks", "base") == {"all": "better", "most": "undecided", "few": "undecided"}
    kind, title, sentences = verdict(made, "base")
    assert (kind, title) == ("better", "all scores highest by looks")
    assert any("most is not to be told from base" in sentence for sentence in sentences)
    assert sentences[-1].endswith("(sign test, corrected for 3 comparisons, p = 0.07).")
    told = made.summary("base")["models"]["most"]["win_rate"]["looks"]
    assert (told["p_value"], told["p_holm"]) == (2 / 64, 4 / 64)
    # Alone it needs no correction.
    alone = outcome(tmp_path / "alone", {label: {"looks": scores[label]} for label in ("base", "most")})
    assert alone.p_values("looks", "base") == {"most": 2 / 64}
    assert alone.verdicts("looks", "base") == {"most": "better"}


def test_a_model_that_is_not_compared_does_not_count_in_the_correction(tmp_path):
    scores = {label: {"right": values} for label, values in (("base", BASE), ("mine", MINE), ("own", MINE))}
    made = outcome(tmp_path, scores, trained=[("own", "right")])
    assert made.verdicts("right", "base") == {"mine": "better", "own": None}
    p_values = made.p_values("right", "base")
    assert p_values["mine"] == made.wins("right", "base")["mine"].p_value and math.isnan(p_values["own"])


def test_three_models_are_ranked_by_a_judge_that_trained_none_of_them(tmp_path):
    draw = np.random.default_rng(0).normal(size=(3, 60)) + [[0.0], [0.4], [3.0]]
    scores = {label: {"looks": values} for label, values in zip(("base", "near", "far"), draw, strict=True)}
    made = outcome(tmp_path, scores)
    ranked = made.ranking("looks").models
    assert [one.name for one in ranked] == ["far", "near", "base"]
    assert (ranked[0].best, ranked[0].worst) == (1, 1)
    page, numbers = write_page(made, tmp_path, "base", "diffexpo evaluate")
    assert [one["name"] for one in numbers["ranking"]["looks"]] == ["far", "near", "base"]
    assert "Ranking by looks" in page.read_text()
    two = outcome(tmp_path / "two", {label: scores[label] for label in ("base", "far")})
    assert two.ranking("looks") is None
    trained = outcome(tmp_path / "trained", scores, trained=[("far", "looks")])
    assert trained.ranking("looks") is None, "two are left, and a ranking needs three"


def test_numbers_of_sets_stand_on_the_page_and_beside_it(two, tmp_path):
    vendi = {"images": 4, "models": {"base": {"pixels": (1.5, 1.25, 1.75)}, "mine": {"pixels": None}}}
    found = {"num": 8, "left_out": 0, "frechet": 1234.5, "cmmd": 0.5}
    real = {"folder": "real", "num": 9, "left_out": 1, "features": "32x32 pixels", "models": {"base": found}}
    page, numbers = write_page(two, tmp_path, "base", "diffexpo evaluate", SetNumbers(vendi, real))
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(numbers))
    assert numbers["vendi"]["models"]["base"]["pixels"] == [1.5, 1.25, 1.75]
    text = page.read_text()
    for told in (
        "Vendi score of pixels",
        "at most 4",
        "1.50",
        "[1.25, 1.75]",
        "9 real images",
        "1234",
        "1 of the real ones",
    ):
        assert told in text


def test_disagreements_are_rows_that_two_judges_see_differently(two, tmp_path):
    judges, rows = two.disagreements("mine", "base")
    assert judges == ("right", "looks")
    for row in rows:
        gaps = [two.model("mine").scores[name][row] - two.model("base").scores[name][row] for name in judges]
        assert gaps[0] * gaps[1] < 0
    agreeing = outcome(
        tmp_path / "a", {"base": {"right": BASE, "looks": BASE}, "mine": {"right": MINE, "looks": MINE}}
    )
    assert agreeing.disagreements("mine", "base") is None
    assert two.disagreements("base", "base") is None


@pytest.mark.parametrize(
    ("bounds", "failed"),
    [
        (["win_rate=0.8"], []),
        (["win_rate=0.82"], ["mine: win_rate is 0.8125, below 0.82"]),
        (["right=0.9", "looks=0"], ["mine: right is 0.875, below 0.9"]),
    ],
)
def test_bounds(two, bounds, failed):
    assert failures(two, gates(bounds), "base") == failed


@pytest.mark.parametrize("text", ["win_rate", "=0.5", "win_rate=high"])
def test_a_bound_has_a_name_and_a_number(text):
    with pytest.raises(ConfigError, match="expected win_rate=0.5"):
        gates([text])


def test_the_page_and_its_files_tell_the_same(two, tmp_path):
    page = write_page(two, tmp_path, "base", "diffexpo evaluate base mine --suite made")[0].read_text()
    for text in (
        "mine scores highest by right",
        "87.5%",
        "Where the judges disagree",
        "1 or 0",
        "version v1",
        "--suite made",
    ):
        assert text in page
    assert 'src="http' not in page and "<script" not in page
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert numbers["models"]["mine"]["scores"]["right"][0] == 0.875
    assert numbers["models"]["mine"]["win_rate"]["right"]["rate"][0] == 0.8125
    assert numbers["groups"]["category"]["odd"]["prompts"] == 4
    assert numbers["models"]["base"]["cost"] == {"network_evaluations": 20.0, "seconds": 4.0}
    header, rows = table_rows(two, "base")
    assert (tmp_path / "table.md").read_text().splitlines()[0] == "| " + " | ".join(header) + " |"
    assert rows[1][0] == "mine" and rows[1][1].startswith("87.5% [")


def test_an_evaluation_is_read_again_from_its_files_alone(two, tmp_path):
    found = read_outcome(tmp_path)
    assert [model.label for model in found.models] == ["base", "mine"]
    assert set(found.judges) == {LOOKS, RIGHT}
    assert found.totals == two.totals
    assert found.rows == two.rows and found.order == two.order
    with pytest.raises(MissingError, match="holds no evaluation"):
        read_outcome(tmp_path / "nowhere")


def test_a_folder_takes_one_setting_and_one_list_of_prompts(two, tmp_path):
    keep_suite(tmp_path, two.suite.model_copy(update={"title": "another word"}), two.rows, two.order)
    with pytest.raises(ConfigError, match="seed was 0, now 1; choose another folder"):
        keep_suite(tmp_path, two.suite.model_copy(update={"seed": 1}), two.rows, two.order)
    fewer = Rows(two.rows.prompts[:4], 1, 4)
    with pytest.raises(ConfigError, match="its prompts have changed"):
        keep_suite(tmp_path, two.suite, fewer, two.order)
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(DataError, match=r"suite\.json is damaged"):
        keep_suite(tmp_path, two.suite, two.rows, two.order)


def test_published_tables_are_whole():
    for table in TABLES.values():
        for name, texts in table.published.items():
            assert len(texts) == len(table.columns), name
    expo = TABLES["expo"].published
    for name, texts in expo.items():
        styles, average = [float(text) for text in texts[:4]], float(texts[4])
        assert np.mean(styles) == pytest.approx(average, abs=0.0051), name
