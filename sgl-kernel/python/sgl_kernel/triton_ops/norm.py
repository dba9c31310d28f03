"""Root-mean-square norm of rows, alone or after the residual and a low-rank term have been added."""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202, SIM102
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl_kernel.triton_ops.device import LIVE_TOKENS, TILES, delta_tile, tile_rows
from sgl_kernel.triton_ops.launch import OPTIONS, ceil_div, delta_of, power_of_two, precision, rank_step, rows_of
from sgl_kernel.types import LoraDelta

_COLUMNS = 128
_MAX_BLOCK = 1 << 16


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """See `reference.rmsnorm`."""
    _norm_rows(x, None, weight, eps, out, None)
    return out


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, delta: LoraDelta | None = None) -> None:
    """See `reference.fused_add_rmsnorm`.

    A norm needs whole rows and a low-rank term wants many programs: with one, a kernel of its own makes the sums.
    """
    if delta is None:
        _norm_rows(x, residual, weight, eps, x, None)
        return
    rows = rows_of(delta.batch, delta.site, x.shape[0])
    _add_to_residual[rows.programs, ceil_div(x.shape[1], _COLUMNS)](
        x,
        x.stride(0),
        residual,
        residual.stride(0),
        delta_of(delta),
        rows.table,
        rows.words,
        rows.tiles,
        HIDDEN=x.shape[1],
        COLUMNS=_COLUMNS,
        TOKENS=rows.tokens,
        STEP=rank_step(delta),
        PRECISION=precision(x.dtype),
        **OPTIONS,
    )
    _norm_rows(residual, None, weight, eps, x, rows.words)


def _norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, words: Tensor | None
) -> None:
    """out = norm of x, or of residual += x; with `words`, for as many rows as the batch has tokens."""
    hidden = x.shape[1]
    block = power_of_two(hidden, 16, _MAX_BLOCK)
    _norm[(x.shape[0],)](
        x,
        x.stride(0),
        residual,
        0 if residual is None else residual.stride(0),
        weight,
        out,
        out.stride(0),
        eps,
        words,
        HIDDEN=hidden,
        BLOCK=block,
        num_warps=power_of_two(block // 512, 1, 16),
        **OPTIONS,
    )


@triton.jit
def _norm(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    out,
    out_stride,
    eps,
    words,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    if words is not None:
        if row >= tl.load(words + LIVE_TOKENS):
            return
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        target = residual + row * residual_stride + columns
        values += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(target, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / HIDDEN + eps)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (values * scale * weights).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table", "tiles"])
def _add_to_residual(
    x,
    x_stride,
    residual,
    residual_stride,
    delta,
    table,
    words,
    tiles,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """residual += x + the low-rank term, for the rows of every tile. Grid: tiles, blocks of COLUMNS columns."""
    if tl.program_id(0) >= tl.load(words + TILES):
        return
    rows, row_present, slot, rank = tile_rows(words, tiles, tl.program_id(0), TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_present = columns < HIDDEN
    mask = row_present[:, None] & column_present[None, :]
    values = tl.load(x + (rows * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    values += delta_tile(delta, table, slot, rank, 0, rows, row_present, columns, column_present, STEP, PRECISION)
    target = residual + (rows * residual_stride)[:, None] + columns[None, :]
    values += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, values.to(residual.dtype.element_ty), mask=mask)
