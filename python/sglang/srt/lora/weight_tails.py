"""A of the first slots, row after row behind the weight that it belongs to: one product then gives y and u.

Owned by LoRAManager, filled by DeviceSlots together with a slot's slab. A base product that leaves no multiprocessor
free makes a shrink beside it wait, and itself slower: some rows more in it cost less (`benchmark/kernels/README.md`).
The model allocates the memory with its weights, so the base model's own products read what they always read.
Invariant: the rows of a slot hold A of the adapter in its slab.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sglang.srt.ops.slabs import LoraLayout, LoraSite

MAX_SHARE = 8
"""A tail is at most this part of its weight's rows: with more it costs more than it saves."""


def tail_slots(layout: LoraLayout, num_slots: int) -> int:
    """Of how many slots the weights are followed by A."""
    sites = [layout.site(0, group.name) for group in layout.groups]
    return min(num_slots, *(sum(site.out_features) // (MAX_SHARE * site.u_width) for site in sites))


class WeightTails:
    """The tails of a model's weights.

    Args:
        extended: [O + slots * u_width, I], a weight and its tail, by parameter; of every site or of none.
        sites: of the parameters.
    """

    def __init__(self, extended: Mapping[str, Tensor], sites: Mapping[str, LoraSite]) -> None:
        assert not extended or extended.keys() == sites.keys()
        self._extended, self._sites = extended, sites
        self.num_slots = 0
        for name, whole in extended.items():
            outputs, width = sum(sites[name].out_features), sites[name].u_width
            self.num_slots = (len(whole) - outputs) // width
            whole[outputs:].zero_()

    def fill(self, slot: int, slab: Tensor) -> None:
        """Copy A out of the slab of a slot, uint8 [slab_bytes] on the device, in the order of the current stream."""
        if slot >= self.num_slots:
            return
        targets, sources = [], []
        for name, whole in self._extended.items():
            site = self._sites[name]
            start, count = sum(site.out_features) + slot * site.u_width, site.u_width * site.in_features
            targets.append(whole[start : start + site.u_width])
            numbers = slab[site.a_offset : site.a_offset + count * site.item_bytes].view(whole.dtype)
            sources.append(numbers.view(site.u_width, site.in_features))
        torch._foreach_copy_(targets, sources)

    def of(self, parameter: str, slots: int) -> Tensor | None:
        """[O + slots * u_width, I]: the weight and A of the first `slots`; None for 0 of them."""
        if not slots:
            return None
        site = self._sites[parameter]
        return self._extended[parameter][: sum(site.out_features) + slots * site.u_width]
