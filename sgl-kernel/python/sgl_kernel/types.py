"""What operations take besides plain tensors: slabs, the batch, and a low-rank term that is still to be added.

Made by whoever runs a model, read by every backend. Backends read `slabs.data`, `site.words`, `batch.words` and
`batch.shape` and nothing else of them.
Invariants: tensors are checked here once, when an object is made, so that operations need not; their addresses never
change, so a CUDA graph may keep them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgl_kernel.lora.batch import BatchShape
from sgl_kernel.lora.layout import HEADER_BYTES, MAX_RANK, LoraLayout, LoraSite
from sgl_kernel.lora.slab import slab_rank

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of activations."""
_UNREAD: NDArray[np.int32] = np.empty(0, np.int32)
"""Stands for ranks that nobody gave."""


@dataclass(frozen=True, eq=False, slots=True)
class LoraSlabs:
    """The adapters that a device holds, one in each slot.

    Attributes:
        data: uint8 [num_slots, slab_bytes], contiguous.
        layout: what the bytes mean; None where sites come from elsewhere, as in a compiled graph.
        ranks: int32 [num_slots] on the host, the adapter's rank of every slot, 0 for an empty one: what `build_batch`
            takes. A copy of what is given; otherwise as the slabs say, on a CPU, and 0 on other devices, which are not
            waited for. `commit` and `clear` keep it; who writes to `data` by other means sees to it himself.

    Raises:
        TypeError, ValueError: `data` or `ranks` has another dtype, shape or alignment.
    """

    data: Tensor
    layout: LoraLayout | None = None
    ranks: NDArray[np.int32] = field(default_factory=lambda: _UNREAD)

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8:
            raise TypeError(f"slabs are {self.data.dtype}; they must be torch.uint8")
        if self.data.ndim != 2 or not self.data.is_contiguous():
            raise ValueError(f"slabs have shape {list(self.data.shape)}; they must be contiguous [slots, slab_bytes]")
        if self.layout is not None and self.data.shape[1] != self.layout.slab_bytes:
            raise ValueError(
                f"slabs have {self.data.shape[1]} bytes, the layout says {self.layout.slab_bytes}; "
                "allocate them with LoraSlabs.allocate(layout, ...)"
            )
        if self.data.data_ptr() % 16:
            raise ValueError("slabs do not start at a multiple of 16 bytes; allocate them as a tensor of their own")
        object.__setattr__(self, "ranks", self._own_ranks())

    def _own_ranks(self) -> NDArray[np.int32]:
        ranks = self.ranks
        if ranks is _UNREAD:
            if self.data.device.type != "cpu":
                return np.zeros(self.num_slots, np.int32)
            # A slot that was never filled may hold anything; `build_batch` refuses what is no rank.
            ranks = self.data.numpy()[:, :4].view(np.int32)[:, 0]
        if ranks.shape != (self.num_slots,) or ranks.dtype != np.int32:
            raise ValueError(f"ranks are {ranks.dtype} {list(ranks.shape)}; they must be int32 [{self.num_slots}]")
        return np.array(ranks)

    @classmethod
    def allocate(cls, layout: LoraLayout, num_slots: int, device: torch.device | str) -> LoraSlabs:
        """Slabs without any adapter."""
        data = torch.zeros(num_slots, layout.slab_bytes, dtype=torch.uint8, device=device)
        return cls(data, layout, np.zeros(num_slots, np.int32))

    @property
    def num_slots(self) -> int:
        """How many adapters have room."""
        return self.data.shape[0]

    def commit(self, slot: int, slab: Tensor, rank: int | None = None) -> None:
        """Put an adapter into a slot: one copy, in the order of the current stream. `ranks` says so at once.

        Args:
            slab: uint8 [slab_bytes], contiguous, on the host (see `pinned_slab`) or on a device. A pinned one must not
                be written before the copy is done.
            rank: the adapter's. None reads it from the slab, which costs nothing on the host, but waits for a device:
                give the rank of a slab that is on one.

        Raises:
            TypeError, ValueError: the slot, the slab or the rank does not fit.
        """
        if slab.dtype != torch.uint8:
            raise TypeError(f"the slab is {slab.dtype}; it must be torch.uint8, as pack_slab fills it")
        if slab.shape != self.data.shape[1:] or not slab.is_contiguous():
            raise ValueError(
                f"the slab has shape {list(slab.shape)}; it must be contiguous [{self.data.shape[1]}], of this layout"
            )
        row = self._row(slot)
        if rank is None:
            rank = slab_rank(slab[:HEADER_BYTES].cpu().numpy())
        largest = MAX_RANK if self.layout is None else self.layout.max_rank
        if not 0 <= rank <= largest:
            raise ValueError(f"the adapter has rank {rank}, the slabs take 0 to {largest}; use a larger max_rank")
        row.copy_(slab, non_blocking=True)
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        """Take the adapter out of a slot: its rows then get no addition."""
        self._row(slot).zero_()
        self.ranks[slot] = 0

    def _row(self, slot: int) -> Tensor:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is out of range; slots are 0 to {self.num_slots - 1}")
        return self.data[slot]


