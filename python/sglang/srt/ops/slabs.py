"""The server's way to sgl_kernel's slabs: a model's layout, the places of an adapter in it, and views of its factors.

Called by `model_executor.setup`, which makes the one `ModelSlabs` of a server, and by `lora`. Groups and slices are
those that trainers name (`sgl_kernel.lora.decoder_groups`, `peft_modules`), so a slab that a trainer packs for the same
layout has the same bytes. Matrices outside the decoder layers, the embedding and the head, have no place in a slab.

A slab has room for every module at its layout's rank, whatever the adapter has. One that is copied into a row of
`LoraSlabs` must be of the model's layout, so `--max-lora-rank` far above the adapters' ranks costs memory, on the host
and on the device, and time of every copy. One that is read where it was packed is `tight`: of its adapter's own rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sgl_kernel.lora.batch import BatchShape as BatchShape
from sgl_kernel.lora.batch import build_batch as build_batch
from sgl_kernel.lora.bf16 import all_finite as _all_finite
from sgl_kernel.lora.layout import RANK_STEP, LoraGroup, round_up
from sgl_kernel.lora.layout import LoraLayout as LoraLayout
from sgl_kernel.lora.layout import LoraSite as LoraSite
from sgl_kernel.lora.peft import DECODER_MODULES
from sgl_kernel.lora.slab import LoraModule, slab_frame
from sgl_kernel.lora.slab import SlabFrame as SlabFrame
from sgl_kernel.types import LoraBatch as LoraBatch
from sgl_kernel.types import LoraSlabs as LoraSlabs

_MATRIX = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SlabPlace(NamedTuple):
    """Where a module lies in a slab, as in `LoraLayout.site`."""

    layer: int
    group: str
    slice_index: int


class Matrix(Protocol):
    """What has a shape: a tensor, or its place in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """(rows, columns)."""


class SlabModule(NamedTuple):
    """A module of an adapter: A [r, I], B [O, r]."""

    place: SlabPlace
    scale: float
    a: Matrix
    b: Matrix


class Slab(NamedTuple):
    """The packed modules of an adapter, on the host or in a row of the device's.

    Fields:
        data: uint8 [layout.slab_bytes]; empty where the adapter has no module that a slab describes.
        rank: the adapter's, the largest of these modules; 0 where there are none.
    """

    layout: LoraLayout
    data: Tensor
    rank: int

    def factors(self, place: SlabPlace, rank: int) -> tuple[Tensor, Tensor]:
        """Views of a module's A [rank, I] and B [O, rank], whose rows are round_up(the adapter's rank, 8) apart."""
        site, numbers = self.layout.site(place.layer, place.group), self.data.view(_TORCH[self.layout.dtype])
        start, outputs = numbers.storage_offset(), site.out_features[place.slice_index]
        a_start = start + site.a_start(place.slice_index) // site.item_bytes
        b_start = start + site.b_offsets[place.slice_index] // site.item_bytes
        # One call each: there are hundreds of views, and those of a row are made within a step.
        a = numbers.as_strided((rank, site.in_features), (site.in_features, 1), a_start)
        return a, numbers.as_strided((outputs, rank), (round_up(self.rank, RANK_STEP), 1), b_start)


class ModelSlabs:
    """How adapters of a model are packed.

    Args:
        shapes: (O, I) of the model's matrices by module name, e.g. ``model.layers.3.self_attn.q_proj``; a group is in
            the layout if the model has all of its slices.
        max_rank: the largest that an adapter may have.
        dtype: of A and B, the model's.

    Attributes:
        layout: of every adapter that the device holds.
        places: where modules lie, by name; those that are missing have no place in a slab.

    Raises:
        ValueError: slabs cannot have this rank or dtype, a matrix of so many inputs, or no group at all.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], max_rank: int, dtype: str) -> None:
        layers: dict[int, dict[str, tuple[int, ...]]] = {}
        for module, shape in shapes.items():
            if match := _MATRIX.fullmatch(module):
                layers.setdefault(int(match[1]), {})[match[2]] = shape
        first, groups = layers.get(0, {}), []
        self.places: dict[str, SlabPlace] = {}
        for group, names in DECODER_MODULES.items():
            if any(name not in first for name in names):
                continue
            assert all(layer.get(n) == first[n] for layer in layers.values() for n in names), (
                f"layers differ in {group}"
            )
            groups.append(LoraGroup(group, first[names[0]][1], tuple(first[name][0] for name in names)))
            for index, name in enumerate(names):
                self.places |= {f"model.layers.{i}.{name}": SlabPlace(i, group, index) for i in layers}
        self.layout = LoraLayout(groups, len(layers), max_rank, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of A and B."""
        return _TORCH[self.layout.dtype]

    def frame(self, modules: Sequence[SlabModule], *, tight: bool) -> tuple[LoraLayout, SlabFrame]:
        """The layout of an adapter's slab, and what its bytes are besides the numbers of A and B.

        Args:
            tight: the layout that the adapter's own rank needs, not the model's.

        Raises:
            ValueError: a module does not fit the layout.
        """
        layout, rank = self.layout, max((module.a.shape[0] for module in modules), default=0)
        if tight and rank:
            layout = LoraLayout(layout.groups, layout.num_layers, rank, layout.dtype)
        return layout, slab_frame(layout, [LoraModule(*m.place, m.scale, m.a, m.b) for m in modules])


def all_finite(numbers: Tensor) -> bool:
    """Whether no number of a host's contiguous tensor, of the dtype of any layout, is infinite or NaN."""
    bfloat16 = numbers.dtype is torch.bfloat16
    return _all_finite(numbers.view(torch.int16).numpy().view(np.uint16) if bfloat16 else numbers.numpy())
