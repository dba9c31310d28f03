"""The Triton kernels that take a low-rank term along, interpreted on the CPU, against float64 and the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from kernels.op_cases import (
    BF16,
    FP16,
    FP32,
    SLOTS,
    assert_bits,
    check_gemm,
    check_norm,
    check_rope,
    check_silu,
    make_lora,
)
from kernels.triton_interpreter import interpreted

__all__ = ["interpreted"]

BATCHES = [(kind, tile) for kind in SLOTS for tile in (16, 64) if tile == 16 or kind in ("mixed", "skewed")]
DTYPES = [BF16, FP16, FP32]


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
def test_norm(interpreted: ModuleType, kind: str, tile: int) -> None:
    check_norm(interpreted, make_lora(SLOTS[kind], 8, (200,), tile=tile))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [False, True])
def test_norm_dtypes(interpreted: ModuleType, dtype: torch.dtype, delta: bool) -> None:
    check_norm(interpreted, make_lora(SLOTS["one"], 8, (64,), dtype=dtype), delta)


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
def test_silu(interpreted: ModuleType, kind: str, tile: int) -> None:
    check_silu(interpreted, make_lora(SLOTS[kind], 8, (88, 88), tile=tile))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [False, True])
def test_silu_dtypes(interpreted: ModuleType, dtype: torch.dtype, delta: bool) -> None:
    check_silu(interpreted, make_lora(SLOTS["one"], 8, (32, 32), dtype=dtype), delta)


@pytest.mark.parametrize(("kind", "tile"), [(kind, tile) for kind, tile in BATCHES if kind != "nothing"])
def test_rope(interpreted: ModuleType, kind: str, tile: int) -> None:
    check_rope(interpreted, make_lora(SLOTS[kind], 8, (128, 64, 64), tile=tile), (2, 1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rope_options(interpreted: ModuleType, dtype: torch.dtype, delta: bool, norm: bool, bias: bool) -> None:
    lora = make_lora([1, -1], 8, (48, 48, 48), dtype=dtype)
    check_rope(interpreted, lora, (1, 1, 48), delta=delta, norm=norm, bias=bias, pools=norm != bias)


def test_rope_of_wide_heads(interpreted: ModuleType) -> None:
    check_rope(interpreted, make_lora(SLOTS["mixed"], 8, (256, 128, 128)), (2, 1, 128), bias=True)


def test_rope_of_nothing(interpreted: ModuleType) -> None:
    """A graph that was captured for rows which this step does not have."""
    lora = make_lora([], 8, (32, 32, 32))
    qkv = lora.random(3, 96)
    angles, positions = torch.ones(1, 32), torch.zeros(3, dtype=torch.int64)
    changed = interpreted.qk_norm_rope(
        qkv.clone(), 1, 1, 32, None, None, 1e-6, angles, positions, delta=lora.delta(lora.u())
    )
    assert_bits(changed, qkv)


@pytest.mark.parametrize("kind", ["single", "mixed", "skewed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_skinny_gemm(interpreted: ModuleType, kind: str, dtype: torch.dtype) -> None:
    check_gemm(
        interpreted, make_lora(SLOTS[kind], 136, (8, 8), dtype=dtype, ranks=[(2, 3), (8, 1), (0, 5), (1, 0)]), 40
    )


@pytest.mark.parametrize("delta", [False, True])
def test_base_rows_are_those_without_adapters(interpreted: ModuleType, delta: bool) -> None:
    """Bit by bit, -0 included."""
    lora = make_lora([0, -1, 1], 8, (32, 32, 32))
    qkv = torch.full((3, 96), -0.0, dtype=BF16)
    angles, positions = torch.ones(1, 32), torch.zeros(3, dtype=torch.int64)
    term = lora.delta(lora.u()) if delta else None
    interpreted.qk_norm_rope(qkv, 1, 1, 32, None, None, 1e-6, angles, positions, delta=term)
    assert qkv[1, 64:].signbit().all()
