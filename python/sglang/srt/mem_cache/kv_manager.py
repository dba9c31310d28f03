"""KV memory of every sequence: slots, pages, and what they share through the prefix cache.

The one owner of PageAllocator, ReqTable and RadixCache; admission and the scheduler call it with token counts and get
yes or no. A sequence's pages are [shared with the tree | its own]; `SequenceKV` records the border.

    pages:   0 ........ num_shared ........ num_pages
             |  locked in the tree | owned by the sequence |

Invariants (checked by managers/invariants when idle): free + tree + owned by sequences = all pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sglang.srt.mem_cache.page_allocator import PageAllocator, Pages
from sglang.srt.mem_cache.radix_cache import Match, Namespace, Node, RadixCache, Tokens
from sglang.srt.mem_cache.req_table import ReqTable


@dataclass(slots=True)
class SequenceKV:
    """What one sequence holds: its slot, its page counts, and the tree node that its shared prefix ends at.

    Fields:
        private: its KV is no one version's any more, so none of it may enter the prefix cache.
    """

    slot: int
    namespace: Namespace
    node: Node
    num_shared: int
    num_pages: int
    private: bool = False


class KVManager:
    """Allocates, shares and frees KV pages.

    Args:
        num_pages, page_size: size of the pool in pages, and of a page in tokens.
        max_slots: sequences in memory at once.
        max_tokens: tokens of the longest sequence.
    """

    def __init__(
        self, num_pages: int, page_size: int, max_slots: int, max_tokens: int, device: torch.device, enable_cache: bool
    ) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size, enable_cache)
        self.table = ReqTable(max_slots, -(-max_tokens // page_size), page_size, device, spare_page=num_pages)

    @property
    def capacity(self) -> int:
        """Tokens the pool holds."""
        return self.allocator.num_pages * self.page_size

    @property
    def available(self) -> int:
        """Tokens that could be allocated now, evicting what nobody uses."""
        return (self.allocator.num_free + self.cache.evictable_pages) * self.page_size

    @property
    def used(self) -> int:
        """Tokens of pages that live sequences hold (shared ones counted once)."""
        return self.capacity - self.available

    def match(self, namespace: Namespace, tokens: Tokens) -> Match:
        """Longest cached prefix of `tokens`."""
        return self.cache.match(namespace, tokens)

    def open(self, namespace: Namespace, match: Match) -> SequenceKV | None:
        """Start a sequence on a matched prefix (locked from here on); None when no slot is free."""
        if not self.table.num_free:
            return None
        self.cache.lock(match.node)
        slot = self.table.take()
        self.table.write(slot, 0, match.pages)
        return SequenceKV(slot, namespace, match.node, len(match.pages), len(match.pages))

    def missing_pages(self, kv: SequenceKV, num_tokens: int) -> int:
        """Pages to allocate before the sequence can hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.page_size) - kv.num_pages)

    def reserve(self, kv: SequenceKV, num_tokens: int) -> bool:
        """Give the sequence room for `num_tokens` tokens, evicting if needed; False (and no change) when impossible."""
        need = self.missing_pages(kv, num_tokens)
        if not need:
            return True
        pages = self._alloc(need)
        if pages is None:
            return False
        self.table.write(kv.slot, kv.num_pages, pages)
        kv.num_pages += need
        return True

    def locations(self, kv: SequenceKV, start: int, end: int) -> np.ndarray:
        """int64 pool rows of the sequence's tokens [start, end)."""
        row = self.table.host[kv.slot]
        if self.page_size == 1:
            return row[start:end].astype(np.int64)
        tokens = np.arange(start, end)
        return row[tokens // self.page_size].astype(np.int64) * self.page_size + tokens % self.page_size

    def share(self, kv: SequenceKV, tokens: Tokens) -> None:
        """Put the KV of `tokens` (the sequence's first ones, computed or about to be) into the prefix cache.

        Pages that turn out to be cached already are swapped for the tree's and freed.
        """
        if not self.cache.enabled or kv.private:
            return
        count = len(tokens) // self.page_size
        if count <= kv.num_shared:
            return
        tokens = tokens[: count * self.page_size]
        own = self.table.host[kv.slot, :count].copy()
        existing = self.cache.insert(kv.namespace, tokens, own)
        self.allocator.free(own[kv.num_shared : existing])
        match = self.cache.match(kv.namespace, tokens)
        self.table.write(kv.slot, kv.num_shared, match.pages[kv.num_shared :])
        self.cache.lock(match.node)
        self.cache.unlock(kv.node)
        kv.node, kv.num_shared = match.node, count

    def close(self, kv: SequenceKV, tokens: Tokens) -> None:
        """End a sequence; the KV of `tokens` (its first ones, computed) stays cached as far as full pages go."""
        self.share(kv, tokens)
        self.cache.unlock(kv.node)
        self.allocator.free(self.table.host[kv.slot, kv.num_shared : kv.num_pages].copy())
        self.allocator.free(self.cache.sweep())
        self.table.give_back(kv.slot)

    def drop_version(self, version_id: int) -> None:
        """Forget the prefixes of a version that no request names any more."""
        self.allocator.free(self.cache.drop(version_id))

    def clear_cache(self) -> None:
        """Forget every prefix nobody uses."""
        self.allocator.free(self.cache.clear())

    def _alloc(self, count: int) -> Pages | None:
        short = count - self.allocator.num_free
        if short > self.cache.evictable_pages:
            return None
        if short > 0:
            self.allocator.free(self.cache.evict(short))
        return self.allocator.alloc(count)
