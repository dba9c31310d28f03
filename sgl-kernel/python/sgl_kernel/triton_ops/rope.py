"""What lies between the qkv projection and attention: bias, low-rank term, norm of heads, rotation, the cache."""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202, SIM102
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl_kernel.triton_ops.device import delta_tile, live_programs, program_rows
from sgl_kernel.triton_ops.launch import OPTIONS, delta_of, power_of_two, precision, rank_step, rows_of_delta
from sgl_kernel.types import LoraDelta


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    k_pool: Tensor | None = None,
    v_pool: Tensor | None = None,
    locs: Tensor | None = None,
    delta: LoraDelta | None = None,
) -> Tensor:
    """See `reference.qk_norm_rope`."""
    rows = rows_of_delta(delta, qkv.shape[0])
    _qk_norm_rope[rows.programs, num_heads + 2 * num_kv_heads](
        qkv,
        qkv.stride(0),
        q_weight,
        k_weight,
        eps,
        cos_sin,
        positions,
        bias,
        k_pool,
        v_pool,
        0 if k_pool is None else k_pool.stride(0),
        0 if v_pool is None else v_pool.stride(0),
        locs,
        qkv.shape[0],
        delta_of(delta),
        rows.table,
        rows.words,
        rows.tiles,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=power_of_two(head_dim // 2, 16, 1024),
        TOKENS=rows.tokens,
        STEP=rank_step(delta),
        PRECISION=precision(qkv.dtype),
        **OPTIONS,
    )
    return qkv


@triton.jit
def _load_half(
    qkv_rows,
    bias,
    delta,
    table,
    slot,
    rank,
    slice_index,
    slice_start,
    rows,
    row_present,
    columns,
    present,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Half a head with its bias and low-rank term, float32 [TOKENS, HALF]; `columns` count from the slice's first."""
    mask = row_present[:, None] & present[None, :]
    values = tl.load(qkv_rows[:, None] + (slice_start + columns)[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + slice_start + columns, mask=present, other=0.0).to(tl.float32)[None, :]
    if delta is not None:
        values += delta_tile(
            delta, table, slot, rank, slice_index, rows, row_present, columns, present, STEP, PRECISION
        )
    return values


@triton.jit
def _norm_halves(low, high, weight, lanes, present, eps, HEAD_DIM: tl.constexpr):
    """The norm of heads, given and returned as halves [TOKENS, HALF]."""
    squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    low_weight = tl.load(weight + lanes, mask=present, other=0.0).to(tl.float32)
    high_weight = tl.load(weight + HEAD_DIM // 2 + lanes, mask=present, other=0.0).to(tl.float32)
    return low * scale * low_weight[None, :], high * scale * high_weight[None, :]


@triton.jit
def _rotate_halves(low, high, cos_sin, positions, mask, lanes, HEAD_DIM: tl.constexpr):
    """Dimension i turns with i + HEAD_DIM / 2, by the angles of each token's position."""
    angles = cos_sin + (positions * HEAD_DIM)[:, None] + lanes[None, :]
    cos = tl.load(angles, mask=mask, other=0.0)
    sin = tl.load(angles + HEAD_DIM // 2, mask=mask, other=0.0)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _store_halves(target, low, high, mask, HEAD_DIM: tl.constexpr):
    tl.store(target, low.to(target.dtype.element_ty), mask=mask)
    tl.store(target + HEAD_DIM // 2, high.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "table", "tiles"])
def _qk_norm_rope(
    qkv,
    qkv_stride,
    q_weight,
    k_weight,
    eps,
    cos_sin,
    positions,
    bias,
    k_pool,
    v_pool,
    k_pool_stride,
    v_pool_stride,
    locs,
    num_rows,
    delta,
    table,
    words,
    tiles,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles or blocks of TOKENS rows, heads of q, k and v."""
    if tl.program_id(0) >= live_programs(words, num_rows, TOKENS):
        return
    rows, row_present, slot, rank = program_rows(words, tiles, num_rows, tl.program_id(0), TOKENS)
    head, slice_index, first_head = tl.program_id(1), 0, 0
    if head >= NUM_HEADS + NUM_KV_HEADS:
        slice_index, first_head = 2, NUM_HEADS + NUM_KV_HEADS
    elif head >= NUM_HEADS:
        slice_index, first_head = 1, NUM_HEADS
    lanes = tl.arange(0, HALF)
    present = lanes < HEAD_DIM // 2
    mask = row_present[:, None] & present[None, :]
    start, head = first_head * HEAD_DIM, head - first_head
    columns = head * HEAD_DIM + lanes
    q = qkv + rows * qkv_stride
    low = _load_half(
        q, bias, delta, table, slot, rank, slice_index, start, rows, row_present, columns, present, STEP, PRECISION
    )
    columns += HEAD_DIM // 2
    high = _load_half(
        q, bias, delta, table, slot, rank, slice_index, start, rows, row_present, columns, present, STEP, PRECISION
    )
    if q_weight is not None:
        if slice_index == 0:
            low, high = _norm_halves(low, high, q_weight, lanes, present, eps, HEAD_DIM)
    if k_weight is not None:
        if slice_index == 1:
            low, high = _norm_halves(low, high, k_weight, lanes, present, eps, HEAD_DIM)
    if slice_index < 2:
        token_positions = tl.load(positions + rows, mask=row_present, other=0)
        low, high = _rotate_halves(low, high, cos_sin, token_positions, mask, lanes, HEAD_DIM)
    place = head * HEAD_DIM + lanes
    _store_halves(q[:, None] + (start + place)[None, :], low, high, mask, HEAD_DIM)
    if k_pool is not None:
        loc = tl.load(locs + rows, mask=row_present, other=0)
        if slice_index == 1:
            _store_halves(k_pool + (loc * k_pool_stride)[:, None] + place[None, :], low, high, mask, HEAD_DIM)
        if slice_index == 2:
            _store_halves(v_pool + (loc * v_pool_stride)[:, None] + place[None, :], low, high, mask, HEAD_DIM)
