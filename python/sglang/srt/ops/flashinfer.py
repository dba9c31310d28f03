"""flashinfer's paged prefill (Ye et al. 2025), the only part of it that is faster than our own kernels here.

Used by `layers.attention.flashinfer`. Importing this imports flashinfer, which compiles kernels at their first use.
"""

# flashinfer has no types.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-unimported"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
