"""The compiled kernels on a GPU: the numerics gate over ranks, adapters and batches, graphs, and early launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernels.op_cases import (
    BF16,
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

from sgl_kernel import _binding
from sgl_kernel.lora.batch import build_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BATCHES = [(kind, tile) for kind in SLOTS for tile in (16, 64)]
QWEN = (2048, (2048, 1024, 1024))
"""K and slices of q, k, v of Qwen3-1.7B."""


@pytest.fixture
def ops() -> Any:
    native = _binding.native_for(torch.empty(0, dtype=BF16, device="cuda"))
    if native is None:
        pytest.skip(f"sgl_kernel holds no kernels for this GPU (target {_binding.target()})")
    return native


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
def test_shrink_and_expand(ops: Any, kind: str, tile: int) -> None:
    check_shrink(ops, make_lora(SLOTS[kind], 136, (24, 40, 8), tile=tile, device="cuda"))
    lora = make_lora(SLOTS[kind], 8, (136, 24, 40), tile=tile, device="cuda")
    check_expand(ops, lora)
    check_expand(ops, lora, spread=True)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 15, 16, 17, 31, 64, 65, 100, 128, 200, 256])
def test_every_rank(ops: Any, rank: int, tile: int) -> None:
    ranks = [(rank, max(1, rank // 2), 256 - rank), (256, rank, 0), (0, 0, rank), (rank, rank, rank)]
    lora = make_lora(SLOTS["skewed"], *QWEN, tile=tile, ranks=ranks, device="cuda")
    check_shrink(ops, lora)
    check_expand(ops, lora)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("adapters", [1, 2, 8, 33, 64])
def test_many_adapters(ops: Any, adapters: int, tile: int) -> None:
    rng = np.random.default_rng(adapters)
    slots = rng.integers(-1, adapters, 3 * adapters + 64).tolist()
    ranks = [tuple(int(r) for r in rng.choice([0, 1, 8, 16, 32], 3)) for _ in range(adapters)]
    lora = make_lora(slots, *QWEN, tile=tile, ranks=ranks, device="cuda")
    check_shrink(ops, lora)
    check_expand(ops, lora)


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
def test_fused(ops: Any, kind: str, tile: int) -> None:
    for hidden in (200, 2048):
        check_norm(ops, make_lora(SLOTS[kind], 8, (hidden,), tile=tile, device="cuda"))
    check_silu(ops, make_lora(SLOTS[kind], 8, (88, 88), tile=tile, device="cuda"))
    if SLOTS[kind]:
        for dim in (64, 128, 256):
            lora = make_lora(SLOTS[kind], 8, (4 * dim, 2 * dim, 2 * dim), tile=tile, device="cuda")
            check_rope(ops, lora, (4, 2, dim))


@pytest.mark.parametrize("rows", [1, 37, 300])
def test_without_adapters(ops: Any, rows: int) -> None:
    for hidden in (8, 576, 4096, 16384):
        check_norm(ops, make_lora([0] * rows, 8, (hidden,), device="cuda"), delta=False)
    check_silu(ops, make_lora([0] * rows, 8, (6144, 6144), device="cuda"), delta=False)
    check_rope(ops, make_lora([0] * rows, 8, (2048, 1024, 1024), device="cuda"), (16, 8, 128), delta=False)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pools", [False, True])
def test_rope_options(ops: Any, norm: bool, bias: bool, pools: bool) -> None:
    lora = make_lora(SLOTS["skewed"], 8, (1024, 256, 256), device="cuda")
    check_rope(ops, lora, (8, 2, 128), norm=norm, bias=bias, pools=pools)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 32, 33, 61])
def test_skinny_gemm(ops: Any, rows: int) -> None:
    slots = np.random.default_rng(rows).integers(-1, 4, rows).tolist()
    ranks = [(16, 3), (8, 1), (0, 5), (64, 0)]
    for inputs, outputs in ((2048, 4096), (6144, 2048), (576, 1000), (72, 8)):
        check_gemm(ops, make_lora(slots, inputs, (8, 8), ranks=ranks, device="cuda"), outputs)


@pytest.mark.parametrize("tile", [16, 64])
def test_rows_do_not_depend_on_their_batch(ops: Any, tile: int) -> None:
    few = make_lora(SLOTS["mixed"], 1032, (512, 256, 256), tile=tile, device="cuda")
    check_row_alone(ops, few, (4, 2, 128), num_outputs=3)
    many = make_lora(SLOTS["skewed"], 1032, (512, 256, 256), tile=tile, device="cuda")
    check_row_alone(ops, many, (4, 2, 128), num_outputs=3)


@pytest.mark.parametrize("most", [8, 16, 32, 64])
def test_products_do_not_depend_on_the_other_rows(ops: Any, most: int) -> None:
    """Among numbers of rows that take the same kernel; eight and sixteen are two kernels with the same sums."""
    torch.manual_seed(most)
    x = torch.randn(most, 2048, device="cuda", dtype=BF16)
    weight = torch.randn(4096, 2048, device="cuda", dtype=BF16)
    whole = ops.skinny_gemm(x, weight, torch.empty(most, 4096, device="cuda", dtype=BF16))
    for rows in (1, most // 2 + 1) if most <= 16 else (most // 2 + 1, most - 1):
        part = ops.skinny_gemm(x[:rows], weight, torch.empty(rows, 4096, device="cuda", dtype=BF16))
        assert_bits(part, whole[:rows], f"{rows} rows")


def test_slots_beyond_two_gibibytes(ops: Any) -> None:
    lora = make_lora(SLOTS["mixed"], 136, (24, 40, 8), device="cuda", slab_bytes=1 << 30)
    check_shrink(ops, lora)
    check_expand(ops, lora)


def test_a_captured_graph_replays_from_one_adapter_to_sixty_four(ops: Any) -> None:
    adapters, rows = 64, 64
    ranks = [(16, 8 + slot % 3) for slot in range(adapters)]
    lora = make_lora(list(range(64)), 2048, (264, 136), ranks=ranks, device="cuda")
    x, y = lora.random(rows, 2048), lora.random(rows, 400)
    u, out = torch.zeros(rows, lora.site.u_width, dtype=BF16, device="cuda"), y.clone()

    def step() -> None:
        out.copy_(y)
        ops.lora_shrink(x, lora.slabs, lora.site, lora.batch, u)
        ops.lora_expand_add(out, lora.delta(u))

    one = np.zeros(rows, np.int32)
    lora.batch.update(build_batch(one, lora.ranks, lora.batch.shape))
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for live in (1, 2, 3, 17, 64, 64, 1):
        slots = np.arange(rows, dtype=np.int32) % live
        slots[5] = -1
        lora.batch.update(build_batch(slots, lora.ranks, lora.batch.shape))
        graph.replay()
        replayed = out.clone()
        step()
        assert_bits(replayed, out, f"{live} adapters")
        assert_bits(out[5], y[5], "base row")
        assert not torch.equal(out[6], y[6])


def test_kernels_that_start_early_compute_the_same(ops: Any) -> None:
    """A chain in which every kernel reads what the one before it writes, many times over."""
    lora = make_lora([0, 1, -1, 2, 3, 0, 1, 1], 512, (512,), ranks=[(16,), (8,), (64,), (3,)], device="cuda")
    weight, norm = lora.random(512, 512, scale=0.05), lora.random(512)
    rows = lora.tokens

    def chain(steps: int) -> torch.Tensor:
        x, residual = start.clone(), start.clone()
        y, u = torch.empty_like(x), torch.zeros(rows, lora.site.u_width, dtype=BF16, device="cuda")
        for _ in range(steps):
            ops.skinny_gemm(x, weight, y, (lora.slabs, lora.site, lora.batch, u))
            ops.fused_add_rmsnorm(y, residual, norm, 1e-5, lora.delta(u))
            x, y = y, x
        return torch.cat([x, residual])

    for seed in range(5):
        torch.manual_seed(seed)
        start = lora.random(rows, 512)
        expected = chain(100)
        with _binding.programmatic_launch():
            assert_bits(chain(100), expected, f"seed {seed}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), _binding.programmatic_launch():
            captured = chain(100)
        for _ in range(3):
            graph.replay()
            assert_bits(captured, expected, f"seed {seed}, captured")
