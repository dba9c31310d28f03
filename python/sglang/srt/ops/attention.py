"""Causal attention over paged KV, the torch reference.

Shape legend: B sequences, Q new tokens of one sequence, L tokens attended to, Hq query heads, Hkv KV heads,
G = Hq / Hkv, D head dimension, N rows of the KV pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, locs: Tensor) -> None:
    """Write new tokens' K and V into the pool, in the pool's dtype.

    Args:
        k, v: [T, Hkv, D]; k_pool, v_pool: [N, Hkv, D]; locs: int64 [T], distinct.
    """
    k_pool.index_copy_(0, locs, k.to(k_pool.dtype))
    v_pool.index_copy_(0, locs, v.to(v_pool.dtype))


def token_locations(pages: Tensor, slots: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Pool rows of tokens: token t of a sequence is at pages[slot, t // P] * P + t % P.

    Args:
        pages: int32 [max_slots, max_pages]; slots, positions: int64, broadcast against each other.

    Returns:
        int64, the broadcast shape.
    """
    if page_size == 1:
        return pages[slots, positions].long()
    return pages[slots, positions // page_size].long() * page_size + positions % page_size


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where bool `visible` holds, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One new token for each of B sequences.

    Args:
        q: [B, Hq, D]; k, v: [B, L, Hkv, D]; mask: additive [B, 1, 1, L], or None when every row sees all of L.

    Returns:
        [B, Hq * D]
    """
    batch, num_heads, dim = q.shape
    num_kv_heads = k.shape[2]
    # The G query heads of a KV head take the place of query positions: no copy of K or V for each of them.
    grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, dim)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(batch, num_heads * dim)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Q new tokens of one sequence.

    Args:
        q: [Q, Hq, D]; k, v: [L, Hkv, D]; mask: additive [Q, L], or None when Q == L and plain causality holds.

    Returns:
        [Q, Hq * D]
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        # Not enable_gqa: on a GPU it rules out the kernels that take float32 or a mask.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1).reshape(len(q), -1)
