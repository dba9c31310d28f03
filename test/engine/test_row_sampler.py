"""The two kernels of `RowSampler`, interpreted on the CPU, and their torch reference: both against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernels.test_triton_compile import compiled
from kernels.triton_interpreter import interpret_library, repair, without
from row_sampling_cases import (
    LAST,
    TEMPERATURES,
    Batch,
    Drawn,
    SampleRows,
    assert_same_bits,
    check,
    draw,
    make_batch,
    random_batch,
)
from torch import Tensor

from sglang.srt.sampling.rows import sample_rows_reference

__all__ = ["compiled"]

KERNELS = "sglang.srt.ops.triton.sampling"
CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = 64
"""Logits a block, so that small vocabularies have many."""

Draw = Callable[[Batch], Drawn]


@cache
def interpreted_kernels() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch, without(KERNELS):
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(KERNELS)


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The module for tensors on the CPU, with small blocks."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        interpret_library(patch)
        repair(patch)
        module = interpreted_kernels()
        patch.setattr(module, "BLOCK", SMALL)
        with _language_interpreted_once(patch):
            yield module


@contextmanager
def _language_interpreted_once(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every call of a device function the interpreter replaces all of Triton's language: most of its time."""
    from triton import language
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    names = {"tl": language, "core": language.core}
    scope = interpreter._patch_lang(SimpleNamespace(__globals__=names))
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    try:
        yield
    finally:
        scope.restore()


def draw_by(kernels: ModuleType, batch: Batch) -> Drawn:
    return draw(kernels.RowSampler(len(batch.logits), batch.logits.shape[1], CPU).sample, batch)


@pytest.fixture(params=["kernels", "reference"])
def sampled(request: pytest.FixtureRequest) -> Draw:
    """Both implementations, one after the other."""
    if request.param == "reference":
        return lambda batch: draw(sample_rows_reference, batch)
    kernels = request.getfixturevalue("kernels")
    return lambda batch: draw_by(kernels, batch)


