"""Rewards behind a server: what does not belong together is refused with the reason."""

import inspect

import pytest

from diffexpo.config.load import load_config
from diffexpo.config.scorers import SCORERS, SCORING_BATCH
from diffexpo.errors import ConfigError

ONE = "rewards=[{{name: far, {}}}]"
REMOTE = "type: remote, path: 'http://127.0.0.1:8188'"
VLM = "type: vlm, path: 'http://127.0.0.1:8000/v1'"
PAIRWISE = f"{VLM}, vlm: {{mode: pairwise}}"
ALONE = ["explore.agents=1", "algorithm.alpha=0", "explore.negatives.agents=both"]


def load(*overrides):
    return load_config([], overrides, {}).config


@pytest.mark.parametrize(
    ("reward", "others", "reason"),
    [
        ("type: remote", [], "path is empty"),
        ("type: remote, path: 'localhost:80'", [], "needs an address such as"),
        ("type: vlm, path: model", [], "needs an address such as"),
        (f"{REMOTE}, vlm: {{mode: caption}}", [], "asks no vision-language model"),
        ("type: jpeg_compressibility, concurrency: 2", [], "only remote, vlm and python"),
        ("type: jpeg_compressibility, service: {retry_s: 1}", [], "calls no server"),
        ("type: ocr, path: x", [], "reads no file"),
        (f"{VLM}, vlm: {{mode: caption}}", [], "nothing compares description and prompt"),
        (PAIRWISE, [], "shares of wins cannot be compared"),
        (PAIRWISE, [*ALONE, "explore.batch_size=60"], "64 does"),
        (PAIRWISE, [*ALONE, "explore.images_per_prompt=3", "explore.batch_size=126"], "60 does"),
        (PAIRWISE, [*ALONE, "explore.images_per_prompt=40"], "at most 64 are compared at once"),
        (
            "type: clip, path: x",
            [f"evaluation.judges=[{{name: j, {PAIRWISE}}}]"],
            "evaluation compares versions",
        ),
        (VLM, [f"evaluation.judges=[{{name: j, {VLM}}}]"], "over-optimisation"),
        (f"{VLM}, service: {{timeout_s: 0}}", [], "expected a number > 0"),
        (f"{VLM}, service: {{api_key_env: 'sk-123-abc'}}", [], "api_key_env"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(reward, others, reason):
    with pytest.raises(ConfigError, match=reason):
        load(ONE.format(reward), *others)


@pytest.mark.parametrize(
    ("reward", "others"),
    [
        (REMOTE, []),
        (f"{REMOTE}, concurrency: 3, service: {{scorer: clip, version: v1, max_failed: 3}}", []),
        (f"{VLM}, vlm: {{mode: caption, text_encoder: 'emoji:judge_train'}}", []),
        ("type: python, path: 'a.py:f', concurrency: 2", []),
        (PAIRWISE, [*ALONE, "explore.batch_size=24"]),
        (PAIRWISE, [*ALONE, "explore.batch_size=128"]),
        (f"{VLM}, vlm: {{model: a}}", [f"evaluation.judges=[{{name: j, {VLM}, vlm: {{model: b}}}}]"]),
    ],
)
def test_what_belongs_together_is_accepted(reward, others):
    assert load(ONE.format(reward), *others).rewards[0].name == "far"


def test_scorers_to_watch_do_not_rank():
    with pytest.raises(ConfigError, match="no reward with role: train"):
        load(ONE.format("type: brisque"))
    assert load(ONE.format("type: brisque, role: train")).rewards[0].role == "train"


def test_every_type_is_described_and_the_batch_is_that_of_scoring():
    from diffexpo.rewards import REWARDS
    from diffexpo.rewards.scoring import score_images

    assert set(SCORERS) == set(REWARDS)
    assert inspect.signature(score_images).parameters["batch_size"].default == SCORING_BATCH
