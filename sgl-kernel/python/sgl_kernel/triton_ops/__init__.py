"""The operations as Triton kernels: for GPUs that no binary fits, and what the binaries are compared with on a GPU.

Same names and arguments as `sgl_kernel.reference`, which says what each computes. Grids depend on capacities alone and
programs find the live counts in the batch buffer, so that a captured graph replays with any batch; sums run in an order
that no other row has a part in; nothing is added by atomics. Imports triton, so ask for it by name.
"""

from __future__ import annotations

from sgl_kernel.triton_ops.activation import silu_and_mul
from sgl_kernel.triton_ops.gemm import skinny_gemm
from sgl_kernel.triton_ops.lora import lora_expand_add, lora_shrink
from sgl_kernel.triton_ops.norm import fused_add_rmsnorm, rmsnorm
from sgl_kernel.triton_ops.rope import qk_norm_rope

__all__ = [
    "fused_add_rmsnorm",
    "lora_expand_add",
    "lora_shrink",
    "qk_norm_rope",
    "rmsnorm",
    "silu_and_mul",
    "skinny_gemm",
]
