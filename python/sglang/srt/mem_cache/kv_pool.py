"""The K and V of every token, one pair of buffers a layer. Owned by ModelRunner; attention reads and writes it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class KVPool:
    """Token-addressed KV storage.

    Args:
        num_tokens: rows of each buffer (pages * page_size).

    The buffers start as zeros, not as whatever memory held: attention masks rows it must not see, and a NaN survives
    a mask.
    """

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_tokens, num_kv_heads, head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)
        self._layers = list(zip(self.k.unbind(0), self.v.unbind(0), strict=True))

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """(k, v) of one layer, each [num_tokens, num_kv_heads, head_dim]."""
        return self._layers[layer_id]

    @property
    def nbytes(self) -> int:
        """Size of both buffers."""
        return self.k.nbytes + self.v.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, memory that the system hands out when it is first written, so an idle pool costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of one token over all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
