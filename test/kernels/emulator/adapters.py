"""Random adapters and batches on an emulated GPU, with poison wherever a kernel has nothing to read."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sgl_kernel.lora.batch import HEADER_WORDS, BatchShape, build_batch
from sgl_kernel.lora.layout import LoraGroup, LoraLayout

from . import Gpu
from .numbers import Bits, Floats, random_bf16, to_float

Ranks = Mapping[int, Sequence[int]]
"""Of every slice of the adapter in a slot; slots that are not named hold poison."""

ABSENT_RANK = 1 << 24


class Adapters:
    """Adapters of one matrix, in the second layer of a slab.

    Args:
        gpu: where they lie.
        in_features: K.
        out_features: rows of every slice.
        ranks: of the adapters.
        num_slots: of which those without ranks hold poison: NaN, and ranks that lead far out of the slab.
        max_rank: of the layout; the largest rank if None.

    Attributes:
        site: LoraSite of args.h.
        rank_cap: columns of u that a slice has.
        adapter_ranks: of every slot, as `build_batch` takes them.
    """

    def __init__(
        self,
        gpu: Gpu,
        in_features: int,
        out_features: Sequence[int],
        ranks: Ranks,
        num_slots: int,
        max_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        largest = max_rank or max(1, *(r for each in ranks.values() for r in each))
        layout = LoraLayout([LoraGroup("g", in_features, tuple(out_features))], 2, largest)
        self._place = layout.site(1, "g")
        self._slabs = np.full((num_slots, layout.slab_bytes), 0xFF, np.uint8)
        self._rng = np.random.default_rng(seed)
        self._parts: dict[tuple[int, int], tuple[Floats, Floats, float]] = {}
        self.ranks = ranks
        self.rank_cap = self._place.rank_cap
        self.adapter_ranks = adapter_ranks(ranks, num_slots)
        self.out_features = tuple(out_features)
        self._pack(num_slots)
        self.site = _site_args(gpu, gpu.array("slabs", self._slabs), self._place, layout.slab_bytes)

    def part(self, slot: int, index: int) -> tuple[Floats, Floats, float]:
        """A [rank, K], B [rows, rank] and the scale of a slice, in float64 and exact."""
        return self._parts[slot, index]

    def _pack(self, num_slots: int) -> None:
        for slot in range(num_slots):
            for index, rows in enumerate(self.out_features):
                rank = self.ranks[slot][index] if slot in self.ranks else ABSENT_RANK
                scale = np.float32(self._rng.uniform(0.5, 2.0))
                self._write(slot, self._place.table_offset + 8 * index, np.array([rank], np.int32))
                self._write(slot, self._place.table_offset + 8 * index + 4, np.array([scale], np.float32))
                if rank < ABSENT_RANK:
                    a, b = random_bf16(self._rng, rank, self._place.in_features), random_bf16(self._rng, rows, rank)
                    self._write(slot, self._place.a_start(index), a)
                    self._write(slot, self._place.b_offsets[index], _pad_rank(b, max(self.ranks[slot])))
                    self._parts[slot, index] = to_float(a), to_float(b), float(scale)

    def _write(self, slot: int, start: int, values: np.ndarray) -> None:
        self._slabs[slot, start : start + values.nbytes] = values.reshape(-1).view(np.uint8)


def make_batch(
    gpu: Gpu, slots: Sequence[int], ranks: Ranks, num_slots: int, tile_tokens: int, max_tokens: int | None = None
) -> tuple[ctypes.Structure, BatchShape]:
    """LoraBatch of args.h for token rows of these slots, and its capacities; what no kernel may read is poison."""
    shape = BatchShape(max_tokens or len(slots) + 3, num_slots, tile_tokens)
    words = build_batch(np.array(slots, np.int32), adapter_ranks(ranks, num_slots), shape)
    words[:HEADER_WORDS] = 1 << 28
    words[shape.perm + len(slots) : shape.token_slot] = 1 << 28
    data = gpu.array("batch", words)
    starts = {"perm": shape.perm, "token_slot": shape.token_slot, "tiles": shape.tiles, "live": shape.live}
    parts = {name: data[start:] for name, start in starts.items()}
    return gpu.args("LoraBatch", **parts), shape


def adapter_ranks(ranks: Ranks, num_slots: int) -> NDArray[np.int32]:
    """The largest rank of every slot's modules."""
    return np.array([max(ranks.get(slot, (0,))) for slot in range(num_slots)], np.int32)


def lora_tiles(slots: Sequence[int], tile_tokens: int) -> int:
    """Tiles that the adapters' rows make."""
    return sum(-(-list(slots).count(slot) // tile_tokens) for slot in set(slots) if slot >= 0)


def _pad_rank(b: Bits, adapter_rank: int) -> Bits:
    rows, rank = b.shape
    wide = np.zeros((rows, -(-adapter_rank // 8) * 8), np.uint16)
    wide[:, :rank] = b
    return wide


def _site_args(gpu: Gpu, slabs: np.ndarray, place: object, slab_bytes: int) -> ctypes.Structure:
    in_features, rank_cap, num_slices, n0, n1, n2, table, a, b0, b1, b2, _ = place.words
    return gpu.args(
        "LoraSite",
        slabs=slabs,
        slab_bytes=slab_bytes,
        table_offset=table,
        a_offset=a,
        b_offsets=(b0, b1, b2),
        in_features=in_features,
        rank_cap=rank_cap,
        num_slices=num_slices,
        out_features=(n0, n1, n2),
    )
