"""Which KV pages are free. Owned by KVManager; nobody else allocates or frees.

Invariant: a page is either free or in use by exactly one owner (a sequence or the prefix cache); freeing a free page
is a programming error and raises.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int32]


class PageAllocator:
    """A stack of free page numbers.

    Args:
        num_pages: pages are numbered 0..num_pages-1.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = num_pages
        self._used = np.zeros(num_pages, dtype=bool)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return self._num_free

    def alloc(self, count: int) -> Pages | None:
        """`count` pages, or None (and no change) when fewer are free."""
        if count > self._num_free:
            return None
        self._num_free -= count
        pages = self._stack[self._num_free : self._num_free + count][::-1].copy()
        self._used[pages] = True
        return pages

    def free(self, pages: Pages) -> None:
        """Give pages back."""
        if not len(pages):
            return
        assert self._used[pages].all(), f"double free of KV pages {pages[~self._used[pages]].tolist()}"
        self._used[pages] = False
        end = self._num_free + len(pages)
        assert end <= self.num_pages, f"a KV page was freed twice in one call: {pages.tolist()}"
        self._stack[self._num_free : end] = pages
        self._num_free = end
