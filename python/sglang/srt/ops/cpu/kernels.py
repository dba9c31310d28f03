"""The compiled operators of decode.cpp as functions on tensors.

Called by the operators' modules, after `usable`. Arguments are checked there and by the callers' layouts: everything is
float32 on the CPU, and dense but for what a docstring says.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sglang.srt.ops.cpu.build import load_library


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: float32, on the CPU, and there is a library."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and load_library() is not None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops.norm.fused_add_rms_norm; residual must be dense."""
    library = load_library()
    assert library is not None and residual.is_contiguous()
    x, out = x.contiguous(), torch.empty_like(residual)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, residual, weight, out))
    library.sgl_add_rms_norm(*pointers, ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), ctypes.c_float(eps))
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See ops.activation.silu_and_mul."""
    library = load_library()
    assert library is not None
    gate_up = gate_up.contiguous()
    tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (gate_up, out))
    library.sgl_silu_and_mul(*pointers, ctypes.c_int64(tokens), ctypes.c_int64(size))
    return out


def decode_attention(q: Tensor, pools: tuple[Tensor, Tensor], locs: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """One new token for each of B sequences, reading the pool in place.

    Args:
        q: [B, Hq, D], each row dense; pools: K and V, [N, Hkv, D].
        locs: int64 [B, L] pool rows; lengths: int64 [B], how many of them count.

    Returns:
        [B, Hq * D]
    """
    library = load_library()
    assert library is not None and q.stride(2) == 1 and q.stride(1) == q.shape[2]
    batch, heads, dim = q.shape
    out = q.new_empty(batch, heads * dim)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (q, *pools, locs, lengths, out))
    sizes = (batch, heads, pools[0].shape[1], dim, locs.shape[1], q.stride(0))
    library.sgl_decode_attention(*pointers, *(ctypes.c_int64(n) for n in sizes), ctypes.c_float(scale))
    return out
