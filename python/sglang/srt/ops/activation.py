"""Gated activations of the MLP (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [T, 2 * I], gate first.

    Returns:
        [T, I]
    """
    size = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])
