"""Adapters for the tests of operations: mixed ranks, missing slices, and NaN wherever a kernel has no business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgl_kernel.lora.batch import BatchShape, build_batch
from sgl_kernel.lora.layout import LoraGroup, LoraLayout, LoraSite
from sgl_kernel.lora.slab import LoraModule, pack_slab
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Factors = tuple[float, NDArray[np.float64], NDArray[np.float64]]


@dataclass
class Case:
    """One site, its adapters on the CPU, and the same adapters as plain float64 numbers.

    factors: (slot, slice) -> scale as float32, A and B as the layout's dtype, widened; missing where the adapter has
        none.
    """

    slabs: LoraSlabs
    site: LoraSite
    batch: LoraBatch
    token_slots: list[int]
    factors: dict[tuple[int, int], Factors]

    def random_u(self, rows: int, dtype: torch.dtype, u_slot_stride: int = 0) -> Tensor:
        """u with numbers where they count and NaN everywhere else."""
        slots = self.slabs.num_slots if u_slot_stride else 1
        u = torch.full((rows, slots * self.site.u_width), float("nan"), dtype=dtype)
        for token, slot in enumerate(self.token_slots):
            for index in range(self.site.num_slices):
                if (slot, index) in self.factors:
                    rank = len(self.factors[slot, index][1])
                    start = slot * u_slot_stride + index * self.site.rank_cap
                    u[token, start : start + rank] = torch.randn(rank)
        return u

    def delta(self, u: Tensor, u_slot_stride: int = 0) -> LoraDelta:
        """What is still to be added."""
        return LoraDelta(u, self.slabs, self.site, self.batch, u_slot_stride)

    def term(self, u: Tensor, u_slot_stride: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(the term [rows, N], the sum of the absolute values of its summands), by loops."""
        term = np.zeros((len(u), self.site.total_out))
        size = np.zeros_like(term)
        for token, slot in enumerate(self.token_slots):
            for index in range(self.site.num_slices):
                if (slot, index) not in self.factors:
                    continue
                scale, a, b = self.factors[slot, index]
                first = slot * u_slot_stride + index * self.site.rank_cap
                out = sum(self.site.out_features[:index])
                for row in range(len(b)):
                    products = [b[row, k] * float(u[token, first + k]) for k in range(len(a))]
                    term[token, out + row] = scale * sum(products)
                    size[token, out + row] = abs(scale) * sum(map(abs, products))
        return term, size


def make_case(
    token_slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    inputs: int = 24,
    outputs: tuple[int, ...] = (16, 8, 8),
    max_tokens: int | None = None,
    tile_tokens: int = 16,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> Case:
    """Adapters of the second layer's site; ranks[slot][slice], 0 for a missing one; `dtype` of the slabs."""
    rng = np.random.default_rng(seed)
    layout = LoraLayout([LoraGroup("g", inputs, outputs)], 2, max(max(map(max, ranks)), 1), dtype)
    data = torch.empty(len(ranks), layout.slab_bytes, dtype=torch.uint8)
    factors: dict[tuple[int, int], Factors] = {}
    for slot, own in enumerate(ranks):
        modules = []
        for index, rank in enumerate(own):
            if rank:
                a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs[index], rank))
                scale = float(np.float32(rng.uniform(0.1, 2)))
                a, b = (torch.tensor(v).to(DTYPES[dtype]) for v in (a, b))
                modules.append(LoraModule(1, "g", index, scale, a, b))
                factors[slot, index] = (scale, a.double().numpy(), b.double().numpy())
        data[slot] = torch.from_numpy(_poisoned(layout, modules))
    shape = BatchShape(max_tokens or max(len(token_slots), 1), len(ranks), tile_tokens)
    slabs = LoraSlabs(data, layout)
    assert slabs.ranks.tolist() == [max(own) for own in ranks]
    words = build_batch(np.array(token_slots, np.int32), slabs.ranks, shape)
    return Case(
        slabs,
        layout.site(1, "g"),
        LoraBatch.to_device(words, shape, "cpu"),
        list(token_slots),
        factors,
    )


def _poisoned(layout: LoraLayout, modules: list[LoraModule]) -> NDArray[np.uint8]:
    """The slab of these modules with NaN wherever nothing is said to be."""
    slab = np.zeros(layout.slab_bytes, np.uint8)
    pack_slab(layout, modules, slab)
    used = np.zeros(layout.slab_bytes, np.bool_)
    used[: 16 + layout.table_bytes] = True
    stride = -(-max((len(m.a) for m in modules), default=0) // 8) * 8
    for m in modules:
        site = layout.site(m.layer, m.group)
        a, b = site.a_start(m.slice_index), site.b_offsets[m.slice_index]
        used[a : a + len(m.a) * site.in_features * layout.item_bytes] = True
        used[b : b + len(m.b) * stride * layout.item_bytes] = True
    slab[~used] = 0xFF
    return slab


@pytest.fixture(name="make_case")
def make_case_fixture():
    torch.manual_seed(0)
    return make_case
