"""Writing new keys and values into the KV pool."""

from __future__ import annotations

from torch import Tensor

from sglang.srt.ops.op import Op


def store_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, locs: Tensor) -> None:
    """``k_pool[locs] = k; v_pool[locs] = v``, converted to the pool's dtype.

    Args:
        k, v: [T, H, D], any strides.
        k_pool, v_pool: [pool_tokens, H, D].
        locs: int64 [T], distinct.
    """
    k_pool.index_copy_(0, locs, k.to(k_pool.dtype))
    v_pool.index_copy_(0, locs, v.to(v_pool.dtype))


STORE_KV = Op(store_kv)
