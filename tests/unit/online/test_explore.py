import pytest

from diffexpo.errors import ConfigError
from diffexpo.online.explore import attach_negatives, constant, cosine_decay, draw_prompts, linear_decay, off
from diffexpo.types import Prompt

POOL = [Prompt(f"p{index}", f"prompt {index}") for index in range(10)]


def test_linear_decay_is_a_straight_line_from_initial_to_zero():
    rates = [linear_decay(t, 5, 0.8) for t in range(1, 6)]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert linear_decay(7, 5, 0.8) == 0.0
    assert linear_decay(1, 1, 0.8) == 0.8


def test_cosine_is_half_way_in_the_middle_and_ends_at_zero():
    assert cosine_decay(1, 5, 1.0) == 1.0
    assert cosine_decay(3, 5, 1.0) == pytest.approx(0.5)
    assert cosine_decay(5, 5, 1.0) == pytest.approx(0.0)


def test_constant_and_off():
    assert [constant(t, 4, 0.3) for t in (1, 4)] == [0.3, 0.3]
    assert off(1, 4, 0.3) == 0.0


@pytest.mark.parametrize("decay", [linear_decay, cosine_decay, constant, off])
def test_iterations_count_from_one(decay):
    with pytest.raises(ConfigError, match="counting from 1"):
        decay(0, 5, 1.0)


def test_prompts_do_not_repeat_while_they_last():
    drawn = [prompt.id for t in (1, 2) for prompt in draw_prompts(POOL, t, 5, seed=3)]
    assert sorted(drawn) == sorted(prompt.id for prompt in POOL)


def test_a_small_pool_is_passed_again_in_another_order():
    drawn = [prompt.id for prompt in draw_prompts(POOL, 1, 30, seed=3)]
    passes = [drawn[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == sorted(prompt.id for prompt in POOL) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_prompts_do_not_depend_on_pool_order():
    forward = [prompt.id for prompt in draw_prompts(POOL, 2, 4, seed=0)]
    backward = [prompt.id for prompt in draw_prompts(POOL[::-1], 2, 4, seed=0)]
    assert forward == backward


def test_an_empty_pool_is_refused():
    with pytest.raises(ConfigError, match="pool is empty"):
        draw_prompts([], 1, 4, seed=0)


def test_negatives_come_at_the_asked_rate_and_are_keyed():
    many = [Prompt(str(index), str(index)) for index in range(4000)]
    requests = attach_negatives(many, ["a", "b"], 0.3, iteration=2, seed=5)
    share = sum(request.negative is not None for request in requests) / len(requests)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    picked = [request.negative for request in requests if request.negative]
    assert abs(picked.count("a") / len(picked) - 0.5) < 0.06
    assert requests == attach_negatives(many, ["a", "b"], 0.3, iteration=2, seed=5)
    assert requests != attach_negatives(many, ["a", "b"], 0.3, iteration=3, seed=5)


def test_rate_zero_and_one_and_an_empty_list():
    assert all(request.negative is None for request in attach_negatives(POOL, ["a"], 0.0, 1, 0))
    assert all(request.negative == "a" for request in attach_negatives(POOL, ["a"], 1.0, 1, 0))
    assert all(request.negative is None for request in attach_negatives(POOL, [], 1.0, 1, 0))


def test_a_prompts_own_negative_takes_the_place_of_the_lists():
    own = Prompt("own", "a cat", "", {"negative_prompt": " blurry "})
    for negatives in (["a"], []):
        assert [r.negative for r in attach_negatives([own, POOL[0]], negatives, 1.0, 1, 0)] == [
            "blurry",
            negatives[0] if negatives else None,
        ]
    assert attach_negatives([own], ["a"], 0.0, 1, 0)[0].negative is None
