"""The public operations: arguments are checked and outputs allocated here, then a backend runs.

Called by models, by `linear` and by `library`. Invariant: a backend gets two-dimensional tensors on one device whose
rows have adjacent columns, and, on a GPU, start at multiples of 16 bytes.
Shape legend: T token rows, K inputs, N outputs of a group, n slices, r rank, H width, I inner width of the MLP, D width
of a head. Activations are bfloat16 (the dtype of the compiled kernels), float16 or float32; slabs are bfloat16 and, on
a CPU, also float32. Operations that take a `delta` process the first `tokens` rows of its batch only; rows of slot -1
get no addition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgl_kernel import _binding, reference
from sgl_kernel._checks import (
    check_angles,
    check_delta,
    check_index,
    check_lora,
    check_out,
    check_outputs,
    check_pools,
    check_rows,
    check_same,
    check_vector,
    flat,
)
from sgl_kernel.lora.layout import LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

MAX_SKINNY_ROWS = 64
"""Rows of a product that `skinny_gemm` takes."""


def backend_for(tensor: Tensor) -> Any:
    """Whose functions run on this tensor: the compiled library's, Triton's on other GPUs and dtypes, or torch's."""
    native = _binding.native_for(tensor)
    if native is not None:
        return native
    if tensor.device.type != "cuda":
        return reference
    from sgl_kernel import triton_ops  # imports Triton, which a machine without a GPU need not have

    return triton_ops


def streamed_rows(tensor: Tensor) -> int:
    """Rows up to which `skinny_gemm` of tensors like this one keeps the memory busier than a library's product does.

    64 on Hopper, 16 on other GPUs that there are compiled kernels for, else 0 (`benchmark/kernels/decode_gemm.py`).
    """
    if _binding.native_for(tensor) is None:
        return 0
    return MAX_SKINNY_ROWS if _binding.has_warpgroups(tensor.device) else 16


# ---- adapters --------------------------------------------------------------------------------------------------------


def lora_shrink(x: Tensor, slabs: LoraSlabs, site: LoraSite, batch: LoraBatch, out: Tensor | None = None) -> Tensor:
    """u_i[t] = A_i x[t] for every slice i of the adapter of row t, summed in float32 and rounded once.

    Args:
        x: [T, K], any row stride.
        slabs, site, batch: the adapters, which matrix of theirs, and whose rows; T is at most the batch's max_tokens.
        out: [T, n * rank_cap] of x's dtype; None allocates it.

    Returns:
        `out`; slice i in columns i * rank_cap ..., of which the first r count, r the module's rank. Those from there up
        to the adapter's rank may have been written with anything, NaN too; others, and rows of slot -1, keep their
        bits.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    rows, columns = check_rows("x", x)
    if columns != site.in_features:
        raise ValueError(f"x has {columns} columns, the site takes {site.in_features}")
    check_lora(x, slabs, site, batch, rows)
    if out is None:
        out = torch.empty(rows, site.u_width, dtype=x.dtype, device=x.device)
    else:
        check_out("out", out, x, rows, site.u_width)
    backend_for(x).lora_shrink(x, slabs, site, batch, out)
    return out


def lora_expand_add_(y: Tensor, delta: LoraDelta) -> Tensor:
    """y_i[t] += scale_i * (B_i u_i[t]) for every slice i of the adapter of row t, in float32, in place.

    Args:
        y: [T, N], any row stride: the output of a projection, slice after slice.
        delta: u of the same rows, and whose it is.

    Returns:
        y. Rows of slot -1, and slices that an adapter does not have, keep every bit.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    rows, columns = check_rows("y", y)
    check_delta(y, delta, rows, columns)
    backend_for(y).lora_expand_add(y, delta)
    return y


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor | None = None,
    *,
    shrink: tuple[LoraSlabs, LoraSite, LoraBatch, Tensor] | None = None,
) -> Tensor:
    """out = x weight^T for few rows, and in the same pass over x what `lora_shrink` computes.

    Args:
        x: [M, K], M at most 64, K a multiple of 8, any row stride.
        weight: [N, K] of x's dtype, N a multiple of 8 on a GPU, any row stride.
        out: [M, N] of x's dtype, any row stride; None allocates it.
        shrink: slabs, site, batch and u [M, n * rank_cap], which is written as by `lora_shrink`; None for the product
            alone.

    Returns:
        `out`; its row does not depend on the other rows. Their number and `shrink` choose the kernel, and so the order
        in which a sum is taken.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    rows, columns = check_rows("x", x)
    outputs, inputs = check_rows("weight", weight)
    if columns % 8:
        raise ValueError(f"x has {columns} columns; it must be a multiple of 8")
    if rows > MAX_SKINNY_ROWS:
        raise ValueError(f"x has {rows} rows; skinny_gemm takes up to {MAX_SKINNY_ROWS}, use a matrix product beyond")
    if inputs != columns:
        raise ValueError(f"x has {columns} columns, weight has {inputs}; they must agree")
    check_same("weight", weight, x)
    check_outputs(x, outputs)
    if shrink is not None:
        slabs, site, batch, u = shrink
        if columns != site.in_features:
            raise ValueError(f"x has {columns} columns, the site takes {site.in_features}")
        check_lora(x, slabs, site, batch, rows)
        check_out("u", u, x, rows, site.u_width)
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    else:
        check_out("out", out, x, rows, outputs)
    backend_for(x).skinny_gemm(x, weight, out, shrink)
    return out


# ---- norms and activations -------------------------------------------------------------------------------------------


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """out = input / sqrt(mean(input^2) + eps) * weight over the last dimension, in float32, rounded once.

    Args:
        input: [..., H].
        weight: [H] of the same dtype.
        out: of input's shape, may be input itself; None allocates it.
        enable_pdl: accepted for upstream's callers; how kernels are launched is `programmatic_launch`'s business.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    if out is None:
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
    elif out.shape != input.shape:
        raise ValueError(f"out has shape {list(out.shape)}; it must be {list(input.shape)}, as input's")
    x, y = flat("input", input), flat("out", out)
    rows, width = check_rows("input", x)
    check_vector("weight", weight, x, width)
    check_out("out", y, x, rows, width)
    backend_for(x).rmsnorm(x, weight, eps, y)
    return out


def fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    delta: LoraDelta | None = None,
) -> None:
    """residual += input + delta, then input = rmsnorm(residual) * weight: in float32, each rounded once, in place.

    Args:
        input: [..., H]; overwritten with the normalised rows.
        residual: of the same shape; overwritten with the sum. The norm is of the sum as it was rounded.
        weight: [H] of the same dtype.
        enable_pdl: see `rmsnorm`.
        delta: of the projection that computed `input`; its site has H outputs.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    x, r = flat("input", input), flat("residual", residual)
    rows, width = check_rows("input", x)
    check_out("residual", r, x, rows, width)
    check_vector("weight", weight, x, width)
    if delta is not None:
        check_delta(x, delta, rows, width)
    backend_for(x).fused_add_rmsnorm(x, r, weight, eps, delta)


def silu_and_mul(input: Tensor, out: Tensor | None = None, *, delta: LoraDelta | None = None) -> Tensor:
    """out = silu(gate) * up, where (gate, up) = input + delta: in float32, rounded once.

    Args:
        input: [..., 2 I], gate first.
        out: [..., I]; None allocates it.
        delta: of the projection that computed `input`; its site has two slices of I outputs.

    Returns:
        `out`; rows from the batch's `tokens` on are not written.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    x = flat("input", input)
    rows, width = check_rows("input", x)
    if width % 2:
        raise ValueError(f"input has {width} columns; it must be an even number, gate and up")
    shape = (*input.shape[:-1], width // 2)
    if out is None:
        out = torch.empty(shape, dtype=input.dtype, device=input.device)
    elif out.shape != shape:
        raise ValueError(f"out has shape {list(out.shape)}; it must be {list(shape)}")
    y = flat("out", out)
    check_out("out", y, x, rows, width // 2)
    if delta is not None:
        check_delta(x, delta, rows, width)
        if delta.site.out_features != (width // 2, width // 2):
            raise ValueError(
                f"the site has slices {delta.site.out_features}; they must be gate and up, {width // 2} each"
            )
    backend_for(x).silu_and_mul(x, y, delta)
    return out


# ---- attention -------------------------------------------------------------------------------------------------------


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    k_pool: Tensor | None = None,
    v_pool: Tensor | None = None,
    locs: Tensor | None = None,
    delta: LoraDelta | None = None,
) -> Tensor:
    """qkv += bias + delta; q and k: RMS norm of every head, then rotation. In float32, rounded once, in place.

    Pairs are (i, i + D/2): with the angle's cosine c and sine s, (x, y) becomes (x c - y s, y c + x s).

    Args:
        qkv: [T, (num_heads + 2 num_kv_heads) D], any row stride: q, k and v, head after head.
        q_weight, k_weight: [D] of qkv's dtype; None for no norm.
        eps: of the norms.
        cos_sin: float32 [P, D], contiguous: of every position D/2 cosines, then D/2 sines.
        positions: int64 [T], each less than P, which is not checked.
        bias: as many numbers as qkv has columns, of its dtype.
        k_pool, v_pool: [slots, num_kv_heads, D] of qkv's dtype, contiguous: rows `locs` of them get k and v.
            All three or none.
        locs: int64 [T], distinct, each a row of the pools, which is not checked.
        delta: of the projection that computed qkv; its site has slices q, k and v.

    Returns:
        qkv.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, stride, alignment or device.
    """
    rows, columns = check_rows("qkv", qkv)
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    if columns != q + 2 * kv or head_dim % 2:
        raise ValueError(
            f"qkv has {columns} columns; it must have {q} + 2 * {kv}, of heads of an even width {head_dim}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_vector(name, weight, qkv, head_dim)
    if bias is not None:
        check_vector("bias", bias, qkv, columns)
    check_angles(cos_sin, qkv, head_dim)
    check_index("positions", positions, qkv, rows)
    check_pools(k_pool, v_pool, locs, qkv, rows, (num_kv_heads, head_dim))
    if delta is not None:
        check_delta(qkv, delta, rows, columns)
        if delta.site.out_features != (q, kv, kv):
            raise ValueError(f"the site has slices {delta.site.out_features}; they must be q, k and v: {(q, kv, kv)}")
    backend_for(qkv).qk_norm_rope(
        qkv,
        num_heads,
        num_kv_heads,
        head_dim,
        q_weight,
        k_weight,
        eps,
        cos_sin,
        positions,
        bias,
        k_pool,
        v_pool,
        locs,
        delta,
    )
    return qkv
