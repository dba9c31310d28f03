"""The arithmetic of sampling: softmax weights of logit rows, their normaliser, and the random numbers.

Called by `sampler`; `host_draw` and `device_draw` draw from the weights. Shape legend: S rows, V vocabulary, N blocks
of `BLOCK` tokens (the last one zero-padded).

Invariant: what is computed for a row depends on that row alone, bit for bit, whatever rows surround it and however many
threads run. Float operations are therefore element-wise, or reduce one block of one row; everything longer than a block
is summed in integers (weights in units of 2**-40 of the row's largest), where the order of additions cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256
UNIT = float(2**40)
"""Integer weight of the most likely token; V * UNIT fits in int64 up to a vocabulary of 8 million."""
FLOAT_MAX = float(torch.finfo(torch.float32).max)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@dataclass(slots=True)
class Normalizer:
    """Turns logits of S rows into log-probabilities: (x - shift) / temperature - log_total.

    Fields:
        shift: float32 [S], the rows' maxima; log_total: float32 [S].
        temperature: float32 [S], or None when it is 1 in every row.
    """

    shift: Tensor
    temperature: Tensor | None
    log_total: Tensor

    def take(self, index: Tensor | None) -> Normalizer:
        """The rows `index` (int64), or all of them for None."""
        if index is None:
            return self
        temperature = None if self.temperature is None else self.temperature[index]
        return Normalizer(self.shift[index], temperature, self.log_total[index])

    def logprobs(self, logits: Tensor) -> Tensor:
        """float32 log-probabilities of `logits` [S] or [S, n]; finite (the float minimum for -inf), NaN in bad rows."""
        column = (slice(None),) + (None,) * (logits.dim() - 1)
        scaled = (logits - self.shift[column]).clamp_(max=0.0)
        if self.temperature is not None:
            scaled.div_(self.temperature[column])
        return scaled.sub_(self.log_total[column]).clamp_(min=-FLOAT_MAX)


@dataclass(slots=True)
class Weights:
    """exp((x - max x) / temperature) of S rows, in the workspace's memory: valid until its next use.

    Fields:
        logits: float32 [S, V] they were made of: these rank the tokens, because weights round to equality earlier.
        values: float32 [S, N, BLOCK], 0 in the padding.
        sums: float32 [S, N]; mass: int64 [S, N], the same in units of 1 / UNIT; total: int64 [S].
        bad: bool [S], rows without a usable distribution (a NaN, or nothing above -inf).
    """

    logits: Tensor
    values: Tensor
    sums: Tensor
    mass: Tensor
    total: Tensor
    bad: Tensor
    normalizer: Normalizer
    vocab_size: int

    @property
    def rows(self) -> Tensor:
        """float32 [S, V] view of `values`."""
        return self.values.flatten(1)[:, : self.vocab_size]


class Workspace:
    """Memory for the weights of as many rows as were ever asked for at once."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._blocks = -(-vocab_size // BLOCK)
        self._values = torch.zeros(0, self._blocks, BLOCK, device=device)

    def weights(self, logits: Tensor, temperature: Tensor | None) -> Weights:
        """Weights of `logits` [S, V] float32 at `temperature` [S] (None: 1 everywhere)."""
        size = logits.shape[0]
        if len(self._values) < size:
            self._values = torch.zeros(size, self._blocks, BLOCK, device=self.device)
        values = self._values[:size]
        # amax carries a NaN along, so this one reduction also finds the rows that cannot be sampled.
        shift = logits.amax(-1, keepdim=True)
        bad = ~(shift > -torch.inf)
        self._exponentiate(logits, shift.clamp_(max=FLOAT_MAX), temperature, values)
        sums = values.sum(-1)
        mass = sums.double().mul_(UNIT).to(torch.int64).masked_fill_(bad, 1)
        total = mass.sum(-1)
        log_total = total.double().div_(UNIT).log_().float()
        normalizer = Normalizer(shift.squeeze(1), temperature, log_total)
        return Weights(logits, values, sums, mass, total, bad.squeeze(1), normalizer, self.vocab_size)

    def _exponentiate(self, logits: Tensor, shift: Tensor, temperature: Tensor | None, values: Tensor) -> None:
        weights = values.flatten(1)[:, : self.vocab_size]
        torch.sub(logits, shift, out=weights)
        # +inf logits share the whole mass. To look first would wait for a device; to clamp always costs a pass.
        if self.device.type != "cpu" or bool((shift == FLOAT_MAX).any()):
            weights.clamp_(max=0.0)
        if temperature is not None:
            weights.div_(temperature[:, None])
        weights.exp_()


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, a pure function of (seed, position).

    The seed is hashed first so that neighbouring seeds start far apart; the position then selects a step of that
    stream, and the sum is hashed again (splitmix64's finaliser both times).
    """
    state = _mix(seeds + _GOLDEN)
    bits = _mix(state + positions * _GOLDEN) >> _SHIFTS[3]
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> _SHIFTS[0])) * _FACTORS[0]
    z = (z ^ (z >> _SHIFTS[1])) * _FACTORS[1]
    mixed: NDArray[np.uint64] = z ^ (z >> _SHIFTS[2])
    return mixed