def grid(size: int) -> Tensor:
    """The middles of `size` equal parts of [0, 1)."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


# ---- against float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vocab_size", [1, 7, SMALL, SMALL + 1, 500])
def test_random_rows(sampled: Draw, vocab_size: int, dtype: torch.dtype) -> None:
    batch = random_batch(20, vocab_size, dtype, seed=vocab_size)
    check(sampled(batch), batch)


@pytest.mark.parametrize(("dtype", "vocab_size"), [(BF16, 151936), (FP32, 4097), (BF16, 40001)])
def test_blocks_of_their_real_size(kernels: ModuleType, dtype: torch.dtype, vocab_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", 4096)
        batch = random_batch(6, vocab_size, dtype)
        check(draw_by(kernels, batch), batch)


@pytest.mark.parametrize(
    ("interpret", "temperature"), [(True, 0.25), (True, 3.0), *((False, t) for t in TEMPERATURES[1:])]
)
def test_counts_over_a_grid_are_the_distribution(
    request: pytest.FixtureRequest, interpret: bool, temperature: float
) -> None:
    """An interval of length p holds n p points of a grid of n, rounded up or down: no need of statistics."""
    kernels = request.getfixturevalue("kernels") if interpret else None  # which take their time
    sample = sample_rows_reference if kernels is None else kernels.RowSampler(120, 150, CPU).sample
    size, vocab_size = 4000 if kernels is None else 120, 150
    logits = torch.from_numpy(np.random.default_rng(1).normal(0.0, 2.0, vocab_size).astype(np.float32))
    logits[::7] = -torch.inf
    drawn = draw(sample, make_batch(logits.expand(size, -1), temperature, grid(size)))
    counts = torch.bincount(drawn.tokens, minlength=vocab_size).double()
    expected = torch.softmax((logits - logits.max()).double() / temperature, -1) * size
    assert ((counts - expected).abs() < 1.001).all()
    assert (counts[::7] == 0).all()
    common = expected > 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert chi_square <= int(common.sum())  # of a grid it is far smaller than of random numbers
    assert (drawn.tokens.diff() >= 0).all()


def test_logprobs_are_those_of_log_softmax(sampled: Draw) -> None:
    batch = random_batch(30, 500, BF16, seed=5)
    heat = [0.0 if i % 3 == 0 else 0.2 + 0.1 * i for i in range(30)]
    batch = make_batch(batch.logits, heat, batch.uniforms)
    drawn = sampled(batch)
    softness = torch.tensor([t or 1.0 for t in heat])
    expected = torch.log_softmax(batch.logits.float() / softness[:, None], -1).gather(1, drawn.tokens[:, None])
    torch.testing.assert_close(drawn.logprobs, expected.squeeze(1), rtol=2e-6, atol=2e-5)


def test_kernels_and_reference_draw_the_same(kernels: ModuleType) -> None:
    batch = random_batch(40, 300, FP32, seed=9)
    ours, reference = draw_by(kernels, batch), draw(sample_rows_reference, batch)
    assert torch.equal(ours.tokens, reference.tokens)
    torch.testing.assert_close(ours.logprobs, reference.logprobs, rtol=1e-6, atol=2e-6)


# ---- greedy rows ----------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_among_equals(sampled: Draw) -> None:
    logits = torch.full((6, 300), -1.0)
    places = [[5, 6], [63, 64], [64, 299], [299], [0, 299], list(range(300))]
    for row, ids in enumerate(places):
        logits[row, ids] = 2.5
    batch = make_batch(logits.to(BF16), 0.0, LAST)
    drawn = sampled(batch)
    check(drawn, batch)
    assert drawn.tokens.tolist() == [ids[0] for ids in places]


def test_greedy_of_odd_values(sampled: Draw) -> None:
    logits = torch.full((4, 200), -torch.inf)
    logits[0, [70, 90]] = torch.tensor([-0.0, 0.0])
    logits[1, [70, 90]] = torch.inf
    logits[2, 199] = -torch.finfo(torch.float32).max
    logits[3, [70, 90]] = torch.tensor([torch.finfo(torch.float32).max, torch.inf])
    drawn = sampled(make_batch(logits, 0.0, 0.5))
    assert drawn.tokens.tolist() == [70, 70, 199, 90]
    assert not drawn.bad.any()
    torch.testing.assert_close(drawn.logprobs[:3], torch.tensor([0.5, 0.5, 1.0]).log())


# ---- rows that are no distributions, and infinite logits ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_bad_rows(sampled: Draw, temperature: float, dtype: torch.dtype) -> None:
    batch = make_batch(random_batch(9, 200, dtype, seed=3).logits, temperature, grid(9))
    before = sampled(batch)
    assert not before.bad.any()
    logits = batch.logits.clone()
    logits[0, 0] = logits[1, 199] = logits[2, 100] = logits[3, :] = torch.nan
    logits[4, :] = -torch.inf
    logits[5, :100], logits[5, 100:] = -torch.inf, torch.nan
    logits[6, 3], logits[6, 150] = torch.inf, torch.nan
    drawn = sampled(batch._replace(logits=logits))
    assert drawn.bad.tolist() == [True] * 7 + [False] * 2
    assert not drawn.tokens[:7].any() and drawn.logprobs[:7].isnan().all()
    assert_same_bits(Drawn(*(values[7:] for values in drawn)), Drawn(*(values[7:] for values in before)))


def test_infinite_logits_share_the_mass(sampled: Draw) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)).mul_(5)
    places = [3, 63, 64, 200, 299]
    logits[places] = torch.inf
    drawn = sampled(make_batch(logits.expand(40, -1), [0.3, 1.0, 1.0, 5.0] * 10, grid(40)))
    assert drawn.tokens.tolist() == [place for place in places for _ in range(8)]
    torch.testing.assert_close(drawn.logprobs, torch.full((40,), 0.2).log())


# ---- tokens without a weight ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [-torch.inf, -150.0])
@pytest.mark.parametrize("kept", [[0], [299], [63], [64], [128, 191], [5, 6, 250], [17, 70, 71, 298]])
def test_tokens_without_a_weight_are_never_drawn(sampled: Draw, kept: list[int], below: float) -> None:
    """-150 is no zero in float32 relative to its own block's maximum, but zero relative to the row's."""
    logits = torch.full((300,), below)
    logits[kept] = torch.linspace(0.0, 1.0, len(kept))
    numbers = [0.0, 2.0**-53, 0.25, 0.5, 0.999999, 1.0 - 2.0**-30, LAST]
    drawn = sampled(make_batch(logits.expand(7, -1), 1.0, numbers))
    assert set(drawn.tokens.tolist()) <= set(kept)
    assert (drawn.tokens[0], drawn.tokens[-1]) == (kept[0], kept[-1])
    assert not drawn.bad.any()


@pytest.mark.parametrize("size", [3, 65, 1000])
def test_the_last_number_draws_the_last_token(sampled: Draw, size: int) -> None:
    """Of equal weights, whose sums round in floats."""
    logits = torch.full((2, size + 40), -torch.inf)
    logits[:, 20 : size + 20] = 0.1
    assert sampled(make_batch(logits, 0.7, [0.0, LAST])).tokens.tolist() == [20, size + 19]


# ---- a row is a function of itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_do_not_notice_their_neighbours(sampled: Draw, dtype: torch.dtype) -> None:
    batch = random_batch(12, 330, dtype, seed=2)
    together = sampled(batch)
    backwards = sampled(batch.rows(list(range(11, -1, -1))))
    assert_same_bits(together, Drawn(*(values.flip(0) for values in backwards)))
    for i in range(12):
        assert_same_bits(sampled(batch.rows([i])), Drawn(*(values[i : i + 1] for values in together)))


def test_rows_may_lie_anywhere(sampled: Draw) -> None:
    batch = random_batch(8, 330, BF16, seed=4)
    spread = torch.full((8, 501), torch.nan, dtype=BF16)
    spread[:, 7:337] = batch.logits
    assert_same_bits(sampled(batch._replace(logits=spread[:, 7:337])), sampled(batch))


def test_a_sampler_takes_any_number_of_rows_up_to_its_own(kernels: ModuleType) -> None:
    sampler: SampleRows = kernels.RowSampler(20, 330, CPU).sample
    batch = random_batch(20, 330, BF16, seed=6)
    together = draw(sampler, batch)
    for size in (0, 1, 13):
        assert_same_bits(draw(sampler, batch.rows(slice(size))), Drawn(*(values[:size] for values in together)))
    with pytest.raises(AssertionError):
        draw(kernels.RowSampler(19, 330, CPU).sample, batch)
    with pytest.raises(AssertionError):
        draw(sampler, batch._replace(logits=batch.logits[:, 1:]))


# ---- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiles(compiled: list[str]) -> None:
    """For GPUs of both vendors."""
    from sglang.srt.ops.triton.sampling import RowSampler

    meta = torch.device("meta")
    for dtype, vocab_size in ((BF16, 151936), (FP32, 262143)):
        sampler = RowSampler(32, vocab_size, meta)
        logits = torch.empty(32, vocab_size, dtype=dtype, device=meta)
        drawn = Drawn(*(torch.empty(32, dtype=kind, device=meta) for kind in (torch.int64, FP32, torch.bool)))
        sampler.sample(logits, torch.empty(32, device=meta), torch.empty(32, dtype=torch.float64, device=meta), *drawn)
    assert compiled == ["_sum_blocks", "_pick_tokens"] * 2
