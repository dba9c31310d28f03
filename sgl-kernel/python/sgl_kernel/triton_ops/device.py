"""Device functions that the kernels share: reading batches and slabs, products, and the low-rank term of a tile."""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN201, SIM108
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Words of the batch's header, and its length: sgl_kernel.lora.batch has them for the host.
LORA_TILES = tl.constexpr(0)
TILES = tl.constexpr(1)
LIVE_TOKENS = tl.constexpr(2)
HEADER_WORDS = tl.constexpr(8)


@triton.jit
def tile_rows(words, tiles, index, TOKENS: tl.constexpr):
    """A tile of the batch.

    Returns:
        int64 [TOKENS], its token rows; [TOKENS], which of them there are; its slot; the rank of the adapter in it.
    """
    entry = words + tiles + 4 * index
    start, count, slot, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    lanes = tl.arange(0, TOKENS)
    present = lanes < count
    rows = tl.load(words + HEADER_WORDS + start + lanes, mask=present, other=0)
    return rows.to(tl.int64), present, slot, rank


@triton.jit
def program_rows(words, tiles, num_rows, index, TOKENS: tl.constexpr):
    """What `tile_rows` returns for tile `index`.

    Without a batch: rows index * TOKENS ... of `num_rows`, slot -1, rank 0.
    """
    if words is None:
        rows = index.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        present = rows < num_rows
        slot, rank = -1, 0
    else:
        rows, present, slot, rank = tile_rows(words, tiles, index, TOKENS)
    return rows, present, slot, rank


@triton.jit
def live_programs(words, num_rows, TOKENS: tl.constexpr):
    """How many programs have rows: the batch's tiles; without a batch, enough for `num_rows`."""
    if words is None:
        live = (num_rows + TOKENS - 1) // TOKENS
    else:
        live = tl.load(words + TILES)
    return live


@triton.jit
def slab_of(adapters, slot):
    """uint8 pointer to the slab of a slot. Slabs together can be far larger than 2 GiB."""
    return adapters.slabs + slot.to(tl.int64) * adapters.slab_bytes


@triton.jit
def read_slice(adapters, table, slot, slice_index):
    """Rank and scale of a module of an adapter; rank 0 for slot -1."""
    entry = slab_of(adapters, slot) + table + 8 * slice_index
    rank = tl.load(entry.to(tl.pointer_type(tl.int32), bitcast=True), mask=slot >= 0, other=0)
    scale = tl.load((entry + 4).to(tl.pointer_type(tl.float32), bitcast=True), mask=slot >= 0, other=0.0)
    return rank, scale


@triton.jit
def a_of(adapters, slot):
    """bf16 pointer to A of the first slice; those of the others follow, each rank_cap rows later."""
    return (slab_of(adapters, slot) + adapters.a_offset).to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def b_of(adapters, slot, slice_index):
    """bf16 pointer to B of a slice."""
    offset = tl.cast(adapters.b_offsets[0], tl.int64)
    offset = tl.where(slice_index == 1, adapters.b_offsets[1], offset)
    offset = tl.where(slice_index == 2, adapters.b_offsets[2], offset)
    address = tl.multiple_of(slab_of(adapters, slot) + offset, 16)
    return address.to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b, in float32.

    Operands of different types are widened. Adapters are bf16: beside fp16 activations, the small values of a B that
    has just begun to learn would not survive as fp16, but TF32 holds both types exactly.
    """
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def row_products(
    x,
    x_present,
    w,
    w_present,
    begin,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over begin <= k < min(begin + LENGTH, K) of x[m][k] * w[n][k].

    Args:
        x, x_present: pointers to the starts of M rows, and which of them there are.
        w, w_present: likewise, of N rows.
        begin, LENGTH: multiples of DEPTH.
        K: a multiple of 8, known when this is compiled: so that masks of k can be seen to be eights of equals.

    Returns:
        float32 [M, N]
    """
    sums = tl.zeros((x.shape[0], w.shape[0]), tl.float32)
    for step in range(0, LENGTH, DEPTH):
        k = begin + step + tl.arange(0, DEPTH)
        x_tile = tl.load(x[:, None] + k[None, :], mask=x_present[:, None] & (k < K)[None, :], other=0.0)
        w_tile = tl.load(w[None, :] + k[:, None], mask=w_present[None, :] & (k < K)[:, None], other=0.0)
        sums = product(x_tile, w_tile, sums, PRECISION)
    return sums


@triton.jit
def delta_tile(
    delta,
    table,
    slot,
    adapter_rank,
    slice_index,
    rows,
    row_present,
    columns,
    column_present,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The low-rank term of some rows of one slot and some outputs of one slice: scale * (B u).

    Args:
        slot, adapter_rank: as the tile has them.
        rows, row_present: token rows, and which of them there are.
        columns, column_present: outputs, counted from the slice's first, and which of them there are.

    Returns:
        float32 [rows, columns]. Where there is nothing to add it is -0, the one number that changes no other.
    """
    rank, scale = read_slice(delta.adapters, table, slot, slice_index)
    # Rows of B are this long, zeros behind the module's rank. Of u as much is loaded, in whole vectors, and what lies
    # behind the module's rank, which may be anything, is left out.
    stride = tl.multiple_of((adapter_rank + 7) // 8 * 8, 8)
    u_rows = delta.u + rows * delta.u_stride + slot.to(tl.int64) * delta.u_slot_stride + slice_index * delta.rank_cap
    b_rows = b_of(delta.adapters, slot, slice_index) + columns.to(tl.int64) * stride
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for step in range(0, rank, STEP):
        k = step + tl.arange(0, STEP)
        u_tile = tl.load(u_rows[:, None] + k[None, :], mask=row_present[:, None] & (k < stride)[None, :], other=0.0)
        b_tile = tl.load(b_rows[None, :] + k[:, None], mask=column_present[None, :] & (k < stride)[:, None], other=0.0)
        u_tile = tl.where((k < rank)[None, :], u_tile, 0.0)
        sums = product(u_tile, b_tile, sums, PRECISION)
    return sums * tl.where(rank > 0, scale, -1.0)
