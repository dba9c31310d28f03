"""How an adapter goes out as a slab, with the bytes that servers keep it in, if it can.

Called by `publisher_package`, which imports it when a fleet takes slabs. What lies where is sgl_kernel's to say
(`peft_modules`, and `slab_frame`, the part of `pack_slab` that needs no numbers); `ops.slab_image` describes the image.
An adapter that fills every slice of its groups, at one rank that is a multiple of 8, has its factors side by side in a
slab. So bringing them into that order, on whatever device they are, is all of the packing, and the slab is no larger
than the tensors. Any other adapter goes as tensors: servers place it themselves, or say what is wrong with it.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from sgl_kernel.lora.layout import LoraLayout
from sgl_kernel.lora.peft import peft_modules
from sgl_kernel.lora.slab import LoraModule, slab_frame
from sglang.srt.ops.slab_image import LAYOUT_KEY, TENSOR, factors_end, factors_start

Shapes = tuple[tuple[str, tuple[int, ...]], ...]

_ALIGNMENT = 8


@dataclass(frozen=True)
class Factor:
    """A tensor's name and shape, where sgl_kernel asks for no more."""

    name: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0


class SlabPlan(NamedTuple):
    """A safetensors image of a slab: `head`, the tensors in this order, and so many zeros."""

    head: bytes
    order: tuple[str, ...]
    zeros: int


@functools.lru_cache(maxsize=2)
def plan_slab(shapes: Shapes, config: bytes, layout: str, dtype: str) -> SlabPlan | None:
    """The slab of an adapter; None when it goes as tensors. Versions of a policy have the same.

    Args:
        shapes: of its tensors, by PEFT's names.
        config: adapter_config.json.
        layout: the servers', as JSON.
        dtype: of the tensors that are sent.
    """
    try:
        own = LoraLayout.from_description(json.loads(layout))
        modules = peft_modules(own, {name: Factor(name, shape) for name, shape in shapes}, json.loads(config))
        rank = max(len(module.a) for module in modules)
        groups = {module.group for module in modules}
        wire = LoraLayout([g for g in own.groups if g.name in groups], own.num_layers, rank, own.dtype)
        frame = slab_frame(wire, modules)
    except (AttributeError, TypeError, ValueError, re.error):  # whatever the config holds that nobody has checked yet
        return None
    order = _side_by_side(wire, modules, frame.factors)
    if not order or rank > own.max_rank or dtype != own.dtype:
        return None
    return SlabPlan(_image_head(wire) + frame.head.tobytes(), order, wire.slab_bytes - factors_end(wire))


def _side_by_side(
    layout: LoraLayout, modules: list[LoraModule], offsets: tuple[tuple[int, int], ...]
) -> tuple[str, ...]:
    """The names of all factors as they lie in a slab; none when there are gaps."""
    placed: dict[int, Factor] = {}
    for module, (a, b) in zip(modules, offsets, strict=True):
        placed |= {a: module.a, b: module.b}
    order, end = [], factors_start(layout)
    for offset, factor in sorted(placed.items()):
        if offset != end:
            return ()
        order.append(factor.name)
        end += factor.shape[0] * factor.shape[1] * layout.item_bytes
    return tuple(order) if end == factors_end(layout) else ()


def _image_head(layout: LoraLayout) -> bytes:
    """What stands before the slab."""
    size = layout.slab_bytes
    entries = {
        "__metadata__": {LAYOUT_KEY: json.dumps(layout.describe(), separators=(",", ":"))},
        TENSOR: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
