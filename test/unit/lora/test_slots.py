"""SlotPool alone: which versions may run together, who loses a slot, and that nobody waits for ever."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.lora.slots import PATIENCE, SlotPool


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def pool_of(num_slots: int, *held: int) -> SlotPool:
    pool = SlotPool(num_slots, clock=Clock())
    for version in held:
        assert pool.admits(version)
        pool.take(version)
    return pool


def resident(pool: SlotPool) -> set[int]:
    return set(pool.versions) - {0}


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_b1_admission_counts_every_hold(num_slots: int) -> None:
    """Whatever is taken and released in whatever order, no more versions hold than there are slots."""
    for order in itertools.permutations([0, 1, 1, 2, 3]):
        pool = SlotPool(num_slots)
        held = []
        for version in order:
            others = set(held) - {0}
            fits = version in others or version == 0 or len(others) < num_slots
            assert pool.admits(version) == fits
            if fits:
                pool.take(version)
                held.append(version)
            assert set(held) - {0} <= resident(pool)
        for version in held:
            pool.release(version)
        assert pool.num_holds == 0


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "drop", "move"]), st.integers(0, 5), st.integers(0, 5))))
def test_b1_holders_always_have_a_slot_of_their_own(events: list[tuple[str, int, int]]) -> None:
    pool = SlotPool(2)
    holds = dict.fromkeys(range(6), 0)
    for event, version, other in events:
        if event == "take" and pool.admits(version):
            pool.take(version)
            holds[version] += 1
        elif event == "release" and holds[version]:
            pool.release(version)
            holds[version] -= 1
        elif event == "drop" and version and not holds[version]:
            pool.drop(version)
        elif event == "move" and version != other and pool.move(version, other, holds[version]):
            holds[other] += holds[version]
            holds[version] = 0
        holders = {v for v, count in holds.items() if count and v}
        assert holders <= resident(pool)
        assert len(resident(pool)) == sum(v != 0 for v in pool.versions), "a version is in two slots"
        assert pool.num_holds == sum(count for v, count in holds.items() if v)


def test_d3_the_base_model_needs_no_slot() -> None:
    pool = pool_of(1, 7)
    assert pool.admits(0)
    pool.take(0)
    pool.release(0)
    assert pool.versions == [7] and pool.num_holds == 1
    assert SlotPool(0).admits(0)


def test_an_idle_version_stays_until_its_slot_is_needed() -> None:
    pool = pool_of(2, 1, 2)
    pool.release(1)
    assert pool.versions == [1, 2] and pool.num_evictions == 0
    assert pool.admits(3) and pool.admits(1)
    pool.take(3)
    assert pool.versions == [3, 2] and pool.num_evictions == 1
    assert not pool.admits(1)


def test_the_least_recently_used_idle_version_goes_first() -> None:
    pool = pool_of(3, 1, 2, 3)
    for version in (2, 1, 3):
        pool.release(version)
    pool.take(4)
    assert resident(pool) == {1, 3, 4}
    pool.take(1)
    pool.release(1)
    pool.take(5)
    assert resident(pool) == {1, 4, 5}


def test_fifo_evicts_the_version_placed_first() -> None:
    pool = SlotPool(2, "fifo")
    for version in (1, 2, 1):
        pool.take(version)
        pool.release(version)
    pool.take(3)
    assert resident(pool) == {2, 3}


def test_free_slots_are_used_before_anybody_loses_one() -> None:
    pool = pool_of(2, 1)
    pool.release(1)
    pool.take(2)
    assert pool.versions == [1, 2] and pool.num_evictions == 0


def test_dropping_a_version_frees_its_slot() -> None:
    pool = pool_of(2, 1, 2)
    pool.release(1)
    pool.drop(1)
    pool.drop(9)
    assert pool.versions == [0, 2] and pool.num_evictions == 0


def test_b3_after_patience_the_version_with_fewest_requests_drains() -> None:
    pool = pool_of(2, 1, 1, 2)
    clock = pool.clock
    assert isinstance(clock, Clock)
    pool.age([(0.0, 3)])
    assert pool.admits(1) and pool.admits(2) and not pool.admits(3)
    clock.now = PATIENCE
    pool.age([(0.0, 3)])
    assert pool.draining == {2}
    assert pool.admits(1) and not pool.admits(2) and not pool.admits(3)
    pool.release(2)
    assert pool.admits(3) and not pool.admits(2), "the slot is promised to the starved version"
    pool.take(3)
    pool.age([])
    assert resident(pool) == {1, 3} and not pool.draining


def test_b3_the_oldest_wait_comes_first() -> None:
    pool = pool_of(1, 1)
    clock = pool.clock
    assert isinstance(clock, Clock)
    clock.now = 5.0
    waits = [(0.5, 3), (0.1, 2), (0.2, 3)]
    pool.age(waits)
    assert pool.draining == {1}
    pool.release(1)
    assert pool.admits(2) and not pool.admits(3) and not pool.admits(1) and not pool.admits(4)


def test_b3_nobody_drains_for_requests_that_have_gone() -> None:
    pool = pool_of(1, 1)
    clock = pool.clock
    assert isinstance(clock, Clock)
    clock.now = 5.0
    pool.age([(0.0, 2)])
    assert not pool.admits(1)
    pool.age([])
    assert pool.admits(1)


def test_b3_who_drains_does_not_change_while_it_drains() -> None:
    pool = pool_of(2, 1, 2, 2)
    clock = pool.clock
    assert isinstance(clock, Clock)
    clock.now = 5.0
    pool.age([(0.0, 3)])
    assert pool.draining == {1}
    pool.release(2)
    pool.age([(0.0, 3)])
    assert pool.draining == {1}


@dataclass
class Load:
    """A closed loop: every version has clients that send their next request as soon as one ends."""

    pool: SlotPool
    clock: Clock
    clients: dict[int, int]
    seconds: float
    queue: deque = field(default_factory=deque)
    running: list = field(default_factory=list)
    waits: dict[int, list[float]] = field(default_factory=dict)

    def run(self, until: float) -> None:
        self.queue.extend([v, None, 0.0] for v, count in self.clients.items() for _ in range(count))
        while self.clock.now < until:
            self.clock.now += 0.02
            for end, version in [job for job in self.running if job[0] <= self.clock.now]:
                self.running.remove((end, version))
                self.pool.release(version)
                self.queue.append([version, None, self.clock.now])
            self.pool.age((job[1], job[0]) for job in self.queue if job[1] is not None)
            for job in list(self.queue):
                version, since, arrived = job
                if self.pool.admits(version):
                    self.pool.take(version)
                    self.queue.remove(job)
                    self.running.append((self.clock.now + self.seconds, version))
                    self.waits.setdefault(version, []).append(self.clock.now - arrived)
                elif since is None:
                    job[1] = self.clock.now


@pytest.mark.parametrize("clients", [1, 4])
def test_b3_six_hot_versions_share_three_slots(clients: int) -> None:
    pool = SlotPool(3, clock=Clock())
    assert isinstance(pool.clock, Clock)
    load = Load(pool, pool.clock, dict.fromkeys(range(1, 7), clients), seconds=0.5)
    load.run(until=60.0)
    worst = {version: max(waits) for version, waits in load.waits.items()}
    # Patience, and a drain for each of the three others that may be ahead.
    assert set(worst) == set(range(1, 7))
    assert max(worst.values()) < 2 * PATIENCE + 3 * 0.5 + 0.2
    served = [len(waits) for waits in load.waits.values()]
    assert max(served) < 2 * min(served)


def test_b5_fifty_versions_pass_through_two_slots() -> None:
    pool = SlotPool(2, clock=Clock())
    assert isinstance(pool.clock, Clock)
    load = Load(pool, pool.clock, dict.fromkeys(range(1, 51), 1), seconds=0.1)
    load.run(until=30.0)
    assert set(load.waits) == set(range(1, 51))
    assert pool.num_evictions > 40


@pytest.mark.parametrize(("old", "new", "slots", "moves"), [(1, 2, 1, True), (1, 0, 1, True), (0, 2, 1, False)])
def test_moving_needs_a_slot_only_when_none_is_given_up(old: int, new: int, slots: int, moves: bool) -> None:
    pool = pool_of(slots, 1, 1)
    assert pool.move(old, new, 2) is moves
    assert pool.num_holds == (0 if new == 0 else 2)
    assert (new in pool.versions) is (moves and new != 0) or new == 0
