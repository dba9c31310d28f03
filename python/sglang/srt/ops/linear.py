"""Projections and the embedding, with weights dense or packed (`ops.packed`).

On a CPU the product is cut along its outputs. MKL's float32 GEMM of a few rows with a row-major weight stays far below
memory speed; as a batch of narrow products over the same, unpacked weight it took 0.6 of the time at 4 to 64 rows, and
from 128 rows on saves little (two-core AVX-512 Xeon, one thread; `benchmark/kernels/cpu_decode.py`).

On a GPU the product of a few rows is sgl_kernel's, which streams the weight at nearly the memory's speed; of more rows
cuBLAS is faster (`benchmark/kernels/decode_gemm.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_kernel import ops as fused
from sgl_kernel.types import LoraDelta
from sglang.srt.ops.op import Op
from sglang.srt.ops.packed import PackedWeight, packed_linear

_BLOCK = 32
_MIN_ROWS, _MAX_DOT_ROWS, _MAX_ROWS = 4, 8, 128
SKINNY_ROWS = 16
"""Rows up to which sgl_kernel's product takes the rows of A along from wherever they are."""


class Product(NamedTuple):
    """Output of a projection, [T, O], and what adapters still add to it: the operation that reads it does that."""

    y: Tensor
    delta: LoraDelta | None = None


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias.

    Args:
        x: [T, I]; weight: [O, I]; bias: [O].

    Returns:
        [T, O]; a kernel may return it with strides (1, T), so whoever takes views of it makes it contiguous first.
    """
    return F.linear(x, weight, bias)


def _linear_mkl(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if not _MIN_ROWS <= rows <= _MAX_ROWS or outputs % _BLOCK or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    blocks = weight.view(-1, _BLOCK, inputs)
    if rows <= _MAX_DOT_ROWS:
        parts = torch.bmm(x.expand(len(blocks), rows, inputs), blocks.transpose(1, 2))
        y = parts.transpose(0, 1).reshape(rows, outputs)
    else:
        # Column by column on both sides: the next product takes this layout without a copy.
        columns = x.t().contiguous().expand(len(blocks), inputs, rows)
        y = torch.bmm(blocks, columns).view(outputs, rows).t()
    return y if bias is None else y.add_(bias)


def is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether sgl_kernel's product takes these and the rows of A of any slot, and is the fastest way."""
    return len(x) <= SKINNY_ROWS and _is_streamed(x, weight)


def _is_streamed(x: Tensor, weight: Tensor) -> bool:
    """Whether sgl_kernel's product takes these, and is faster than cuBLAS's."""
    # Rows of all three start at multiples of 16 bytes.
    return weight.shape[0] % 8 == weight.shape[1] % 8 == 0 and len(x) <= fused.streamed_rows(x)


def _linear_gpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_streamed(x, weight):
        return F.linear(x, weight, bias)
    y = fused.skinny_gemm(x, weight)
    return y if bias is None else y.add_(bias)


_KERNELS = {"cuda": _linear_gpu} | ({"cpu": _linear_mkl} if torch.backends.mkl.is_available() else {})
dense_linear = Op(linear_reference, _KERNELS)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`linear_reference`, for a weight in any form."""
    if isinstance(weight, PackedWeight):
        return packed_linear(x, weight, bias)
    return dense_linear(x, weight, bias)


def head_logits(x: Tensor, weight: Tensor | PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x @ weight^T in a dtype that may be wider than the operands', contiguous [T, V].

    Args:
        out: where to write it, dense weights only; None allocates.
    """
    if isinstance(weight, PackedWeight):
        assert out is None
        return packed_linear(x, weight).to(dtype).contiguous()
    if dtype != x.dtype and x.is_cuda:
        return torch.mm(x, weight.t(), dtype, out=out)  # the sums of the same product, not rounded
    if dtype != x.dtype:
        return torch.mm(x.to(dtype), weight.to(dtype).t(), out=out)
    if out is None:
        return linear(x, weight).contiguous()
    return fused.skinny_gemm(x, weight, out) if _is_streamed(x, weight) else torch.mm(x, weight.t(), out=out)


def embedding(ids: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Rows `ids` int64 [T] of a weight [V, H]."""
    return weight.rows(ids) if isinstance(weight, PackedWeight) else weight[ids]
