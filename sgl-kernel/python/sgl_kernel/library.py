"""The operations as torch operators, `torch.ops.sgl_kernel.*`, for callers that are compiled by torch.

Importing this module registers them. Arguments are tensors and numbers only: a site is `LoraSite.words`, a batch
`LoraBatch.words` with `shape_ints(LoraBatch.shape)`. `rmsnorm`, `fused_add_rmsnorm` and `silu_and_mul` write to an
output that the caller gives, which is what upstream's operators of these names do.
Invariant: an operator does what the function of its name in `ops` does, and says in its schema what it writes to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_kernel import ops
from sgl_kernel.lora.batch import BatchShape
from sgl_kernel.lora.layout import LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

# Library.define rather than custom_op, whose wrapper takes tens of microseconds a call.
_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_KEY = "CompositeExplicitAutograd"


def shape_ints(shape: BatchShape) -> list[int]:
    """A batch's capacities as the operators take them: max_tokens, num_slots, tile_tokens."""
    return [shape.max_tokens, shape.num_slots, shape.tile_tokens]


@functools.lru_cache(maxsize=4096)
def _site(words: tuple[int, ...]) -> LoraSite:
    return LoraSite.from_words(words)


@functools.lru_cache(maxsize=1024)
def _shape(ints: tuple[int, ...]) -> BatchShape:
    return BatchShape(*ints)


def _lora_shrink(x: Tensor, slabs: Tensor, site: Sequence[int], batch: Tensor, shape: Sequence[int]) -> Tensor:
    words = LoraBatch(batch, _shape(tuple(shape)))
    return ops.lora_shrink(x, LoraSlabs(slabs), _site(tuple(site)), words)


def _lora_shrink_meta(x: Tensor, slabs: Tensor, site: Sequence[int], batch: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], _site(tuple(site)).u_width)


def _lora_expand_add_(
    y: Tensor,
    u: Tensor,
    slabs: Tensor,
    site: Sequence[int],
    batch: Tensor,
    shape: Sequence[int],
    u_slot_stride: int = 0,
) -> None:
    words = LoraBatch(batch, _shape(tuple(shape)))
    ops.lora_expand_add_(y, LoraDelta(u, LoraSlabs(slabs), _site(tuple(site)), words, u_slot_stride))


def _rmsnorm(out: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    ops.rmsnorm(input, weight, eps, out, enable_pdl)


def _fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    ops.fused_add_rmsnorm(input, residual, weight, eps, enable_pdl)


def _silu_and_mul(out: Tensor, input: Tensor) -> None:
    ops.silu_and_mul(input, out)


def _writes_only(*_: object) -> None:
    """The shapes that an operator without results returns."""


for _schema, _run, _meta in (
    (
        "lora_shrink(Tensor x, Tensor slabs, int[] site, Tensor batch, int[] shape) -> Tensor",
        _lora_shrink,
        _lora_shrink_meta,
    ),
    (
        "lora_expand_add_(Tensor(a!) y, Tensor u, Tensor slabs, int[] site, Tensor batch, int[] shape, "
        "int u_slot_stride=0) -> ()",
        _lora_expand_add_,
        _writes_only,
    ),
    (
        "rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
        _rmsnorm,
        _writes_only,
    ),
    (
        "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, bool enable_pdl) -> ()",
        _fused_add_rmsnorm,
        _writes_only,
    ),
    ("silu_and_mul(Tensor(a!) out, Tensor input) -> ()", _silu_and_mul, _writes_only),
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _name = _schema.split("(")[0]
    _LIBRARY.impl(_name, _run, _KEY)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sgl_kernel::{_name}", _meta, lib=_LIBRARY)
