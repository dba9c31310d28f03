"""Columns that travel between the host and fixed addresses on a device, all of them in one copy.

Owned by DecodeGraphs: graphs keep the device's addresses. The host's side exists several times, page-locked, so that
the columns of the next steps can be written while copies of earlier ones are on their way.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
HOST_COPIES = 4
"""More than the steps that can be in flight, so that nobody overwrites columns which are still being copied."""

Columns = dict[str, NDArray[Any]]
Fields = dict[str, tuple[Any, int]]
"""Name -> (numpy dtype, length)."""

_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


class PackedColumns:
    """Named columns.

    Args:
        fields: in the order of their addresses.

    Attributes:
        device: name -> tensor, at fixed addresses that are multiples of 16 bytes.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        ends = list(itertools.accumulate(_padded(dtype, count) for dtype, count in fields.values()))
        self._fields = {
            name: (np.dtype(dtype), slice(start, start + np.dtype(dtype).itemsize * count))
            for (name, (dtype, count)), start in zip(fields.items(), [0, *ends], strict=False)
        }
        pinned = device.type != "cpu"
        self._data = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        self._mirrors = [torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=pinned) for _ in range(HOST_COPIES)]
        self._columns = [
            {name: mirror.numpy()[span].view(dtype) for name, (dtype, span) in self._fields.items()}
            for mirror in self._mirrors
        ]
        self._done = [torch.cuda.Event() if pinned else None for _ in self._mirrors]  # type: ignore[no-untyped-call]
        self._turn = 0
        self.device: dict[str, Tensor] = {
            name: self._data[span].view(_TORCH[dtype]) for name, (dtype, span) in self._fields.items()
        }

    def next(self) -> Columns:
        """The host's columns to write next."""
        self._turn = (self._turn + 1) % HOST_COPIES
        return self._columns[self._turn]

    def upload(self) -> None:
        """Queue the copy of the columns that `next` gave."""
        self._data.copy_(self._mirrors[self._turn], non_blocking=True)

    def download(self) -> PendingColumns:
        """Queue a copy of the device's columns to the host."""
        columns = self.next()
        self._mirrors[self._turn].copy_(self._data, non_blocking=True)
        event = self._done[self._turn]
        if event is not None:
            event.record()
        return PendingColumns(columns, event)


class PendingColumns:
    """Columns on their way to the host."""

    def __init__(self, columns: Columns, done: torch.cuda.Event | None) -> None:
        self._columns, self._done = columns, done

    def wait(self) -> Columns:
        """Block until they are there; valid until HOST_COPIES - 1 more have been asked for."""
        if self._done is not None:
            self._done.synchronize()
        return self._columns


def _padded(dtype: Any, count: int) -> int:
    return math.ceil(np.dtype(dtype).itemsize * count / _ALIGNMENT) * _ALIGNMENT
