"""The weights of one adapter version: copied out of the front's buffer once, then never changed.

Made by LoRAManager, on a worker thread. Modules of the decoder layers lie in a slab (`ops.slabs`), with the bytes that
a trainer would pack; the embedding and the head, which no slab describes, one behind the other in a tensor beside it.
A device slot is filled by one copy of each. Invariants: every number is the payload's own, cast to the model's dtype;
the scale stays a number beside them.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.srt.lora.adapter import Adapter, AdapterModule, Span
from sglang.srt.ops.slabs import ModelSlabs, Slab, SlabModule, SlabPlace

_ALIGNMENT = 64
"""Elements; a factor outside the slab starts at a multiple of it."""


class Place(NamedTuple):
    """Where a module's outputs are, rows from `start` of a parameter, and where its factors; None: in no slab."""

    parameter: str
    start: int
    slab: SlabPlace | None = None


@dataclass(frozen=True, slots=True)
class Factors:
    """One module of an adapter: y[:, start:] += scale * (x A^T) B^T; a is [r, I], b [O, r], of any row stride."""

    start: int
    scale: float
    a: Tensor
    b: Tensor


class PlacedModule(NamedTuple):
    """A module of an adapter, and its place in the model."""

    module: AdapterModule
    place: Place


class AdapterWeights:
    """Factors by parameter of the model, all of them views.

    Args:
        slab: the modules that have a place in it.
        rest: factors of all others, in the order of `modules`, each at a multiple of _ALIGNMENT.

    Attributes:
        factors: parameter -> modules; several where the parameter is several matrices in one.
    """

    def __init__(self, modules: Sequence[PlacedModule], slab: Slab, rest: Tensor) -> None:
        self.slab, self.rest = slab, rest
        self._modules = modules
        self.factors: dict[str, list[Factors]] = {}
        offset = 0
        for module, place in modules:
            if place.slab is not None:
                a, b = slab.factors(place.slab, module.rank)
            else:
                a, offset = _cut(rest, offset, module.a.shape)
                b, offset = _cut(rest, offset, module.b.shape)
            self.factors.setdefault(place.parameter, []).append(Factors(place.start, module.scale, a, b))

    @property
    def nbytes(self) -> int:
        """Size of the slab and of all other factors."""
        return int(self.slab.data.nbytes + self.rest.nbytes)

    def in_row(self, row: Tensor) -> AdapterWeights:
        """The same on a device: a row that has the slab's bytes, and a copy of `rest` in the order of the stream."""
        slab = Slab(self.slab.layout, row, self.slab.rank)
        return AdapterWeights(self._modules, slab, self.rest.to(row.device, non_blocking=True))


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
    adapter: Adapter, file: AdapterFile, places: Mapping[str, Place], slabs: ModelSlabs, *, tight: bool, pin: bool
) -> AdapterWeights:
    """The host's master copy of an adapter.

    Args:
        places: module name -> its place in the model.
        tight, pin: see `ModelSlabs.pack`.

    Raises:
        KeyError: the model has no such module.
        ValueError: a number is too large for the model's dtype, or a rank for its slabs.
    """
    modules = [PlacedModule(module, places[module.name]) for module in adapter.modules]
    slab = slabs.pack(
        [SlabModule(p.slab, m.scale, file.tensor(m.a), file.tensor(m.b)) for m, p in modules if p.slab is not None],
        tight=tight,
        pin=pin,
    )
    others = [m for m, place in modules if place.slab is None]
    size = sum(_aligned(span.shape) for m in others for span in (m.a, m.b))
    rest, offset = torch.zeros(size, dtype=slabs.dtype, pin_memory=pin), 0
    for span in (span for m in others for span in (m.a, m.b)):
        part, offset = _cut(rest, offset, span.shape)
        part.copy_(file.tensor(span))
    return AdapterWeights(modules, slab, rest)


def _aligned(shape: tuple[int, int]) -> int:
    return -(-shape[0] * shape[1] // _ALIGNMENT) * _ALIGNMENT


def _cut(data: Tensor, offset: int, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """(the view at an offset, where the next one starts)."""
    return data[offset : offset + shape[0] * shape[1]].view(shape), offset + _aligned(shape)
