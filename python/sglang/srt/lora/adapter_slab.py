"""An adapter that comes as a slab: its tensors by name, where its layout puts them, and what lies beside them.

Made by `adapter_reader` for an image whose header describes a layout (`ops.slab_image`). From there on it is read as
tensors are: the same checks of names, shapes, ranks and limits, by PEFT's names, and the same of the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang.srt.lora.adapter import DType
from sglang.srt.lora.problems import invalid
from sglang.srt.lora.safetensors_bytes import ITEM_BYTES, TensorEntry
from sglang.srt.ops import slab_image


class AdapterSlab:
    """See the module.

    Args:
        description: of the slab's layout, as its header has it.
        nbytes: of the slab.
        own: the layout that this server keeps adapters in; None where it is not known.

    Attributes:
        entries: the factors, as tensors by PEFT's names.
        nbytes: as given; start, end: the bytes that have nothing but factors.
        digest: of the layout.

    Raises:
        AdapterError: invalid_adapter; the layout is not one that this server takes, or has another size.
    """

    def __init__(self, description: str, nbytes: int, own: Mapping[str, Any] | None) -> None:
        if own is None:
            raise invalid("this server takes no slabs; send the tensors")
        try:
            self._layout = slab_image.read_layout(description, own)
        except (ValueError, RecursionError) as error:
            raise invalid(f"the slab's layout does not fit: {error}") from error
        layout = self._layout
        if nbytes != layout.slab_bytes:
            raise invalid(f"the slab has {nbytes} bytes, its layout {layout.slab_bytes}; send all that pack_slab made")
        self.nbytes, self.digest = nbytes, layout.digest
        self.start, self.end = slab_image.factors_start(layout), slab_image.factors_end(layout)
        self._modules = list(slab_image.slices(layout))
        dtype: DType = layout.dtype  # type: ignore[assignment]  # one of the three
        self.entries = {
            f"base_model.model.{module.module}.lora_{name}.weight": TensorEntry(
                dtype, factor.shape, factor.offset, factor.shape[0] * factor.shape[1] * ITEM_BYTES[dtype]
            )
            for module in self._modules
            for name, factor in (("A", module.a), ("B", module.b))
        }

    def frame(self, scales: Mapping[str, float]) -> SlabFrame:
        """What the bytes beside the factors must be.

        Args:
            scales: by module, as the adapter's config has them.
        """
        try:
            head = slab_image.expected_head(self._layout, self._modules, scales)
        except ValueError as error:
            raise invalid(f"the config does not fit a slab: {error}") from error
        return SlabFrame(self._modules, head, self.end)


@dataclass(frozen=True, eq=False, slots=True)
class SlabFrame:
    """The bytes of a slab that are not factors: `head` in front of them, and zeros from `end` on."""

    modules: list[slab_image.Slice]
    head: NDArray[np.uint8]
    end: int

    def problems(self, slab: NDArray[np.uint8]) -> list[str]:
        """Where the slab, uint8 [n], has other ones."""
        problem = slab_image.head_problem(self.modules, slab[: len(self.head)], self.head)
        problems = [f"the slab is none of this adapter: {problem}"] if problem else []
        if slab[self.end :].any():
            problems.append(f"the slab has other bytes than zeros behind its factors, from byte {self.end} on")
        return problems
