from dataclasses import replace

import numpy as np
import torch

from diffexpo.online.pairing import best_and_worst, best_dominating, make_pairs
from tests.rows import sample_row

NAN = float("nan")


def rows(group, count=4):
    agents = ["main"] * (count // 2) + ["exploration"] * (count // 2)
    return [
        sample_row(
            f"{group}-{index}", f"prompt {group}", agent, negative_prompt="blurry" if index == 1 else None
        )
        for index, agent in enumerate(agents)
    ]


def beats(scores):
    return torch.tensor(scores[:, :, None] > scores[:, None, :])


def test_best_and_worst_are_the_extremes():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    best, worst, valid = best_and_worst(scores)
    assert best.tolist() == [1, 2] and worst.tolist() == [0, 1] and valid.tolist() == [True, True]


def test_ties_are_no_pair_and_the_margin_must_be_exceeded():
    scores = torch.tensor([[2.0, 2.0], [2.0, 2.5]])
    assert best_and_worst(scores)[2].tolist() == [False, True]
    assert best_and_worst(scores, min_margin=0.5)[2].tolist() == [False, False]


def test_nan_is_never_chosen_and_needs_two_finite_scores():
    scores = torch.tensor([[NAN, 1.0, 2.0], [NAN, NAN, 2.0], [NAN, NAN, NAN]])
    best, worst, valid = best_and_worst(scores)
    assert (best[0], worst[0]) == (2, 1)
    assert valid.tolist() == [True, False, False]


def test_adding_a_constant_or_a_positive_factor_keeps_the_choice():
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for changed in (scores + 7.0, scores * 3.0):
        assert torch.equal(best_and_worst(changed)[0], best_and_worst(scores)[0])
        assert torch.equal(best_and_worst(changed)[1], best_and_worst(scores)[1])
    flipped = best_and_worst(-scores)
    assert torch.equal(flipped[0], best_and_worst(scores)[1])


def test_pareto_wants_the_winner_better_under_every_reward():
    one = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    two = np.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    mixed = torch.tensor(one + two)
    best, worst, valid = best_dominating(beats(one) & beats(two), mixed)
    assert valid.tolist() == [True, False]
    assert (int(best[0]), int(worst[0])) == (1, 2)


def test_pareto_with_one_reward_is_best_and_worst():
    scores = np.random.default_rng(0).normal(size=(40, 6))
    mixed = torch.tensor(scores)
    ours, plain = best_dominating(beats(scores), mixed), best_and_worst(mixed)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_pairs_name_their_samples_and_drops_are_counted():
    mixed = np.array([[1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [NAN, NAN, NAN, 1.0]])
    paired = make_pairs([rows(0), rows(1), rows(2)], mixed, iteration=2, seed=0, judge="j")
    pairs = paired.pairs
    assert [pair.winner_id for pair in pairs] == ["0-1"] and pairs[0].loser_id == "0-0"
    assert pairs[0].margin == 3.0 and pairs[0].winner_agent == "main"
    assert (len(pairs), paired.dropped_tie, paired.dropped_nan) == (1, 1, 1)
    assert paired.metrics()["pairs/winner_from_negative"] == 1.0


def test_contrast_couples_take_one_image_of_each_agent():
    pairs = make_pairs([rows(0)], np.array([[1.0, 2.0, 3.0, 4.0]]), iteration=1, seed=0, judge="j").pairs
    assert pairs[0].main_id in ("0-0", "0-1") and pairs[0].explored_id in ("0-2", "0-3")
    alone = [replace(row, agent="exploration") for row in rows(0)]
    single = make_pairs([alone], np.array([[1.0, 2.0, 3.0, 4.0]]), iteration=1, seed=0, judge="j").pairs
    assert single[0].main_id is None and single[0].explored_id is None


def test_agents_are_told_apart_where_there_are_two():
    scores = np.array([[1.0, 2.0, 3.0, 4.0]])
    report = make_pairs([rows(0)], scores, iteration=1, seed=0, judge="j")
    kept = "1 pairs of 1 prompts (0 ties, 0 without two scores)"
    assert report.describe() == f"{kept}, 1 winners from the exploration agent"
    alone = [replace(row, agent="exploration") for row in rows(0)]
    report = make_pairs([alone], scores, iteration=1, seed=0, judge="j")
    assert report.describe() == kept


def test_uncertainty_travels_with_the_pair():
    gamma = np.array([[0.1, 0.2, 0.3, 0.4]])
    scores = np.array([[1.0, 2.0, 3.0, 4.0]])
    pairs = make_pairs([rows(0)], scores, iteration=1, seed=0, judge="j", uncertainty=gamma).pairs
    assert (pairs[0].uncertainty_winner, pairs[0].uncertainty_loser) == (0.4, 0.1)
