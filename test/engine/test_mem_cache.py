"""Page allocator, radix cache, and KVManager: pages are conserved whatever sequences do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang.srt.mem_cache.kv_manager import KVManager, SequenceKV
from sglang.srt.mem_cache.page_allocator import PageAllocator
from sglang.srt.mem_cache.radix_cache import Namespace, RadixCache

CPU = torch.device("cpu")
BASE = Namespace(0)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def manager(pages: int = 16, page_size: int = 1, slots: int = 4, enable_cache: bool = True) -> KVManager:
    return KVManager(pages, page_size, slots, 64, CPU, enable_cache)


def start(kv: KVManager, ids: np.ndarray, namespace: Namespace = BASE) -> SequenceKV:
    seq = kv.open(namespace, kv.match(namespace, ids[:-1]))
    assert seq is not None
    assert kv.reserve(seq, len(ids))
    return seq


def test_allocator_hands_out_each_page_once() -> None:
    allocator = PageAllocator(5)
    a, b = allocator.alloc(2), allocator.alloc(3)
    assert a is not None and b is not None
    assert sorted([*a, *b]) == [0, 1, 2, 3, 4]
    assert allocator.alloc(1) is None
    allocator.free(a)
    assert allocator.num_free == 2
    with pytest.raises(AssertionError, match="double free"):
        allocator.free(a)


def test_match_stops_where_tokens_differ_and_splits_there() -> None:
    cache = RadixCache(page_size=1)
    cache.insert(BASE, tokens(1, 2, 3, 4), tokens(10, 11, 12, 13))
    match = cache.match(BASE, tokens(1, 2, 9))
    assert match.pages.tolist() == [10, 11]
    assert cache.insert(BASE, tokens(1, 2, 9), tokens(20, 21, 22)) == 2
    assert cache.match(BASE, tokens(1, 2, 9)).pages.tolist() == [10, 11, 22]
    assert cache.match(BASE, tokens(1, 2, 3, 4, 5)).pages.tolist() == [10, 11, 12, 13]
    assert cache.evictable_pages == 5


def test_namespaces_share_nothing() -> None:
    cache = RadixCache(page_size=1)
    cache.insert(Namespace(1), tokens(1, 2), tokens(5, 6))
    assert not len(cache.match(Namespace(2), tokens(1, 2)).pages)
    assert not len(cache.match(Namespace(1, "salt"), tokens(1, 2)).pages)
    assert len(cache.match(Namespace(1), tokens(1, 2)).pages) == 2


def test_pages_are_matched_whole() -> None:
    cache = RadixCache(page_size=4)
    cache.insert(BASE, np.arange(8, dtype=np.int32), tokens(3, 4))
    assert cache.match(BASE, np.arange(7, dtype=np.int32)).pages.tolist() == [3]
    assert cache.match(BASE, np.arange(3, dtype=np.int32)).pages.tolist() == []


def test_eviction_takes_least_recently_used_unlocked_leaves() -> None:
    cache = RadixCache(page_size=1)
    cache.insert(BASE, tokens(1, 2), tokens(0, 1))
    cache.insert(BASE, tokens(1, 3), tokens(9, 2))
    cache.insert(BASE, tokens(7), tokens(3))
    locked = cache.match(BASE, tokens(1, 3)).node
    cache.lock(locked)
    assert cache.evict(1).tolist() == [1]
    assert cache.evict(10).tolist() == [3]
    assert (cache.evictable_pages, cache.locked_pages) == (0, 2)
    cache.unlock(locked)
    assert sorted(cache.evict(10).tolist()) == [0, 2]


def test_a_finished_sequence_is_found_by_the_next() -> None:
    kv = manager()
    seq = start(kv, tokens(1, 2, 3))
    kv.close(seq, tokens(1, 2, 3))
    again = start(kv, tokens(1, 2, 3, 4))
    assert again.num_shared == 3
    assert kv.used == 4


def test_two_sequences_that_computed_the_same_prompt_keep_one_copy() -> None:
    kv = manager()
    first, second = start(kv, tokens(1, 2, 3)), start(kv, tokens(1, 2, 3))
    assert kv.used == 6
    kv.share(first, tokens(1, 2, 3))
    kv.share(second, tokens(1, 2, 3))
    assert kv.used == 3
    assert kv.locations(first, 0, 3).tolist() == kv.locations(second, 0, 3).tolist()


def test_reserve_evicts_and_refuses_without_change() -> None:
    kv = manager(pages=4)
    kv.close(start(kv, tokens(1, 2, 3)), tokens(1, 2, 3))
    seq = start(kv, tokens(8, 9))
    assert kv.reserve(seq, 4)
    assert not kv.reserve(seq, 5)
    assert (kv.used, seq.num_pages) == (4, 4)


def test_e2_a_dropped_version_leaves_no_page() -> None:
    kv = manager()
    for namespace in (Namespace(1), Namespace(1, "salt"), BASE):
        kv.close(start(kv, tokens(1, 2, 3), namespace), tokens(1, 2, 3))
    kv.drop_version(1)
    assert kv.cache.versions == {0} and kv.cache.num_condemned == 0
    assert kv.allocator.num_free == 13 and kv.cache.evictable_pages == 3
    assert len(kv.match(Namespace(1), tokens(1, 2, 3)).pages) == 0


def test_pages_of_a_dropped_version_go_with_their_last_reader() -> None:
    kv = manager()
    kv.close(start(kv, tokens(1, 2, 3, 4), Namespace(1)), tokens(1, 2, 3, 4))
    seq = start(kv, tokens(1, 2, 9), Namespace(1))
    seq.private = True
    kv.drop_version(1)
    assert kv.cache.num_condemned == 1 and kv.cache.locked_pages == 2 and kv.cache.evictable_pages == 0
    assert kv.reserve(seq, 14) and not kv.reserve(seq, 17), "its own pages are not evicted under it"
    kv.close(seq, tokens(1, 2, 9))
    assert kv.allocator.num_free == 16 and kv.cache.num_condemned == 0


def test_private_kv_is_never_shared() -> None:
    kv = manager()
    seq = start(kv, tokens(1, 2, 3))
    kv.share(seq, tokens(1, 2))
    seq.private = True
    kv.share(seq, tokens(1, 2, 3))
    kv.close(seq, tokens(1, 2, 3))
    assert kv.match(BASE, tokens(1, 2, 3)).pages.tolist() == [0, 1]
    assert kv.allocator.num_free == 14


def test_disabled_cache_keeps_nothing() -> None:
    kv = manager(enable_cache=False)
    kv.close(start(kv, tokens(1, 2, 3)), tokens(1, 2, 3))
    assert kv.allocator.num_free == 16
    assert start(kv, tokens(1, 2, 3)).num_shared == 0


def test_locations_follow_pages() -> None:
    kv = manager(pages=8, page_size=4)
    seq = start(kv, np.arange(6, dtype=np.int32))
    pages = kv.table.host[seq.slot, :2]
    assert kv.locations(seq, 3, 6).tolist() == [pages[0] * 4 + 3, pages[1] * 4, pages[1] * 4 + 1]


class KVMachine(RuleBasedStateMachine):
    """Sequences over a tiny alphabet (so prefixes collide) open, grow, share and close in any order."""

    page_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.kv = manager(pages=24, page_size=self.page_size, slots=5)
        self.live: list[tuple[SequenceKV, np.ndarray]] = []
        self.truth: dict[int, tuple[Namespace, tuple[int, ...]]] = {}

    def _record(self, seq: SequenceKV, ids: np.ndarray, first: int) -> None:
        """The 'model' writes KV: each row remembers the whole prefix it was computed from."""
        for position, row in zip(range(first, len(ids)), self.kv.locations(seq, first, len(ids)).tolist(), strict=True):
            self.truth[row] = (seq.namespace, tuple(ids[: position + 1].tolist()))

    @rule(ids=st.lists(st.integers(0, 2), min_size=1, max_size=10), version=st.integers(0, 1))
    def open(self, ids: list[int], version: int) -> None:
        prompt, namespace = tokens(*ids), Namespace(version)
        seq = self.kv.open(namespace, self.kv.match(namespace, prompt[:-1]))
        if seq is None:
            assert len(self.live) == 5
            return
        if not self.kv.reserve(seq, len(prompt)):
            self.kv.close(seq, prompt[:0])
            return
        self._record(seq, prompt, seq.num_shared * self.page_size)
        self.live.append((seq, prompt))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 2))
    def grow(self, data: st.DataObject, token: int) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        seq, ids = self.live[index]
        if len(ids) < 20 and self.kv.reserve(seq, len(ids) + 1):
            grown = np.append(ids, np.int32(token)).astype(np.int32)
            self._record(seq, grown, len(ids))
            self.live[index] = (seq, grown)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        seq, ids = data.draw(st.sampled_from(self.live))
        self.kv.share(seq, ids)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        seq, ids = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.kv.close(seq, ids)

    @rule()
    def clear(self) -> None:
        self.kv.clear_cache()

    @invariant()
    def every_sequence_reads_its_own_kv(self) -> None:
        for seq, ids in self.live:
            for position, row in enumerate(self.kv.locations(seq, 0, len(ids)).tolist()):
                assert self.truth[row] == (seq.namespace, tuple(ids[: position + 1].tolist()))

    @invariant()
    def pages_are_conserved(self) -> None:
        kv = self.kv
        owned = sum(seq.num_pages - seq.num_shared for seq, _ in self.live)
        tree = kv.cache.evictable_pages + kv.cache.locked_pages
        assert kv.allocator.num_free + tree + owned == kv.allocator.num_pages
        if not self.live:
            assert kv.cache.locked_pages == 0 and kv.used == 0


class PagedKVMachine(KVMachine):
    page_size = 4


KVMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
PagedKVMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestKVMachine = KVMachine.TestCase
TestPagedKVMachine = PagedKVMachine.TestCase
