"""Batches for `RowSampler` and its torch reference, and what float64 says about their results, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from engine.sampling_cases import random_logits
from torch import Tensor

SampleRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
LAST = 1.0 - 2.0**-53
"""The largest uniform number."""
TEMPERATURES = [0.0, 1e-6, 1e-3, 0.3, 0.7, 1.0, 1.0, 2.0, 100.0, torch.finfo(torch.float32).max]
SLACK = 2e-6
"""How far rounding may move the borders between tokens."""


class Drawn(NamedTuple):
    """Results of some rows: int64, float32 and bool [R]."""

    tokens: Tensor
    logprobs: Tensor
    bad: Tensor


class Batch(NamedTuple):
    """Arguments: [R, V], float32 [R], float64 [R]."""

    logits: Tensor
    temperature: Tensor
    uniforms: Tensor

    def rows(self, index: slice | list[int]) -> Batch:
        return Batch(*(values[index] for values in self))


def make_batch(logits: Tensor, temperature: float | list[float], uniforms: float | list[float] | Tensor) -> Batch:
    """One number is for all rows."""
    shape, device = logits.shape[:1], logits.device
    heat = torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(shape)
    numbers = torch.as_tensor(uniforms, dtype=torch.float64, device=device).expand(shape)
    return Batch(logits, heat.contiguous(), numbers.contiguous())


def random_batch(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Batch:
    """Rows of all kinds, on a CPU whatever the device, then moved there."""
    rng = np.random.default_rng(seed)
    logits = np.stack([random_logits(rng, vocab_size) for _ in range(num_rows)])
    heat = rng.choice(TEMPERATURES, num_rows).astype(np.float32)
    numbers = rng.random(num_rows)
    numbers[rng.random(num_rows) < 0.1] = 0.0
    numbers[rng.random(num_rows) < 0.1] = LAST
    batch = Batch(torch.from_numpy(logits).to(dtype), torch.from_numpy(heat), torch.from_numpy(numbers))
    return Batch(*(values.to(device) for values in batch))


def draw(sample: SampleRows, batch: Batch) -> Drawn:
    """Every output is written, whatever was in it."""
    size, device = len(batch.logits), batch.logits.device
    drawn = Drawn(
        torch.full((size,), -7, dtype=torch.int64, device=device),
        torch.full((size,), 7.0, device=device),
        torch.arange(size, device=device) % 2 == 0,
    )
    sample(*batch, *drawn)
    return drawn


def assert_same_bits(first: Drawn, second: Drawn) -> None:
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.logprobs.view(torch.int32), second.logprobs.view(torch.int32))
    assert torch.equal(first.bad, second.bad)


def exact_logprobs(batch: Batch) -> Tensor:
    """float64 [R, V]; NaN in rows that cannot be sampled."""
    x = batch.logits.double()
    infinite = x == torch.inf
    x = torch.where(infinite.any(-1, keepdim=True) & ~x.isnan(), torch.where(infinite, 0.0, -torch.inf), x)
    heat = torch.where(batch.temperature == 0, 1.0, batch.temperature).double()
    return torch.log_softmax((x - x.amax(-1, keepdim=True)) / heat[:, None], -1)


def check(drawn: Drawn, batch: Batch) -> None:
    """Tokens lie where their uniform numbers point, log-probabilities are theirs, and bad rows are marked."""
    exact = exact_logprobs(batch)
    bad = exact.isnan().any(-1)
    assert torch.equal(drawn.bad, bad)
    assert not drawn.tokens[bad].any() and drawn.logprobs[bad].isnan().all()
    good = ~bad
    exact, tokens, u = exact[good], drawn.tokens[good, None], batch.uniforms[good]
    own = exact.gather(1, tokens).squeeze(1)
    torch.testing.assert_close(drawn.logprobs[good].double(), own, rtol=1e-6, atol=5e-6)
    assert (own > -torch.inf).all()
    greedy = batch.temperature[good] == 0
    assert torch.equal(tokens[greedy, 0], batch.logits[good][greedy].argmax(-1))
    ends = exact.exp().cumsum(-1)
    end = (ends / ends[:, -1:]).gather(1, tokens).squeeze(1)
    placed = (u >= end - own.exp() - SLACK) & (u <= end + SLACK)
    assert (placed | greedy).all(), (~(placed | greedy)).nonzero()
