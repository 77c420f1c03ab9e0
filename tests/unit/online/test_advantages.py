from collections import defaultdict

import numpy as np
import pytest

from diffexpo.online import PerPromptStats, group_advantages
from diffexpo.rng import numpy_generator

NAN = float("nan")


def batch(seed, size=24, prompts=5):
    generator = numpy_generator("advantages", seed)
    return [f"p{i}" for i in generator.integers(prompts, size=size)], generator.normal(3.0, 2.0, size=size)


def slow_group_advantages(rewards, groups, global_std):
    """One image at a time, from the formula."""
    good = [r for r in rewards if np.isfinite(r)]
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group and np.isfinite(r)]
        out.append((reward - np.mean(own)) / (np.std(good if global_std else own) + 1e-4))
    return np.array(out)


@pytest.mark.parametrize("global_std", [True, False])
def test_group_advantages_equal_the_formula(global_std):
    groups, rewards = batch(0)
    rewards[[3, 7]] = NAN
    ours = group_advantages(rewards, groups, global_std=global_std)
    np.testing.assert_allclose(
        ours, slow_group_advantages(rewards, groups, global_std), rtol=1e-12, atol=1e-12
    )
    assert ours.dtype == np.float64


def test_the_check_value_of_the_docstring():
    ours = group_advantages([1.0, 3.0], ["a", "a"], global_std=False)
    np.testing.assert_allclose(ours, [-1 / 1.0001, 1 / 1.0001], rtol=1e-15)


@pytest.mark.parametrize("global_std", [True, False])
def test_advantages_of_a_group_sum_to_0(global_std):
    groups, rewards = batch(1, size=240)
    ours = group_advantages(rewards, groups, global_std=global_std)
    for group in set(groups):
        own = ours[[g == group for g in groups]]
        assert abs(own.sum()) < 1e-12 and own.std() > 0.1


@pytest.mark.parametrize("global_std", [True, False])
def test_the_order_of_the_images_does_not_change_a_bit(global_std):
    groups, rewards = batch(2, size=240)
    rewards[5] = NAN
    order = numpy_generator("order").permutation(len(rewards))
    ours = group_advantages(rewards, groups, global_std=global_std)
    shuffled = group_advantages(rewards[order], [groups[i] for i in order], global_std=global_std)
    np.testing.assert_array_equal(shuffled, ours[order])


def test_the_split_into_batches_does_not_change_a_bit():
    groups, rewards = batch(3, size=60)
    order = sorted(range(60), key=lambda i: groups[i])
    groups, rewards = [groups[i] for i in order], rewards[order]
    whole = group_advantages(rewards, groups, global_std=False)
    cut = groups.index("p2")
    parts = [
        group_advantages(rewards[s], groups[s], global_std=False) for s in (slice(cut), slice(cut, None))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_with_the_batch_std_all_groups_share_one_scale():
    rewards, groups = np.array([0.0, 1.0, 10.0, 30.0]), ["a", "a", "b", "b"]
    ours = group_advantages(rewards, groups, global_std=True)
    np.testing.assert_allclose(ours * (rewards.std() + 1e-4), [-0.5, 0.5, -10, 10], rtol=1e-13)


@pytest.mark.parametrize("global_std", [True, False])
def test_adding_a_constant_and_scaling_leave_the_order_of_a_group(global_std):
    groups, rewards = batch(4)
    ours = group_advantages(rewards, groups, global_std=global_std)
    np.testing.assert_allclose(
        group_advantages(rewards + 8.0, groups, global_std=global_std), ours, atol=1e-11
    )
    # The floor apart, the scale of the rewards does not matter.
    np.testing.assert_allclose(
        group_advantages(rewards * 1e6, groups, global_std=global_std), ours, rtol=1e-2, atol=1e-12
    )


@pytest.mark.parametrize("global_std", [True, False])
def test_a_group_without_spread_gets_exactly_0(global_std):
    # 0.1 three times has the rounded mean 0.10000000000000002: without care it would get an advantage.
    rewards, groups = [0.1, 0.1, 0.1, 5.0, 1e9 + 0.1, 1e9 + 0.1], ["a", "a", "a", "one", "b", "b"]
    assert np.mean([0.1] * 3) != 0.1
    assert group_advantages(rewards, groups, global_std=global_std).tolist() == [0.0] * 6
    assert group_advantages([2.0, 2.0], ["a", "b"], global_std=global_std).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("global_std", [True, False])
def test_failed_rewards_are_left_out_and_marked(bad, global_std):
    rewards, groups = [1.0, bad, 3.0, bad, bad, 4.0], ["a", "a", "a", "b", "c", "c"]
    ours = group_advantages(rewards, groups, global_std=global_std)
    assert np.isnan(ours).tolist() == [False, True, False, True, True, False]
    without = group_advantages([1.0, 3.0, 4.0], ["a", "a", "c"], global_std=global_std)
    np.testing.assert_array_equal(ours[[0, 2, 5]], without)
    assert ours[5] == 0, "what is left of its group is one image"
    assert np.isnan(group_advantages([bad, bad], ["a", "a"], global_std=global_std)).all()


def test_labels_may_be_arrays_and_rewards_integers():
    rewards, labels = np.array([1, 2, 4, 8]), np.array([7, 7, 9, 9])
    ours = group_advantages(rewards, labels, global_std=False)
    np.testing.assert_array_equal(
        ours, group_advantages([1.0, 2.0, 4.0, 8.0], list("aabb"), global_std=False)
    )
    assert (np.abs(ours) < 1).all() and (ours != 0).all(), "integer arithmetic would have truncated these"
    import torch

    np.testing.assert_array_equal(
        ours,
        group_advantages(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([7, 7, 9, 9]), global_std=False),
    )
    assert group_advantages([], [], global_std=True).shape == (0,)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"rewards have shape \(2,\) and there are 3 groups"):
        group_advantages([1.0, 2.0], ["a", "a", "b"], global_std=True)
    with pytest.raises(ValueError, match=r"rewards have shape \(1, 2\)"):
        group_advantages([[1.0, 2.0]], ["a"], global_std=True)
    with pytest.raises(ValueError, match="there are 1 prompts"):
        PerPromptStats(4, 2).update(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="buffer_size is 0"):
        PerPromptStats(0, 0)
    with pytest.raises(ValueError, match="min_count is -1"):
        PerPromptStats(4, -1)


