"""Suites: those that are shipped, one's own, and what is refused."""

import pytest

from diffexpo.config.rewards import REWARDS
from diffexpo.config.suites import SUITES, list_suites, read_judge, read_suite
from diffexpo.errors import ConfigError, MissingError


def test_every_shipped_suite_is_whole():
    names = list_suites()
    assert set(names) == {path.stem for path in SUITES.glob("*.yaml")} >= {"scenes", "hpsv2", "pickapic"}
    for name in names:
        suite = read_suite(name)
        assert suite.name == name
        assert suite.title == names[name]
        assert suite.judges, "nothing would be scored"
        is_embedded = ":" in suite.prompts
        assert (suite.published is None) is is_embedded, "a list is shipped, or it says where it is published"
        assert suite.flow_sampler.name.startswith("flow")
        assert not suite.sampler.name.startswith("flow")


def test_hpsv2_has_its_four_styles_of_800():
    suite = read_suite("hpsv2")
    assert sum(suite.categories.values()) == 3200
    assert suite.rule == "chunks"
    assert (suite.sampler.name, suite.sampler.steps, suite.sampler.guidance) == ("ddpm", 50, 7.5)


def test_partiprompts_counts_add_up_to_the_published_list():
    assert sum(read_suite("partiprompts").categories.values()) == 1632


def test_settings_are_overridden_one_at_a_time():
    suite = read_suite("scenes", ["num_prompts=3", "sampler.steps=2", "judges=[]"])
    assert (suite.num_prompts, suite.sampler.steps, suite.judges) == (3, 2, ())
    assert suite.sampler.name == read_suite("scenes").sampler.name
    assert suite.drawing != read_suite("scenes").drawing
    assert read_suite("scenes", ["title=x", "judges=[]"]).drawing == read_suite("scenes").drawing


def test_a_suite_of_ones_own(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "name: own\ntitle: mine\nprompts: mine.txt\njudges: [{name: size, type: jpeg_compressibility}]\n"
    )
    suite = read_suite(str(file))
    assert (suite.name, suite.judges[0].type) == ("own", "jpeg_compressibility")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nonsense=1"], r"nonsense is not a setting of a suite \(in suite scenes\)"),
        (["num_promts=1"], "Did you mean num_prompts"),
        (["batch_size=0"], "batch_size = 0"),
        (["title"], "has no value"),
        (["title.x=1"], "no group of settings"),
        (
            ["judges=[{name: a, type: jpeg_compressibility}, {name: a, type: brisque}]"],
            "2 judges are called 'a'",
        ),
        (["judges=[{name: a, type: human}]"], "does not score an image by itself"),
    ],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_suite("scenes", overrides)


def test_a_suite_that_is_not_there():
    with pytest.raises(MissingError, match="Did you mean scenes"):
        read_suite("scene")


def test_judges_as_they_are_typed():
    judge = read_judge("looks=scene_looks:scenes:looks_heldout")
    assert (judge.name, judge.type, judge.path) == ("looks", "scene_looks", "scenes:looks_heldout")
    plain = read_judge("pickscore")
    assert (plain.name, plain.type, plain.path) == ("pickscore", "pickscore", None)
    assert read_judge("clip:emoji:judge_heldout").path == "emoji:judge_heldout"
    with pytest.raises(ConfigError, match="Did you mean pickscore"):
        read_judge("pickscor")


def test_every_judge_tells_its_biases():
    assert all(card.biases for card in REWARDS.values())
    assert "guidance" in REWARDS["pickscore"].biases
