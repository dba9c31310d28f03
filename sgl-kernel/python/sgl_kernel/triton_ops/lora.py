"""Low-rank adapters by themselves: u = A x, and y += scale * (B u)."""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_kernel.lora.layout import LoraSite, round_up
from sgl_kernel.triton_ops.device import LORA_TILES, a_of, delta_tile, read_slice, row_products, tile_rows
from sgl_kernel.triton_ops.launch import (
    OPTIONS,
    adapters_of,
    ceil_div,
    delta_of,
    power_of_two,
    precision,
    rank_step,
    rows_of,
)
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

_DEPTH = 64
_PART = 256
"""The least part of K that is worth a program of its own."""
_MAX_PARTS = 16
_COLUMNS = 128


def lora_shrink(x: Tensor, slabs: LoraSlabs, site: LoraSite, batch: LoraBatch, out: Tensor) -> Tensor:
    """See `reference.lora_shrink`.

    K is cut into parts, by K alone, whose sums are added in their order. In a decode step there are few tiles, so the
    parts go to as many programs and a second kernel adds them up; in a prompt one program goes through all of them.
    """
    rows = rows_of(batch, site, x.shape[0])
    wanted = min(max(site.in_features // _PART, 1), _MAX_PARTS)
    part = round_up(ceil_div(site.in_features, wanted), _DEPTH)
    parts = ceil_div(site.in_features, part)
    programs = parts if rows.tokens == 16 else 1
    ranks = power_of_two(site.rank_cap, 16, rows.tokens)
    blocks = site.num_slices * ceil_div(site.rank_cap, ranks)
    sums = out if programs == 1 else x.new_empty((programs, x.shape[0], site.u_width), dtype=torch.float32)
    _shrink[rows.programs, blocks, programs](
        x,
        x.stride(0),
        sums,
        sums.stride(-2),
        sums.stride(0),
        adapters_of(slabs, site),
        rows.table,
        rows.words,
        rows.tiles,
        K=site.in_features,
        RANK_CAP=site.rank_cap,
        RANKS=ranks,
        TOKENS=rows.tokens,
        PART=part,
        PARTS=parts // programs,
        DEPTH=_DEPTH,
        PRECISION=precision(x.dtype),
        **OPTIONS,
    )
    if programs > 1:
        _add_parts[rows.programs, blocks](
            sums,
            sums.stride(1),
            sums.stride(0),
            out,
            out.stride(0),
            adapters_of(slabs, site),
            rows.table,
            rows.words,
            rows.tiles,
            RANK_CAP=site.rank_cap,
            RANKS=ranks,
            TOKENS=rows.tokens,
            PARTS=parts,
            **OPTIONS,
        )
    return out


def lora_expand_add(y: Tensor, delta: LoraDelta) -> Tensor:
    """See `reference.lora_expand_add`."""
    rows = rows_of(delta.batch, delta.site, y.shape[0])
    n0, n1, n2 = (*delta.site.out_features, 0, 0)[:3]
    blocks = sum(ceil_div(n, _COLUMNS) for n in (n0, n1, n2))
    _expand_add[rows.programs, blocks](
        y,
        y.stride(0),
        delta_of(delta),
        rows.table,
        rows.words,
        rows.tiles,
        N0=n0,
        N1=n1,
        N2=n2,
        COLUMNS=_COLUMNS,
        TOKENS=rows.tokens,
        STEP=rank_step(delta),
        PRECISION=precision(y.dtype),
        **OPTIONS,
    )
    return y


@triton.jit
def _rank_block(block, RANK_CAP: tl.constexpr, RANKS: tl.constexpr):
    """Slice and first rank of a block of columns of u."""
    blocks: tl.constexpr = (RANK_CAP + RANKS - 1) // RANKS
    return block // blocks, block % blocks * RANKS


@triton.jit(do_not_specialize=["table", "tiles"])
def _shrink(
    x,
    x_stride,
    out,
    out_stride,
    part_stride,
    adapters,
    table,
    words,
    tiles,
    K: tl.constexpr,
    RANK_CAP: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[program][t][slice * RANK_CAP + r] = sum over PARTS parts of K. Grid: tiles, blocks of ranks, programs."""
    tile = tl.program_id(0)
    if tile >= tl.load(words + LORA_TILES):
        return
    rows, row_present, slot, _ = tile_rows(words, tiles, tile, TOKENS)
    slice_index, first_rank = _rank_block(tl.program_id(1), RANK_CAP, RANKS)
    rank, _ = read_slice(adapters, table, slot, slice_index)
    if first_rank >= rank:
        return
    ranks = first_rank + tl.arange(0, RANKS)
    columns = slice_index * RANK_CAP + ranks
    a_rows = a_of(adapters, slot) + columns.to(tl.int64) * K
    first = tl.program_id(2) * PARTS * PART
    sums = tl.zeros((TOKENS, RANKS), tl.float32)
    for part in range(PARTS):
        sums += row_products(
            x + rows * x_stride, row_present, a_rows, ranks < rank, first + part * PART, K, PART, DEPTH, PRECISION
        )
    target = out + tl.program_id(2).to(tl.int64) * part_stride + (rows * out_stride)[:, None] + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=row_present[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["table", "tiles"])
def _add_parts(
    sums,
    sums_stride,
    part_stride,
    out,
    out_stride,
    adapters,
    table,
    words,
    tiles,
    RANK_CAP: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out[t][r] = the sums of all parts, added in their order. Grid: tiles, blocks of ranks."""
    tile = tl.program_id(0)
    if tile >= tl.load(words + LORA_TILES):
        return
    rows, row_present, slot, _ = tile_rows(words, tiles, tile, TOKENS)
    slice_index, first_rank = _rank_block(tl.program_id(1), RANK_CAP, RANKS)
    rank, _ = read_slice(adapters, table, slot, slice_index)
    ranks = first_rank + tl.arange(0, RANKS)
    columns = slice_index * RANK_CAP + ranks
    mask = row_present[:, None] & (ranks < rank)[None, :]
    source = sums + (rows * sums_stride)[:, None] + columns[None, :]
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    for _ in range(PARTS):
        total += tl.load(source, mask=mask, other=0.0)
        source += part_stride
    target = out + (rows * out_stride)[:, None] + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table", "tiles"])
def _expand_add(
    y,
    y_stride,
    delta,
    table,
    words,
    tiles,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles, blocks of COLUMNS outputs of slice 0, then of slice 1, then of slice 2."""
    tile = tl.program_id(0)
    if tile >= tl.load(words + LORA_TILES):
        return
    rows, row_present, slot, adapter_rank = tile_rows(words, tiles, tile, TOKENS)
    blocks0: tl.constexpr = (N0 + COLUMNS - 1) // COLUMNS
    blocks1: tl.constexpr = (N1 + COLUMNS - 1) // COLUMNS
    block = tl.program_id(1)
    slice_index, start, size = 0, 0, N0
    if block >= blocks0 + blocks1:
        slice_index, start, size, block = 2, N0 + N1, N2, block - blocks0 - blocks1
    elif block >= blocks0:
        slice_index, start, size, block = 1, N0, N1, block - blocks0
    rank, _ = read_slice(delta.adapters, table, slot, slice_index)
    if rank == 0:
        return
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    column_present = columns < size
    term = delta_tile(
        delta, table, slot, adapter_rank, slice_index, rows, row_present, columns, column_present, STEP, PRECISION
    )
    target = y + (rows * y_stride)[:, None] + (start + columns)[None, :]
    mask = row_present[:, None] & column_present[None, :]
    sums = tl.load(target, mask=mask, other=0.0).to(tl.float32) + term
    tl.store(target, sums.to(y.dtype.element_ty), mask=mask)
