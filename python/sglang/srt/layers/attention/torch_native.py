"""Attention by torch's scaled_dot_product_attention: the reference on every device, the back end on CPU.

Owned by ModelRunner. A step's sequences are split into those with one new token, served together on gathered and padded
KV, and those with several, served one by one.
Invariant: after `plan`, `forward` depends on nothing on the host, so it never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.model_executor.forward_context import KVPoolView, PageTableView, StepShape
from sglang.srt.ops import attention as ops


@dataclass(slots=True)
class _Decodes:
    """Sequences with one new token: their rows of the step, the pool rows they see [B, L], and the padding mask."""

    rows: Tensor | None
    locs: Tensor
    mask: Tensor | None


@dataclass(slots=True)
class _Prefill:
    """One sequence with several new tokens: rows [start, end) of the step; no locs when nothing came before."""

    start: int
    end: int
    locs: Tensor | None
    mask: Tensor | None


class TorchNativeAttention:
    """Implements forward_context.AttentionBackend."""

    def __init__(
        self, kv_pool: KVPoolView, page_table: PageTableView, device: torch.device, sliding_window: int | None
    ) -> None:
        self.kv_pool = kv_pool
        self.page_table = page_table
        self.device = device
        self.window = sliding_window
        self._out_locs = torch.empty(0, dtype=torch.int64)
        self._decodes: _Decodes | None = None
        self._prefills: list[_Prefill] = []

    def plan(self, shape: StepShape, req_slots: Tensor, out_locs: Tensor) -> None:
        """See AttentionBackend."""
        self._out_locs = out_locs
        ends = np.cumsum(shape.query_lens)
        single = np.flatnonzero(shape.query_lens == 1)
        self._decodes = self._plan_decodes(shape, single, ends, req_slots) if len(single) else None
        self._prefills = [
            self._plan_prefill(int(ends[b]), int(shape.query_lens[b]), int(shape.kv_lens[b]), req_slots[b : b + 1])
            for b in np.flatnonzero(shape.query_lens > 1)
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, scale: float) -> Tensor:
        """See AttentionBackend."""
        k_pool, v_pool = self.kv_pool.layer(layer_id)
        ops.store_kv(k, v, k_pool, v_pool, self._out_locs)
        decodes = self._decodes
        if decodes is not None and decodes.rows is None:
            return self._decode(q, k_pool, v_pool, decodes, scale)
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        if decodes is not None:
            out[decodes.rows] = self._decode(q[decodes.rows], k_pool, v_pool, decodes, scale)
        for part in self._prefills:
            rows = slice(part.start, part.end)
            keys, values = (k[rows], v[rows]) if part.locs is None else (k_pool[part.locs], v_pool[part.locs])
            out[rows] = ops.prefill_attention(q[rows], keys, values, part.mask, scale)
        return out

    def _decode(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, decodes: _Decodes, scale: float) -> Tensor:
        shape = (*decodes.locs.shape, *k_pool.shape[1:])
        flat = decodes.locs.view(-1)
        keys, values = k_pool.index_select(0, flat).view(shape), v_pool.index_select(0, flat).view(shape)
        return ops.decode_attention(q, keys, values, decodes.mask, scale)

    def _plan_decodes(
        self, shape: StepShape, single: NDArray[np.int64], ends: NDArray[np.int64], req_slots: Tensor
    ) -> _Decodes:
        everything = len(single) == len(shape.query_lens)
        lens = shape.kv_lens[single]
        longest = int(lens.max())
        slots = req_slots if everything else req_slots[self._upload(single)]
        locs = self._locations(slots, longest)
        rows = None if everything else self._upload(ends[single] - 1)
        if int(lens.min()) == longest and self.window is None:
            return _Decodes(rows, locs, None)
        seen = ops.visible(self._upload(lens.astype(np.int64) - 1), longest, self.window)
        mask = torch.zeros(seen.shape, dtype=self._mask_dtype(), device=self.device).masked_fill_(~seen, -torch.inf)
        return _Decodes(rows, locs, mask[:, None, None, :])

    def _plan_prefill(self, end: int, query_len: int, kv_len: int, slot: Tensor) -> _Prefill:
        start = end - query_len
        fresh = query_len == kv_len
        if fresh and self.window is None:
            return _Prefill(start, end, None, None)
        locs = None if fresh else self._locations(slot, kv_len)[0]
        positions = torch.arange(kv_len - query_len, kv_len, device=self.device)
        return _Prefill(start, end, locs, ops.visible(positions, kv_len, self.window))

    def _locations(self, slots: Tensor, length: int) -> Tensor:
        return ops.token_locations(self.page_table.pages[slots], length, self.page_table.page_size)

    def _mask_dtype(self) -> torch.dtype:
        return self.kv_pool.layer(0)[0].dtype

    def _upload(self, values: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)
