"""Root-mean-square normalisation. Statistics are taken in float32 whatever the dtype (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., H]; weight: [H] of the same dtype.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` in place and normalise the sum.

    Args:
        x, residual: [T, H]; residual is overwritten with residual + x.
    """
    return rms_norm(residual.add_(x), weight, eps)
