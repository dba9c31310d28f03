"""Leases: the holders of one logical request, each released once, on a version that may be switched under them."""

from __future__ import annotations

import pytest

from sglang.srt.lora.lease import AdapterInfo, AdapterVersion, Lease, LeaseOwner, LoRARef


class Owner(LeaseOwner):
    """Writes down whose lease ended, and how many leases were left then."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, int]] = []

    def lease_ended(self, version: AdapterVersion) -> None:
        self.ended.append((version.version_id, len(version.leases)))


def make_version(version_id: int) -> AdapterVersion:
    return AdapterVersion(version_id, LoRARef(lora_name="a"), AdapterInfo("digest", 8, 2, 1, "/a"))


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_holders_are_counted_and_the_last_one_ends_the_lease(owner):
    version = make_version(1)
    lease = Lease(owner, version, [5, 6, 7])
    assert (len(version.leases), version.num_holders) == (1, 3)
    assert lease.release(6)
    assert lease.release(5)
    assert (len(version.leases), version.num_holders) == (1, 1)
    assert not owner.ended
    assert lease.release(7)
    assert owner.ended == [(1, 0)]
    assert (version.leases, version.num_holders) == (set(), 0)
    assert owner.double_releases == 0


@pytest.mark.parametrize("left", [[5], [5, 6]], ids=["ended", "shared"])
def test_a_second_release_changes_nothing_and_is_counted(owner, left):
    version = make_version(1)
    lease = Lease(owner, version, left)
    assert lease.release(5)
    before = (set(lease.holders), set(version.leases), list(owner.ended))
    assert not lease.release(5)
    assert not lease.release(99), "nor one that never held it"
    assert (lease.holders, version.leases, owner.ended) == before
    assert owner.double_releases == 2


def test_a_move_takes_every_holder_along(owner):
    old, new = make_version(1), make_version(2)
    lease, other = Lease(owner, old, [5, 6]), Lease(owner, old, [7])
    lease.release(5)
    lease.move(new)
    assert owner.ended == [(1, 1)], "told, although another lease is left"
    assert (old.leases, new.leases, lease.version) == ({other}, {lease}, new)
    assert (old.num_holders, new.num_holders) == (1, 1)
    lease.release(6)
    assert owner.ended == [(1, 1), (2, 0)]


def test_owners_count_apart():
    one, two = Owner(), Owner()
    Lease(one, make_version(1), [1]).release(2)
    assert (one.double_releases, two.double_releases) == (1, 0)
