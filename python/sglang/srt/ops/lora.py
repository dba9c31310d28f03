"""Low-rank additions to a projection (Hu et al. 2021): the torch reference, and sgl_kernel's for adapters in slabs.

Shape legend: T token rows of a step, N of them of one adapter version, r rank, I inputs, O outputs of the module.
Sums are taken in float32 whatever the dtype: y is rounded once, after the addition.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sgl_kernel import ops as fused
from sgl_kernel.lora.layout import LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs
from sglang.srt.ops.linear import Product, dense_linear, is_skinny


def lora_add_(y: Tensor, x: Tensor, rows: Tensor | None, a: Tensor, b: Tensor, scale: float, out_start: int) -> Tensor:
    """y[rows, out_start : out_start + O] += scale * (x A^T) B^T, in place; returns y.

    Args:
        y: [T, outputs of the fused projection], any strides; rows that are not named keep every bit.
        x: [N, I], the version's rows only.
        rows: int64 [N], distinct; None for all rows.
        a: [r, I]; b: [O, r].
        out_start: where this module's outputs start in y.
    """
    shrunk = (x.float() @ a.float().t()).mul_(scale)
    return _add_(y, shrunk, rows, b, out_start)


def lora_embedding_add_(y: Tensor, ids: Tensor, rows: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y[rows] += scale * A^T[ids] B^T, in place; returns y: `lora_add_` of one-hot rows.

    Args:
        y: [T, hidden]; ids: int64 [N], the version's tokens only; a: [r, vocab]; b: [hidden, r].
    """
    shrunk = a[:, ids].t().float() * scale
    return _add_(y, shrunk, rows, b, 0)


def _add_(y: Tensor, shrunk: Tensor, rows: Tensor | None, b: Tensor, out_start: int) -> Tensor:
    delta = shrunk @ b.float().t()
    target = y.narrow(1, out_start, len(b))
    if rows is None:
        target.add_(delta)
    else:
        target.index_copy_(0, rows, (target[rows] + delta).to(y.dtype))
    return y


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def lora_project(
    x: Tensor, weight: Tensor, slabs: LoraSlabs, site: LoraSite, batch: LoraBatch, extended: Tensor | None = None
) -> Product:
    """x weight^T, and u = x A^T of the adapters in slabs, for the operation that reads the product to add B u.

    Few rows on a GPU: both in one kernel. More: one product with the extended weight, or, without one, u on a stream of
    its own beside the product, which then waits for multiprocessors.

    Args:
        x: [T, I]; weight: [O, I] of the slabs' dtype.
        extended: [O + slots * u_width, I], the weight and behind it A of the first slots (`lora.weight_tails`); no row
            has an adapter of another slot.
    """
    if extended is not None and not is_skinny(x, weight):
        both = dense_linear(x, extended)
        both = both if x.is_cuda else both.contiguous()
        y, u = both.split([len(weight), len(extended) - len(weight)], dim=1)
        return Product(y, LoraDelta(u, slabs, site, batch, site.u_width))
    u = torch.empty(len(x), site.u_width, dtype=x.dtype, device=x.device)
    if is_skinny(x, weight):
        y = fused.skinny_gemm(x, weight, shrink=(slabs, site, batch, u))
    elif not x.is_cuda:
        fused.lora_shrink(x, slabs, site, batch, u)
        y = dense_linear(x, weight).contiguous()
    else:
        main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            fused.lora_shrink(x, slabs, site, batch, u)
        y = dense_linear(x, weight)
        # The allocator knows u and x as the main stream's; nothing frees them before this.
        main.wait_stream(side)
    return Product(y, LoraDelta(u, slabs, site, batch))
