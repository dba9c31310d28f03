"""The adapters that a device holds, each in a row of `LoraSlabs`, as planned by slots (`lora.slots`).

Owned by LoRAManager, which calls it between two steps. Rows are allocated once, so their memory is taken before the KV
pool is sized and their addresses never change. There is one row more than slots: a version is brought there as soon as
it is committed, beside the steps that run, so the first step that has it in a slot finds it on the device.
Invariants: a version is in one row at most. A row is written on the upload stream, after every step queued so far, and
a step that reads it is queued after the write. Rows of versions that have a slot are never written, so steps queued
while a row is being written do not read it. What a row holds is in `weights` exactly while its version has a slot. A
version that is freed leaves its bytes where they are, but no row is said to hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang.srt.lora.weight_tails import WeightTails
from sglang.srt.lora.weights import AdapterWeights
from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.ops.slabs import LoraLayout, LoraSlabs


class UploadStream(Protocol):
    """A queue of the device beside the current one, on which steps run."""

    def queue(self, work: Callable[[], None]) -> object:
        """Do what `work` queues after everything that is in the current queue; returns a mark behind it."""

    def wait(self, mark: object) -> None:
        """Let everything that is put into the current queue from now on be done after the mark."""


class InOrder:
    """For devices that have one queue."""

    def queue(self, work: Callable[[], None]) -> object:
        """See UploadStream."""
        work()
        return None

    def wait(self, mark: object) -> None:
        """See UploadStream."""


class CudaUploadStream:
    """A stream of CUDA or ROCm.

    Memory that `work` allocates belongs to the upload stream. When it is freed it can only serve a later `work`, which
    runs after all steps that were queued by then, so it needs no `record_stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def queue(self, work: Callable[[], None]) -> object:
        """See UploadStream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        return self._stream.record_event()

    def wait(self, mark: object) -> None:
        """See UploadStream."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)


@dataclass(slots=True)
class Row:
    """What a row holds.

    Fields:
        weights: views of it; None while it holds nothing.
        mark: behind its upload; None when steps need not wait for it any more.
    """

    version: int = BASE_VERSION
    weights: AdapterWeights | None = None
    mark: object = None


class DeviceSlots:
    """Rows by version.

    Args:
        tails: where A of the first rows goes too.
        stream: on which rows are written; by default what the device has.

    Attributes:
        slabs: uint8 [num_slots + 1, slab_bytes] on the device, and the rank of every row.
        weights: the versions that had a slot at the last `load`, as views of their rows.
    """

    def __init__(
        self,
        layout: LoraLayout,
        num_slots: int,
        device: torch.device,
        tails: WeightTails | None = None,
        stream: UploadStream | None = None,
    ) -> None:
        self.slabs = LoraSlabs.allocate(layout, num_rows(num_slots), device)
        self.weights: dict[int, AdapterWeights] = {}
        self._tails = tails
        self._rows = [Row() for _ in range(self.slabs.num_slots)]
        self._stream = stream or (CudaUploadStream(device) if device.type == "cuda" else InOrder())

    @property
    def versions(self) -> tuple[int, ...]:
        """The version that each row holds; BASE_VERSION for none."""
        return tuple(row.version for row in self._rows)

    def prefetch(self, version_id: int, weights: AdapterWeights) -> None:
        """Begin to bring a version to the device, into a row that no slot has.

        Args:
            weights: as in `load`.
        """
        self._fill(self._free_row(self.weights), version_id, weights)

    def load(self, slots: Sequence[int], host: Mapping[int, AdapterWeights]) -> None:
        """Let the steps queued from now on find the versions of all slots in their rows.

        Args:
            slots: the version of every slot; BASE_VERSION, and versions that `host` does not know, need no row.
            host: slabs of the layout of the rows, in page-locked memory where the device can read that.
        """
        assert len(slots) < len(self._rows), f"{len(slots)} slots, {len(self._rows)} rows"
        wanted = [version_id for version_id in slots if version_id in host]
        held = {row.version: row for row in self._rows}
        self.weights = {}
        for version_id in wanted:
            row = held.get(version_id)
            if row is None:
                row = self._fill(self._free_row(wanted), version_id, host[version_id])
            if row.mark is not None:
                self._stream.wait(row.mark)
                row.mark = None
            assert row.weights is not None
            self.weights[version_id] = row.weights

    def forget(self, version_id: int) -> None:
        """No row holds this version any more."""
        self.weights.pop(version_id, None)
        self._rows = [Row() if row.version == version_id else row for row in self._rows]

    def _free_row(self, kept: Collection[int]) -> int:
        """A row of none of these versions: an empty one, else one that steps have read, else one that none has yet."""
        free = [i for i, row in enumerate(self._rows) if row.version not in kept]
        return min(free, key=lambda i: (self._rows[i].version != BASE_VERSION, self._rows[i].mark is not None))

    def _fill(self, index: int, version_id: int, weights: AdapterWeights) -> Row:
        row = self._rows[index] = Row(version_id)

        def upload() -> None:
            slab = weights.slab
            if slab.rank:
                self.slabs.commit(index, slab.data, slab.rank)
                if self._tails is not None:
                    self._tails.fill(index, self.slabs.data[index])
            else:
                self.slabs.clear(index)
            row.weights = weights.in_row(self.slabs.data[index])

        row.mark = self._stream.queue(upload)
        return row


def num_rows(num_slots: int) -> int:
    """Rows of a device that has so many slots."""
    return num_slots + 1
