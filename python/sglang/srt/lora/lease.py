"""Adapter versions and the leases that keep them in memory.

A lease is made by `LoRARegistry` in one step with the look-up of the name, belongs to the records of one logical
request (n samples share it), and is released by whoever closes a record. Plain integers and sets on the event-loop
thread: nothing here waits, so nothing can be interrupted half-way.
Invariants: a version's leases are exactly those that still have holders; a release that has nothing to release is
counted and changes nothing; the state of a version only moves forward.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import uuid4

TENSOR_SOURCE = "__tensor__"
"""Upstream's path of an adapter that came as tensors; not one that a request can ask for."""


@dataclass
class LoRARef:
    """A loaded adapter under upstream's public name; `lora_id` is new for every load, so it names one version."""

    lora_id: str = field(default_factory=lambda: uuid4().hex)
    lora_name: str | None = None
    lora_path: str | None = None
    pinned: bool | None = None


class VersionState(enum.IntEnum):
    """Life of a version; only SERVING takes new requests, only GONE is out of memory."""

    STAGING = 0
    SERVING = 1
    RETIRING = 2
    FREEING = 3
    GONE = 4


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known of an adapter's bytes.

    Fields:
        digest: sha256 of names, shapes, types and values; equal digests mean equal adapters.
        rank: the largest of its modules; source: the path, or how its tensors came.
    """

    digest: str
    nbytes: int
    num_tensors: int
    rank: int
    source: str


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """One immutable adapter. `version_id` is its number on the wire, never reused for other bytes.

    Fields:
        clock: when it was published, and when it was last asked for, as counts of the registry's events.
    """

    version_id: int
    ref: LoRARef
    info: AdapterInfo
    state: VersionState = VersionState.STAGING
    leases: set[Lease] = field(default_factory=set)
    published: int = 0
    last_used: int = 0

    @property
    def name(self) -> str:
        """The name it was loaded under."""
        return self.ref.lora_name or ""

    @property
    def pinned(self) -> bool:
        """Whether eviction must leave it alone."""
        return bool(self.ref.pinned)

    @property
    def num_holders(self) -> int:
        """Sequences that run, or will run, on it."""
        return sum(len(lease.holders) for lease in self.leases)


class Lease:
    """The hold of one logical request on one version.

    Attributes:
        version: what its holders run on; another one after a switch.
        holders: keys of the sequences that have not ended.
    """

    __slots__ = ("acquired_at", "holders", "version", "_registry")

    def __init__(self, registry: LeaseOwner, version: AdapterVersion, holders: Iterable[int]) -> None:
        self.version = version
        self.holders = set(holders)
        self.acquired_at = time.monotonic()
        self._registry = registry
        version.leases.add(self)

    def release(self, holder: int) -> bool:
        """One sequence has ended; False, and counted as a bug, when it had been released before."""
        if holder not in self.holders:
            self._registry.double_releases += 1
            return False
        self.holders.remove(holder)
        if not self.holders:
            self.version.leases.remove(self)
            self._registry.lease_ended(self.version)
        return True

    def move(self, version: AdapterVersion) -> None:
        """Hold another version instead: a switch."""
        old, self.version = self.version, version
        old.leases.remove(self)
        version.leases.add(self)
        self._registry.lease_ended(old)


class LeaseOwner:
    """What a lease tells its registry."""

    double_releases: int = 0
    """Releases of what had been released already; anything but 0 is a bug."""

    def lease_ended(self, version: AdapterVersion) -> None:
        """A lease on `version` has gone."""
        raise NotImplementedError
