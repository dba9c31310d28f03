"""How long a captured graph takes. Used by the benchmarks of this directory that need a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

_WARM_UP = 3


def replay_ms(graph: torch.cuda.CUDAGraph, repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Median milliseconds of a replay, on the device.

    Args:
        before: enqueued ahead of every replay, and not timed.
    """
    times = []
    for i in range(repeats + _WARM_UP):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= _WARM_UP:
            times.append(start.elapsed_time(end))
    return statistics.median(times)
