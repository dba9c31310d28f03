"""From the objects of `types` to the arguments of kernels, and the sizes of blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgl_kernel.lora.layout import MAX_SLICES, LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

# Left to the compiler, y + scale * sum would be rounded once in one kernel and twice in the next.
OPTIONS = {"enable_fp_fusion": False}
ROWS = 16
"""Token rows of a program where no batch says how rows go together."""


class Adapters(NamedTuple):
    """Where a site lies in every slab; the table's offset is an argument of its own, see `Rows`."""

    slabs: Tensor
    slab_bytes: int
    a_offset: int
    b_offsets: tuple[int, ...]


class Delta(NamedTuple):
    """What `device.delta_tile` reads."""

    u: Tensor
    u_stride: int
    u_slot_stride: int
    rank_cap: int
    adapters: Adapters


class Rows(NamedTuple):
    """Which token rows a launch is for: those of a batch's tiles, or simply all.

    `table` and `tiles` vary from layer to layer and graph to graph, and are multiples of 16 only by chance. Kernels
    are not to be compiled anew for that, so they take both outside of tuples, as `do_not_specialize`.

    Attributes:
        words: the batch buffer, or None.
        tiles: where the tiles start in it.
        table: where the site's table entries start in a slab.
        programs: upper limit of the number of tiles.
        tokens: TOKENS of the kernel, rows a program has.
    """

    words: Tensor | None
    tiles: int
    table: int
    programs: int
    tokens: int


def ceil_div(value: int, step: int) -> int:
    """value / step, rounded up."""
    return -(-value // step)


def power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that is at least `value`, but at least `low` and at most `high`."""
    return min(max(1 << (value - 1).bit_length(), low), high)


def adapters_of(slabs: LoraSlabs, site: LoraSite) -> Adapters:
    """A site of the slabs, as kernels take it."""
    absent = (0,) * (MAX_SLICES - site.num_slices)
    return Adapters(slabs.data, slabs.data.shape[1], site.a_offset, (*site.b_offsets, *absent))


def delta_of(delta: LoraDelta | None) -> Delta | None:
    """A low-rank term, as kernels take it."""
    if delta is None:
        return None
    adapters = adapters_of(delta.slabs, delta.site)
    return Delta(delta.u, delta.u.stride(0), delta.u_slot_stride, delta.site.rank_cap, adapters)


def rows_of(batch: LoraBatch, site: LoraSite, num_rows: int) -> Rows:
    """The rows of a batch's tiles, when there are `num_rows` at most."""
    shape = batch.shape
    # As for BatchShape.max_tiles, but for the rows that this launch has: fewer than a batch may have.
    partial = min(shape.num_slots + 1, num_rows) * (shape.tile_tokens - 1)
    programs = min(shape.max_tiles, (num_rows + partial) // shape.tile_tokens)
    return Rows(batch.words, shape.tiles, site.table_offset, programs, shape.tile_tokens)


def rows_of_delta(delta: LoraDelta | None, num_rows: int) -> Rows:
    """The rows that a kernel with this low-rank term is for: of the batch's tiles; without a term, all."""
    if delta is None:
        return Rows(None, 0, 0, ceil_div(num_rows, ROWS), ROWS)
    return rows_of(delta.batch, delta.site, num_rows)


def rank_step(delta: LoraDelta | None) -> int:
    """Ranks that are multiplied at once."""
    return 16 if delta is None else power_of_two(delta.site.rank_cap, 16, 64)


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: see `device.product`."""
    return "tf32" if dtype == torch.float16 and torch.version.hip is None else "ieee"
