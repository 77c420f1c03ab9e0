"""A judge behind a chat server: probabilities from log-probabilities, positions cancelled, what is unclear is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from diffexpo.assembly import resolve
from diffexpo.config.rewards import ServiceConfig, VlmConfig, read_card
from diffexpo.errors import ConfigError, MissingError, RewardError, ScorerStoppedError
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.server import decode_png
from diffexpo.rewards.text_similarity import REFERENCE, TextSimilarity, recall
from diffexpo.rewards.vlm import QUESTIONS, VlmJudge, choice_probability, wins
from tests.tiny import tiny_judge, tiny_tokenizer
from tests.unit.rewards.scripted_server import Reply, ScriptedServer

QUICK = ServiceConfig(timeout_s=5.0, retry_s=0.0)
LEVELS = (0.2, 0.9, 0.4, 0.6)
IMAGES = torch.stack([torch.full((3, 6, 6), level) for level in LEVELS])


def entries(**probabilities: float) -> list[dict[str, object]]:
    return [{"token": token, "logprob": math.log(value)} for token, value in probabilities.items()]


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (entries(Yes=0.6, no=0.3), 0.6 / 0.9),
        (entries(yes=0.2, YES=0.3, No=0.25, maybe=0.25), 0.5 / 0.75),
        (
            [{"token": " Yes.", "logprob": math.log(0.3)}, {"token": "\u2581no", "logprob": math.log(0.1)}],
            0.75,
        ),
        ([{"token": "\u0120yes", "logprob": 0.0}], 1.0),
        (entries(no=0.5), 0.0),
        (entries(yesterday=0.5, nothing=0.2), math.nan),
        ([], math.nan),
        ([{"token": None, "logprob": -1.0}, {"token": "yes", "logprob": None}, {"token": "no"}], math.nan),
        ([{"token": "yes", "logprob": math.nan}, {"token": "no", "logprob": -0.5}], 0.0),
        ([{"token": "yes", "logprob": -9999.0}, {"token": "no", "logprob": -0.1}], 0.0),
    ],
)
def test_probability_of_yes(top: list[dict[str, object]], expected: float) -> None:
    assert choice_probability(top, ("yes", "no")) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_choices_are_complementary() -> None:
    top = entries(**{"1": 0.37, "2": 0.21, "two": 0.4})
    assert choice_probability(top, ("1", "2")) + choice_probability(top, ("2", "1")) == pytest.approx(1.0)


def test_wins_against_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    shown = generator.uniform(size=(5, 5))
    shown[1, 3] = shown[4, 2] = np.nan
    expected = []
    for i in range(5):
        found = []
        for j in range(5):
            if i != j and np.isfinite(shown[i, j]) and np.isfinite(shown[j, i]):
                found.append((shown[i, j] + (1 - shown[j, i])) / 2)
        expected.append(np.mean(found))
    np.testing.assert_allclose(wins(torch.from_numpy(shown)).numpy(), expected, rtol=0, atol=1e-15)
    # Every comparison hands out one win.
    whole = wins(torch.from_numpy(generator.uniform(size=(6, 6))))
    assert float(whole.mean()) == pytest.approx(0.5, abs=1e-12)
    assert torch.isnan(wins(torch.full((2, 2), torch.nan))).all()
    assert torch.isnan(wins(torch.tensor([[0.5]]))).all()


def test_a_judge_that_only_looks_at_positions_says_nothing() -> None:
    biased = torch.full((4, 4), 0.93)
    np.testing.assert_allclose(wins(biased).numpy(), 0.5, atol=1e-15)


Talk = Callable[[list[float], str], Any]


def chat(talk: Talk, models: tuple[str, ...] = ("looker",)) -> ScriptedServer:
    """A chat server whose model sees the mean brightness of each image and the text."""

    def answer(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": name} for name in models]})
        assert path == "/v1/chat/completions" and body["temperature"] == 0
        if body["model"] not in models:
            return Reply({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        *images, text = body["messages"][0]["content"]
        levels = []
        for image in images:
            head, _, data = image["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            levels.append(float(decode_png(data).mean() / 255))
        found = talk(levels, text["text"])
        if isinstance(found, Reply):
            return found
        if isinstance(found, str):
            return Reply({"choices": [{"message": {"role": "assistant", "content": found}}]})
        assert body["max_tokens"] == 1 and body["logprobs"] is True and body["top_logprobs"] >= 2
        return Reply({"choices": [{"message": {}, "logprobs": {"content": [{"top_logprobs": found}]}}]})

    return ScriptedServer(answer)


def judge(server: ScriptedServer, service: ServiceConfig = QUICK, **settings: Any) -> VlmJudge:
    return VlmJudge("vlm", f"{server.url}/v1", service, VlmConfig(**settings))


def test_yes_and_no_become_a_probability() -> None:
    def talk(levels: list[float], text: str) -> Any:
        assert text == QUESTIONS["yes_no"].replace("{prompt}", 'a "{odd}" prompt')
        return entries(Yes=levels[0], No=1 - levels[0])

    with chat(talk) as server:
        scorer = judge(server)
        found = scorer.score(IMAGES, ['a "{odd}" prompt'] * 4)
    torch.testing.assert_close(found, torch.tensor(LEVELS), rtol=0, atol=2 / 255)
    assert scorer.version.startswith("looker yes_no question ")


def test_an_unclear_answer_is_nan_and_counted() -> None:
    def talk(levels: list[float], text: str) -> Any:
        return entries(Well=0.9) if levels[0] > 0.8 else entries(yes=0.5, no=0.5)

    with chat(talk) as server:
        scorer = judge(server)
        found = scorer.score(IMAGES, ["x"] * 4)
    assert torch.isnan(found).tolist() == [False, True, False, False]
    assert (scorer.budget.num_asked, scorer.budget.num_failed) == (4, 1)


def test_a_judge_that_never_answers_stops_the_run() -> None:
    with chat(lambda levels, text: entries(**{"<think>": 1.0})) as server:
        scorer = judge(server)
        many = IMAGES[:1].expand(40, -1, -1, -1)
        with pytest.raises(ScorerStoppedError, match="thinks before it answers"):
            scorer.score(many, ["x"] * 40)


def test_a_server_without_log_probabilities_stops_the_run() -> None:
    with (
        chat(lambda levels, text: "Yes") as server,
        pytest.raises(ScorerStoppedError, match="without log-prob"),
    ):
        judge(server).score(IMAGES, ["x"] * 4)


@pytest.mark.parametrize(
    "body", [{}, {"choices": []}, {"choices": [3]}, {"choices": [{"logprobs": {"content": []}}]}]
)
def test_a_malformed_answer_is_asked_for_again(body: object) -> None:
    replies = [Reply(body), Reply(b"no JSON"), entries(yes=0.25, no=0.75)]
    with chat(lambda levels, text: replies.pop(0)) as server:
        scorer = judge(server, QUICK.model_copy(update={"retry_s": 20.0}))
        assert scorer.score(IMAGES[:1], ["x"]).tolist() == [0.25]
    assert scorer.budget.num_failed == 0


def test_pairs_are_compared_in_both_orders() -> None:
    def talk(levels: list[float], text: str) -> Any:
        first = 1 / (1 + math.exp(-(levels[0] - levels[1]) - 0.3))  # likes the first place
        return entries(**{"1": first, "2": 1 - first})

    prompts = ["a", "a", "b", "a"]
    with chat(talk) as server:
        scorer = judge(server, mode="pairwise")
        found = scorer.score(IMAGES, prompts)
    asked = [
        body["messages"][0]["content"][-1]["text"] for path, body, _ in server.seen if path.endswith("ions")
    ]
    assert len(asked) == 6 and all('"a"' in text for text in asked)
    assert torch.isnan(found).tolist() == [False, False, True, False]  # "b" has none to be compared with

    def beats(i: int, j: int) -> float:
        first, second = (1 / (1 + math.exp(-sign * (LEVELS[i] - LEVELS[j]) - 0.3)) for sign in (1, -1))
        return (first + 1 - second) / 2

    for row, others in ((0, (1, 3)), (1, (0, 3)), (3, (0, 1))):
        assert float(found[row]) == pytest.approx(np.mean([beats(row, other) for other in others]), abs=5e-3)
    assert scorer.num_compared == 3
    assert scorer.is_groupwise


def test_inconsistent_orders_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with chat(lambda levels, text: entries(**{"1": 0.9, "2": 0.1})) as server:
        scorer = judge(server, mode="pairwise")
        assert scorer.score(IMAGES, ["a"] * 4).tolist() == pytest.approx([0.5] * 4)
    assert (scorer.num_compared, scorer.num_inconsistent) == (6, 6)
    assert "6 of 6 comparisons name another winner" in caplog.text


def test_descriptions_are_compared_with_the_prompt(tmp_path: Path) -> None:
    folder = tiny_judge(tmp_path / "clip")
    texts = {0: "a cat", 1: "dog", 2: "", 3: "a cat"}

    def talk(levels: list[float], text: str) -> Any:
        return texts[int(np.argmin([abs(levels[0] - level) for level in LEVELS]))]

    with chat(talk) as server:
        scorer = judge(server, mode="caption", text_encoder=str(folder))
        found = scorer.score(IMAGES, ["a cat", "a cat", "a cat", "dog"])
    # Cosines of float32 vectors of some tens of elements.
    assert float(found[0]) == pytest.approx(1.0, abs=1e-5)
    assert float(found[1]) == pytest.approx(float(found[3]), abs=1e-5) and float(found[1]) < 0.999
    assert torch.isnan(found[2]) and scorer.budget.num_failed == 1


def test_the_embedded_judge_compares_descriptions() -> None:
    config = read_card(
        name="vlm", type="vlm", path="", vlm={"mode": "caption", "text_encoder": "emoji:judge_train"}
    )
    with chat(lambda levels, text: "red heart") as server:
        config = config.model_copy(update={"path": f"{server.url}/v1", "service": QUICK})
        (scorer,) = load_rewards([config], resolve, "cpu")
        found = scorer.score(IMAGES[:3], ["red heart", "noto red heart", "noto flag: France"])
    assert float(found[0]) == pytest.approx(1.0, abs=1e-5)
    assert found[1] > found[2] + 0.1


def test_recall_against_a_plain_loop() -> None:
    generator = np.random.default_rng(1)
    candidate, reference = generator.normal(size=(5, 7)), generator.normal(size=(3, 7))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    expected = np.mean([max(cosine(x, y) for y in candidate) for x in reference])
    found = recall(torch.from_numpy(candidate), torch.from_numpy(reference))
    assert found.dtype == torch.float64 and float(found) == pytest.approx(expected, abs=1e-12)
    # Everything that the reference says is said, and more.
    both = torch.from_numpy(np.concatenate([candidate, reference]))
    assert float(recall(both, torch.from_numpy(reference))) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(RewardError, match="0 candidate and 3 reference tokens"):
        recall(torch.zeros(0, 7), torch.from_numpy(reference))


def test_any_encoder_gives_bertscore_recall(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(str(tmp_path / "bert"))
    tokenizer.save_pretrained(str(tmp_path / "bert"))
    similarity = TextSimilarity("vlm", str(tmp_path / "bert"))
    said = REFERENCE.replace("{prompt}", "red fish")
    assert similarity.compare(said, "red fish") == pytest.approx(1.0, abs=1e-5)
    assert similarity.compare("zzz", "red fish") < 0.99
    # Layer 0 is the embedding: the tokens that the tokenizer adds must not take part.
    ids = tokenizer(said, add_special_tokens=False).input_ids
    assert TextSimilarity("vlm", str(tmp_path / "bert"), layer=0)._tokens(said).shape == (len(ids), 16)
    with pytest.raises(RewardError, match="text_layer = 3, but .* has 2 layers"):
        TextSimilarity("vlm", str(tmp_path / "bert"), layer=3)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with chat(lambda levels, text: "x", ("one", "two")) as server:
        with pytest.raises(MissingError, match=r"vlm.model = None; .* serves one, two"):
            judge(server)
        with pytest.raises(MissingError, match="vlm.model = 'three'"):
            judge(server, model="three")
        assert judge(server, model="two").version.startswith("two ")
        with pytest.raises(ConfigError, match=r"holds no \{prompt\}"):
            judge(server, model="one", question="Is it good?")
        with pytest.raises(ConfigError, match="needs vlm.text_encoder"):
            judge(server, model="one", mode="caption")
        with pytest.raises(MissingError, match="holds no config.json"):
            judge(server, model="one", mode="caption", text_encoder=str(tmp_path))
    with pytest.raises(MissingError, match="its address ends in /v1"):
        judge(server, model="one")


@pytest.mark.parametrize("lists", ["another", "nothing"])
def test_a_hosted_model_answers_behind_an_alias_and_refuses_settings_by_name(lists: str) -> None:
    """As large hosts do: no list of models, or one without the alias; no temperature, another name for max_tokens."""

    def answer(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return Reply({"data": [{"id": "other"}]}) if lists == "another" else Reply({}, 404)
        if body["model"] != "team/alias":
            return Reply({"error": {"message": "no such deployment"}}, 404)
        for name in ("max_tokens", "temperature"):
            if name in body:
                return Reply({"error": {"message": f"Unsupported parameter: '{name}'"}}, 400)
        top = [{"token": "yes", "logprob": math.log(0.8)}, {"token": "no", "logprob": math.log(0.2)}]
        return Reply({"choices": [{"message": {}, "logprobs": {"content": [{"top_logprobs": top}]}}]})

    with ScriptedServer(answer) as server:
        found = judge(server, model="team/alias")
        torch.testing.assert_close(found.score(torch.rand(2, 3, 8, 8), ["a", "b"]), torch.full((2,), 0.8))
        refused = [
            body for path, body, _ in server.seen if body and {"max_tokens", "temperature"} & body.keys()
        ]
        assert len(refused) == 2, "what is refused is learned once"
        assert server.seen[-1][1]["max_completion_tokens"] == 1
        with pytest.raises(MissingError, match=r"vlm.model = 'team/alais'; .*no such deployment"):
            judge(server, model="team/alais")


def test_what_is_left_over_beside_another_first_word_is_no_answer() -> None:
    thought = [
        {"token": "<think>", "logprob": -1e-6},
        {"token": "yes", "logprob": -14.0},
        {"token": "no", "logprob": -15.0},
    ]
    assert math.isnan(choice_probability(thought, ("yes", "no")))
    sure = [{"token": "Yes", "logprob": 1.2e-7}]
    assert choice_probability(sure, ("yes", "no")) == 1.0
