"""Kernels for serving and training with low-rank adapters, and the torch-free description of their data.

Names are imported when they are first used: `import sgl_kernel` loads neither torch nor numpy nor the compiled library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sgl_kernel.version import __version__ as __version__

if TYPE_CHECKING:
    from sgl_kernel._binding import launches_early as launches_early
    from sgl_kernel._binding import programmatic_launch as programmatic_launch
    from sgl_kernel.linear import LoraLinear as LoraLinear
    from sgl_kernel.linear import lora_linear as lora_linear
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
    from sgl_kernel.ops import fused_add_rmsnorm as fused_add_rmsnorm
    from sgl_kernel.ops import lora_expand_add_ as lora_expand_add_
    from sgl_kernel.ops import lora_shrink as lora_shrink
    from sgl_kernel.ops import qk_norm_rope as qk_norm_rope
    from sgl_kernel.ops import rmsnorm as rmsnorm
    from sgl_kernel.ops import silu_and_mul as silu_and_mul
    from sgl_kernel.ops import skinny_gemm as skinny_gemm
    from sgl_kernel.types import LoraBatch as LoraBatch
    from sgl_kernel.types import LoraDelta as LoraDelta
    from sgl_kernel.types import LoraSlabs as LoraSlabs
    from sgl_kernel.types import pinned_slab as pinned_slab
    from sgl_kernel.types import pinned_words as pinned_words

_HOMES = {
    "_binding": "launches_early programmatic_launch",
    "linear": "LoraLinear lora_linear",
    "lora": (
        "BatchShape LoraGroup LoraLayout LoraModule LoraSite build_batch decoder_groups pack_slab peft_modules "
        "slab_digest slab_rank unpack_slab"
    ),
    "ops": "fused_add_rmsnorm lora_expand_add_ lora_shrink qk_norm_rope rmsnorm silu_and_mul skinny_gemm",
    "types": "LoraBatch LoraDelta LoraSlabs pinned_slab pinned_words",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "BatchShape",
    "LoraBatch",
    "LoraDelta",
    "LoraGroup",
    "LoraLayout",
    "LoraLinear",
    "LoraModule",
    "LoraSite",
    "LoraSlabs",
    "__version__",
    "build_batch",
    "decoder_groups",
    "fused_add_rmsnorm",
    "launches_early",
    "lora_expand_add_",
    "lora_linear",
    "lora_shrink",
    "pack_slab",
    "peft_modules",
    "pinned_slab",
    "pinned_words",
    "programmatic_launch",
    "qk_norm_rope",
    "rmsnorm",
    "silu_and_mul",
    "skinny_gemm",
    "slab_digest",
    "slab_rank",
    "unpack_slab",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
