"""Rotary position embedding, half-split pairing: dimension i turns with dimension i + D/2 (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of dimensions by each token's angles, in place; returns x.

    Args:
        x: [T, N, D], its last dimension dense; may be a view into a fused projection.
        cos: [T, 1, D] in x's dtype, the same in both halves.
        sin: [T, 1, D], its first half negated, so that the rotation is x * cos + (x's halves exchanged) * sin.
    """
    exchanged = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return x.mul_(cos).addcmul_(exchanged, sin)
