"""y = x W^T for the few token rows of a decode step."""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sgl_kernel.lora.layout import LoraSite, round_up
from sgl_kernel.triton_ops.device import row_products
from sgl_kernel.triton_ops.launch import OPTIONS, ceil_div, precision
from sgl_kernel.triton_ops.lora import lora_shrink
from sgl_kernel.types import LoraBatch, LoraSlabs

_TOKENS = 32
_DEPTH_BYTES = 256
"""Of every row at once."""


def skinny_gemm(
    x: Tensor, weight: Tensor, out: Tensor, shrink: tuple[LoraSlabs, LoraSite, LoraBatch, Tensor] | None = None
) -> Tensor:
    """See `reference.skinny_gemm`.

    Few rows of weights a program, so that there are as many programs as can be: what counts is how much of the weights
    is on its way at once. Always 32 token rows a program, filled or not: for another number the compiler picks other
    matrix instructions, and a row's bits would depend on how many others there are.
    """
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    columns, depth = 16 if out_features <= 4096 else 32, _DEPTH_BYTES // x.element_size()
    _gemm[ceil_div(num_rows, _TOKENS), ceil_div(out_features, columns)](
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        out,
        out.stride(0),
        num_rows,
        out_features,
        K=in_features,
        LENGTH=round_up(in_features, depth),
        COLUMNS=columns,
        TOKENS=_TOKENS,
        DEPTH=depth,
        PRECISION=precision(x.dtype),
        num_stages=4,
        **OPTIONS,
    )
    if shrink is not None:
        slabs, site, batch, u = shrink
        lora_shrink(x, slabs, site, batch, u)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _gemm(
    x,
    x_stride,
    weight,
    weight_stride,
    out,
    out_stride,
    num_rows,
    out_features,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: blocks of TOKENS rows, blocks of COLUMNS outputs; blocks of the same weights are neighbours."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_present, column_present = rows < num_rows, columns < out_features
    sums = row_products(
        x + rows * x_stride,
        row_present,
        weight + columns * weight_stride,
        column_present,
        0,
        K,
        LENGTH,
        DEPTH,
        PRECISION,
    )
    target = out + (rows * out_stride)[:, None] + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=row_present[:, None] & column_present[None, :])
