"""Attention back ends by name; each is imported when it is first asked for."""

from __future__ import annotations

import torch

from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.forward_context import AttentionBackend, KVPoolView, PageTableView


def create_attention_backend(
    name: str,
    kv_pool: KVPoolView,
    page_table: PageTableView,
    num_heads: int,
    device: torch.device,
    sliding_window: int | None = None,
) -> AttentionBackend:
    """The back end called `name`, for `num_heads` query heads.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "torch_native":
        from sglang.srt.layers.attention.torch_native import TorchNativeAttention

        return TorchNativeAttention(kv_pool, page_table, device, sliding_window)
    if name == "triton":
        from sglang.srt.layers.attention.triton import TritonAttention

        return TritonAttention(kv_pool, page_table, num_heads, device, sliding_window)
    if name == "flashinfer":
        from sglang.srt.layers.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(kv_pool, page_table, num_heads, device, sliding_window)
    raise ConfigError(f"--attention-backend {name!r} is not known; use triton, flashinfer or torch_native")
