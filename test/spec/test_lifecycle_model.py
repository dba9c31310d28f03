"""Every reachable state of the protocol, and the proof that the check would notice if the protocol were broken."""

from __future__ import annotations

import pytest
from spec.lifecycle_model import BROKEN, Model, Violation, explore, has_cycle

REASONS = {
    "release at disconnect": "freed under a live request",
    "release at abort": "released twice",
    "no release after abort": "a lease has leaked",
    "publish before staged": "the name means a version that does not serve",
    "free at retire": "freed under a live request",
    "ids are reused": "used twice",
    "switch applied later": "a token of version 1 is told to be of version 0",
    "leases do not move": "a token of version 1 is told to be of version 0",
    "no hold": "freed under a live request",
    "look-up and count apart": "which is not staged",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "at_least"),
    [({}, 200_000), ({"versions": 3, "requests": 1, "unloads": 2}, 30_000)],
    ids=["two versions and requests", "three versions"],
)
def test_every_state_keeps_the_promises_and_every_fair_run_ends_clean(size, at_least):
    explored = explore(Model(**size))
    assert explored.states > at_least
    assert explored.ends > 500


def test_every_way_to_break_the_protocol_is_listed():
    assert set(REASONS) == set(BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_protocol_is_caught(broken):
    with pytest.raises(Violation, match=REASONS[broken]):
        explore(Model(broken=frozenset([broken])))


def test_cycles_are_found():
    assert not has_cycle([[1, 2], [2], []])
    assert has_cycle([[1], [2], [1]])
