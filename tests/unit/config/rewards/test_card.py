"""Cards of rewards: what a type needs, what it would not read, what does not belong together; and that cards are whole."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from diffexpo.config import load_config
from diffexpo.config.papers import WORKS
from diffexpo.config.rewards import CARDS, REWARDS, RewardCard, read_card
from diffexpo.config.rewards.card import SCORING_BATCH
from diffexpo.errors import ConfigError
from diffexpo.rewards.base import scorer_class
from diffexpo.rewards.scoring import score_drawn

TWO = "rewards=[{name: a, type: clip, path: emoji:judge_train}, {name: b, type: jpeg_compressibility}]"
ONE = "rewards=[{{name: far, {}}}]"
REMOTE = "type: remote, path: 'http://127.0.0.1:8188'"
VLM = "type: vlm, path: 'http://127.0.0.1:8000/v1'"
PAIRWISE = f"{VLM}, vlm: {{mode: pairwise}}"
ALONE = ["explore.agents=1", "algorithm.alpha=0", "explore.negatives.agents=both"]


def load(*overrides: str):
    return load_config([], overrides, {}).config


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("type: hpsv2", "rewards.0.path is empty: type hpsv2 needs HPS_v2_compressed"),
        ("type: imagereward", "rewards.0.path is empty: type imagereward needs ImageReward"),
        ("type: aesthetic", "rewards.0.path is empty: type aesthetic needs the head"),
        ("type: aesthetic, path: x, scale: raw", "rewards.0.scale = raw: type aesthetic has its own unit"),
        (
            "type: jpeg_compressibility, base: x",
            "rewards.0.base = 'x': type jpeg_compressibility stands on no",
        ),
        (
            "type: python, path: 'a.py:f', precision: float16",
            "type python holds no network; remove precision",
        ),
        ("type: clip, path: x, base: y", "rewards.0.base = 'y': type clip stands on no other model"),
    ],
)
def test_settings_that_a_type_needs_or_ignores(reward: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"rewards=[{{name: a, {reward}}}]")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "reward",
    [
        "type: pickscore",
        "type: pickscore, path: a, base: b, scale: raw, precision: bfloat16",
        "type: hpsv2.1, path: a.safetensors, scale: logit",
        "type: imagereward, path: a, base: b, precision: float16",
        "type: aesthetic, path: a, base: b",
    ],
)
def test_settings_that_make_sense_pass(reward: str) -> None:
    assert load(f"rewards=[{{name: a, {reward}}}]").rewards[0].name == "a"


def test_cards_are_whole() -> None:
    for name, card in REWARDS.items():
        assert card.what and card.unit and card.needs() and card.licence, name
        assert bool(card.default_path) <= bool(card.path_is) and bool(card.default_base) <= bool(card.base_is)
        assert set(card.scales) in (set(), {"raw", "percent", "logit"})
        assert set(card.papers) <= set(WORKS)
        made = read_card(name="a", type=name)
        assert type(made) is card and made.type == name
        assert made.chosen_scale == (card.scales[0] if card.scales else None)
        assert bool(made.num_parameters) <= card.has_weights


def test_card_and_code_are_two_files_of_one_name() -> None:
    assert len(REWARDS) == len(CARDS)
    for card in CARDS:
        file = card.__module__.rpartition(".")[2]
        scorer = scorer_class(card)
        assert scorer.__module__ == f"diffexpo.rewards.{file}" and callable(scorer.score)
        assert getattr(scorer, "reads", "images") == card.reads


def test_the_batch_is_that_of_scoring() -> None:
    assert inspect.signature(score_drawn).parameters["batch_size"].default == SCORING_BATCH


def test_every_setting_is_documented_and_has_the_same_meaning_in_all_types() -> None:
    assert all(field.description for field in RewardCard.model_fields.values())
    for card in CARDS:
        own = {name for name, field in card.model_fields.items() if name not in RewardCard.model_fields}
        assert all(card.model_fields[name].description for name in own)
        assert list(card.model_fields)[: len(RewardCard.model_fields)] == list(RewardCard.model_fields)


@pytest.mark.parametrize(
    "kind", [kind for kind in REWARDS if kind != "balance"]
)  # which stands on another one
def test_a_resolved_file_holds_every_setting_and_is_read_back(kind: str) -> None:
    """Files of older versions list the settings of all types, at their defaults where a type does not read them."""
    card = REWARDS[kind]
    needed = {"python": "a.py:f", "remote": "http://h:1", "vlm": "http://h:1/v1"}.get(kind, "x")
    path = needed if card.path_is and card.default_path is None else None
    written = {
        "name": "a",
        "type": kind,
        "path": path,
        "base": None,
        "scale": None,
        "precision": "float32",
        "weight": 1.0,
        "role": "train",
        "concurrency": None,
        "cache": None,
        "service": {
            "timeout_s": 60.0,
            "retry_s": 120.0,
            "images_per_request": 16,
            "max_failed_fraction": 0.1,
            "max_failed": None,
            "scorer": None,
            "version": None,
            "api_key_env": None,
        },
        "vlm": {
            "mode": "yes_no",
            "model": None,
            "question": None,
            "top_logprobs": 20,
            "max_tokens": 96,
            "text_encoder": None,
            "text_layer": None,
        },
        "self_judge": {"draws": 8, "timestep_range": [0.0, 1.0], "beta": 5000.0},
    }
    own = set(card.model_fields) - set(RewardCard.model_fields)
    written |= {
        name: read_card(name="a", type=kind).model_dump(mode="json")[name]
        for name in card.model_fields
        if name in own
    }
    (reward,) = load(f"rewards={json.dumps([written])}").rewards
    assert json.dumps(reward.model_dump(mode="json")) == json.dumps(written)


HUMAN = "rewards=[{{type: human, {}}}{}]"
JPEG = ", {name: j, type: jpeg_compressibility}"


@pytest.mark.parametrize(
    ("reward", "others", "overrides", "reason"),
    [
        ("role: watch", "", [], "people are asked for pairs"),
        ("weight: 2", "", [], "votes are not mixed with scores"),
        ("share: 0.5", "", [], "another reward with role: train must rank the other prompts"),
        ("couples: extremes", "", [], "another reward with role: train must choose the couples"),
        ("share: 0, votes: 1", JPEG, [], "people would be asked nothing"),
        ("votes: 1", JPEG, [], "'j' would rank nothing"),
        ("votes: 1", ", {name: b, type: human}", [], "type = human stands twice"),
        ("votes: 1", "", ["explore.iterations=1"], "nothing is drawn"),
        ("votes: 1", "", ["algorithm.type=rwr"], "people give pairs of images"),
        ("votes: 1", "", ["algorithm.type=spin"], "people give pairs of images"),
        ("votes: 1", "", ["baseline.contenders=[emoji/dpo_online]"], "each would ask people for votes"),
        ("path: x", "", [], "reads no file"),
        ("cache: x", "", [], "gives no scores"),
        ("couples: disputed", "", [], "two other rewards with role: train must dispute, there are 0"),
        ("couples: tournament, candidates: 9", "", [], "candidates = 9: a prompt has 8 images"),
        ("couples: tournament", JPEG, [], "'j' would rank nothing"),
        ("votes: 0", "", [], "expected an integer >= 1"),
        ("question: beauty", "", [], "expected one of quality, alignment, aesthetics"),
        ("rating: {checks_evry: 1}", "", [], "Did you mean rewards.0.rating.checks_every"),
    ],
)
def test_people_are_asked_for_what_they_can_give(
    reward: str, others: str, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(HUMAN.format(reward, others), *overrides)


def test_people_may_judge_all_or_a_part() -> None:
    (people,) = load(HUMAN.format("question: aesthetics", "")).rewards
    assert people.name == "people" and people.asking is not None and people.asking.question == "aesthetics"
    worth = (
        "of 3 on a pair that 75% of people would decide alike, most are right in 84% of cases, of 9 in 95%"
    )
    assert people.plan(10) == (
        f"10 pairs x 3 votes by people: 30 votes; the run waits for them; {worth} (`diffexpo label cost`)"
    )
    (people,) = load(HUMAN.format("couples: tournament, votes: 1, rounds: 6", "")).rewards
    assert people.plan(10).startswith("10 pairs x 6 rounds x 1 votes by people: 60 votes; the run waits")
    assert people.asking is not None and (people.asking.candidates, people.asking.rounds) == (4, 6)
    people, _ = load(HUMAN.format("share: 0.25, couples: extremes", JPEG)).rewards
    assert people.plan(10).startswith(
        "2 pairs x 3 votes by people: 6 votes; the run waits for them; the other 8 prompts by rewards; of 3"
    )
    assert all(
        card.asks_people == (read_card(name="a", type=name).asking is not None)
        for name, card in REWARDS.items()
    )
    with pytest.raises(ConfigError, match="it can stand in rewards only"):
        load("evaluation.judges=[{type: human}]")
    with pytest.raises(ConfigError, match=r"rewards\.0\.votes is a setting of another type"):
        load("rewards=[{name: a, type: jpeg_compressibility, votes: 2}]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rewards=[{name: a, type: clop}]"],
            "rewards.0.type = 'clop' .*one of clip, pickscore, .*Did you mean clip",
        ),
        (["rewards=[{name: a}]"], r"rewards.0.type is not given \(in --set .*one of clip"),
        (["rewards=[{type: clip, path: x}]"], "rewards.0.name is not given"),
        (["rewards.0.wieght=2"], "rewards.0.wieght is not a setting .*Did you mean rewards.0.weight"),
        (["rewards.0.vlm.mode=yesno"], "rewards.0.vlm.mode = 'yesno' .*Did you mean yes_no"),
        (
            ["rewards=[{name: a, type: vlm, path: 'http://h', vlm: {mod: x}}]"],
            "rewards.0.vlm.mod is not a setting",
        ),
        (["evaluation.judges=[{name: a, type: clip, role: see}]"], "evaluation.judges.0.role = 'see'"),
        (["rewards=[3]"], "rewards.0 = 3 .*a list of groups"),
    ],
)
def test_wrong_settings_are_named_by_their_place(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_global_mixture_needs_all_prompts_at_once() -> None:
    assert load(TWO, "mixture.kind=global").mixture.kind == "global"
    spo = ["algorithm.type=spo", "offline.source=null", "explore.agents=1", "explore.sampler.eta=1"]
    spo += ["explore.sampler.name=ddim", "mixture.kind=global", "baseline.offline_dpo=false"]
    with pytest.raises(ConfigError, match="mixture.kind = global with algorithm.type = spo"):
        load(TWO, *spo)


@pytest.mark.parametrize(
    ("reward", "others", "reason"),
    [
        ("type: remote", [], "path is empty"),
        ("type: remote, path: 'localhost:80'", [], "expected an address such as"),
        ("type: vlm, path: model", [], "expected an address such as"),
        (f"{REMOTE}, vlm: {{mode: caption}}", [], "asks no vision-language model"),
        ("type: jpeg_compressibility, concurrency: 2", [], "only remote, vlm and python"),
        ("type: jpeg_compressibility, service: {retry_s: 1}", [], "calls no server"),
        ("type: ocr, path: x", [], "reads no file"),
        (f"{VLM}, vlm: {{mode: caption}}", [], "nothing compares description and prompt"),
        (PAIRWISE, [], "such scores cannot be compared"),
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
def test_a_contradiction_is_refused_with_its_reason(reward: str, others: list[str], reason: str) -> None:
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
def test_what_belongs_together_is_accepted(reward: str, others: list[str]) -> None:
    assert load(ONE.format(reward), *others).rewards[0].name == "far"


def test_scorers_to_watch_do_not_rank() -> None:
    with pytest.raises(ConfigError, match="no reward with role: train"):
        load(ONE.format("type: brisque"))
    assert load(ONE.format("type: brisque, role: train")).rewards[0].role == "train"


BALANCE = "rewards=[{{name: score, type: clip, path: emoji:judge_train}}, {{name: fair, type: balance, {}}}]"
FAIR = "by: score, values: {a: 'a {noun}', b: 'no {noun}'}"


@pytest.mark.parametrize(
    ("reward", "overrides", "reason"),
    [
        (
            FAIR.replace("by: score", "by: scroe"),
            [],
            "by = 'scroe': expected the name of a reward that stands before",
        ),
        ("by: score, values: {a: x}", [], "expected two values or more"),
        ("by: score, values: {a: x, b: x}", [], "with different texts"),
        (
            "by: score, values: {a: '{gender}', b: x}",
            [],
            "{gender} stands for nothing; expected {prompt} or {noun}",
        ),
        (FAIR + ", target: {a: 1.0}", [], "target names a; expected the values a, b"),
        (FAIR + ", target: {a: 0.7, b: 0.7}", [], "target sums to 1.4; expected 1"),
        (FAIR + ", target: {a: 1.0, b: 0.0}", [], "target has a share of 0"),
        (FAIR + ", temperature: 0", [], "temperature"),
        (FAIR + ", cache: x", [], "compares images of a prompt; remove cache"),
        (FAIR, ["explore.agents=2"], "type = balance with explore.agents = 2"),
        (FAIR, ["explore.batch_size=12"], "type = balance with explore.batch_size = 12 and 8 images"),
        (FAIR, ["explore.images_per_prompt=40"], "with 80 images of a prompt: at most 64"),
    ],
)
def test_a_reward_for_balance_needs_a_reader_and_whole_prompts(
    reward: str, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load(BALANCE.format(reward), *ALONE, *overrides)


def test_a_reward_for_balance_stands_on_one_before_it() -> None:
    card = load(BALANCE.format(FAIR), *ALONE).rewards[1]
    assert (card.stands_on, card.is_groupwise) == ("score", True)
    with pytest.raises(ConfigError, match="evaluation compares versions"):
        load("evaluation.judges=[{name: fair, type: balance, " + FAIR + "}]", *ALONE)
    with pytest.raises(ConfigError, match="scores no image for a text"):
        load(
            "rewards=[{name: score, type: vlm, path: 'http://h/v1', vlm: {mode: pairwise}}, {name: fair, type: balance, "
            + FAIR
            + "}]",
            *ALONE,
        )
