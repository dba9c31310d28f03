"""Draws from the weights of `distribution` on the host, in numpy: its calls cost a fraction of torch's on small arrays.

`device_draw` is the same arithmetic for every other device; the two agree token for token. Called by `sampler`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.sampling.distribution import BLOCK, UNIT, Weights
from sglang.srt.sampling.plan import Filters

_LOW_BITS = 2**32 - 1


def draw(weights: Weights, index: Tensor | None, uniforms: NDArray[np.float64]) -> Tensor:
    """One token per row from the whole distribution: first the block, then the token in it.

    Args:
        index: int64 [D] rows of `weights`, None for all of them.
        uniforms: float64 [D] in [0, 1).

    Returns:
        int64 [D]; any token for a bad row.
    """
    rows = np.arange(len(uniforms)) if index is None else index.numpy()
    mass = weights.mass.numpy()[rows]
    each = np.arange(len(rows))
    ends = mass.cumsum(-1)
    target = _scaled(uniforms, ends[:, -1])
    block = (ends <= target[:, None]).sum(-1)
    size = mass[each, block]
    offset = target - (ends[each, block] - size)
    shares = weights.values.numpy()[rows, block].astype(np.float64)
    shares /= weights.sums.numpy()[rows, block].astype(np.float64)[:, None]
    inside = (np.where(weights.bad.numpy()[rows][:, None], 1.0, shares) * UNIT).astype(np.int64)
    ends = inside.cumsum(-1)
    target = _scaled(offset / size, ends[:, -1])
    return torch.from_numpy(block * BLOCK + (ends <= target[:, None]).sum(-1))


def draw_filtered(weights: Weights, index: Tensor | None, uniforms: NDArray[np.float64], filters: Filters) -> Tensor:
    """One token per row from what the filters leave; arguments and result as `draw`, rows in the order of `filters`.

    Sorts only the few tokens that may survive, row by row.
    """
    rows, logits, totals = weights.rows.numpy(), weights.logits.numpy(), weights.total.numpy()
    bad = weights.bad.numpy()
    picked = range(len(uniforms)) if index is None else index.tolist()
    tokens = np.zeros(len(uniforms), np.int64)
    limits = filters.columns.T.tolist()
    for i, (row, u) in enumerate(zip(picked, uniforms.tolist(), strict=True)):
        if not bad[row]:
            top_k, top_p, min_p = limits[i]
            tokens[i] = _draw_filtered_row(rows[row], logits[row], int(totals[row]), u, int(top_k), top_p, min_p)
    return torch.from_numpy(tokens)


def argmax_rows(logits: Tensor) -> Tensor:
    """int64 [S]: the first position of each row's maximum (of its first NaN, if it has one)."""
    return torch.from_numpy(logits.numpy().argmax(-1))  # 20 times faster than torch's


def top_entries(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, equals by token id: (values float32 [S, n], ids int64 [S, n])."""
    count = min(count, logits.shape[1])
    ids = torch.from_numpy(np.stack([_top_ids(row, count) for row in logits.numpy()]))
    return logits.gather(1, ids), ids


def _top_ids(row: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    return _ranked(row, np.flatnonzero(~(row < _reached_by(row, count))))[:count]  # a NaN is below nothing


def _draw_filtered_row(
    weights: NDArray[np.float32],
    logits: NDArray[np.float32],
    total: int,
    u: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> int:
    # All tokens below this weight hold less than half of 1 - top_p together, so the cut lies above it.
    floor = max(0.5 * (1.0 - top_p) * (total / UNIT) / len(weights), min_p)
    if floor <= 0.0 or top_k <= len(weights) // BLOCK:
        # The margin is for weights that rounding put in another order than their logits.
        floor = max(floor, _reached_by(weights, top_k) * (1.0 - 1e-6))
    ids = _ranked(logits, np.flatnonzero(weights >= np.float32(floor)))[:top_k]
    kept = weights[ids]
    mass = (kept.astype(np.float64) * UNIT).astype(np.int64)
    ends = mass.cumsum()
    stays = ((ends - mass) <= top_p * total) & (kept >= np.float32(min_p))
    count = max(int(np.count_nonzero(stays)), 1)
    target = min(int(u * float(ends[count - 1])), int(ends[count - 1]) - 1)
    return int(ids[ends.searchsorted(target, side="right")])


def _reached_by(row: NDArray[np.float32], count: int) -> float:
    """A value that at least `count` entries reach: near the count-th largest, and quick to find for a small count."""
    size = len(row)
    groups = size // BLOCK
    if count >= size:
        return -np.inf
    if count > groups:
        return float(np.partition(row, size - count)[size - count])
    # As many groups reach this value, so as many entries do. Any grouping would; with this one the maximum is fast.
    peaks = row[: groups * BLOCK].reshape(BLOCK, groups).max(0)
    return float(np.partition(peaks, groups - count)[groups - count])


def _ranked(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """`ids`, largest logit first, equals by id."""
    bits: NDArray[Any] = (logits[ids] + np.float32(0.0)).view(np.int32)  # + 0 makes -0 equal to 0
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32) | (_LOW_BITS - ids)
    keys.sort()
    ranked: NDArray[np.int64] = _LOW_BITS - (keys[::-1] & _LOW_BITS)
    return ranked


def _scaled(fractions: NDArray[np.float64], totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """floor(fraction * total), below the total whatever the rounding."""
    return np.minimum((fractions * totals).astype(np.int64), totals - 1)
