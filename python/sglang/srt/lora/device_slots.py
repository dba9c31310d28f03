"""The adapters that a device holds: one row of `LoraSlabs` for every slot that the planner hands out (`lora.slots`).

Owned by LoRAManager, which calls it between two steps. Rows are allocated once, so their memory is taken before the KV
pool is sized and their addresses never change.
Invariants: a row is written only when its slot has another version than the one it holds, in the order of the current
stream, so after the steps that read it; what a row holds is in `weights` exactly while its slot has that version. A
version that is freed leaves its bytes where they are, but no row is said to hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang.srt.lora.weights import AdapterWeights
from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.ops.slabs import LoraLayout, LoraSlabs


class DeviceSlots:
    """Rows by slot.

    Attributes:
        slabs: uint8 [num_slots, slab_bytes] on the device, and the rank of every row.
        weights: the versions that had a slot at the last `load`, as views of their rows.
    """

    def __init__(self, layout: LoraLayout, num_slots: int, device: torch.device) -> None:
        self.slabs = LoraSlabs.allocate(layout, num_slots, device)
        self.weights: dict[int, AdapterWeights] = {}
        self._rows: list[tuple[int, AdapterWeights | None]] = [(BASE_VERSION, None)] * num_slots

    @property
    def versions(self) -> tuple[int, ...]:
        """The version that each row holds; BASE_VERSION for none."""
        return tuple(version for version, _ in self._rows)

    def load(self, slots: Sequence[int], host: Mapping[int, AdapterWeights]) -> None:
        """Fill the rows whose slot has a version that they do not hold.

        Args:
            slots: the version of every slot; BASE_VERSION, and versions that `host` does not know, need no row.
            host: slabs of the layout of the rows, in page-locked memory where the device can read that.
        """
        assert len(slots) <= len(self._rows), f"{len(slots)} slots, {len(self._rows)} rows"
        self.weights = {}
        for row, version_id in enumerate(slots):
            if version_id not in host:
                continue
            held, weights = self._rows[row]
            if held != version_id or weights is None:
                weights = self._fill(row, host[version_id])
                self._rows[row] = version_id, weights
            self.weights[version_id] = weights

    def forget(self, version_id: int) -> None:
        """No row holds this version any more."""
        self.weights.pop(version_id, None)
        self._rows = [(BASE_VERSION, None) if held == version_id else (held, w) for held, w in self._rows]

    def _fill(self, row: int, weights: AdapterWeights) -> AdapterWeights:
        slab = weights.slab
        if slab.rank:
            self.slabs.commit(row, slab.data, slab.rank)
        else:
            self.slabs.clear(row)
        return weights.in_row(self.slabs.data[row])
