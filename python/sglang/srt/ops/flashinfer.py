"""flashinfer's paged prefill (Ye et al. 2025), the only part of it that is faster than our own kernels here.

Used by `layers.attention.flashinfer`. flashinfer compiles kernels at their first use: here, when the server starts.
"""

# flashinfer has no types.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-unimported"

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_WORKSPACE_BYTES = 128 << 20


class PagedPrefill:
    """Causal attention of the new tokens of a step's sequences.

    Args:
        num_heads, num_kv_heads, head_dim, dtype: of queries, keys and values.
        page_size: tokens of a page.
        window: tokens that a position sees, itself included; None for all before it.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        page_size: int,
        window: int | None,
        device: torch.device,
    ) -> None:
        import flashinfer

        hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa3" if hopper else "fa2"
        )
        self._shape = num_heads, num_kv_heads, head_dim, page_size
        self._options = {"window_left": -1 if window is None else window - 1, "q_data_type": dtype}
        self._compile(dtype, device)

    def _compile(self, dtype: torch.dtype, device: torch.device) -> None:
        """Attend to one token, so that no request waits for a compiler."""
        heads, kv_heads, dim, size = self._shape
        logger.info("flashinfer's kernels are compiled now if its cache does not have them, which takes a minute")
        starts = torch.tensor([0, 1], dtype=torch.int32)
        self.plan(starts, starts, torch.zeros(1, dtype=torch.int32, device=device), starts[1:], 1.0)
        q = torch.zeros(1, heads, dim, dtype=dtype, device=device)
        pool = torch.zeros(size, kv_heads, dim, dtype=dtype, device=device)
        self.run(q, pool, pool, torch.empty_like(q))

    def plan(self, query_starts: Tensor, page_starts: Tensor, pages: Tensor, last: Tensor, scale: float) -> None:
        """Prepare a step.

        Args:
            query_starts: int32 [B + 1] on the host, where each sequence's queries begin, and the end of all.
            page_starts: int32 [B + 1] on the host, the same for its pages in `pages`.
            pages: int32 [pages of all sequences] on the device.
            last: int32 [B] on the host, tokens in each sequence's last page.
            scale: scores are q k scale.
        """
        self._wrapper.plan(
            query_starts, page_starts, pages, last, *self._shape, causal=True, sm_scale=scale, **self._options
        )

    def run(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Attend.

        Args:
            q, out: [T, Hq, D]; keys, values: [N, Hkv, D], the pool.
        """
        size = self._shape[3]
        paged = tuple(buffer.view(-1, size, *buffer.shape[1:]) for buffer in (keys, values))
        self._wrapper.run(q, paged, out=out)
