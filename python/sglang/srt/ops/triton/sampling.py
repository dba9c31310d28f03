"""Sampling of a decode step in two kernel launches, straight from the logits: greedy rows, and rows drawn from the
whole distribution at some temperature.

Owned by whoever captures or runs a decode step; `sampling.rows` has the same contract in torch, for other devices and
for tests.

A row is cut into blocks of `BLOCK` logits. The first kernel, one program a block, reads every logit once and leaves the
block's maximum and its sum of exp((x - maximum) / T). The second, one program a row, picks the block from those and
reads that one block again to pick the token.

Invariants: what a row gets is a pure function of its own logits, temperature and uniform number, whatever rows surround
it. Floats are summed within one block of one row, in the one order that the kernel was compiled to; everything longer,
and the places of the tokens in their block, is summed in integers, in units of 2**-40 of the largest weight, so that
rounding leaves no gap: the target always lies below the end of a token with a weight. Grids depend on the number of
rows alone, nothing is allocated after the construction, and nothing waits for the device.
"""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of a program: 38 programs for one row of 151936, and 8 KiB of bfloat16 on their way for each."""
_SUM_WARPS = 4
_PICK_WARPS = 8
# Which products and sums were to be rounded once would be the compiler's choice, and a row's bits with it.
_OPTIONS = {"enable_fp_fusion": False}

_UNIT = tl.constexpr(float(2**40))
_FLOAT_MAX = tl.constexpr(float(torch.finfo(torch.float32).max))
_FLOAT_TINY = tl.constexpr(float(torch.finfo(torch.float32).tiny))
_LOG2_E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))
# Slices of longer buffers begin anywhere, and a graph must not find that its kernel is still to be compiled.
_COLUMNS = ["temperature", "uniforms", "tokens", "logprobs", "bad"]


class RowSampler:
    """Workspace for up to `max_rows` rows of V logits on one device, at fixed addresses (CUDA graphs keep them).

    The first call with a dtype compiles, so make it before a graph is captured. Not for two streams at a time.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self._block = BLOCK
        self._num_blocks = -(-vocab_size // self._block)
        self._maxima = torch.empty(max_rows, self._num_blocks, dtype=torch.float32, device=device)
        self._sums = torch.empty_like(self._maxima)

    def sample(
        self, logits: Tensor, temperature: Tensor, uniforms: Tensor, tokens: Tensor, logprobs: Tensor, bad: Tensor
    ) -> None:
        """One token per row: the first whose cumulative weight exceeds u * total, weights exp((x - max x) / T).

        +inf logits share the whole mass equally; a token without mass is never drawn.

        Args:
            logits: bfloat16, float16 or float32 [R, V], rows dense, any distance apart.
            temperature: float32 [R]; 0 takes the largest logit, the lowest id among equals.
            uniforms: float64 [R] in [0, 1).
            tokens: int64 [R], written.
            logprobs: float32 [R], written: log-probability of the token at the row's temperature, at 1 where that is 0.
            bad: bool [R], written: rows with a NaN or with nothing above -inf; token 0, log-probability NaN.
        """
        num_rows = logits.shape[0]
        assert num_rows <= self.max_rows and logits.shape[1] == self.vocab_size, (logits.shape, self.max_rows)
        assert logits.stride(1) == 1 or self.vocab_size == 1, logits.stride()
        if num_rows == 0:
            return
        # The stride of a single row says nothing, and may be anything: no reason to compile anew.
        row_stride = logits.stride(0) if num_rows > 1 else self.vocab_size
        sizes = {"VOCAB": self.vocab_size, "NUM_BLOCKS": self._num_blocks, "BLOCK": self._block}
        _sum_blocks[self._num_blocks, num_rows](
            logits, row_stride, temperature, self._maxima, self._sums, **sizes, num_warps=_SUM_WARPS, **_OPTIONS
        )
        _pick_tokens[(num_rows,)](
            logits,
            row_stride,
            temperature,
            uniforms,
            self._maxima,
            self._sums,
            tokens,
            logprobs,
            bad,
            **sizes,
            BLOCKS=triton.next_power_of_2(self._num_blocks),
            num_warps=_PICK_WARPS,
            **_OPTIONS,
        )


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _sum_blocks(
    logits,
    row_stride,
    temperature,
    maxima,
    sums,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum of a block (-inf for one of nothing else) and sum of its weights, NaN if it has one.

    Grid: blocks, rows.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = _block_of(logits + row * row_stride, block, VOCAB, BLOCK)
    peak = tl.max(x, 0)  # leaves out NaN, which the sum shows
    weights = _weights(x, peak, _rate(tl.load(temperature + row)))
    place = row * NUM_BLOCKS + block
    tl.store(maxima + place, peak)
    tl.store(sums + place, tl.sum(weights, 0))


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _pick_tokens(
    logits,
    row_stride,
    temperature,
    uniforms,
    maxima,
    sums,
    tokens,
    logprobs,
    bad,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    present = blocks < NUM_BLOCKS
    peaks = tl.load(maxima + row * NUM_BLOCKS + blocks, mask=present, other=-_INF)
    block_sums = tl.load(sums + row * NUM_BLOCKS + blocks, mask=present, other=0.0)
    heat, uniform = tl.load(temperature + row), tl.load(uniforms + row)  # on their way together with those
    peak = tl.max(peaks, 0)
    usable = (tl.sum((block_sums != block_sums).to(tl.int32), 0) == 0) & (peak > -_INF)
    tl.store(bad + row, usable == 0)
    if usable:
        x = logits + row * row_stride
        rate = _rate(heat)
        mass = (block_sums * _weights(peaks, peak, rate) * _UNIT).to(tl.int64)
        total = tl.sum(mass, 0)
        if heat == 0.0:
            block = tl.min(tl.where(peaks == peak, blocks, BLOCKS), 0)
            place = tl.min(tl.where(_block_of(x, block, VOCAB, BLOCK) == peak, tl.arange(0, BLOCK), BLOCK), 0)
        else:
            target = _scaled(uniform, total)
            block, start = _first_beyond(mass, target)
            here = blocks == block
            block_peak = tl.max(tl.where(here, peaks, -_INF), 0)
            size = tl.sum(tl.where(here, mass, 0), 0)
            # Once more relative to the block's own maximum: a token far below the row's keeps its digits.
            inside = _weights(_block_of(x, block, VOCAB, BLOCK), block_peak, rate) * _UNIT
            inside = inside.to(tl.int64)
            share = (target - start).to(tl.float64) / size.to(tl.float64)
            place, _ = _first_beyond(inside, _scaled(share, tl.sum(inside, 0)))
        token = block * BLOCK + place
        distance = _below(tl.load(x + token).to(tl.float32), peak).to(tl.float64)
        log_total = tl.log(total.to(tl.float64) / _UNIT)
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, (distance / _softness(heat).to(tl.float64) - log_total).to(tl.float32))
    else:
        tl.store(tokens + row, tl.zeros((), tl.int64))
        tl.store(logprobs + row, float("nan"))


@triton.jit
def _block_of(x, block, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK] of the row at `x`, -inf behind its end."""
    ids = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(x + ids, mask=ids < VOCAB, other=-_INF).to(tl.float32)


@triton.jit
def _softness(heat):
    """The temperature that log-probabilities are taken at."""
    return tl.where(heat == 0.0, 1.0, heat)


@triton.jit
def _rate(heat):
    """log2(e) / T, neither infinite nor 0 for any T: both times 0 and times -inf there is a result."""
    return tl.minimum(tl.maximum(_LOG2_E / _softness(heat), _FLOAT_TINY), _FLOAT_MAX)


@triton.jit
def _below(x, peak):
    """x - peak: 0 for +inf, -inf for -inf, NaN for NaN, whatever the peak."""
    top = tl.minimum(tl.maximum(peak, -_FLOAT_MAX), _FLOAT_MAX)
    return tl.minimum(x, _FLOAT_MAX, propagate_nan=tl.PropagateNan.ALL) - top


@triton.jit
def _weights(x, peak, rate):
    """exp((x - peak) / T)."""
    return tl.exp2(_below(x, peak) * rate)


@triton.jit
def _scaled(fraction, total):
    """floor(fraction * total), below the total whatever the rounding."""
    return tl.minimum((fraction * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _first_beyond(weights, target):
    """The first place where the running sum of integer weights exceeds `target`, and the sum before it."""
    ends = tl.cumsum(weights, 0)
    passed = ends <= target
    return tl.sum(passed.to(tl.int32), 0), tl.max(tl.where(passed, ends, 0), 0)
