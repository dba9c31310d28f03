"""The adapters of one step's rows in the device's slabs, applied by sgl_kernel: implements forward_context.LoRABatch.

Made by LoRAManager: for a step, or once for all captured steps, whose words are then replaced before every replay.
Modules outside the slabs, the embedding and the head, are left to a `BatchInfo`, which is None where no version has
one: only such steps can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.lora.batch_info import BatchInfo
from sglang.srt.lora.weight_tails import WeightTails
from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.ops.linear import Product, linear
from sglang.srt.ops.lora import lora_project
from sglang.srt.ops.packed import PackedWeight, Parameter
from sglang.srt.ops.slabs import LoraBatch, LoraSite, LoraSlabs


class SlabBatch:
    """Adds each row's adapter.

    Args:
        sites: where the factors of a parameter lie in a slab; others have none.
        words: of the rows, by slot.
        tails: A behind the weights.
        tail_slots: no row has an adapter of a slot from here on; 0 for any slots, and then tails are not read.
        others: what slabs do not hold.
    """

    def __init__(
        self,
        slabs: LoraSlabs,
        sites: Mapping[str, LoraSite],
        words: LoraBatch,
        tails: WeightTails,
        tail_slots: int,
        others: BatchInfo | None = None,
    ) -> None:
        self._slabs, self._sites, self._words, self._others = slabs, sites, words, others
        self._tails, self._tail_slots = tails, tail_slots

    def project(self, x: Tensor, weight: Parameter, bias: Tensor | None, parameter: str) -> Product:
        """See LoRABatch; the adapters' part is left to be added."""
        assert not isinstance(weight, PackedWeight)
        site = self._sites.get(parameter)
        if site is None:
            return Product(linear(x, weight, bias))
        extended = self._tails.of(parameter, self._tail_slots)
        product = lora_project(x, weight, self._slabs, site, self._words, extended)
        if bias is not None:
            product.y.add_(bias)
        return product

    def changes(self, parameter: str) -> bool:
        """See LoRABatch; asked about parameters outside the slabs."""
        return self._others is not None and self._others.changes(parameter)

    def add_(self, y: Tensor, x: Tensor, parameter: str) -> None:
        """See LoRABatch; parameters outside the slabs only."""
        if self._others is not None:
            self._others.add_(y, x, parameter)

    def add_embedding_(self, y: Tensor, ids: Tensor, parameter: str) -> None:
        """See LoRABatch."""
        if self._others is not None:
            self._others.add_embedding_(y, ids, parameter)


def row_slots(versions: NDArray[np.int64], slots: Sequence[int]) -> NDArray[np.int32]:
    """The slot of every row, -1 for the base model.

    Args:
        versions: int64 [T]; slots: the version of every slot.
    """
    found = np.full(len(versions), -1, np.int32)
    for slot, version in enumerate(slots):
        if version != BASE_VERSION:
            found[versions == version] = slot
    return found
