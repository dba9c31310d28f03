"""Rotary position embedding, half-split pairing: dimension i turns with dimension i + D/2 (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of dimensions by each token's angles.

    Args:
        x: [T, N, D]; cos, sin: [T, 1, D / 2] in x's dtype.

    Returns:
        [T, N, D]: first half x1 * cos - x2 * sin, second half x2 * cos + x1 * sin.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
