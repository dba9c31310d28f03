"""Gated activations of the MLP (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sgl_kernel import ops as fused
from sgl_kernel.types import LoraDelta
from sglang.srt.ops.cpu import kernels


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [T, 2 * I], gate first.

    Returns:
        [T, I]
    """
    size = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :size]).mul_(gate_up[:, size:])


def silu_and_mul(gate_up: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """`silu_and_mul_reference` of gate_up + delta, by a kernel where there is one.

    Args:
        delta: what adapters add to gate_up.
    """
    if gate_up.is_cuda or delta is not None:
        return fused.silu_and_mul(gate_up, delta=delta)
    return kernels.silu_and_mul(gate_up) if kernels.usable(gate_up) else silu_and_mul_reference(gate_up)
