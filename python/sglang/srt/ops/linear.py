"""Dense projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias.

    Args:
        x: [T, I]; weight: [O, I]; bias: [O].

    Returns:
        [T, O]
    """
    return F.linear(x, weight, bias)
