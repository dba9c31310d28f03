"""Attention by the Triton kernels of `ops.triton.attention`: GPUs of every maker, graphs included.

Owned by ModelRunner. The new tokens' K and V are in the pool when `forward` is called. Sequences with one new token go
to the decode kernel, the others to the prefill kernel as blocks of queries; what the kernels need to know of a step is
one packed copy, made by `plan`. Nothing at all is copied for a captured step: `plan_decode` keeps two tensors that the
kernel reads when it runs.
Invariants: after `plan`, `forward` depends on nothing on the host. One step at a time, on one stream: the counters by
which splits find out which of them is the last are shared by all launches, and zero between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.forward_context import KVPoolView, PageTableView, StepShape
from sglang.srt.ops.triton import attention as ops
from sglang.srt.sampling.transfer import to_device

_MIN_COUNTED = 4096
"""Sequences there are counters for, if the page table has fewer slots: graphs may be padded beyond those."""


@dataclass(slots=True)
class _Step:
    """A planned step.

    Fields:
        decodes, splits: the sequences with one new token; None when there are none.
        slots: int64 [B], all sequences'; blocks: int64 [blocks, ops.BLOCK_FIELDS], None when all have one new token.
    """

    slots: Tensor
    decodes: ops.Decodes | None
    splits: ops.Splits
    blocks: Tensor | None


class TritonAttention:
    """Implements forward_context.AttentionBackend.

    Args:
        num_heads: query heads.
        sliding_window: tokens each position sees, itself included; None for all before it.

    Raises:
        ConfigError: the page size is not a power of two.
    """

    def __init__(
        self,
        kv_pool: KVPoolView,
        page_table: PageTableView,
        num_heads: int,
        device: torch.device,
        sliding_window: int | None = None,
    ) -> None:
        size = page_table.page_size
        if size < 1 or size & (size - 1):
            raise ConfigError(f"--page-size {size}: Triton attention needs a power of two, such as 1 or 16")
        self.kv_pool = kv_pool
        self.page_table = page_table
        self.device = device
        self.window = sliding_window
        keys, _ = kv_pool.layer(0)
        self._kv_heads, head_dim = keys.shape[1:]
        group = num_heads // self._kv_heads
        self._tiles = ops.prefill_tiles(head_dim, group, keys.dtype, device)
        self._queries = self._tiles.queries(group)
        counted = max(_MIN_COUNTED, page_table.pages.shape[0])
        self._counters = torch.zeros(counted * self._kv_heads, dtype=torch.int32, device=device)
        self._step: _Step | None = None

    def plan(self, shape: StepShape, req_slots: Tensor) -> None:
        """See AttentionBackend."""
        if shape.decode_only:
            kv_lens = to_device(shape.kv_lens.astype(np.int64), self.device)
            self._plan_all_decodes(req_slots, kv_lens, int(shape.kv_lens.max()))
        else:
            self._step = self._plan_mixed(shape, req_slots)

    def plan_decode(self, slots: Tensor, kv_lens: Tensor) -> None:
        """Prepare a step of one new token a sequence without looking at it, for a graph.

        Args:
            slots: int64 [B], rows of the page table; kv_lens: int64 [B], tokens to attend to, the new one included.
                Both on the device, and read whenever the kernels run. A sequence of no tokens gets zeros.
        """
        self._plan_all_decodes(slots, kv_lens, self.page_table.pages.shape[1] * self.page_table.page_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, scale: float) -> Tensor:
        """See AttentionBackend; k and v are in the pool already."""
        del k, v
        assert q.stride(2) == 1 and q.stride(1) == q.shape[2]
        step = self._step
        assert step is not None, "forward before plan"
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        kv = ops.PagedKV(*self.kv_pool.layer(layer_id), self.page_table.pages, self.page_table.page_size)
        if step.blocks is not None:
            ops.prefill(q, out, kv, step.slots, step.blocks, scale, self.window, self._tiles)
        if step.decodes is not None:
            ops.decode(q, out, kv, step.decodes, step.splits, self._counters, scale, self.window)
        return out

    def _plan_all_decodes(self, slots: Tensor, kv_lens: Tensor, longest: int) -> None:
        decodes = ops.Decodes(slots, kv_lens, None, slots.shape[0])
        self._step = _Step(slots, decodes, self._splits(slots.shape[0], longest), None)

    def _plan_mixed(self, shape: StepShape, req_slots: Tensor) -> _Step:
        blocks = query_blocks(shape, self._queries)
        single = np.flatnonzero(shape.query_lens == 1)
        rows = np.cumsum(shape.query_lens)[single] - 1
        batch, count, num_blocks = len(shape.kv_lens), len(single), len(blocks)
        places = np.stack([single, rows], axis=1)
        columns = np.concatenate([shape.kv_lens, places.reshape(-1), blocks.reshape(-1)])
        packed = to_device(columns.astype(np.int64), self.device)
        kv_lens, pairs, fields = packed.split([batch, 2 * count, ops.BLOCK_FIELDS * num_blocks])
        decodes = ops.Decodes(req_slots, kv_lens, pairs.view(count, 2), count) if count else None
        longest = int(shape.kv_lens[single].max()) if count else 1
        splits = self._splits(max(count, 1), longest)
        return _Step(req_slots, decodes, splits, fields.view(num_blocks, ops.BLOCK_FIELDS))

    def _splits(self, count: int, longest: int) -> ops.Splits:
        seen = longest if self.window is None else min(longest, self.window)
        return ops.choose_splits(count, self._kv_heads, seen, self.device)


def query_blocks(shape: StepShape, queries: int) -> NDArray[np.int64]:
    """Blocks of at most `queries` new tokens of the sequences that have several, those with the most to see first.

    Returns:
        int64 [blocks, ops.BLOCK_FIELDS], see `ops.prefill`.
    """
    query_lens, kv_lens = shape.query_lens.astype(np.int64), shape.kv_lens.astype(np.int64)
    counts = np.where(query_lens > 1, -(-query_lens // queries), 0)
    sequence = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = index * queries
    position = (kv_lens - query_lens)[sequence] + start
    row = (np.cumsum(query_lens) - query_lens)[sequence] + start
    count = np.minimum(query_lens[sequence] - start, queries)
    order = np.argsort(-(position + count), kind="stable")
    return np.stack([sequence, row, count, position], axis=1)[order]
