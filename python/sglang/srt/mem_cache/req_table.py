"""Slots of the sequences in memory and the page table attention reads. Owned by KVManager.

Host side is the truth; the device copy is brought up to date by `flush`, one packed copy a step. On CPU both are the
same memory. Invariant: a slot has at most one sequence; entries beyond a sequence's pages are stale but
valid page numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.mem_cache.page_allocator import Pages


class ReqTable:
    """[max_slots + 1, max_pages] page numbers; the last row is no sequence's.

    Args:
        max_slots: sequences that can hold KV at once.
        max_pages: pages of the longest sequence.
        spare_page: a page that is never allocated: with the last row, where padding of captured steps goes.
    """

    def __init__(
        self, max_slots: int, max_pages: int, page_size: int, device: torch.device, spare_page: int = 0
    ) -> None:
        self.page_size = page_size
        self.max_slots, self.spare_page = max_slots, spare_page
        self.host = np.zeros((max_slots + 1, max_pages), dtype=np.int32)
        self._shared = device.type == "cpu"
        shared_or_copy = torch.from_numpy(self.host)
        self.pages: Tensor = shared_or_copy if self._shared else shared_or_copy.to(device)
        self._free = list(range(max_slots - 1, -1, -1))
        self._pending: list[tuple[int, int, int]] = []

    @property
    def num_free(self) -> int:
        """Slots not taken."""
        return len(self._free)

    def take(self) -> int:
        """A free slot; the caller has checked that there is one."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot."""
        assert slot not in self._free, f"slot {slot} freed twice"
        self._free.append(slot)

    def write(self, slot: int, start: int, pages: Pages) -> None:
        """Set entries [start, start + len(pages)) of a slot."""
        if not len(pages):
            return
        self.host[slot, start : start + len(pages)] = pages
        if not self._shared:
            self._pending.append((slot, start, start + len(pages)))

    def leave_to_step(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Forget writes of the single pages that tokens at these positions go to: the step that is launched next
        writes them itself.

        Args:
            slots, positions: int64 [B].
        """
        if self._pending:
            page = dict(zip(slots.tolist(), (positions // self.page_size).tolist(), strict=True))
            self._pending = [p for p in self._pending if p[2] - p[1] != 1 or page.get(p[0]) != p[1]]

    def flush(self) -> None:
        """Copy what `write` changed since the last call to the device, in stream order."""
        if not self._pending:
            return
        width = self.host.shape[1]
        # Values are read here, not when they were written: an entry that changed twice is copied twice with one value.
        index = np.unique(np.concatenate([slot * width + np.arange(start, end) for slot, start, end in self._pending]))
        packed = torch.from_numpy(np.stack([index, self.host.reshape(-1)[index].astype(np.int64)]))
        packed = packed.pin_memory().to(self.pages.device, non_blocking=True)
        self.pages.view(-1).index_put_((packed[0],), packed[1].to(torch.int32))
        self._pending.clear()
