"""Root-mean-square normalisation. Statistics are taken in float32 whatever the dtype (Zhang and Sennrich 2019).

On a GPU these are sgl_kernel's, which also add what a projection's adapters still have to add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_kernel import ops as fused
from sgl_kernel.types import LoraDelta
from sglang.srt.ops.cpu import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., H]; weight: [H] of the same dtype.
    """
    if x.is_cuda:
        return fused.rmsnorm(x.contiguous(), weight, eps)
    if x.dtype != torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    # Half the time of F.rms_norm on a CPU: the reduction is one call, the small calls touch one number a row.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` in place and normalise the sum.

    Args:
        x, residual: [T, H]; residual is overwritten with residual + x.
    """
    return rms_norm(residual.add_(x), weight, eps)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, delta: LoraDelta | None = None
) -> Tensor:
    """`add_rms_norm_reference` of x + delta, by a kernel where there is one; x may be overwritten.

    Args:
        delta: what adapters add to x.
    """
    if x.is_cuda or delta is not None:
        fused.fused_add_rmsnorm(x, residual, weight, eps, delta=delta)
        return x
    if kernels.usable(x, residual):
        return kernels.add_rms_norm(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)
