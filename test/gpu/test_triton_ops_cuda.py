"""The Triton kernels compiled for a GPU: the cases that the CPU interprets, real widths, graphs, far slots."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from kernels.op_cases import (
    BF16,
    FP16,
    FP32,
    SLOTS,
    assert_bits,
    check_expand,
    check_gemm,
    check_norm,
    check_rope,
    check_row_alone,
    check_shrink,
    check_silu,
    make_lora,
)

from sgl_kernel.lora.batch import build_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BATCHES = [(kind, tile) for kind in SLOTS for tile in (16, 64)]
DTYPES = [BF16, FP16, FP32]


@pytest.fixture
def ops() -> ModuleType:
    pytest.importorskip("triton")
    from sgl_kernel import triton_ops

    return triton_ops


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_and_expand(ops: ModuleType, kind: str, tile: int, dtype: torch.dtype) -> None:
    check_shrink(ops, make_lora(SLOTS[kind], 136, (24, 40, 8), tile=tile, dtype=dtype, device="cuda"))
    lora = make_lora(SLOTS[kind], 8, (136, 24, 40), tile=tile, dtype=dtype, device="cuda")
    check_expand(ops, lora)
    check_expand(ops, lora, spread=True)


@pytest.mark.parametrize("tile", [16, 64])
def test_real_widths_and_ranks(ops: ModuleType, tile: int) -> None:
    ranks = [(256, 64, 1), (16, 3, 128), (0, 200, 17), (8, 0, 0)]
    lora = make_lora(SLOTS["skewed"], 4096, (4096, 1024, 1024), tile=tile, ranks=ranks, device="cuda")
    check_shrink(ops, lora)
    check_expand(ops, lora)


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused(ops: ModuleType, kind: str, tile: int, dtype: torch.dtype) -> None:
    check_norm(ops, make_lora(SLOTS[kind], 8, (200,), tile=tile, dtype=dtype, device="cuda"))
    check_silu(ops, make_lora(SLOTS[kind], 8, (88, 88), tile=tile, dtype=dtype, device="cuda"))
    if SLOTS[kind]:
        check_rope(ops, make_lora(SLOTS[kind], 8, (128, 64, 64), tile=tile, dtype=dtype, device="cuda"), (2, 1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_adapters(ops: ModuleType, dtype: torch.dtype) -> None:
    check_norm(ops, make_lora(SLOTS["mixed"], 8, (4096,), dtype=dtype, device="cuda"), delta=False)
    check_silu(ops, make_lora(SLOTS["mixed"], 8, (1000, 1000), dtype=dtype, device="cuda"), delta=False)
    check_rope(ops, make_lora(SLOTS["mixed"], 8, (48,) * 3, dtype=dtype, device="cuda"), (1, 1, 48), delta=False)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pools", [False, True])
def test_rope_options(ops: ModuleType, norm: bool, bias: bool, pools: bool) -> None:
    lora = make_lora(SLOTS["skewed"], 8, (1024, 256, 256), device="cuda")
    check_rope(ops, lora, (8, 2, 128), norm=norm, bias=bias, pools=pools)


@pytest.mark.parametrize("kind", ["single", "mixed", "skewed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_skinny_gemm(ops: ModuleType, kind: str, dtype: torch.dtype) -> None:
    ranks = [(16, 3), (8, 1), (0, 5), (1, 0)]
    check_gemm(ops, make_lora(SLOTS[kind], 2056, (8, 8), dtype=dtype, ranks=ranks, device="cuda"), 4160)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [16, 64])
def test_rows_do_not_depend_on_their_batch(ops: ModuleType, dtype: torch.dtype, tile: int) -> None:
    lora = make_lora(SLOTS["skewed"], 1032, (512, 256, 256), dtype=dtype, tile=tile, device="cuda")
    check_row_alone(ops, lora, (4, 2, 128))


def test_slots_beyond_two_gibibytes(ops: ModuleType) -> None:
    lora = make_lora(SLOTS["mixed"], 136, (24, 40, 8), device="cuda", slab_bytes=1 << 30)
    check_shrink(ops, lora)
    check_expand(ops, lora)


def test_a_captured_graph_replays_with_any_batch(ops: ModuleType) -> None:
    lora = make_lora(SLOTS["skewed"], 520, (264, 136), device="cuda")
    x, y = lora.random(lora.rows, 520), lora.random(lora.rows, 400)
    u, out = torch.zeros(lora.rows, lora.site.u_width, dtype=BF16, device="cuda"), y.clone()

    def step() -> None:
        out.copy_(y)
        ops.lora_shrink(x, lora.slabs, lora.site, lora.batch, u)
        ops.lora_expand_add(out, lora.delta(u))

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kind in SLOTS:
        lora.batch.update(build_batch(np.array(SLOTS[kind], np.int32), lora.ranks, lora.batch.shape))
        graph.replay()
        replayed = out.clone()
        step()
        assert_bits(replayed, out, kind)
        base = [row for row, slot in enumerate(SLOTS[kind]) if slot < 0]
        assert_bits(out[base], y[base], kind)
