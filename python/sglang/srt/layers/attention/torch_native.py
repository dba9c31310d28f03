"""Attention by torch's scaled_dot_product_attention: the reference on every device, the back end on CPU.

Owned by ModelRunner. A step's sequences are split into those with one new token, served together on gathered and padded
KV, and those with several, served one by one. Locations and masks are made once a step, in `plan`.
Invariants: after `plan`, `forward` depends on nothing on the host, so it never waits for the device. Padding repeats a
sequence's own last token: what stands in pages that are not its own, be it NaN, never enters a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.model_executor.forward_context import KVPoolView, PageTableView, StepShape
from sglang.srt.ops import attention as ops
from sglang.srt.ops.cpu import kernels
from sglang.srt.sampling.transfer import to_device

_QUERY_BLOCK = 512
"""Queries attended to under one mask: bounds it to 512 rows, and skips keys that none of them sees."""
_FREE_PADDING = 4096
"""Padded tokens that are not worth a second batch."""


@dataclass(slots=True)
class _Decodes:
    """Sequences with one new token.

    Fields:
        rows: token rows of the step, int64 [B]; None when they are all of them, in order.
        locs: pool rows they see, int64 [B, L]; visible: bool [B, 1, 1, L], None when nothing is padding.
        last: column of each one's new token, int64 [B].
    """

    rows: Tensor | None
    locs: Tensor
    visible: Tensor | None
    last: Tensor


@dataclass(slots=True)
class _Block:
    """Queries [start, end) of a sequence's new tokens, and the gathered keys [low, high) that some of them see."""

    start: int
    end: int
    low: int
    high: int
    visible: Tensor | None


@dataclass(slots=True)
class _Prefill:
    """One sequence with several new tokens: rows [start, end) of the step; no locs when nothing came before."""

    start: int
    end: int
    locs: Tensor | None
    blocks: list[_Block]


