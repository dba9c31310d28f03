"""Runs a model step by step through ForwardContext: sequences, a page table, a KV pool, nothing of the scheduler.

For tests of models and attention on any device. Pages are handed out in a scattered order, every page starts as NaN
(what a sequence must not read), and pages of ended sequences keep their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.layers.attention.factory import create_attention_backend
from sglang.srt.model_executor.forward_context import CausalLM, ForwardContext, StepShape

CPU = torch.device("cpu")


class NaNPool:
    """A KV pool that starts as NaN."""

    def __init__(self, layers: int, tokens: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device):
        shape = (layers, 2, tokens, kv_heads, dim)
        self.data = torch.full(shape, float("nan"), dtype=dtype, device=device)

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """(k, v) of a layer."""
        return self.data[layer_id, 0], self.data[layer_id, 1]


class PageTable:
    """Every entry is a valid page; those beyond a sequence's own are somebody else's."""

    def __init__(self, slots: int, max_pages: int, page_size: int, num_pages: int, device: torch.device, seed: int = 0):
        self.page_size = page_size
        self.rng = np.random.default_rng(seed)
        self.free = self.rng.permutation(num_pages).tolist()
        self.host = self.rng.integers(num_pages, size=(slots, max_pages)).astype(np.int32)
        self.device = device
        self.pages = torch.from_numpy(self.host.copy()).to(device)

    def grow(self, slot: int, old: int, new: int) -> None:
        """Give a slot pages for `new` tokens; it had `old`."""
        first, last = -(-old // self.page_size), -(-new // self.page_size)
        for index in range(first, last):
            self.host[slot, index] = self.free.pop()
        self.pages = torch.from_numpy(self.host.copy()).to(self.device)

    def locations(self, slot: int, start: int, stop: int) -> np.ndarray:
        """Pool rows of tokens [start, stop)."""
        tokens = np.arange(start, stop)
        return self.host[slot, tokens // self.page_size].astype(np.int64) * self.page_size + tokens % self.page_size


@dataclass
class SequenceState:
    """One sequence: its slot, and the tokens whose KV is stored."""

    slot: int
    tokens: list[int] = field(default_factory=list)


class Harness:
    """A model with attention and memory around it.

    Args:
        model: loaded, on `device`.
        capacity: tokens of the pool; max_len: tokens of a sequence.
    """

    def __init__(
        self,
        model: CausalLM,
        config: ModelConfig,
        *,
        page_size: int = 1,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        capacity: int = 1024,
        max_len: int = 256,
        slots: int = 8,
    ) -> None:
        self.model = model
        self.device = device
        num_pages = capacity // page_size
        self.pool = NaNPool(
            config.num_hidden_layers, capacity, config.num_key_value_heads, config.head_dim, dtype, device
        )
        self.table = PageTable(slots, -(-max_len // page_size), page_size, num_pages, device)
        self.attention = create_attention_backend(
            "torch_native", self.pool, self.table, config.num_attention_heads, device, config.sliding_window
        )
        self._slots = 0

    def open(self) -> SequenceState:
        """A new, empty sequence."""
        self._slots += 1
        return SequenceState(self._slots - 1)

    def fork(self, parent: SequenceState, length: int) -> SequenceState:
        """A sequence that starts from the parent's first `length` tokens, in the same pages; whole pages only."""
        size = self.table.page_size
        assert length % size == 0 and length <= len(parent.tokens)
        child = self.open()
        self.table.host[child.slot, : length // size] = self.table.host[parent.slot, : length // size]
        child.tokens = parent.tokens[:length]
        return child

    @torch.inference_mode()
    def step(self, *work: tuple[SequenceState, Sequence[int]]) -> list[Tensor]:
        """Append tokens to sequences in one forward pass; logits [new tokens, V] of each, float32 on the CPU."""
        ids, positions, locs = [], [], []
        for sequence, new in work:
            old, total = len(sequence.tokens), len(sequence.tokens) + len(new)
            self.table.grow(sequence.slot, old, total)
            ids += list(new)
            positions += range(old, total)
            locs += self.table.locations(sequence.slot, old, total).tolist()
            sequence.tokens = sequence.tokens + list(new)
        query_lens = [len(new) for _, new in work]
        kv_lens = [len(sequence.tokens) for sequence, _ in work]
        shape = StepShape(np.array(query_lens, dtype=np.int32), np.array(kv_lens, dtype=np.int32))
        slots = self._tensor([sequence.slot for sequence, _ in work])
        self.attention.plan(shape, slots)
        ctx = ForwardContext(self._tensor(ids), self._tensor(positions), self._tensor(locs), self.pool, self.attention)
        logits = self.model.compute_logits(self.model.forward(ctx)).float()
        assert logits.dtype == torch.float32 and logits.is_contiguous()
        return list(logits.cpu().split(query_lens))

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
