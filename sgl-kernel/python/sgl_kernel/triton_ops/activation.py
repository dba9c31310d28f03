"""silu(gate) * up, with the low-rank terms of both."""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl_kernel.triton_ops.device import delta_tile, live_programs, program_rows
from sgl_kernel.triton_ops.launch import OPTIONS, ceil_div, delta_of, precision, rank_step, rows_of_delta
from sgl_kernel.types import LoraDelta

_COLUMNS = 64


def silu_and_mul(x: Tensor, out: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """See `reference.silu_and_mul`."""
    inner = out.shape[1]
    rows = rows_of_delta(delta, x.shape[0])
    _silu_and_mul[rows.programs, ceil_div(inner, _COLUMNS)](
        x,
        x.stride(0),
        out,
        out.stride(0),
        x.shape[0],
        delta_of(delta),
        rows.table,
        rows.words,
        rows.tiles,
        INNER=inner,
        COLUMNS=_COLUMNS,
        TOKENS=rows.tokens,
        STEP=rank_step(delta),
        PRECISION=precision(x.dtype),
        **OPTIONS,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "table", "tiles"])
def _silu_and_mul(
    x,
    x_stride,
    out,
    out_stride,
    num_rows,
    delta,
    table,
    words,
    tiles,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles or blocks of TOKENS rows, blocks of COLUMNS outputs."""
    if tl.program_id(0) >= live_programs(words, num_rows, TOKENS):
        return
    rows, row_present, slot, rank = program_rows(words, tiles, num_rows, tl.program_id(0), TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_present = columns < INNER
    mask = row_present[:, None] & column_present[None, :]
    source = x + (rows * x_stride)[:, None] + columns[None, :]
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + INNER, mask=mask, other=0.0).to(tl.float32)
    if delta is not None:
        gate += delta_tile(delta, table, slot, rank, 0, rows, row_present, columns, column_present, STEP, PRECISION)
        up += delta_tile(delta, table, slot, rank, 1, rows, row_present, columns, column_present, STEP, PRECISION)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + (rows * out_stride)[:, None] + columns[None, :], product.to(out.dtype.element_ty), mask=mask)
