"""Every Triton kernel compiles for GPUs of both vendors, as launched by the operations; no GPU is needed.

A stand-in for the driver names the target, tensors have no storage, and launches stop behind the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_kernel.lora.batch import BatchShape
from sgl_kernel.lora.layout import LoraGroup, LoraLayout, LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

pytestmark = pytest.mark.slow

TARGETS = {"cuda": ("nvidia", "cuda", 90, 32), "hip": ("amd", "hip", "gfx942", 64)}
SHARED_BYTES = {"nvidia": 99 << 10, "amd": 64 << 10}
"""What a block may have: on sm_86 and sm_89, and on every gfx9 before gfx950."""
ROWS, SLOTS = 20, 3


class Driver:
    """The part of a driver that is asked before a kernel is launched."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target  # the key under which compiled kernels are kept

    def get_current_stream(self, device: Any) -> int:
        return 0


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the kernels that have been compiled since, in that order."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    backend, *target = TARGETS[request.param]
    if triton.knobs.runtime.interpret or backend not in triton.backends.backends:
        pytest.skip(f"this Triton interprets, or has no compiler for {backend}")
    names: list[str] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel = launch(self, *args, **(kwargs | {"warmup": True}))
        assert {"cubin", "hsaco"} & set(kernel.asm)
        assert kernel.metadata.shared <= SHARED_BYTES[backend], self.__name__
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(GPUTarget(*target)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return names


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Inputs:
    """Operands without storage, of a model with heads of 64 and a hidden width of 256."""

    def __init__(self, dtype: torch.dtype, tile: int, max_rank: int) -> None:
        self.dtype = dtype
        groups = [LoraGroup("qkv", 256, (256, 64, 64)), LoraGroup("o", 256, (256,)), LoraGroup("up", 256, (512, 512))]
        self.layout = LoraLayout(groups, 2, max_rank)
        self.slabs = LoraSlabs(meta(SLOTS, 5 << 30, dtype=torch.uint8))
        shape = BatchShape(ROWS, SLOTS, tile)
        self.batch = LoraBatch(meta(shape.words, dtype=torch.int32), shape)

    def __call__(self, *shape: int) -> Tensor:
        return meta(*shape, dtype=self.dtype)

    def site(self, name: str) -> LoraSite:
        return self.layout.site(1, name)

    def delta(self, name: str) -> LoraDelta:
        return LoraDelta(self(ROWS, self.site(name).u_width), self.slabs, self.site(name), self.batch)

    def shrink(self, name: str) -> tuple[LoraSlabs, LoraSite, LoraBatch, Tensor]:
        site = self.site(name)
        return self.slabs, site, self.batch, self(ROWS, site.u_width)


def call_all(ops: Any, t: Inputs) -> None:
    angles, index = meta(9, 64, dtype=torch.float32), meta(ROWS, dtype=torch.int64)
    pool = t(99, 1, 64)
    ops.skinny_gemm(t(ROWS, 256), t(384, 256), t(ROWS, 384), t.shrink("qkv"))
    ops.lora_expand_add(t(ROWS, 384), t.delta("qkv"))
    ops.qk_norm_rope(
        t(ROWS, 384), 4, 1, 64, t(64), t(64), 1e-6, angles, index, t(384), pool, pool, index, t.delta("qkv")
    )
    ops.fused_add_rmsnorm(t(ROWS, 256), t(ROWS, 256), t(256), 1e-6, t.delta("o"))
    ops.silu_and_mul(t(ROWS, 1024), t(ROWS, 512), t.delta("up"))


def call_without_adapters(ops: Any, t: Inputs) -> None:
    angles, index = meta(9, 64, dtype=torch.float32), meta(ROWS, dtype=torch.int64)
    ops.skinny_gemm(t(1, 1024), t(8192, 1024), t(1, 8192))
    ops.qk_norm_rope(t(ROWS, 384), 4, 1, 64, None, None, 1e-6, angles, index)
    ops.fused_add_rmsnorm(t(ROWS, 256), t(ROWS, 256), t(256), 1e-6)
    ops.rmsnorm(t(ROWS, 256), t(256), 1e-6, t(ROWS, 256))
    ops.silu_and_mul(t(ROWS, 1024), t(ROWS, 512))


CASES: list[tuple[Callable[[Any, Inputs], None], torch.dtype, int, int, set[str]]] = [
    (call_all, torch.float16, 16, 16, {"_gemm", "_shrink", "_expand_add", "_qk_norm_rope", "_silu_and_mul", "_norm"}),
    (call_all, torch.bfloat16, 64, 64, {"_shrink", "_add_to_residual"}),
    (call_without_adapters, torch.float32, 16, 8, {"_gemm", "_qk_norm_rope", "_silu_and_mul", "_norm"}),
]


@pytest.mark.parametrize(("call", "dtype", "tile", "max_rank", "expected"), CASES)
def test_compiles(
    compiled: list[str],
    call: Callable[[Any, Inputs], None],
    dtype: torch.dtype,
    tile: int,
    max_rank: int,
    expected: set[str],
) -> None:
    from sgl_kernel import triton_ops

    call(triton_ops, Inputs(dtype, tile, max_rank))
    assert expected <= set(compiled)


def test_parts_and_far_offsets(compiled: list[str]) -> None:
    """K in parts, which takes a second kernel; and factors that lie more than 4 GiB behind the start of a slab."""
    from sgl_kernel import triton_ops

    t = Inputs(torch.bfloat16, 16, 16)
    site = LoraSite(1024, (256,), 16, 8, (4 << 30) + 16, ((4 << 30) + 65536,))
    u = t(ROWS, 16)
    triton_ops.lora_shrink(t(ROWS, 1024), t.slabs, site, t.batch, u)
    triton_ops.lora_expand_add(t(ROWS, 256), LoraDelta(u, t.slabs, site, t.batch))
    assert compiled == ["_shrink", "_add_parts", "_expand_add"]


def test_layers_and_graphs_share_kernels(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another layer nor another number of rows costs a compilation."""
    from sgl_kernel import triton_ops
    from sgl_kernel.triton_ops import activation

    compilations = []
    kernel = activation._silu_and_mul
    do_compile = kernel._do_compile
    monkeypatch.setattr(kernel, "_do_compile", lambda *args: compilations.append(1) or do_compile(*args))
    t = Inputs(torch.bfloat16, 16, 32)
    for rows, layer in ((1, 0), (2, 1), (16, 0), (17, 1)):
        shape = BatchShape(rows, SLOTS, 16)
        batch = LoraBatch(meta(shape.words, dtype=torch.int32), shape)
        site = t.layout.site(layer, "up")
        term = LoraDelta(t(rows, site.u_width), t.slabs, site, batch)
        triton_ops.silu_and_mul(t(rows, 1024), t(rows, 512), term)
    assert len(compilations) == 1


# ---- the server's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "dim", "page_size", "window"), [(16, 128, 16, None), (9, 64, 1, 100)])
def test_attention_compiles(compiled: list[str], heads: int, dim: int, page_size: int, window: int | None) -> None:
    from sglang.srt.ops.triton import attention

    kv_heads, dtype = 8 if heads == 16 else 3, torch.bfloat16
    q = meta(ROWS, heads, dim, dtype=dtype)
    pool = meta(64 * page_size, kv_heads, dim, dtype=dtype)
    kv = attention.PagedKV(pool, pool, meta(5, 9, dtype=torch.int32), page_size)
    index, out = meta(4, dtype=torch.int64), meta(ROWS, heads * dim, dtype=dtype)
    counters = meta(99, dtype=torch.int32)
    for places, parts in ((None, 1), (None, 8), (meta(3, 2, dtype=torch.int64), 8)):
        decodes = attention.Decodes(index, index, places, 4 if places is None else 3)
        attention.decode(q, out, kv, decodes, attention.Splits(parts, 64), counters, 0.1, window)
    tiles = attention.prefill_tiles(dim, heads // kv_heads, dtype, q.device)
    blocks = meta(6, attention.BLOCK_FIELDS, dtype=torch.int64)
    attention.prefill(q, out, kv, index, blocks, 0.1, window, tiles)
    assert set(compiled) == {"_decode", "_prefill"}


@pytest.mark.parametrize("compiled", ["cuda"], indirect=True)
def test_attention_that_starts_early_compiles(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.ops.triton import attention

    monkeypatch.setattr(attention, "launches_early", lambda _: True)
    q, pool = meta(ROWS, 16, 128, dtype=torch.bfloat16), meta(1024, 8, 128, dtype=torch.bfloat16)
    kv = attention.PagedKV(pool, pool, meta(5, 9, dtype=torch.int32), 16)
    index, out, counters = meta(4, dtype=torch.int64), q.view(ROWS, -1), meta(99, dtype=torch.int32)
    attention.decode(q, out, kv, attention.Decodes(index, index, None, 4), attention.Splits(8, 64), counters, 0.1, None)
    assert compiled == ["_decode"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rest_of_a_captured_step_compiles(compiled: list[str], dtype: torch.dtype) -> None:
    from sglang.srt.ops.triton import decode_step, sampling

    sampler = sampling.RowSampler(ROWS, 151936, torch.device("meta"))
    numbers = meta(ROWS, dtype=torch.float32), meta(ROWS, dtype=torch.float64)
    drawn = meta(ROWS, dtype=torch.int64), meta(ROWS, dtype=torch.float32), meta(ROWS, dtype=torch.bool)
    sampler.sample(meta(ROWS, 151936, dtype=dtype), *numbers, *drawn)
    index = meta(ROWS, dtype=torch.int64)
    decode_step.begin_decode(index, index, index, meta(9, dtype=torch.int64), meta(9, 7, dtype=torch.int32), 16, index)
    assert compiled == ["_sum_blocks", "_pick_tokens", "_begin"]
