"""Causal attention over paged KV, the torch reference.

Shape legend: B sequences, Q new tokens of one sequence, L tokens attended to, Hq query heads, Hkv KV heads,
G = Hq / Hkv, D head dimension, N rows of the KV pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, locs: Tensor) -> None:
    """Write new tokens' K and V into the pool.

    Args:
        k, v: [T, Hkv, D]; k_pool, v_pool: [N, Hkv, D]; locs: int64 [T].
    """
    k_pool.index_copy_(0, locs, k)
    v_pool.index_copy_(0, locs, v)


def token_locations(pages: Tensor, length: int, page_size: int) -> Tensor:
    """Pool rows of the first `length` tokens of each sequence.

    Args:
        pages: int32 [B, max_pages] page numbers.

    Returns:
        int64 [B, length]
    """
    if page_size == 1:
        return pages[:, :length].long()
    tokens = torch.arange(length, device=pages.device)
    return pages[:, tokens // page_size].long() * page_size + tokens % page_size


def visible(query_positions: Tensor, length: int, window: int | None) -> Tensor:
    """Which tokens a query sees: itself, the ones before it, and of those the last `window`.

    Args:
        query_positions: int64 [...] position of each query.

    Returns:
        bool [..., length]
    """
    keys = torch.arange(length, device=query_positions.device)
    seen = keys <= query_positions[..., None]
    if window is not None:
        seen &= keys > query_positions[..., None] - window
    return seen


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
    grouped = q.view(batch, num_kv_heads, num_heads // num_kv_heads, dim)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(batch, num_heads * dim)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Q new tokens of one sequence.

    Args:
        q: [Q, Hq, D]; k, v: [L, Hkv, D]; mask: bool [Q, L], or None when Q == L and plain causality holds.

    Returns:
        [Q, Hq * D]
    """
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1).reshape(len(q), -1)
