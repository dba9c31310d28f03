"""Low-rank additions to a projection, the torch reference (Hu et al. 2021).

Shape legend: T token rows of a step, N of them of one adapter version, r rank, I inputs, O outputs of the module.
Sums are taken in float32 whatever the dtype: y is rounded once, after the addition.
"""

from __future__ import annotations

from torch import Tensor


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
