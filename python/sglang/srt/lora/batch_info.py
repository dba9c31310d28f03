"""The adapters of one set of rows, each applied by torch operations: implements forward_context.LoRABatch.

Made by LoRAManager for every step anew from the step's own versions, and again for the rows that need logits: nothing
here outlives a forward pass. Invariant: a row of the base model is in no group, so nothing is ever added to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.lora.weights import AdapterWeights, Factors
from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.ops.linear import Product, linear
from sglang.srt.ops.lora import lora_add_, lora_embedding_add_
from sglang.srt.ops.packed import Parameter
from sglang.srt.sampling.transfer import to_device


class Group(NamedTuple):
    """The rows of one version: int64 [N] on the device, None for all; and the version's factors by parameter."""

    rows: Tensor | None
    factors: Mapping[str, list[Factors]]


class BatchInfo:
    """Adds each version's deltas to its own rows."""

    def __init__(self, groups: list[Group]) -> None:
        self._groups = groups

    def project(self, x: Tensor, weight: Parameter, bias: Tensor | None, parameter: str) -> Product:
        """See LoRABatch; everything is added."""
        y = linear(x, weight, bias)
        self.add_(y, x, parameter)
        return Product(y)

    def changes(self, parameter: str) -> bool:
        """See LoRABatch."""
        return any(parameter in factors for _, factors in self._groups)

    def add_(self, y: Tensor, x: Tensor, parameter: str) -> None:
        """See LoRABatch."""
        for rows, factors in self._groups:
            modules = factors.get(parameter)
            if modules is None:
                continue
            own = x if rows is None else x[rows]
            for module in modules:
                lora_add_(y, own, rows, module.a, module.b, module.scale, module.start)

    def add_embedding_(self, y: Tensor, ids: Tensor, parameter: str) -> None:
        """See LoRABatch."""
        for rows, factors in self._groups:
            for module in factors.get(parameter, ()):
                own = ids if rows is None else ids[rows]
                lora_embedding_add_(y, own, rows, module.a, module.b, module.scale)


def group_rows(
    versions: NDArray[np.int64], weights: Mapping[int, AdapterWeights], device: torch.device
) -> BatchInfo | None:
    """The groups of rows that have an adapter; None when no row has one.

    Args:
        versions: int64 [T], the version of every row.
        weights: of every version among them, where the device can read them.
    """
    present = [v for v in np.unique(versions).tolist() if v != BASE_VERSION]
    if not present:
        return None
    rows = [np.flatnonzero(versions == version) for version in present]
    if len(rows[0]) == len(versions):
        return BatchInfo([Group(None, weights[present[0]].factors)])
    on_device = torch.split(to_device(np.concatenate(rows), device), [len(r) for r in rows])
    return BatchInfo([Group(r, weights[v].factors) for r, v in zip(on_device, present, strict=True)])