class TorchNativeAttention:
    """Implements forward_context.AttentionBackend.

    Args:
        sliding_window: tokens each position sees, itself included; None for all before it.
    """

    def __init__(
        self, kv_pool: KVPoolView, page_table: PageTableView, device: torch.device, sliding_window: int | None = None
    ) -> None:
        self.kv_pool = kv_pool
        self.page_table = page_table
        self.device = device
        self.window = sliding_window
        self._decodes: list[_Decodes] = []
        self._prefills: list[_Prefill] = []
        self._masks: dict[int, Tensor] = {}
        self._workspace: tuple[Tensor, Tensor] | None = None

    def plan(self, shape: StepShape, req_slots: Tensor) -> None:
        """See AttentionBackend."""
        self._masks.clear()
        query_lens, kv_lens = shape.query_lens.astype(np.int64), shape.kv_lens.astype(np.int64)
        ends = np.cumsum(query_lens)
        single = np.flatnonzero(query_lens == 1)
        batches = _batches(single, self._seen(kv_lens[single]))
        everything = len(batches) == 1 and len(single) == len(query_lens)
        self._decodes = [
            self._plan_decodes(kv_lens[batch], None if everything else np.stack([batch, ends[batch] - 1]), req_slots)
            for batch in batches
        ]
        self._prefills = [
            self._plan_prefill(int(ends[b]), int(query_lens[b]), int(kv_lens[b]), req_slots[b])
            for b in np.flatnonzero(query_lens > 1)
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, scale: float) -> Tensor:
        """See AttentionBackend."""
        k_pool, v_pool = self.kv_pool.layer(layer_id)
        if len(self._decodes) == 1 and self._decodes[0].rows is None:
            return self._decode(q, (k_pool, v_pool), self._decodes[0], scale)
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        for decodes in self._decodes:
            assert decodes.rows is not None
            picked = self._decode(q[decodes.rows], (k_pool, v_pool), decodes, scale)
            out.index_copy_(0, decodes.rows, picked)
        for part in self._prefills:
            rows = slice(part.start, part.end)
            keys, values = (k[rows], v[rows]) if part.locs is None else self._gather(part.locs, k_pool, v_pool, q.dtype)
            self._prefill(q[rows], keys, values, part, scale, out[rows])
        return out

    def _decode(self, q: Tensor, pools: tuple[Tensor, Tensor], decodes: _Decodes, scale: float) -> Tensor:
        """Attention of one batch; `q` holds its rows only."""
        if kernels.usable(q, pools[0]):
            return kernels.decode_attention(q, pools, decodes.locs, decodes.last + 1, scale)
        shape = (*decodes.locs.shape, *pools[0].shape[1:])
        keys, values = (t.view(shape) for t in self._gather(decodes.locs.view(-1), *pools, q.dtype))
        return ops.decode_attention(q, keys, values, self._mask(decodes.visible, q.dtype), scale)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, part: _Prefill, scale: float, out: Tensor) -> None:
        for block in part.blocks:
            queries, seen = slice(block.start, block.end), slice(block.low, block.high)
            mask = self._mask(block.visible, q.dtype)
            out[queries] = ops.prefill_attention(q[queries], keys[seen], values[seen], mask, scale)

    def _plan_decodes(
        self, kv_lens: NDArray[np.int64], places: NDArray[np.int64] | None, req_slots: Tensor
    ) -> _Decodes:
        """`places`: (sequence, token row) of each member, [2, B]; None when the members are the whole step."""
        seen = self._seen(kv_lens)
        longest = int(seen.max())
        first, last = to_device(np.stack([kv_lens - seen, kv_lens - 1]), self.device)
        slots, rows = req_slots, None
        if places is not None:
            members, rows = to_device(places, self.device)
            slots = req_slots[members]
        positions = first[:, None] + torch.arange(longest, device=self.device)
        locs = self._locations(slots[:, None], torch.minimum(positions, last[:, None]))
        padded = int(seen.min()) < longest
        visible = (positions <= last[:, None])[:, None, None, :] if padded else None
        return _Decodes(rows, locs, visible, last - first)

    def _plan_prefill(self, end: int, query_len: int, kv_len: int, slot: Tensor) -> _Prefill:
        start, prefix = end - query_len, kv_len - query_len
        window = self.window or kv_len
        if prefix == 0 and window >= kv_len:
            return _Prefill(start, end, None, [_Block(0, query_len, 0, query_len, None)])
        # The keys gathered are those from `first` on: what the window hides from every query is left out.
        first = max(0, prefix - window + 1)
        locs = self._locations(slot, torch.arange(first, kv_len, device=self.device)) if prefix else None
        blocks = []
        for low_query in range(0, query_len, _QUERY_BLOCK):
            high_query = min(low_query + _QUERY_BLOCK, query_len)
            low, high = max(0, prefix + low_query - window + 1), prefix + high_query
            queries = torch.arange(prefix + low_query, high, device=self.device)[:, None]
            keys = torch.arange(low, high, device=self.device)
            visible = (keys <= queries) & (keys > queries - window)
            blocks.append(_Block(low_query, high_query, low - first, high - first, visible))
        return _Prefill(start, end, locs, blocks)

    def _seen(self, kv_lens: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens a sequence's last position sees."""
        return kv_lens if self.window is None else np.minimum(kv_lens, self.window)

    def _locations(self, slots: Tensor, positions: Tensor) -> Tensor:
        return ops.token_locations(self.page_table.pages, slots, positions, self.page_table.page_size)

    def _mask(self, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask, made by the first layer of a step."""
        if visible is None:
            return None
        mask = self._masks.get(id(visible))
        if mask is None:
            mask = self._masks[id(visible)] = ops.additive_mask(visible, dtype)
        return mask

    def _gather(self, locs: Tensor, k_pool: Tensor, v_pool: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of pool rows, in memory that every layer uses again: fresh pages cost more than the copy."""
        count = len(locs)
        if self._workspace is None or len(self._workspace[0]) < count:
            shape = (count + count // 4, *k_pool.shape[1:])
            self._workspace = k_pool.new_empty(shape), v_pool.new_empty(shape)
        keys, values = self._workspace[0][:count], self._workspace[1][:count]
        torch.index_select(k_pool, 0, locs, out=keys)
        torch.index_select(v_pool, 0, locs, out=values)
        return keys.to(dtype), values.to(dtype)


def _batches(members: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Sequences to pad together: all of them, or by power of two of the length where padding would be over half."""
    if not len(members):
        return []
    if len(members) * int(lengths.max()) <= max(_FREE_PADDING, 2 * int(lengths.sum())):
        return [members]
    classes = np.frexp(lengths)[1]
    return [members[classes == value] for value in np.unique(classes)]
