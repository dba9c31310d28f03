"""The weights of one adapter version: copied out of the front's buffer once, then never changed.

Made by `adapter_copier`. Modules of the decoder layers lie in a slab (`ops.slabs`), with the bytes that
a trainer would pack; the embedding and the head, which no slab describes, one behind the other in a tensor beside it.
A device slot is filled by one copy of each. Invariants: every number is the payload's own, cast to the model's dtype;
the scale stays a number beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sglang.srt.lora.adapter import AdapterModule
from sglang.srt.ops.slabs import Slab, SlabPlace

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

    @functools.cached_property
    def factors(self) -> Mapping[str, list[Factors]]:
        """See the class. Made when first asked for: operators that read slabs need none of these hundreds of views."""
        found: dict[str, list[Factors]] = {}
        offset = 0
        for module, place in self._modules:
            if place.slab is not None:
                a, b = self.slab.factors(place.slab, module.rank)
            else:
                a, offset = _cut(self.rest, offset, module.a.shape)
                b, offset = _cut(self.rest, offset, module.b.shape)
            found.setdefault(place.parameter, []).append(Factors(place.start, module.scale, a, b))
        return found

    @property
    def nbytes(self) -> int:
        """Size of the slab and of all other factors."""
        return int(self.slab.data.nbytes + self.rest.nbytes)

    def in_row(self, row: Tensor) -> AdapterWeights:
        """The same on a device: a row that has the slab's bytes, and a copy of `rest` in the order of the stream."""
        slab = Slab(self.slab.layout, row, self.slab.rank)
        return AdapterWeights(self._modules, slab, self.rest.to(row.device, non_blocking=True))


def aligned(shape: tuple[int, int]) -> int:
    """Elements that a factor outside the slab takes."""
    return -(-shape[0] * shape[1] // _ALIGNMENT) * _ALIGNMENT


def _cut(data: Tensor, offset: int, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """(the view at an offset, where the next one starts)."""
    return data[offset : offset + shape[0] * shape[1]].view(shape), offset + aligned(shape)