def pinned_slab(layout: LoraLayout) -> Tensor:
    """uint8 [slab_bytes] on the host for `pack_slab` to fill, page-locked where there is a GPU; not initialised."""
    return torch.empty(layout.slab_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def pinned_words(shape: BatchShape) -> Tensor:
    """int32 [words] on the host, whose `numpy()` is an `out` for `build_batch`; page-locked where there is a GPU."""
    return torch.empty(shape.words, dtype=torch.int32, pin_memory=torch.cuda.is_available())


@dataclass(frozen=True, eq=False, slots=True)
class LoraBatch:
    """What `build_batch` made, where kernels can read it.

    Attributes:
        words: int32 [shape.words], contiguous.
        shape: its capacities.

    Raises:
        TypeError, ValueError: `words` has another dtype or shape.
    """

    words: Tensor
    shape: BatchShape

    def __post_init__(self) -> None:
        if self.words.dtype != torch.int32:
            raise TypeError(f"words are {self.words.dtype}; they must be torch.int32, as build_batch returns them")
        if self.words.shape != (self.shape.words,) or not self.words.is_contiguous():
            raise ValueError(
                f"words have shape {list(self.words.shape)}; {self.shape} has [{self.shape.words}], contiguous"
            )

    @classmethod
    def to_device(cls, words: NDArray[np.int32] | Tensor, shape: BatchShape, device: torch.device | str) -> LoraBatch:
        """A copy of host words on a device, in the order of the current stream; pinned words must outlive the copy."""
        host = words if isinstance(words, Tensor) else torch.from_numpy(words)
        return cls(host.to(device, non_blocking=True, copy=True), shape)

    def update(self, words: NDArray[np.int32] | Tensor) -> None:
        """Replace the words in place, for a graph that keeps their address.

        Raises:
            ValueError: they are of another shape.
        """
        host = words if isinstance(words, Tensor) else torch.from_numpy(words)
        if host.shape != self.words.shape:
            raise ValueError(f"words have shape {list(host.shape)}; this batch has [{self.shape.words}]")
        self.words.copy_(host, non_blocking=True)


@dataclass(frozen=True, eq=False, slots=True)
class LoraDelta:
    """The low-rank term that a consumer of a projection's output still has to add.

    Token t of slot s has u of slice i in columns ``s * u_slot_stride + i * rank_cap ...`` of row t, of which as many
    count as the module has ranks. The others may hold anything, NaN too.

    Attributes:
        u: [T, columns], bf16 on a GPU, the activations' dtype elsewhere; adjacent columns, any row stride.
        slabs, site, batch: whose B is to be applied to which rows.
        u_slot_stride: 0 when u is what shrink writes; site.u_width when u of the first slots lies side by side, as when
            the rows of their A are the last rows of the projection's weight; rows then have none of another slot.

    Raises:
        TypeError, ValueError: u has another dtype, shape, stride or device.
    """

    u: Tensor
    slabs: LoraSlabs
    site: LoraSite
    batch: LoraBatch
    u_slot_stride: int = 0

    def __post_init__(self) -> None:
        u, site = self.u, self.site
        if u.dtype not in FLOATS:
            raise TypeError(f"u is {u.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
        if self.u_slot_stride not in (0, site.u_width):
            raise ValueError(
                f"u_slot_stride is {self.u_slot_stride}; it must be 0 or the site's u_width {site.u_width}"
            )
        slots = self.slabs.data.shape[0] if self.u_slot_stride else 1
        widths = range(site.u_width, slots * site.u_width + 1, site.u_width)
        if u.ndim != 2 or u.shape[1] not in widths or u.stride(1) != 1:
            raise ValueError(
                f"u has shape {list(u.shape)}, strides {u.stride()}; it must have adjacent columns, {site.u_width} of "
                f"them for each of 1 to {slots} slots"
            )
        if u.device != self.slabs.data.device or u.device != self.batch.words.device:
            raise ValueError(
                f"u is on {u.device}, the slabs on {self.slabs.data.device}, the batch on {self.batch.words.device}; "
                "all must be on one device"
            )
        if u.is_cuda and (u.data_ptr() | u.stride(0) * u.element_size()) % 16:
            raise ValueError(
                f"u is at {u.data_ptr():#x} with {u.stride(0)} elements between rows; "
                "every row must start at a multiple of 16 bytes"
            )
        if self.batch.shape.num_slots > self.slabs.data.shape[0]:
            raise ValueError(
                f"the batch names {self.batch.shape.num_slots} slots, there are {self.slabs.data.shape[0]}"
            )
        if site.end > self.slabs.data.shape[1]:
            raise ValueError(
                f"the site ends at byte {site.end}, slabs at {self.slabs.data.shape[1]}; take it from the slabs' layout"
            )
