"""Advantages: what a group's rewards say about each attempt."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.rl.advantages import compute_advantages
from sglang.rl.config import AdvantageSection
from sglang.rl.samples import Group, Problem, Sample

NOTHING = AdvantageSection(group_mean=False, group_std=False, batch_norm=False, filter_zero=False)


def group(*rewards, key="p"):
    return Group(Problem("", None, key), [Sample([1], reward=reward) for reward in rewards])


def test_the_default_is_mean_and_deviation_of_the_group():
    found = compute_advantages([group(1.0, 0.0, 0.0, 0.0)], AdvantageSection())
    assert found.values[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-4)
    assert found.kept == [True]


def test_rewards_pass_through_when_everything_is_off():
    found = compute_advantages([group(3.0, 3.0), group(1.0)], NOTHING)
    assert found.values == [[3.0, 3.0], [1.0]]
    assert found.kept == [True, True]


def test_the_mean_alone():
    found = compute_advantages([group(1.0, 3.0)], AdvantageSection(group_std=False))
    assert found.values == [[-1.0, 1.0]]


def test_groups_of_equal_rewards_are_left_out_or_exactly_zero():
    groups = [group(0.1, 0.1, 0.1), group(0.0, 1.0), group(1.0, 1.0)]
    found = compute_advantages(groups, AdvantageSection())
    assert found.kept == [False, True, False]
    assert found.values[0] == [0.0, 0.0, 0.0]
    found = compute_advantages(groups, AdvantageSection(filter_zero=False))
    assert found.kept == [True, True, True]
    assert found.values[0] == [0.0, 0.0, 0.0]


def test_a_group_of_one_has_no_deviation():
    assert compute_advantages([group(2.0)], AdvantageSection()).kept == [False]
    found = compute_advantages([group(2.0)], AdvantageSection(group_mean=False))
    assert found.values == [[2.0]]
    assert found.kept == [True]


def test_whitening_is_over_what_is_kept():
    section = AdvantageSection(group_mean=False, group_std=False, batch_norm=True)
    found = compute_advantages([group(1.0, 2.0), group(9.0, 9.0), group(3.0, 4.0)], section)
    assert found.kept == [True, False, True]
    assert found.values[1] == [0.0, 0.0]
    kept = found.values[0] + found.values[2]
    assert np.mean(kept) == pytest.approx(0.0, abs=1e-9)
    assert np.std(kept) == pytest.approx(1.0, rel=1e-4)


def test_whitening_of_nothing_and_of_equals():
    section = AdvantageSection(group_mean=False, group_std=False, batch_norm=True, filter_zero=False)
    assert compute_advantages([], section).values == []
    assert compute_advantages([group(5.0), group(5.0)], section).values == [[0.0], [0.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_names_the_problem(bad):
    with pytest.raises(ValueError, match=r"'sum-17': the reward of attempt 1 is (nan|inf)"):
        compute_advantages([group(1.0, 0.0), group(0.0, bad, key="sum-17")], AdvantageSection())


@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=6), max_size=6),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_always_one_finite_number_per_attempt(rewards, flags):
    mean, std, batch, drop = flags
    section = AdvantageSection(group_mean=mean, group_std=std, batch_norm=batch, filter_zero=drop)
    found = compute_advantages([group(*each) for each in rewards], section)
    assert [len(value) for value in found.values] == [len(each) for each in rewards]
    assert all(math.isfinite(number) for value in found.values for number in value)
    assert len(found.kept) == len(rewards)
