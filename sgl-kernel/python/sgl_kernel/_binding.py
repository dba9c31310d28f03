"""The compiled library: loading it, and its functions under the names and signatures of `reference`.

The only module that knows the binding (apache-tvm-ffi). Used by `ops` alone. Importing it loads nothing; the library is
opened when the first GPU tensor asks for it, and its kernels are brought to that GPU then, all of them, so that a
stream which captures a graph later has nothing left to load.
Invariants: arguments have been checked by `ops`; launches go to torch's current stream of the tensor's device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_kernel.lora.batch import BatchShape
from sgl_kernel.lora.layout import LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

LIBRARY = Path(__file__).with_name("_sgl_kernel.so")
_NO_SITE = (0,) * 12
_NO_SHAPE = (0,) * 8
_overlap = False


@functools.cache
def library() -> Any:
    """The compiled library's functions.

    Raises:
        RuntimeError: this installation has none.
    """
    if not LIBRARY.exists():
        raise RuntimeError(f"{LIBRARY} is missing: install a wheel of sgl-kernel, or build one (sgl-kernel/README.md)")
    import tvm_ffi  # brings libtvm_ffi.so into the process, which ours needs

    return tvm_ffi.load_module(str(LIBRARY))


def target() -> str:
    """Whose device code this installation holds: ``cuda``, ``rocm``, ``cpu`` (none); ``none`` without a library."""
    return str(library().target()) if LIBRARY.exists() else "none"


@functools.cache
def _fits(device_index: int) -> bool:
    """Whether the library has kernels for a GPU; brings them there."""
    vendor = "rocm" if torch.version.hip else "cuda"
    if target() != vendor:
        return False
    if vendor == "cuda" and torch.cuda.get_device_capability(device_index) < (8, 0):
        return False
    library().preload(device_index)
    return True


def native_for(tensor: Tensor) -> Native | None:
    """The library, where it has kernels for this tensor's device and dtype."""
    if tensor.dtype is not torch.bfloat16 or tensor.device.type != "cuda":
        return None
    return _NATIVE if _fits(tensor.device.index) else None


@contextlib.contextmanager
def programmatic_launch() -> Iterator[None]:
    """Let kernels launched inside start before the one ahead of them in the stream has finished.

    They then read weights, slabs, batch, positions and cache locations early: inside, none of these may be written by a
    kernel that runs between the kernels of this library. A copy into them is fine. Without effect before Hopper.
    """
    global _overlap
    before, _overlap = _overlap, True
    try:
        yield
    finally:
        _overlap = before


def launches_early(device: torch.device) -> bool:
    """Whether kernels launched now, on this device, start as `programmatic_launch` says: for kernels of others."""
    if not _overlap or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether a CUDA device multiplies by warpgroups: Hopper."""
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _shape(words: tuple[int, ...]) -> Any:
    import tvm_ffi

    return tvm_ffi.Shape(words)


@functools.lru_cache(maxsize=4096)
def _site(site: LoraSite) -> Any:
    return _shape(site.words)


@functools.lru_cache(maxsize=4096)
def _batch_shape(shape: BatchShape) -> Any:
    capacities = (shape.max_tokens, shape.num_slots, shape.tile_tokens, shape.max_tiles)
    return _shape((*capacities, shape.perm, shape.token_slot, shape.tiles, shape.live))


def _delta(delta: LoraDelta | None) -> tuple[Any, ...]:
    """(u, u_slot_stride, slabs, site, words, shape) as the library takes them."""
    if delta is None:
        return None, 0, None, _shape(_NO_SITE), None, _shape(_NO_SHAPE)
    batch = delta.batch
    return (
        delta.u,
        delta.u_slot_stride,
        delta.slabs.data,
        _site(delta.site),
        batch.words,
        _batch_shape(batch.shape),
    )


class Native:
    """The functions of `reference`, compiled."""

    def lora_shrink(self, x: Tensor, slabs: LoraSlabs, site: LoraSite, batch: LoraBatch, out: Tensor) -> Tensor:
        """See reference."""
        shape = _batch_shape(batch.shape)
        library().lora_shrink(x, slabs.data, _site(site), batch.words, shape, out, _overlap)
        return out

    def lora_expand_add(self, y: Tensor, delta: LoraDelta) -> Tensor:
        """See reference."""
        library().lora_expand_add(y, *_delta(delta), _overlap)
        return y

    def skinny_gemm(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        shrink: tuple[LoraSlabs, LoraSite, LoraBatch, Tensor] | None = None,
        splits: int = 0,
    ) -> Tensor:
        """See reference; `splits` parts of K instead of the chosen number, by warpgroups no more than four."""
        extra: tuple[Any, ...]
        if shrink is None:
            extra = (None, _shape(_NO_SITE), None, _shape(_NO_SHAPE), None)
        else:
            slabs, site, batch, u = shrink
            extra = (slabs.data, _site(site), batch.words, _batch_shape(batch.shape), u)
        library().skinny_gemm(x, weight, out, *extra, splits, _overlap)
        return out

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """See reference."""
        library().rmsnorm(x, weight, eps, out, _overlap)
        return out

    def fused_add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, delta: LoraDelta | None = None
    ) -> None:
        """See reference."""
        library().fused_add_rmsnorm(x, residual, weight, eps, *_delta(delta), _overlap)

    def silu_and_mul(self, x: Tensor, out: Tensor, delta: LoraDelta | None = None) -> Tensor:
        """See reference."""
        library().silu_and_mul(x, out, *_delta(delta), _overlap)
        return out

    def qk_norm_rope(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        bias: Tensor | None = None,
        k_pool: Tensor | None = None,
        v_pool: Tensor | None = None,
        locs: Tensor | None = None,
        delta: LoraDelta | None = None,
    ) -> None:
        """See reference."""
        heads = (num_heads, num_kv_heads, head_dim)
        norm = (q_weight, k_weight, eps)
        pools = (k_pool, v_pool, locs)
        library().qk_norm_rope(qkv, *heads, *norm, cos_sin, positions, bias, *pools, *_delta(delta), _overlap)


_NATIVE = Native()
