"""A validated adapter on its way from the front to the back: plain data, no torch.

Made by `adapter_reader` in the front from a directory or from tensors in a request, read by `lora_manager` in the back.
The bytes lie in one host buffer that both processes can open; spans say where.
Invariant: what is in an `Adapter` fits the model (modules, shapes, finite values); nobody validates it again.

Shape legend: r rank, I inputs, O outputs of a module. A module computes y += scale * (x A^T) B^T; the embedding is the
same product over one-hot rows, so its A is [r, vocab] and its B [hidden, r], and lm_head's B is [vocab, r].
"""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["float32", "float16", "bfloat16"]


class Span(msgspec.Struct, array_like=True, frozen=True):
    """A row-major tensor in the adapter's buffer: `offset` in bytes, a multiple of the item size."""

    dtype: DType
    shape: tuple[int, int]
    offset: int


class AdapterModule(msgspec.Struct, array_like=True, frozen=True):
    """The two factors of one module.

    Fields:
        name: the model's own name, e.g. ``model.layers.3.self_attn.q_proj``, ``model.embed_tokens``, ``lm_head``.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA; kept apart from the tensors, which stay as they came.
        a: [r, I]; b: [O, r].
    """

    name: str
    scale: float
    a: Span
    b: Span

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


class Adapter(msgspec.Struct, array_like=True, frozen=True):
    """Everything the back needs to serve a version.

    Fields:
        path: file that holds the bytes (readable while the front keeps the buffer open).
        nbytes: size of the buffer.
        modules: at most one per module name; any subset of the model's modules.
        base_copies: base weights that the file repeats (PEFT saves the embedding beside an adapter of it), by the
            model's tensor name, e.g. ``model.embed_tokens.weight``; staging fails when they are not the base's own.
    """

    path: str
    nbytes: int
    modules: tuple[AdapterModule, ...]
    base_copies: tuple[tuple[str, Span], ...] = ()

    @property
    def max_rank(self) -> int:
        """Largest rank of its modules."""
        return max(module.rank for module in self.modules)
