"""Draws from the weights of `distribution` with torch operations only, for any device; nothing waits for it.

`host_draw` is the same arithmetic for the CPU; the two agree token for token. Called by `sampler`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.sampling.distribution import BLOCK, UNIT, Weights
from sglang.srt.sampling.plan import Filters
from sglang.srt.sampling.transfer import to_device

_LOW_BITS = 2**32 - 1


def draw(weights: Weights, index: Tensor | None, uniforms: NDArray[np.float64]) -> Tensor:
    """As `host_draw.draw`."""
    device = weights.sums.device
    rows = torch.arange(len(uniforms), device=device) if index is None else index
    mass = weights.mass[rows]
    ends = mass.cumsum(-1)
    target = _scaled(to_device(uniforms, device), ends[:, -1])
    block = torch.searchsorted(ends, target, right=True)
    size = mass.gather(1, block)
    offset = target - (ends.gather(1, block) - size)
    block = block.squeeze(1)
    shares = weights.values[rows, block].double()
    shares.div_(weights.sums[rows, block].double()[:, None]).masked_fill_(weights.bad[rows][:, None], 1.0)
    ends = shares.mul_(UNIT).to(torch.int64).cumsum(-1)
    target = _scaled((offset.double() / size.double()).squeeze(1), ends[:, -1])
    return block * BLOCK + torch.searchsorted(ends, target, right=True).squeeze(1)


def draw_filtered(weights: Weights, index: Tensor | None, uniforms: NDArray[np.float64], filters: Filters) -> Tensor:
    """As `host_draw.draw_filtered`, but sorts whole rows: how few tokens survive is not known on the host."""
    device = weights.sums.device
    rows = weights.rows if index is None else weights.rows[index]
    logits = weights.logits if index is None else weights.logits[index]
    totals = weights.total if index is None else weights.total[index]
    top_k, top_p, min_p = filters.on_device[:, :, None].unbind(0)
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    values = rows.gather(1, ids)
    mass = (values.double() * UNIT).to(torch.int64)
    ends = mass.cumsum(-1)
    rank = torch.arange(values.shape[1], device=device)
    stays = ((ends - mass).double() <= top_p * totals[:, None]) & (values >= min_p.float()) & (rank < top_k)
    last = stays.sum(-1, keepdim=True).clamp_(min=1) - 1
    target = _scaled(to_device(uniforms, device), ends.gather(1, last).squeeze(1))
    return ids.gather(1, torch.minimum(torch.searchsorted(ends, target, right=True), last)).squeeze(1)


def argmax_rows(logits: Tensor) -> Tensor:
    """As `host_draw.argmax_rows`."""
    return logits.argmax(-1)


def top_entries(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `host_draw.top_entries`."""
    width = logits.shape[1]
    bits = (logits + 0.0).view(torch.int32)  # + 0 makes -0 equal to 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64).bitwise_left_shift_(32)
    keys |= torch.arange(_LOW_BITS, _LOW_BITS - width, -1, device=logits.device)
    ids = _LOW_BITS - (keys.topk(min(count, width), dim=-1).values & _LOW_BITS)
    return logits.gather(1, ids), ids


def _scaled(fractions: Tensor, totals: Tensor) -> Tensor:
    """floor(fraction * total) as int64 [D, 1], below the total whatever the rounding."""
    return torch.minimum((fractions * totals).to(torch.int64), totals - 1)[:, None]
