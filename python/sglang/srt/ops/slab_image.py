"""A slab as it travels: a safetensors image of one tensor, with the layout in its header. No torch.

Made by `rl.publisher_slab`, read by `lora.adapter_slab` in the front, so it stands below both sides, unlike the rest of
`ops`. The tensor TENSOR is uint8 [layout.slab_bytes]; the image's metadata has, as LAYOUT_KEY, the layout's
description (`LoraLayout.describe`) as JSON. Its max_rank is the rank of every module, a multiple of RANK_STEP, and its
groups are those that the adapter has, so there is nothing in a slab that a server would not use.
Invariants: factors lie behind each other without a gap, from the table to the zeros that round the slab up. So the
header alone says where everything is; what a slab has besides the numbers of A and B follows from layout and scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sgl_kernel.lora.layout import HEADER_BYTES, RANK_STEP, TABLE_ENTRY
from sgl_kernel.lora.layout import LoraLayout as LoraLayout
from sgl_kernel.lora.peft import DECODER_MODULES
from sgl_kernel.lora.slab import LoraModule, slab_frame

TENSOR, LAYOUT_KEY = "lora_slab", "lora_layout"

_ENTRY = np.dtype([("rank", "<i4"), ("scale", "<f4")])
_MAX_SHOWN = 80
"""Characters of a value that a message shows."""
_REMEDY = "pack for the slab_layout that this server's /lora_adapters says, or send the tensors"


class Factor(NamedTuple):
    """A dense, row-major matrix; `offset` in bytes from the start of the slab."""

    shape: tuple[int, int]
    offset: int


class Slice(NamedTuple):
    """A module of a slab, by the model's own name: its place as in `LoraLayout.site`, A [r, I] and B [O, r]."""

    module: str
    layer: int
    group: str
    slice_index: int
    a: Factor
    b: Factor


def read_layout(text: str, own: Mapping[str, Any]) -> LoraLayout:
    """The layout of a slab that a server takes: the server's own, at the adapter's rank, of some or all groups.

    Args:
        text: what the image's metadata says.
        own: the server's layout, as `describe` describes it.

    Raises:
        ValueError: it is not such a layout; the message has the value at fault and the remedy.
        RecursionError: it is nested beyond sense.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(given, dict) or given.keys() != own.keys():
        raise ValueError(f"it is {_shown(given)}; it must have exactly {', '.join(own)}, as LoraLayout.describe has")
    for key in own:
        if key not in ("groups", "max_rank") and given[key] != own[key]:
            raise ValueError(f"{key} is {_shown(given[key])}, this server's is {own[key]!r}; {_REMEDY}")
    groups = given["groups"]
    known = [group for group in own["groups"] if group in groups] if isinstance(groups, list) else []
    if not known or groups != known:
        raise ValueError(
            f"groups are {_shown(groups)}; they must be of this server's, {own['groups']}, in their order; {_REMEDY}"
        )
    rank = given["max_rank"]
    if type(rank) is not int or rank % RANK_STEP:
        raise ValueError(
            f"max_rank is {_shown(rank)}; it must be the adapter's rank, a multiple of {RANK_STEP}; send adapters of "
            "other ranks as tensors"
        )
    return LoraLayout.from_description({**own, "groups": known, "max_rank": rank})


def slices(layout: LoraLayout) -> Iterator[Slice]:
    """Every module, in the order of the table."""
    rank = layout.max_rank
    for layer in range(layout.num_layers):
        for group in layout.groups:
            site = layout.site(layer, group.name)
            for index, name in enumerate(DECODER_MODULES[group.name]):
                a = Factor((rank, site.in_features), site.a_start(index))
                b = Factor((site.out_features[index], rank), site.b_offsets[index])
                yield Slice(f"model.layers.{layer}.{name}", layer, group.name, index, a, b)


def factors_start(layout: LoraLayout) -> int:
    """The first byte behind the table."""
    return HEADER_BYTES + layout.table_bytes


def factors_end(layout: LoraLayout) -> int:
    """The first byte behind the last factor; zeros follow."""
    return layout.site(layout.num_layers - 1, layout.groups[-1].name).end


def expected_head(layout: LoraLayout, modules: Iterable[Slice], scales: Mapping[str, float]) -> NDArray[np.uint8]:
    """The bytes in front of the factors.

    Args:
        scales: by module.

    Raises:
        ValueError: a scale is no finite float32.
    """
    parts = [LoraModule(m.layer, m.group, m.slice_index, scales[m.module], m.a, m.b) for m in modules]
    return slab_frame(layout, parts).head


def head_problem(modules: Sequence[Slice], found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> str:
    """How the bytes in front of the factors differ from those expected; "" when they do not."""
    if np.array_equal(found, expected):
        return ""
    if not np.array_equal(found[:HEADER_BYTES], expected[:HEADER_BYTES]):
        begins, should = (head[:HEADER_BYTES].view("<i4").tolist() for head in (found, expected))
        return f"it begins with {begins}; a slab of this layout begins with {should}: the adapter's rank, and zeros"
    tables = [head[HEADER_BYTES : HEADER_BYTES + len(modules) * TABLE_ENTRY] for head in (found, expected)]
    wrong = np.flatnonzero(tables[0].view(np.uint64) != tables[1].view(np.uint64))
    if not len(wrong):
        return "there are other bytes than zeros behind its table"
    (rank, scale), (its_rank, its_scale) = (table.view(_ENTRY)[wrong[0]].item() for table in tables)
    return (
        f"its table gives {modules[wrong[0]].module} rank {rank} and scale {scale:g}; by its layout and "
        f"adapter_config.json it has rank {its_rank} and scale {its_scale:g}"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
