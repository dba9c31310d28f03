"""Attention by flashinfer where it is faster than our Triton kernels: steps with prompts in them.

Owned by ModelRunner. Steps of one new token for every sequence, captured or not, are `TritonAttention`'s
(`benchmark/kernels/attention.py` compares both). A step with prompts goes through flashinfer whole, the sequences that
decode in it as prompts of one token.
Invariant: the first `forward` of a step plans it, because flashinfer wants to know the scale; all layers have the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang.srt.layers.attention.triton import TritonAttention
from sglang.srt.model_executor.forward_context import KVPoolView, PageTableView, StepShape
from sglang.srt.ops import flashinfer as ops
from sglang.srt.sampling.transfer import to_device


@dataclass(slots=True)
class _Step:
    """A step with prompts, as `PagedPrefill.plan` takes it; the scale it was planned with."""

    query_starts: Tensor
    page_starts: Tensor
    pages: Tensor
    last: Tensor
    scale: float | None = None


class FlashInferAttention:
    """Implements forward_context.CapturableAttention.

    Args:
        num_heads: query heads.
        sliding_window: tokens each position sees, itself included; None for all before it.
    """

    def __init__(
        self,
        kv_pool: KVPoolView,
        page_table: PageTableView,
        num_heads: int,
        device: torch.device,
        sliding_window: int | None = None,
    ) -> None:
        self._decodes = TritonAttention(kv_pool, page_table, num_heads, device, sliding_window)
        self._pool, self._table, self._device = kv_pool, page_table, device
        keys, _ = kv_pool.layer(0)
        _, kv_heads, head_dim = keys.shape
        self._prefill = ops.PagedPrefill(
            num_heads, kv_heads, head_dim, keys.dtype, page_table.page_size, sliding_window, device
        )
        self._step: _Step | None = None

    def plan(self, shape: StepShape, req_slots: Tensor) -> None:
        """See AttentionBackend."""
        self._step = None
        if shape.decode_only:
            self._decodes.plan(shape, req_slots)
            return
        size = self._table.page_size
        kv_lens = shape.kv_lens.astype(np.int64)
        counts = -(-kv_lens // size)
        page_starts = np.concatenate([[0], np.cumsum(counts)])
        query_starts = np.concatenate([[0], np.cumsum(shape.query_lens)])
        sequence = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(page_starts[-1]) - page_starts[sequence]
        sequences, places = to_device(np.stack([sequence, place]), self._device)
        self._step = _Step(
            torch.from_numpy(query_starts.astype(np.int32)),
            torch.from_numpy(page_starts.astype(np.int32)),
            self._table.pages[req_slots[sequences], places],
            torch.from_numpy(((kv_lens - 1) % size + 1).astype(np.int32)),
        )

    def plan_decode(self, slots: Tensor, kv_lens: Tensor) -> None:
        """See CapturableAttention."""
        self._step = None
        self._decodes.plan_decode(slots, kv_lens)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, scale: float) -> Tensor:
        """See AttentionBackend; k and v are in the pool already."""
        step = self._step
        if step is None:
            return self._decodes.forward(q, k, v, layer_id, scale)
        if step.scale is None:
            self._prefill.plan(step.query_starts, step.page_starts, step.pages, step.last, scale)
            step.scale = scale
        assert step.scale == scale, "layers of different scales"
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        self._prefill.run(q, *self._pool.layer(layer_id), out.view(q.shape))
        return out
