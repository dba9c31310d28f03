"""How adapters are laid out and batched: torch-free, for trainers and schedulers as much as for the server.

Names are imported when they are first used, so that a layout costs no numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_kernel.lora.batch import BatchShape as BatchShape
    from sgl_kernel.lora.batch import build_batch as build_batch
    from sgl_kernel.lora.layout import LoraGroup as LoraGroup
    from sgl_kernel.lora.layout import LoraLayout as LoraLayout
    from sgl_kernel.lora.layout import LoraSite as LoraSite
    from sgl_kernel.lora.layout import decoder_groups as decoder_groups
    from sgl_kernel.lora.peft import peft_modules as peft_modules
    from sgl_kernel.lora.slab import LoraModule as LoraModule
    from sgl_kernel.lora.slab import pack_slab as pack_slab
    from sgl_kernel.lora.slab import slab_digest as slab_digest
    from sgl_kernel.lora.slab import slab_rank as slab_rank
    from sgl_kernel.lora.slab import unpack_slab as unpack_slab

_HOMES = {
    "BatchShape": "batch",
    "LoraGroup": "layout",
    "LoraLayout": "layout",
    "LoraModule": "slab",
    "LoraSite": "layout",
    "build_batch": "batch",
    "decoder_groups": "layout",
    "pack_slab": "slab",
    "peft_modules": "peft",
    "slab_digest": "slab",
    "slab_rank": "slab",
    "unpack_slab": "slab",
}
__all__ = [
    "BatchShape",
    "LoraGroup",
    "LoraLayout",
    "LoraModule",
    "LoraSite",
    "build_batch",
    "decoder_groups",
    "pack_slab",
    "peft_modules",
    "slab_digest",
    "slab_rank",
    "unpack_slab",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
