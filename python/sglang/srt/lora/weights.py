"""The weights of one adapter version: copied out of the front's buffer once, then never changed.

Made by LoRAManager, on a worker thread. All factors of a version lie in one tensor, so a device slot is filled by one
copy. Invariants: every byte is the payload's own, cast to the model's dtype; the scale stays a number beside them.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.srt.lora.adapter import Adapter, Span

_ALIGNMENT = 64
"""Elements; a factor starts at a multiple of it."""


class Place(NamedTuple):
    """Where a module's outputs are: rows from `start` of a parameter of the model."""

    parameter: str
    start: int


@dataclass(frozen=True, slots=True)
class Factors:
    """One module of an adapter: y[:, start:] += scale * (x A^T) B^T; a is [r, I], b [O, r]."""

    start: int
    scale: float
    a: Tensor
    b: Tensor


class AdapterWeights:
    """Factors by parameter of the model.

    Args:
        data: every factor, one after another, each at a multiple of _ALIGNMENT.
        layout: (where, scale, shape of A, shape of B) in the order of `data`.
    """

    def __init__(self, data: Tensor, layout: list[tuple[Place, float, tuple[int, int], tuple[int, int]]]) -> None:
        self.data = data
        self._layout = layout
        self.factors: dict[str, list[Factors]] = {}
        offset = 0
        for place, scale, a_shape, b_shape in layout:
            a, offset = _cut(data, offset, a_shape)
            b, offset = _cut(data, offset, b_shape)
            self.factors.setdefault(place.parameter, []).append(Factors(place.start, scale, a, b))

    @property
    def nbytes(self) -> int:
        """Size of all factors."""
        return int(self.data.nbytes)

    def to(self, device: torch.device) -> AdapterWeights:
        """A copy on a device, in the order of the current stream."""
        return AdapterWeights(self.data.to(device, non_blocking=True), self._layout)


class AdapterFile:
    """The payload's bytes, mapped while they are copied.

    Raises:
        OSError, ValueError: the file is gone, or shorter than the adapter says.
    """

    def __init__(self, adapter: Adapter) -> None:
        with open(adapter.path, "rb") as file:
            # Writable for us alone: torch has no read-only tensors, and nothing is written.
            self._map = mmap.mmap(file.fileno(), adapter.nbytes, access=mmap.ACCESS_COPY)

    def tensor(self, span: Span) -> Tensor:
        """The tensor of a span; valid as long as it, or this object, lives."""
        dtype = getattr(torch, span.dtype)
        count = span.shape[0] * span.shape[1]
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=span.offset).view(span.shape)


def copy_adapter(
    adapter: Adapter, file: AdapterFile, places: Mapping[str, Place], dtype: torch.dtype, pin: bool
) -> AdapterWeights:
    """The host's master copy of an adapter.

    Args:
        places: module name -> its place in the model.
        pin: page-locked memory, which a device can read by itself.

    Raises:
        KeyError: the model has no such module.
    """
    layout = [(places[m.name], m.scale, m.a.shape, m.b.shape) for m in adapter.modules]
    size = sum(_aligned(shape) for _, _, a, b in layout for shape in (a, b))
    weights = AdapterWeights(torch.zeros(size, dtype=dtype, pin_memory=pin), layout)
    made = {name: iter(factors) for name, factors in weights.factors.items()}
    for module in adapter.modules:
        factors = next(made[places[module.name].parameter])
        factors.a.copy_(file.tensor(module.a))
        factors.b.copy_(file.tensor(module.b))
    return weights


def _aligned(shape: tuple[int, int]) -> int:
    return -(-shape[0] * shape[1] // _ALIGNMENT) * _ALIGNMENT


def _cut(data: Tensor, offset: int, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """(the view at an offset, where the next one starts)."""
    return data[offset : offset + shape[0] * shape[1]].view(shape), offset + _aligned(shape)