def slow_updates(batches, buffer_size, min_count):
    """The whole history kept, its last `buffer_size` rewards taken anew for every image."""
    history, out = defaultdict(list), []
    for prompts, rewards in batches:
        for prompt, reward in zip(prompts, rewards, strict=True):
            if np.isfinite(reward):
                history[prompt].append(reward)
        advantages = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            own = history[prompt][-buffer_size:]
            used = own if len(own) >= min_count else [r for r in rewards if np.isfinite(r)]
            advantages.append((reward - np.mean(used)) / (np.std(used) + 1e-6))
        out.append(np.array(advantages))
    return out


@pytest.mark.parametrize(("buffer_size", "min_count"), [(16, 16), (32, 16), (7, 3), (3, 0), (4, 100)])
def test_per_prompt_stats_equal_a_slow_derivation(buffer_size, min_count):
    batches = [batch(seed) for seed in range(12)]
    batches[4][1][::5] = NAN
    stats = PerPromptStats(buffer_size, min_count)
    for (prompts, rewards), truth in zip(batches, slow_updates(batches, buffer_size, min_count), strict=True):
        ours = stats.update(prompts, rewards)
        np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-10)
        assert ours.dtype == np.float64


def test_new_rewards_enter_before_the_statistics():
    stats = PerPromptStats(buffer_size=8, min_count=2)
    stats.update(["a", "a"], [0.0, 2.0])
    # Mean of 0, 2, 4 is 2; of the old ones alone it would be 1.
    assert stats.update(["a"], [4.0])[0] == pytest.approx(2 / (np.std([0, 2, 4]) + 1e-6), rel=1e-14)


def test_below_min_count_the_whole_batch_is_the_measure():
    stats = PerPromptStats(buffer_size=8, min_count=3)
    rewards = np.array([1.0, 2.0, 6.0])
    expected = (rewards - 3) / (rewards.std() + 1e-6)
    np.testing.assert_allclose(stats.update(["a", "a", "b"], rewards), expected, rtol=1e-14)
    # "a" has three now and is measured by itself, "b" is not yet.
    second = stats.update(["a", "b"], [6.0, 8.0])
    assert second[0] == pytest.approx(3 / (np.std([1, 2, 6]) + 1e-6), rel=1e-14)
    assert second[1] == pytest.approx(1 / (1 + 1e-6), rel=1e-14)


def test_the_buffer_forgets():
    stats = PerPromptStats(buffer_size=2, min_count=1)
    stats.update(["a"] * 5, [100.0, -3.0, 7.0, 1.0, 3.0])
    assert stats.update(["a"], [5.0])[0] == pytest.approx(1 / (1 + 1e-6), rel=1e-14)


def test_prompts_without_spread_and_failed_rewards():
    stats = PerPromptStats(buffer_size=4, min_count=2)
    ours = stats.update(["a", "a", "a", "b", "b"], [0.1, 0.1, 0.1, NAN, 2.0])
    assert ours[:3].tolist() == [0.0, 0.0, 0.0] and np.isnan(ours[3]) and ours[4] > 0
    # The failed reward of "b" was not remembered: its second is measured against 2 and itself.
    assert stats.update(["b"], [4.0])[0] == pytest.approx(1 / (1 + 1e-6), rel=1e-14)
    assert np.isnan(stats.update(["c"], [NAN])).all()
    assert stats.update(["d"], [3.0]).tolist() == [0.0], "a batch of one is its own mean"


def test_integer_rewards_are_not_truncated():
    ours = PerPromptStats(4, 1).update(["a", "a", "a"], np.array([1, 2, 4]))
    np.testing.assert_array_equal(ours, PerPromptStats(4, 1).update(["a", "a", "a"], [1.0, 2.0, 4.0]))
    assert (np.abs(ours) % 1 > 0.05).all()
