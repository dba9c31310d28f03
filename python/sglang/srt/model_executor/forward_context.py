"""What one forward pass needs besides the weights: built by ModelRunner, read by models and attention.

Passed as an argument, never a global: a layer sees exactly the step it belongs to.
Shape legend: T tokens of the step over all sequences, B sequences, R rows that need logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.ops.linear import Product
from sglang.srt.ops.packed import Parameter


class KVPoolView(Protocol):
    """The part of mem_cache.KVPool that attention uses."""

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """(k, v) buffers of one layer, each [pool_tokens, num_kv_heads, head_dim]."""
        ...


class PageTableView(Protocol):
    """The part of mem_cache.ReqTable that attention uses: token t of a sequence is at page[t // P] * P + t % P."""

    pages: Tensor
    """int32 [max_slots, max_pages] on the device."""
    page_size: int


@dataclass(slots=True)
class StepShape:
    """Raggedness of a step, on the host.

    Fields:
        query_lens: int32 [B], new tokens of each sequence (1 for decode).
        kv_lens: int32 [B], tokens each sequence attends to, the new ones included.
    """

    query_lens: NDArray[np.int32]
    kv_lens: NDArray[np.int32]

    @property
    def decode_only(self) -> bool:
        """Whether every sequence adds exactly one token."""
        return len(self.query_lens) == int(self.query_lens.sum())


class AttentionBackend(Protocol):
    """One implementation of paged causal attention. `plan` runs once a step, `forward` once a layer.

    K and V of the new tokens are in the pool, at `out_locs`, before `forward` is called.
    """

    def plan(self, shape: StepShape, req_slots: Tensor) -> None:
        """Prepare a step.

        Args:
            req_slots: int64 [B] rows of the page table (`PageTableView`) of the step's sequences; pages of the new
                tokens are already in it. Entries of the table beyond a sequence's pages are valid pages to be masked.
        """
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, scale: float) -> Tensor:
        """Attend causally.

        Args:
            q: [T, num_heads, head_dim]; k, v: [T, num_kv_heads, head_dim], of the new tokens. Heads are dense.

        Returns:
            [T, num_heads * head_dim]
        """
        ...


@runtime_checkable
class CapturableAttention(AttentionBackend, Protocol):
    """A back end whose decode steps can be captured in a graph."""

    def plan_decode(self, slots: Tensor, kv_lens: Tensor) -> None:
        """Prepare a step of one new token for each of B sequences, whose values are read when its kernels run.

        Args:
            slots, kv_lens: int64 [B] on the device, as `plan` takes them.
        """
        ...


class LoRABatch(Protocol):
    """The adapters of a set of rows. Rows of the base model are left as they are, bit for bit."""

    def project(self, x: Tensor, weight: Parameter, bias: Tensor | None, parameter: str) -> Product:
        """x weight^T + bias, and what each row's adapter makes of x: added, or still to be added.

        Args:
            x: [T, I]; weight: [O, I]; bias: [O].
            parameter: the model's name of the weight, e.g. ``layers.0.qkv``.
        """
        ...

    def add_(self, y: Tensor, x: Tensor, parameter: str) -> None:
        """Add to y what each row's adapter makes of x.

        Args:
            y: [T, O], the base product of this parameter, any strides; x: [T, I], its input.
        """
        ...

    def changes(self, parameter: str) -> bool:
        """Whether any of the adapters adds to this parameter's output."""
        ...

    def add_embedding_(self, y: Tensor, ids: Tensor, parameter: str) -> None:
        """`add_` for an embedding: y is [T, hidden], ids int64 [T]."""
        ...


@dataclass(slots=True)
class ForwardContext:
    """One step.

    Fields:
        input_ids, positions: int64 [T].
        out_locs: int64 [T], rows of the KV pool that the tokens' K and V go to.
        kv_pool: the buffers.
        attention: the back end, already planned for this step.
        lora: adapters of the T rows; None when no row has one, and then no LoRA work of any kind happens.
    """

    input_ids: Tensor
    positions: Tensor
    out_locs: Tensor
    kv_pool: KVPoolView
    attention: AttentionBackend
    lora: LoRABatch | None = None


class CausalLM(Protocol):
    """What ModelRunner calls on a model."""

    def forward(self, ctx: ForwardContext) -> Tensor:
        """Hidden states after the final norm, [T, hidden_size]."""
        ...

    def compute_logits(self, hidden: Tensor, lora: LoRABatch | None = None, out: Tensor | None = None) -> Tensor:
        """Logits [R, vocab_size] of `hidden` [R, hidden_size], dense; `lora` has the adapters of these R rows.

        They are of the model's dtype, or float32 where adapters add to them; in `out`, of the model's dtype, if given.
        """
        ...


def resolve_dtype(name: str) -> torch.dtype:
    """torch dtype of a config's dtype name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype
