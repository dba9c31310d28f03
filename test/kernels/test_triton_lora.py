"""The Triton kernels of adapters alone, interpreted on the CPU, against float64 and against the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from kernels.op_cases import (
    BF16,
    FP16,
    FP32,
    SENTINEL,
    SLOTS,
    assert_bits,
    check_expand,
    check_row_alone,
    check_shrink,
    make_lora,
)
from kernels.triton_interpreter import interpreted

__all__ = ["interpreted"]

BATCHES = [(kind, tile) for kind in SLOTS for tile in (16, 64)]


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
def test_shrink(interpreted: ModuleType, kind: str, tile: int) -> None:
    check_shrink(interpreted, make_lora(SLOTS[kind], 136, (24, 40, 8), tile=tile))


@pytest.mark.parametrize(("kind", "tile"), BATCHES)
def test_expand(interpreted: ModuleType, kind: str, tile: int) -> None:
    check_expand(interpreted, make_lora(SLOTS[kind], 8, (136, 24, 40), tile=tile))


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_other_dtypes(interpreted: ModuleType, dtype: torch.dtype) -> None:
    lora = make_lora(SLOTS["mixed"], 72, (40, 24), dtype=dtype)
    check_shrink(interpreted, lora)
    check_expand(interpreted, lora)


def test_fp16_keeps_what_a_b_has_just_learnt(interpreted: ModuleType) -> None:
    """The first steps of training make B of 1e-8: nothing, as fp16."""
    lora = make_lora([0], 8, (16,), dtype=FP16, ranks=[(8,)])
    start = lora.site.b_offsets[0]
    lora.slabs.data[0, start : start + 16 * 8 * 2].view(BF16).fill_(1e-8)
    lora.slabs.data[0, lora.site.table_offset + 4 : lora.site.table_offset + 8].view(FP32).fill_(1e6)
    y = torch.zeros(1, 16, dtype=FP16)
    interpreted.lora_expand_add(y, lora.delta(torch.ones(1, 8, dtype=FP16)))
    torch.testing.assert_close(y, torch.full_like(y, 0.08), rtol=0.01, atol=0)


def test_rank_256(interpreted: ModuleType) -> None:
    lora = make_lora([0, 1], 16, (24,), ranks=[(256,), (5,)])
    check_shrink(interpreted, lora)
    check_expand(interpreted, lora)


@pytest.mark.parametrize("tile", [16, 64])
def test_small_ranks_of_a_small_layout(interpreted: ModuleType, tile: int) -> None:
    lora = make_lora(SLOTS["mixed"], 40, (24, 136), ranks=[(1, 2), (3, 3), (0, 1), (2, 0)], tile=tile)
    check_shrink(interpreted, lora)
    check_expand(interpreted, lora)


def test_u_of_all_slots_side_by_side(interpreted: ModuleType) -> None:
    check_expand(interpreted, make_lora(SLOTS["mixed"], 8, (24, 40, 8)), spread=True)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_parts_of_k_are_added_in_one_order(interpreted: ModuleType, dtype: torch.dtype) -> None:
    """As many programs or as one, whatever the tile."""
    ranks = [(8, 3), (2, 0)]
    few, many = (
        check_shrink(interpreted, make_lora([0, 1, -1], 840, (8, 8), dtype=dtype, tile=tile, ranks=ranks))
        for tile in (16, 64)
    )
    assert_bits(few, many)


def test_rows_do_not_depend_on_their_batch(interpreted: ModuleType) -> None:
    check_row_alone(interpreted, make_lora(SLOTS["skewed"], 136, (64, 32, 32)), (2, 1, 32))


def test_results_replay(interpreted: ModuleType) -> None:
    """The same launches with other words: what a captured graph does."""
    lora, other = (make_lora(SLOTS[kind], 40, (24, 8)) for kind in ("skewed", "mixed"))
    x = lora.random(lora.rows, 40)
    u = torch.full((lora.rows, lora.site.u_width), SENTINEL, dtype=BF16)
    small = make_lora(SLOTS["mixed"] + [-1] * (lora.tokens - other.tokens), 40, (24, 8))
    lora.batch.update(small.batch.words)
    interpreted.lora_shrink(x, lora.slabs, lora.site, lora.batch, u)
    lora.token_slots = small.token_slots
    covered = lora.covered()
    assert (u[~covered & ~lora.unspecified()] == SENTINEL).all()
    assert (u[covered] != SENTINEL).all()
