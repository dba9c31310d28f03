"""KV of one decode batch, kept dense from step to step, so that a CPU need not gather it anew for every token.

Owned by TorchNativeAttention. A gather reads and writes the KV of every sequence once more in each layer. While the
same sequences go on decoding, a step only has to append one row to each: attention of 16 sequences then takes 0.73 of
the time at 128 tokens and half of it at 512 (SmolLM2, one thread).

Invariants: row t of a sequence equals the pool row of its token t. That holds while every step since the copy was taken
continued it: only steps write the pool, and those write their tokens here too. Any other step ends the copy. Padding
holds tokens of the same sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADROOM = 32
"""Tokens a batch can grow by before it is copied again."""
MIN_TOKENS = 512
"""Below this many tokens of KV in the batch a gather is the quicker one."""
POOL_SHARE = 4
"""The copy holds at most one in this many of the pool's rows."""


class DenseCache:
    """At most one batch at a time. Either `plan` or `end` is called once a step, `layer` once a layer when planned."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None
        """`locs` and `last` of the step before, when it only decoded."""
        self._locs: Tensor | None = None
        """int64 [B, capacity] pool rows the copy was taken from; None when there is no copy."""
        self._fresh = False
        self._padded = False
        self._length = 0
        self._rows = self._last = torch.empty(0, dtype=torch.int64)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def end(self) -> None:
        """The step does more than go on with the batch: drop the copy. Its memory stays for the next one."""
        self._before = self._locs = None

    def plan(self, locs: Tensor, last: Tensor, padded: bool, pool_rows: int) -> bool:
        """Whether the step is served from the copy.

        Args:
            locs: int64 [B, L] pool rows; those behind a sequence's last column repeat it.
            last: int64 [B] column of each sequence's new token.
            padded: whether the sequences differ in length.
            pool_rows: size of the pool.
        """
        before, self._before = self._before, (locs, last)
        batch, self._length = locs.shape
        pays = batch * self._length >= MIN_TOKENS
        fits = batch * (self._length + HEADROOM) * POOL_SHARE <= pool_rows
        if before is None or not pays or not fits or not _continues(*before, locs, last):
            self._locs = None
            return False
        # Taken only once a batch is seen to go on: under churn most batches live for a step or two.
        self._fresh = self._locs is None or self._length > self._locs.shape[1]
        if self._fresh:
            self._locs = torch.cat([locs, locs[:, -1:].expand(batch, HEADROOM)], dim=1)
        self._rows, self._last, self._padded = torch.arange(batch), last, padded
        return True

    def layer(self, layer_id: int, k: Tensor, v: Tensor, pools: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of a planned step, each [B, L, Hkv, D]; its own k, v [B, Hkv, D] are in the pools already."""
        assert self._locs is not None
        copies = self._take(layer_id, pools) if self._fresh else self._layers[layer_id]
        shape = (*self._locs.shape, *k.shape[1:])
        keys, values = (flat[: self._locs.numel()].view(shape) for flat in copies)
        if not self._fresh:
            for dense, new in ((keys, k), (values, v)):
                dense[self._rows, self._last] = new.to(dense.dtype)
                if self._padded:
                    # A column that only the longest sequence has reached.
                    dense[:, self._length - 1] = new
        return keys[:, : self._length], values[:, : self._length]

    def _take(self, layer_id: int, pools: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self._locs is not None
        rows = self._locs.view(-1)
        copies = self._layers.get(layer_id)
        if copies is None or len(copies[0]) < len(rows):
            shape = (len(rows) + len(rows) // 4, *pools[0].shape[1:])
            copies = self._layers[layer_id] = pools[0].new_empty(shape), pools[1].new_empty(shape)
        for pool, copy in zip(pools, copies, strict=True):
            torch.index_select(pool, 0, rows, out=copy[: len(rows)])
        return copies


def _continues(old_locs: Tensor, old_last: Tensor, locs: Tensor, last: Tensor) -> bool:
    """Whether these are the same sequences, each with one more token, in the same places."""
    if old_last.shape != last.shape or not torch.equal(old_last + 1, last):
        return False
    width = old_locs.shape[1]
    kept = torch.arange(width) < last[:, None]
    return not bool(((old_locs != locs[:, :width]) & kept).any())
