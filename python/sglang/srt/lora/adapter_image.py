"""The bytes of an adapter as the back gets them: where every tensor goes, and the one pass that brings it there.

Called by `adapter_reader`. An image has the modules in the order of their names, A before B, then repeated base
weights; every matrix starts at a multiple of _ALIGNMENT bytes, with zeros in between. An A that several modules share
is there once for each, so equal modules have equal images, whatever names and order their tensors came in. The image of
an adapter that comes as a slab is the slab: equal modules have equal slabs, too, but another digest than their tensors.
An image is checked and hashed in leaves, beside each other. All of this is few calls of many bytes, because a thread
that has called waits for the interpreter, and whoever streams tokens in this process waits for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang.srt.lora.adapter import AdapterModule, DType, Span
from sglang.srt.lora.adapter_fit import AdapterPlan, PlannedModule
from sglang.srt.lora.adapter_slab import AdapterSlab, SlabFrame
from sglang.srt.lora.adapter_source import TensorSource
from sglang.srt.lora.safetensors_bytes import ITEM_BYTES, TensorEntry

LEAF_BYTES = 4 << 20
"""Part of what a digest means."""

_ALIGNMENT = 64
_INFINITIES: dict[DType, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int, int]] = {
    "float32": (np.int32, np.uint32, 0x7F80_0000, 0xFF80_0000),
    "float16": (np.int16, np.uint16, 0x7C00, 0xFC00),
    "bfloat16": (np.int16, np.uint16, 0x7F80, 0xFF80),
}
"""Integers as wide as the numbers, and the bits of both infinities."""


class Stretch(NamedTuple):
    """Bytes that lie side by side in the source, from `begin` on, and in the image, from `offset` on."""

    begin: int
    offset: int
    nbytes: int
    dtype: DType

    @property
    def end(self) -> int:
        """The first byte of the image behind it."""
        return self.offset + self.nbytes


class Leaf(NamedTuple):
    """Bytes [start, end) of an image, and the parts (first, last + 1, dtype) of it that hold numbers of one dtype."""

    start: int
    end: int
    parts: list[tuple[int, int, DType]]


@dataclass(frozen=True, eq=False, slots=True)
class AdapterImage:
    """Where the tensors of an adapter go; the same for all adapters of equal names, shapes and config.

    Attributes:
        nbytes: of the image.
        modules: in the order of their names; their spans are within the image.
        base_copies: (name of the model's tensor, its span), by name.
        pieces: the spans of every tensor that was sent, in the order of its rows.
        head: what a digest covers besides the bytes: names, scales, dtypes and shapes.
        stretches: what to copy from the source; gaps: (first, last + 1) of the bytes in between, zeros.
        frame: of a slab, what its bytes must be where no factor is.
    """

    nbytes: int
    modules: tuple[AdapterModule, ...]
    base_copies: tuple[tuple[str, Span], ...]
    pieces: dict[str, list[Span]]
    head: bytes
    stretches: list[Stretch]
    gaps: list[tuple[int, int]]
    leaves: list[Leaf]
    frame: SlabFrame | None = None

    def fill(self, source: TensorSource, view: NDArray[np.uint8]) -> None:
        """Read an adapter.

        Args:
            view: uint8 [nbytes], with whatever bytes.

        Raises:
            AdapterError: as the source.
        """
        for start, end in self.gaps:
            view[start:end] = 0
        for stretch in self.stretches:
            source.read(stretch.begin, view[stretch.offset : stretch.end])

    def examine(self, view: NDArray[np.uint8], pool: Executor) -> tuple[str, bool]:
        """What the bytes are.

        Returns:
            (digest: hex SHA-256 over `head` and the SHA-256 of every leaf; whether all numbers are finite).
        """

        def examined(leaf: Leaf) -> tuple[bytes, bool]:
            finite = all(all_finite(view[start:end], dtype) for start, end, dtype in leaf.parts)
            return hashlib.sha256(view[leaf.start : leaf.end].data).digest(), finite

        done = list((pool.map if len(self.leaves) > 1 else map)(examined, self.leaves))
        digest = hashlib.sha256(self.head)
        digest.update(b"".join(leaf for leaf, _ in done))
        return digest.hexdigest(), all(finite for _, finite in done)

    def not_finite(self, view: NDArray[np.uint8]) -> list[str]:
        """Tensors that have NaN or infinite values."""
        return [
            tensor
            for tensor, spans in self.pieces.items()
            if not all(all_finite(bytes_of(view, span), span.dtype) for span in spans)
        ]

    def checksum(self, tensor: str, view: NDArray[np.uint8]) -> str:
        """Hex SHA-256 of a tensor's bytes."""
        digest = hashlib.sha256()
        for span in self.pieces[tensor]:
            digest.update(bytes_of(view, span).data)
        return digest.hexdigest()


def lay_out(plan: AdapterPlan, entries: Mapping[str, TensorEntry]) -> AdapterImage:
    """The image of an adapter that fits the model (so all of its tensors have two dimensions)."""
    layout = _Layout(entries)
    modules = tuple(layout.module(module) for module in plan.modules)
    copies = tuple((name, layout.place(tensor, _shape(entries[tensor]))) for name, tensor in sorted(plan.base_copies))
    head = _described(modules) + [[name, [span.dtype, span.shape]] for name, span in copies]
    stretches = list(_joined(layout.stretches))
    ends = [0, *(stretch.end for stretch in stretches)]
    starts = [*(stretch.offset for stretch in stretches), layout.nbytes]
    return AdapterImage(
        nbytes=layout.nbytes,
        modules=modules,
        base_copies=copies,
        pieces={name: [spans[row] for row in sorted(spans)] for name, spans in layout.pieces.items()},
        head=json.dumps(head).encode(),
        stretches=stretches,
        gaps=[(end, start) for end, start in zip(ends, starts, strict=True) if end < start],
        leaves=_leaves(stretches, layout.nbytes),
    )


def keep_slab(plan: AdapterPlan, slab: AdapterSlab) -> AdapterImage:
    """The image of a slab that fits the model: its own bytes."""

    def span(tensor: str) -> Span:
        entry = slab.entries[tensor]
        return Span(entry.dtype, _shape(entry), entry.begin)

    modules = tuple(AdapterModule(m.name, m.scale, span(m.a), span(m.b)) for m in plan.modules)
    dtype = modules[0].a.dtype
    return AdapterImage(
        nbytes=slab.nbytes,
        modules=modules,
        base_copies=(),
        pieces={name: [span(name)] for name in slab.entries},
        head=json.dumps([slab.digest, *_described(modules)]).encode(),
        stretches=[Stretch(0, 0, slab.nbytes, dtype)],
        gaps=[],
        leaves=_leaves([Stretch(slab.start, slab.start, slab.end - slab.start, dtype)], slab.nbytes),
        frame=slab.frame({module.name: module.scale for module in plan.modules}),
    )


class _Layout:
    """Gives tensors their places, one behind the other.

    Attributes:
        pieces: tensor -> first row -> the rows from there on; those that are there several times, once.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self.stretches: list[Stretch] = []
        self.pieces: dict[str, dict[int, Span]] = {name: {} for name in entries}
        self.nbytes = 0
        self._entries = entries

    def module(self, planned: PlannedModule) -> AdapterModule:
        a = self.place(planned.a, _shape(self._entries[planned.a]))
        b = self.place(planned.b, (planned.rows, planned.rank), planned.first_row)
        return AdapterModule(planned.name, planned.scale, a, b)

    def place(self, tensor: str, shape: tuple[int, int], first_row: int = 0) -> Span:
        entry = self._entries[tensor]
        row = shape[1] * ITEM_BYTES[entry.dtype]
        self.stretches.append(Stretch(entry.begin + first_row * row, self.nbytes, shape[0] * row, entry.dtype))
        span = Span(entry.dtype, shape, self.nbytes)
        self.pieces[tensor].setdefault(first_row, span)
        self.nbytes += -(-shape[0] * row // _ALIGNMENT) * _ALIGNMENT
        return span


def all_finite(data: NDArray[np.uint8], dtype: DType) -> bool:
    """Whether no number is NaN or infinite, told by the bits without a copy.

    Numbers beyond an infinity are NaNs. As signed integers the positive ones of these are larger than all others, as
    unsigned integers the negative ones.
    """
    signed, unsigned, positive, negative = _INFINITIES[dtype]
    return bool(data.view(signed).max() < positive and data.view(unsigned).max() < negative)


def bytes_of(view: NDArray[np.uint8], span: Span) -> NDArray[np.uint8]:
    """The bytes of a matrix in an image."""
    return view[span.offset : span.offset + span.shape[0] * span.shape[1] * ITEM_BYTES[span.dtype]]


def _described(modules: Iterable[AdapterModule]) -> list[list[object]]:
    """Modules in a digest."""
    return [[m.name, m.scale.hex(), *([f.dtype, f.shape] for f in (m.a, m.b))] for m in modules]


def _shape(entry: TensorEntry) -> tuple[int, int]:
    return entry.shape[0], entry.shape[1]


def _joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """The same with neighbours made one: all of a file whose tensors are in the order of the image."""
    last: Stretch | None = None
    for stretch in stretches:
        if last is not None and stretch == last._replace(
            begin=last.begin + last.nbytes, offset=last.offset + last.nbytes, nbytes=stretch.nbytes
        ):
            last = last._replace(nbytes=last.nbytes + stretch.nbytes)
            continue
        if last is not None:
            yield last
        last = stretch
    if last is not None:
        yield last


def _leaves(stretches: Iterable[Stretch], nbytes: int) -> list[Leaf]:
    leaves = [Leaf(start, min(start + LEAF_BYTES, nbytes), []) for start in range(0, nbytes, LEAF_BYTES)]
    for dtype, same in itertools.groupby(stretches, key=lambda stretch: stretch.dtype):
        first, last = (run := list(same))[0], run[-1]  # the zeros in between are finite numbers, too
        for leaf in leaves[first.offset // LEAF_BYTES : -(-last.end // LEAF_BYTES)]:
            leaf.parts.append((max(first.offset, leaf.start), min(last.end, leaf.end), dtype))
    return leaves
