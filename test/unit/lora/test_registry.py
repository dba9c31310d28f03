"""The registry: names, versions, leases, and upstream's public methods over them."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from unit.fake_scheduler import settle

from sglang.srt.errors import AdapterError
from sglang.srt.lora.lease import TENSOR_SOURCE, AdapterInfo, AdapterVersion, LoRARef, VersionState
from sglang.srt.lora.lora_registry import LoRARegistry

INFO = AdapterInfo(digest="digest", nbytes=8, num_tensors=2, rank=1, source="/a")


class Registry(LoRARegistry):
    """A registry whose freeing is slow: the test says `freed`."""

    def __init__(self) -> None:
        super().__init__(on_free=lambda version: self.freeing.append(version))
        self.freeing: list[AdapterVersion] = []

    def published(self, name: str, path: str | None = None) -> AdapterVersion:
        version = self.new_version(LoRARef(lora_name=name, lora_path=path or f"/{name}"), INFO)
        previous = self.publish(version)
        if previous is not None:
            self.retire(previous)
        return version

    def held(self, name: str, *holders: int):
        (lease,) = self.lease([(name, holders or (1,))])
        return lease


@pytest.fixture
def registry() -> Registry:
    return Registry()


# ---- versions ------------------------------------------------------------------------------------------------------


def test_ids_are_never_used_again(registry):
    versions = [registry.published("a") for _ in range(5)]
    for version in versions[:-1]:
        registry.freed(version)
    versions += [registry.published("a"), registry.published("b")]
    assert [version.version_id for version in versions] == list(range(1, 8))
    assert len({version.ref.lora_id for version in versions}) == 7


def test_a_version_has_no_name_until_it_is_published(registry):
    version = registry.new_version(LoRARef(lora_name="a"), INFO)
    assert version.state is VersionState.STAGING
    assert registry.get("a") is None
    assert registry.named("a") == [version]
    assert registry.serving() == []
    assert registry.publish(version) is None
    assert registry.get("a") is version
    assert version.state is VersionState.SERVING


def test_publishing_over_a_name_hands_back_what_it_meant(registry):
    first = registry.published("a")
    lease = registry.held("a")
    second = registry.new_version(LoRARef(lora_name="a"), INFO)
    assert registry.publish(second) is first
    assert registry.serving() == [second]
    assert first.state is VersionState.SERVING, "the caller retires it"
    registry.retire(first)
    assert registry.get("a") is second, "the name is the new version's"
    lease.release(1)
    assert registry.freeing == [first]


def test_an_unheld_version_is_freed_when_it_retires_and_once(registry):
    version = registry.published("a")
    for _ in range(2):
        registry.retire(version)
    assert version.state is VersionState.FREEING
    assert registry.get("a") is None
    assert registry.versions, "in memory until the back has answered"
    registry.freed(version)
    registry.retire(version)
    assert (version.state, registry.versions, registry.freeing) == (VersionState.GONE, {}, [version])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_held_version_is_freed_by_its_last_holder(registry, order):
    version = registry.published("a")
    leases = [registry.held("a", i) for i in range(3)]
    registry.retire(version)
    for place in order:
        assert version.state is VersionState.RETIRING
        assert not registry.freeing
        leases[place].release(place)
    assert registry.freeing == [version]


def test_a_version_that_was_never_published_can_go_either_way(registry):
    failed, refused = (registry.new_version(LoRARef(lora_name="a"), INFO) for _ in range(2))
    registry.freed(failed)
    registry.retire(refused)
    assert registry.freeing == [refused], "the back has it"
    registry.freed(refused)
    assert not registry.versions


def test_hold_keeps_a_version_and_nothing_else(registry):
    version = registry.published("a")
    with registry.hold(version), registry.hold(version):
        registry.retire(version)
        assert version.num_holders == 2
        assert not registry.freeing
    assert registry.freeing == [version]
    assert registry.double_releases == 0


def test_hold_ends_with_its_block_however_that_ends(registry):
    version = registry.published("a")
    with pytest.raises(KeyError), registry.hold(version):
        raise KeyError
    assert registry.num_leases == 0


def test_switch_moves_every_lease(registry):
    old = registry.published("a")
    leases = [registry.held("a", i) for i in range(3)]
    new = registry.new_version(LoRARef(lora_name="a"), INFO)
    registry.publish(new)
    registry.switch(old, new)
    assert not registry.freeing, "not retired yet"
    registry.retire(old)
    assert registry.freeing == [old]
    assert {lease.version for lease in leases} == {new}
    assert registry.num_leases == new.num_holders == 3
    registry.retire(new)
    for i, lease in enumerate(leases):
        lease.release(i)
    assert registry.freeing == [old, new]


# ---- waiting -------------------------------------------------------------------------------------------------------


async def test_wait_gone_is_over_when_all_are_gone(registry):
    versions = [registry.published(name) for name in "ab"]
    waits = [asyncio.ensure_future(registry.wait_gone(versions)) for _ in range(2)]
    for version in versions:
        assert not any(wait.done() for wait in waits)
        registry.retire(version)
        registry.freed(version)
        await settle()
    assert await asyncio.gather(*waits) == [True, True]
    assert await registry.wait_gone(versions)
    assert not registry._gone


async def test_wait_gone_gives_up_in_time_or_with_its_caller(registry):
    version = registry.published("a")
    assert not await registry.wait_gone([version], timeout=0.0)
    lost = asyncio.ensure_future(registry.wait_gone([version]))
    kept = asyncio.ensure_future(registry.wait_gone([version]))
    await settle()
    lost.cancel()
    await settle()
    registry.retire(version)
    registry.freed(version)
    await settle()
    assert lost.cancelled()
    assert await kept
    assert not registry._gone


# ---- names and leases ----------------------------------------------------------------------------------------------


def test_names_and_exact_paths_resolve(registry):
    version = registry.published("a", "/adapters/a")
    assert registry.resolve("a") is registry.resolve("/adapters/a") is version
    assert (registry.name_of("/adapters/a"), registry.name_of("b")) == ("a", "b")
    with pytest.raises(AdapterError, match=r"not loaded any more: b\nAll loaded adapters: \['a'\]") as caught:
        registry.resolve("b")
    assert caught.value.code == "adapter_not_found"
    registry.retire(version)
    for gone in ("a", "/adapters/a"):
        with pytest.raises(AdapterError):
            registry.resolve(gone)


def test_a_path_that_was_overwritten_means_the_newest_adapter(registry):
    registry.published("v1", "/shm/adapter")
    newest = registry.published("v2", "/shm/adapter")
    assert registry.resolve("/shm/adapter") is newest


def test_a_name_goes_before_a_path(registry):
    registry.published("a", "b")
    named = registry.published("b", "elsewhere")
    assert registry.resolve("b") is named


def test_tensors_have_no_path_to_ask_for(registry):
    registry.published("a", TENSOR_SOURCE)
    with pytest.raises(AdapterError):
        registry.resolve(TENSOR_SOURCE)


@pytest.mark.parametrize("bad", range(3))
def test_leases_are_all_or_none(registry, bad):
    registry.published("a")
    names = ["a", "a", "a"]
    names[bad] = "unknown"
    with pytest.raises(AdapterError):
        registry.lease([(name, [i]) for i, name in enumerate(names)])
    assert registry.num_leases == 0
    leases = registry.lease([("a", [1, 2]), ("a", [3])])
    assert [lease.holders for lease in leases] == [{1, 2}, {3}]
    assert registry.num_leases == 2


def test_oldest_lease(registry):
    registry.published("a")
    assert registry.oldest_lease is None
    leases = [registry.held("a", i) for i in range(2)]
    assert registry.oldest_lease == leases[0].acquired_at
    leases[0].release(0)
    assert registry.oldest_lease == leases[1].acquired_at


def test_the_clock_knows_what_was_published_and_used_last(registry):
    a, b = registry.published("a"), registry.published("b")
    registry.held("a")
    assert a.published < b.published == b.last_used < a.last_used


# ---- upstream's public methods -------------------------------------------------------------------------------------


async def test_upstream_life_of_an_adapter():
    ref = LoRARef(lora_name="a", lora_path="/a", pinned=True)
    registry = LoRARegistry([ref])
    assert (registry.num_registered_loras, registry.get_all_adapters()) == (1, {"a": ref})
    assert registry.serving()[0].pinned
    with pytest.raises(ValueError, match="already registered"):
        await registry.register(LoRARef(lora_name="a"))
    await registry.register(LoRARef(lora_name="b"))
    assert list(registry.get_all_adapters()) == ["a", "b"]
    first, second = await registry.acquire("a"), await registry.acquire("a")
    assert first == second == ref.lora_id
    assert await registry.unregister("a") == ref.lora_id
    unload = asyncio.ensure_future(registry.wait_for_unload(ref.lora_id))
    with pytest.raises(AdapterError):
        await registry.acquire("a")
    for _ in range(2):
        await settle()
        assert not unload.done()
        await registry.release(ref.lora_id)
    await unload
    assert registry.num_registered_loras == 1
    with pytest.raises(ValueError, match=r"LoRA with name a does not exist. Loaded LoRAs: \['b'\]"):
        await registry.unregister("a")
    await registry.wait_for_unload(ref.lora_id)
    assert registry.double_releases == 0


async def test_upstream_batches_with_base_rows():
    registry = LoRARegistry([LoRARef("id-a", "a"), LoRARef("id-b", "b")])
    ids = await registry.acquire(["a", None, "b", "a"])
    assert ids == ["id-a", None, "id-b", "id-a"]
    assert registry.num_leases == 3
    await registry.release(ids)
    assert registry.num_leases == 0
    with pytest.raises(AdapterError):
        await registry.acquire(["a", "unknown", "b"])
    assert registry.num_leases == 0


async def test_A22_a_second_release_is_counted_and_harmless():
    registry = LoRARegistry([LoRARef("id-a", "a")])
    await registry.release(None)
    assert registry.double_releases == 0
    held = await registry.acquire("a")
    await registry.acquire("a")
    await registry.release([held, held, held, "never-heard-of", None])
    assert (registry.num_leases, registry.double_releases) == (0, 2)
    await registry.unregister("a")
    await registry.release(held)
    assert registry.double_releases == 3


async def test_upstream_release_after_a_switch(registry):
    old = registry.published("a")
    held = await registry.acquire("a")
    new = registry.new_version(LoRARef(lora_name="a"), INFO)
    registry.publish(new)
    registry.switch(old, new)
    registry.retire(old)
    await registry.release(held)
    assert registry.num_leases == 0
    assert registry.double_releases == 0


async def test_A12_look_up_and_count_are_one_step_in_every_interleaving():
    """10,000 rounds of acquire against unregister: whoever gets an id holds a version that is not freed."""
    freed: list[AdapterVersion] = []
    registry = LoRARegistry(on_free=lambda version: (freed.append(version), registry.freed(version)))

    async def use() -> None:
        try:
            held = await registry.acquire("a")
        except AdapterError:
            return
        await asyncio.sleep(0)
        assert held not in [version.ref.lora_id for version in freed]
        await registry.release(held)

    async def replace() -> None:
        await asyncio.sleep(0)
        await registry.wait_for_unload(await registry.unregister("a"))

    for _ in range(1_000):
        await registry.register(LoRARef(lora_name="a"))
        await asyncio.gather(*(use() for _ in range(5)), replace(), *(use() for _ in range(4)))
    assert len(freed) == 1_000
    assert (registry.num_leases, registry.double_releases, registry.versions) == (0, 0, {})
