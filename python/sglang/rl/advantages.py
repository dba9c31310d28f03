"""Rewards to advantages: how much better an attempt was than the others at its problem.

Called by `train` on rank 0 once a step; plain numbers in, plain numbers out. One advantage per attempt, of which every
token gets the same (outcome rewards; Shao et al. 2024, "DeepSeekMath", section 4.1).
Invariants: nothing is NaN; equal rewards get exactly 0 from their group's mean, not a rounding error that a division by
a tiny deviation has blown up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang.rl.config import AdvantageSection
from sglang.rl.samples import Group

EPSILON = 1e-6
"""Added to deviations: differences of rewards far below it count for little."""

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Advantages:
    """Of a step.

    Fields:
        values: one list per group with a number per attempt; zeros for groups that are left out.
        kept: per group, whether it is trained on.
    """

    values: list[list[float]]
    kept: list[bool]


def compute_advantages(groups: Sequence[Group], section: AdvantageSection) -> Advantages:
    """Advantages of all attempts of a step.

    In this order: the group's mean off, divided by the group's standard deviation (of a sample, n - 1), groups of equal
    rewards left out, whitened over what is kept. A group of one attempt has no deviation: it is not divided, and is
    left out only when its mean is taken off, which leaves nothing of it.

    Raises:
        ValueError: a reward is NaN or infinite; the message names the problem.
    """
    rewards = [_rewards(group) for group in groups]
    values = [_of_group(reward, section) for reward in rewards]
    kept = [not (section.filter_zero and _says_nothing(reward, section)) for reward in rewards]
    values = [value if keep else np.zeros_like(value) for value, keep in zip(values, kept, strict=True)]
    if section.batch_norm:
        values = _whiten(values, kept)
    return Advantages([value.tolist() for value in values], kept)


def _rewards(group: Group) -> _Array:
    rewards = np.array([sample.reward for sample in group.samples], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(
            f"problem {group.problem.key!r}: the reward of attempt {bad[0]} is {rewards[bad[0]]}; "
            "a task must give every attempt a finite number"
        )
    return rewards


def _of_group(rewards: _Array, section: AdvantageSection) -> _Array:
    equal = _all_equal(rewards)
    values = rewards
    if section.group_mean:
        # The mean of equal numbers is not always that number.
        values = np.zeros_like(rewards) if equal else rewards - rewards.mean()
    if section.group_std and not equal:
        values = values / (rewards.std(ddof=1) + EPSILON)
    return values


def _says_nothing(rewards: _Array, section: AdvantageSection) -> bool:
    return _all_equal(rewards) and (len(rewards) != 1 or section.group_mean)


def _all_equal(rewards: _Array) -> bool:
    return bool((rewards == rewards[:1]).all())


def _whiten(values: Sequence[_Array], kept: Sequence[bool]) -> list[_Array]:
    """Mean 0 and deviation 1 over all kept attempts; of fewer than two, or of equal ones, all 0."""
    chosen = [value for value, keep in zip(values, kept, strict=True) if keep]
    together = np.concatenate(chosen) if chosen else np.zeros(0)
    if _all_equal(together):
        return [np.zeros_like(value) for value in values]
    mean, deviation = together.mean(), together.std() + EPSILON
    return [(value - mean) / deviation if keep else value for value, keep in zip(values, kept, strict=True)]
