"""Copies adapters out of the front's buffer into the memory that the back keeps them in.

Owned by LoRAManager, called on its worker thread alone. Beside that thread the scheduler steps, so it must not keep the
interpreter: what has the model's dtype and lies densely, mostly all, is read by few calls of the system, straight to
where it belongs. The rest is cast matrix by matrix. Where everything goes is worked out once for all versions that
differ in nothing but numbers, as those of one policy do.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.srt.lora.adapter import Adapter, AdapterModule, Span
from sglang.srt.lora.weights import AdapterWeights, Place, PlacedModule, aligned
from sglang.srt.ops.slabs import LoraLayout, ModelSlabs, Slab, SlabFrame, SlabModule, all_finite

MAX_PARTS, MAX_READERS = 128, 4
"""Parts of memory that one read fills (systems take 1024 at most), and reads at once."""
READ_BYTES = 8 << 20
"""A read with so many takes no more parts: a slab, which has few, is read by several threads, too."""
MIN_WARM, WARM_BYTES = 2, 1 << 30
"""Page-locked slabs there are before the first adapter comes: one that is served and one that replaces it, and as many
more as may be wanted, up to so many bytes."""


class AdapterFile:
    """The payload's bytes, while they are copied; closed at the end of `with`.

    Raises:
        OSError, ValueError: the file is gone, or shorter than the adapter says.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._fd = os.open(adapter.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Writable for us alone: torch has no read-only tensors, and nothing is written.
            self._map = mmap.mmap(self._fd, adapter.nbytes, access=mmap.ACCESS_COPY)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def tensor(self, span: Span) -> Tensor:
        """The tensor of a span; valid as long as it, or this object, lives."""
        dtype = getattr(torch, span.dtype)
        count = span.shape[0] * span.shape[1]
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=span.offset).view(span.shape)

    def read(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill these parts, one after the other, with the bytes from `offset` on."""
        left = list(parts)
        while left:
            count = os.preadv(self._fd, left, offset)
            if not count:
                raise ValueError(f"the adapter's file ends at byte {offset}")
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]


class Target(NamedTuple):
    """Where a matrix goes: its rows are `stride` numbers apart, from number `start` on, of the slab or of the rest."""

    module: str
    span: Span
    in_slab: bool
    start: int
    stride: int

    def of(self, slab: Tensor, rest: Tensor) -> Tensor:
        """The matrix in these, which are of one dtype."""
        memory = slab if self.in_slab else rest
        return memory.as_strided(self.span.shape, (self.stride, 1), self.start)


class Read(NamedTuple):
    """Bytes of the file from `offset` on, and the parts they go to: (of the slab, first byte, last + 1)."""

    offset: int
    parts: list[tuple[bool, int, int]]


@dataclass(frozen=True, eq=False, slots=True)
class CopyPlan:
    """What to copy where.

    Attributes:
        given: the modules it was made for.
        reads, casts: cover every matrix once.
        zeros: (first, last + 1) bytes of the slab in which no matrix lies densely.
        rest: numbers outside the slab.
    """

    given: tuple[AdapterModule, ...]
    modules: list[PlacedModule]
    layout: LoraLayout
    frame: SlabFrame
    reads: list[Read]
    casts: list[Target]
    zeros: list[tuple[int, int]]
    rest: int


class AdapterCopier:
    """Makes the host's master copies.

    Args:
        places: module name -> its place in the model.
        tight: slabs of the adapter's own rank, not of the model's.
        pin: page-locked memory, which a device can read by itself.
        warm: adapters that are likely to be here at once.
    """

    def __init__(
        self, places: Mapping[str, Place], slabs: ModelSlabs, *, tight: bool, pin: bool, warm: int = MIN_WARM
    ) -> None:
        self._places, self._slabs, self._tight, self._pin = places, slabs, tight, pin
        self._last: CopyPlan | None = None
        self._readers = ThreadPoolExecutor(MAX_READERS, thread_name_prefix="copy-adapter")
        # torch keeps page-locked memory that is freed, until no copy uses it, for the next of its size, a power of two,
        # but empties this cache whenever a graph is captured: it gets these when the first adapter comes. To lock new
        # memory takes 30 ms, in which the driver makes every other call wait, too.
        nbytes = slabs.layout.slab_bytes
        count = max(MIN_WARM, min(warm, WARM_BYTES >> (nbytes - 1).bit_length())) if pin else 0
        self._spare = [self._empty(nbytes) for _ in range(count)]

    def copy(self, adapter: Adapter, file: AdapterFile) -> AdapterWeights:
        """An adapter in memory of its own.

        Raises:
            KeyError: the model has no such module.
            OSError, ValueError: the file is too short, a number is too large for the model's dtype, or a rank for its
                slabs.
        """
        self._spare.clear()
        plan = self._last
        if plan is None or plan.given != adapter.modules:
            plan = self._last = self._plan(adapter.modules)
        data = self._empty(plan.layout.slab_bytes if plan.frame.rank else 0)
        rest = torch.zeros(plan.rest, dtype=self._slabs.dtype, pin_memory=self._pin)
        if plan.frame.rank:
            slab = data.numpy()
            for start, end in plan.zeros:
                slab[start:end] = 0
            plan.frame.write_head(slab)
        memory = {True: data.numpy().data, False: rest.view(torch.uint8).numpy().data}

        def fill(read: Read) -> None:
            file.read(read.offset, [memory[in_slab][start:end] for in_slab, start, end in read.parts])

        filling = [self._readers.submit(fill, read) for read in plan.reads]
        wait(filling)  # all of them, before the file is closed because one has failed
        for filled in filling:
            filled.result()
        if plan.casts:
            self._cast(plan, file, data.view(self._slabs.dtype), rest)
        return AdapterWeights(plan.modules, Slab(plan.layout, data, plan.frame.rank), rest)

    def _cast(self, plan: CopyPlan, file: AdapterFile, slab: Tensor, rest: Tensor) -> None:
        for target in plan.casts:
            target.of(slab, rest).copy_(file.tensor(target.span))
        numbers = slab[len(plan.frame.head) // slab.itemsize :]
        if all_finite(numbers) and all_finite(rest):
            return
        dtype = self._slabs.layout.dtype
        for target in plan.casts:
            if not all_finite(target.of(slab, rest).contiguous()):
                raise ValueError(f"{target.module} has a value that is too large for {dtype}; look at the training")

    def _plan(self, given: tuple[AdapterModule, ...]) -> CopyPlan:
        modules = [PlacedModule(module, self._places[module.name]) for module in given]
        in_slab = [(module, place.slab) for module, place in modules if place.slab is not None]
        layout, frame = self._slabs.frame([SlabModule(p, m.scale, m.a, m.b) for m, p in in_slab], tight=self._tight)
        item, targets = layout.item_bytes, []
        for (module, _), (a, b) in zip(in_slab, frame.factors, strict=True):
            targets.append(Target(module.name, module.a, True, a // item, module.a.shape[1]))
            targets.append(Target(module.name, module.b, True, b // item, frame.stride))
        rest = 0
        for module in (module for module, place in modules if place.slab is None):
            for span in (module.a, module.b):
                targets.append(Target(module.name, span, False, rest, span.shape[1]))
                rest += aligned(span.shape)
        direct = [t for t in targets if t.span.dtype == layout.dtype and t.stride == t.span.shape[1]]
        return CopyPlan(
            given=given,
            modules=modules,
            layout=layout,
            frame=frame,
            reads=_reads(direct, item),
            casts=[t for t in targets if t.span.dtype != layout.dtype or t.stride != t.span.shape[1]],
            zeros=_gaps(targets, item, len(frame.head), layout.slab_bytes),
            rest=rest,
        )

    def _empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pin)


def _numbers(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _reads(targets: Iterable[Target], item: int) -> list[Read]:
    """In the order of the file, few of them; what also lies side by side where it goes, as of slabs, is one part."""
    reads: list[Read] = []
    end = -1
    for target in sorted(targets, key=lambda target: target.span.offset):
        offset, start, nbytes = target.span.offset, target.start * item, _numbers(target.span.shape) * item
        if offset != end or len(reads[-1].parts) == MAX_PARTS or end - reads[-1].offset >= READ_BYTES:
            reads.append(Read(offset, []))
        parts = reads[-1].parts
        if parts and parts[-1][0] == target.in_slab and parts[-1][2] == start:
            start = parts.pop()[1]
        parts.append((target.in_slab, start, target.start * item + nbytes))
        end = offset + nbytes
    return reads


def _gaps(targets: Iterable[Target], item: int, start: int, end: int) -> list[tuple[int, int]]:
    """What of bytes [start, end) of the slab no matrix fills."""
    gaps = []
    for target in sorted((t for t in targets if t.in_slab and t.stride == t.span.shape[1]), key=lambda t: t.start):
        first = target.start * item
        if start < first:
            gaps.append((start, first))
        start = first + _numbers(target.span.shape) * item
    return [*gaps, (start, end)] if start < end else gaps
