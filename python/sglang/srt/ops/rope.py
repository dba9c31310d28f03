"""What becomes of a fused projection to q, k and v before attention: bias, norms of heads, rotation, KV write.

Rotary position embedding pairs halves: dimension i turns with dimension i + D/2 (Su et al. 2021). On a GPU all of it is
one kernel of sgl_kernel, which also adds what the projection's adapters still have to add.
Shape legend: T tokens, Hq query heads, Hkv KV heads, D head dimension, N rows of the KV pool, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sgl_kernel import ops as fused
from sgl_kernel.types import LoraDelta
from sglang.srt.ops.attention import store_kv
from sglang.srt.ops.norm import rms_norm

FUSED_HEAD_DIMS = (64, 128, 256)
"""Of the compiled kernel."""


class Heads(NamedTuple):
    """Heads of a fused projection, q then k then v, and the norms of q's and k's, [D] each; None for no norm."""

    num: int
    num_kv: int
    dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


class KVTarget(NamedTuple):
    """Where new tokens' K and V go: rows `locs`, int64 [T], distinct, of one layer's pools, [N, Hkv, D] each."""

    k: Tensor
    v: Tensor
    locs: Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of a step's tokens, in the form that the device's operator takes.

    Fields:
        positions: int64 [T].
        table: float32 [P, D], of every position D/2 cosines, then D/2 sines; None where `cos` and `sin` are given.
        cos, sin: as `rotate_` takes them.
    """

    positions: Tensor
    table: Tensor | None
    cos: Tensor | None = None
    sin: Tensor | None = None


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of dimensions by each token's angles, in place; returns x.

    Args:
        x: [T, N, D], its last dimension dense; may be a view into a fused projection.
        cos: [T, 1, D] in x's dtype, the same in both halves.
        sin: [T, 1, D], its first half negated, so that the rotation is x * cos + (x's halves exchanged) * sin.
    """
    exchanged = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return x.mul_(cos).addcmul_(exchanged, sin)


def attention_inputs(
    qkv: Tensor, heads: Heads, rotation: Rotation, target: KVTarget, bias: Tensor | None, delta: LoraDelta | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a step; k and v are stored.

    Args:
        qkv: [T, (Hq + 2 Hkv) D], any strides; may be overwritten.
        bias: of all its columns.
        delta: what adapters add to it.

    Returns:
        [T, Hq, D], [T, Hkv, D], [T, Hkv, D]: views of one tensor, heads dense.
    """
    if rotation.table is None:
        return _reference(qkv, heads, rotation, target, bias, delta)
    same = target.k.dtype == qkv.dtype
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    k_pool, v_pool, locs = target if same else (None, None, None)
    fused.qk_norm_rope(
        qkv,
        *heads,
        rotation.table,
        rotation.positions,
        bias=bias,
        k_pool=k_pool,
        v_pool=v_pool,
        locs=locs,
        delta=delta,
    )
    q, k, v = _split(qkv, heads)
    if not same:
        store_kv(k, v, *target)
    return q, k, v


def _reference(
    qkv: Tensor, heads: Heads, rotation: Rotation, target: KVTarget, bias: Tensor | None, delta: LoraDelta | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, operation by operation."""
    qkv = qkv.contiguous()
    if bias is not None:
        qkv.add_(bias)
    if delta is not None:
        fused.lora_expand_add_(qkv, delta)
    q, k, v = _split(qkv, heads)
    if heads.q_norm is not None and heads.k_norm is not None:
        normed = [rms_norm(q, heads.q_norm, heads.eps), rms_norm(k, heads.k_norm, heads.eps)]
        qk = torch.cat(normed, dim=1)
    else:
        qk = qkv.view(len(qkv), -1, heads.dim)[:, : heads.num + heads.num_kv]
    assert rotation.cos is not None and rotation.sin is not None
    q, k = rotate_(qk, rotation.cos, rotation.sin).split([heads.num, heads.num_kv], dim=1)
    store_kv(k, v, *target)
    return q, k, v


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(1, (-1, heads.dim)).split([heads.num, heads.num_kv, heads.num_kv], dim=1)
    return q, k, v
