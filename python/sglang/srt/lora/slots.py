"""Which adapter versions may run together: a fixed number of slots, handed out by the planner. No torch.

A slot belongs to a version while live requests hold it, and stays with it, warm, until another version needs it. The
base model needs no slot. The planner asks `admits` before it starts a request, so a step never names more versions
than there are slots; a request that gets none is passed over, and others behind it may run.

More hot versions than slots stay fair by age: when a request has been passed over for longer than PATIENCE, and no
slot is idle, the resident version with the fewest live requests takes no new ones until it has drained.

Invariants: holds are counted per live request, and a version with holds has exactly one slot; idle slots promised to
versions that have waited too long are not given to others, the oldest wait first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Literal

from sglang.srt.managers.io_struct.wire import BASE_VERSION

PATIENCE = 1.0
"""Seconds a request is passed over for others of resident versions before one of those has to drain."""


class SlotPool:
    """Slots by version.

    Args:
        num_slots: 0 where only the base model is served; then nothing here costs anything.
        policy: which idle version loses its slot: the one used (lru) or placed (fifo) the longest time ago.
        clock: seconds.
    """

    def __init__(
        self, num_slots: int, policy: Literal["lru", "fifo"] = "lru", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.versions: list[int] = [BASE_VERSION] * num_slots
        """The version in each slot, BASE_VERSION for none."""
        self.num_evictions = 0
        self._lru = policy == "lru"
        self._stamps: dict[int, int] = {}
        self._ticks = itertools.count()
        self._holds: dict[int, int] = {}
        self._starved: list[int] = []
        self._draining: set[int] = set()

    @property
    def num_holds(self) -> int:
        """Live requests that hold a slot."""
        return sum(self._holds.values())

    @property
    def draining(self) -> frozenset[int]:
        """Resident versions that take no new request now."""
        return frozenset(self._draining)

    def age(self, passed_over: Iterable[tuple[float, int]]) -> None:
        """Decide who may take slots until the next call.

        Args:
            passed_over: (time of the first refusal, version) of each waiting request that `admits` has refused.
        """
        if not self.versions:
            return
        now = self.clock()
        overdue = sorted((since, version) for since, version in passed_over if now - since >= PATIENCE)
        # A version that still runs has its slot; its refused requests count from the moment it has drained.
        self._starved = [v for v in dict.fromkeys(v for _, v in overdue) if v not in self._holds]
        short = max(0, len(self._starved) - self._num_idle)
        cheapest_first = sorted(self._holds, key=lambda v: (v not in self._draining, self._holds[v], self._stamps[v]))
        self._draining = set(cheapest_first[:short])

    def admits(self, version: int) -> bool:
        """Whether one more request of this version may start now."""
        if version == BASE_VERSION:
            return True
        if version in self._holds:
            return version not in self._draining
        ahead = self._starved.index(version) if version in self._starved else len(self._starved)
        return self._num_idle > ahead

    def take(self, version: int) -> None:
        """Count a request in; `admits` has said yes."""
        if version == BASE_VERSION:
            return
        if version not in self._holds:
            self._place(version)
            if version in self._starved:
                self._starved.remove(version)
        self._holds[version] = self._holds.get(version, 0) + 1
        self._touch(version)

    def release(self, version: int, count: int = 1) -> None:
        """Count requests out; the version keeps its slot until another one needs it."""
        if version == BASE_VERSION:
            return
        self._holds[version] -= count
        assert self._holds[version] >= 0, f"adapter version {version} released more often than taken"
        if not self._holds[version]:
            del self._holds[version]
        self._touch(version)

    def move(self, old: int, new: int, count: int) -> bool:
        """Hand `count` holds of one version to another; False, and no change, when there is no slot for it."""
        if not count:
            return True
        leaves = old != BASE_VERSION and self._holds.get(old) == count
        if new != BASE_VERSION and new not in self._holds and not (leaves or self._num_idle):
            return False
        self.release(old, count)
        for _ in range(count):
            self.take(new)
        return True

    def drop(self, version: int) -> None:
        """Forget a version that nobody holds; its slot is free."""
        assert version not in self._holds, f"adapter version {version} is dropped while requests hold it"
        if version in self.versions:
            self.versions[self.versions.index(version)] = BASE_VERSION
        self._stamps.pop(version, None)

    @property
    def _num_idle(self) -> int:
        return len(self.versions) - len(self._holds)

    def _touch(self, version: int) -> None:
        if self._lru:
            self._stamps[version] = next(self._ticks)

    def _place(self, version: int) -> None:
        """Give a version a slot: its own, else a free one, else that of the idle version that comes first."""
        if version in self.versions:
            return
        idle = [v for v in self.versions if v not in self._holds]
        assert idle, f"no slot for adapter version {version}: admits was not asked"
        loser = BASE_VERSION if BASE_VERSION in idle else min(idle, key=lambda v: self._stamps[v])
        if loser != BASE_VERSION:
            self.num_evictions += 1
            del self._stamps[loser]
        self.versions[self.versions.index(loser)] = version
        self._stamps[version] = next(self._ticks)
