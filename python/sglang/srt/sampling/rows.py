"""Tokens of greedy rows and of rows drawn from the whole distribution, into tensors that are already there.

The same contract as `ops.triton.sampling.RowSampler`, in torch operations and float64: for devices without Triton, and
what the kernels are tested against. Called for decode steps of such rows alone; `sampler` serves every other batch.

Invariants: a row is a pure function of its own logits, temperature and uniform number (weights are summed as integers,
see `distribution`), and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.srt.sampling.distribution import FLOAT_MAX, UNIT


@torch.inference_mode()
def sample_rows_reference(
    logits: Tensor, temperature: Tensor, uniforms: Tensor, tokens: Tensor, logprobs: Tensor, bad: Tensor
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
    greedy = temperature == 0
    heat = temperature.double().masked_fill(greedy, 1.0)
    peak = logits.amax(-1).double()  # carries a NaN along
    torch.logical_not(peak > -torch.inf, out=bad)
    below = (logits.double() - peak.clamp(-FLOAT_MAX, FLOAT_MAX)[:, None]).clamp_(max=0.0)
    scaled = below.div_(heat[:, None]).masked_fill_(bad[:, None], 0.0)
    ends = (scaled.exp() * UNIT).to(torch.int64).cumsum(-1)
    total = ends[:, -1]
    target = torch.minimum((uniforms * total).to(torch.int64), total - 1)
    drawn = torch.searchsorted(ends, target[:, None], right=True).squeeze(1)
    torch.where(greedy, logits.argmax(-1), drawn, out=tokens)
    tokens.masked_fill_(bad, 0)
    chosen = scaled.gather(1, tokens[:, None]).squeeze(1) - (total / UNIT).log_()
    logprobs.copy_(chosen).masked_fill_(bad, torch.nan)
