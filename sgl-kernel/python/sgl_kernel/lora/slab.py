"""Packing an adapter into its slab, and reading it back.

Called by the trainer, or by a server that was given the factors themselves. Imports numpy, never torch; tensors of
torch are taken all the same. Invariants: every byte of a slab is written, and equal modules in any order give equal
bytes; the columns of B between a module's rank and the adapter's are zeros, which kernels rely on; after an error the
slab is empty, not half of an adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgl_kernel.lora.bf16 import all_finite, to_bf16_bits, to_float16, to_float32
from sgl_kernel.lora.layout import HEADER_BYTES, MAX_RANK, RANK_STEP, TABLE_ENTRY, LoraLayout, LoraSite, round_up

_ROUND: dict[str, Callable[[Any], NDArray[Any]]] = {
    "bfloat16": to_bf16_bits,
    "float16": to_float16,
    "float32": to_float32,
}
_ITEMS = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
"""By a site's dtype; bf16 as bits."""
_ENTRY = np.dtype([("rank", "<i4"), ("scale", "<f4")])


@dataclass(frozen=True, eq=False, slots=True)
class LoraModule:
    """One slice of one site: y += scale * (x A^T) B^T.

    Attributes:
        layer, group, slice_index: where it belongs, as in `LoraLayout.site`.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA; kept as float32.
        a: [r, in_features]; b: [out_features, r]. Arrays or tensors of float16, float32, float64 or bfloat16, or bf16
            bits as uint16.
    """

    layer: int
    group: str
    slice_index: int
    scale: float
    a: Any
    b: Any

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"layer {self.layer}, {self.group}[{self.slice_index}]"


def pack_slab(layout: LoraLayout, modules: Iterable[LoraModule], out: NDArray[np.uint8]) -> None:
    """Fill a slab with an adapter: every factor is rounded on its way there, so no second copy of them all exists.

    Args:
        modules: any subset of the layout's slices, each once, in any order; what is missing adds nothing.
        out: uint8 [layout.slab_bytes], contiguous and writable, e.g. `pinned_slab(layout).numpy()`.

    Raises:
        ValueError: a module is given twice, or does not fit the layout, or has a value that is not finite in the
            layout's dtype; or `out` does not fit. The message names the module.
    """
    if out.dtype != np.uint8 or out.shape != (layout.slab_bytes,) or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}; it must be contiguous uint8 [{layout.slab_bytes}] for this layout"
        )
    if not out.flags.writeable:
        raise ValueError("out is read-only; give a writable buffer")
    out.fill(0)
    given = list(modules)
    frame = slab_frame(layout, given)
    try:
        for module in given:
            with _naming(module):
                _write(layout, module, frame.rank, out)
    except ValueError:
        out.fill(0)
        raise
    frame.write_head(out)


@dataclass(frozen=True, eq=False, slots=True)
class SlabFrame:
    """All of a slab but the numbers of A and B, which whoever has a frame may put in their places by himself.

    Attributes:
        rank: the adapter's, the largest of its modules.
        head: uint8, the slab's first bytes: header and table.
        factors: where A and B of every module begin, in the order of the modules, bytes from the start of the slab.
        stride: numbers from one row of B to the next; those behind the module's rank are zeros.
    """

    rank: int
    head: NDArray[np.uint8]
    factors: tuple[tuple[int, int], ...]
    stride: int

    def write_head(self, out: NDArray[np.uint8]) -> None:
        """Write header and table to uint8 [layout.slab_bytes]."""
        out[: len(self.head)] = self.head


def slab_frame(layout: LoraLayout, modules: Sequence[LoraModule]) -> SlabFrame:
    """The frame of an adapter, told by shapes and scales: of `a` and `b`, nothing but `shape` is read.

    Raises:
        ValueError: a module is given twice, or does not fit the layout.
    """
    ranks: dict[tuple[int, str, int], int] = {}
    for module in modules:
        key = (module.layer, module.group, module.slice_index)
        if key in ranks:
            raise ValueError(f"{module.name} is given twice; give every module once")
        with _naming(module):
            ranks[key] = _rank_of(layout, module)
    rank = max(ranks.values(), default=0)
    head = np.zeros(HEADER_BYTES + layout.table_bytes, np.uint8)
    head[:4].view("<i4")[0] = rank
    factors = []
    for (layer, group, index), module_rank, module in zip(ranks, ranks.values(), modules, strict=True):
        site = layout.site(layer, group)
        _entry(head, site, index)[0] = (module_rank, np.float32(module.scale))
        factors.append((site.a_start(index), site.b_offsets[index]))
    return SlabFrame(rank, head, tuple(factors), round_up(rank, RANK_STEP))


def unpack_slab(layout: LoraLayout, slab: NDArray[np.uint8]) -> list[LoraModule]:
    """The modules of a slab in the layout's order, with float32 factors that are exactly those of the slab.

    Args:
        slab: uint8 [layout.slab_bytes].

    Raises:
        ValueError: the slab is not one of this layout.
    """
    if slab.dtype != np.uint8 or slab.shape != (layout.slab_bytes,):
        raise ValueError(f"the slab is {slab.dtype} {list(slab.shape)}; this layout has uint8 [{layout.slab_bytes}]")
    adapter_rank = slab_rank(slab)
    modules = []
    for layer in range(layout.num_layers):
        for group in layout.groups:
            site = layout.site(layer, group.name)
            for index in range(site.num_slices):
                rank, scale = _entry(slab, site, index)[0].item()
                if not 0 <= rank <= min(adapter_rank, site.rank_cap):
                    raise ValueError(
                        f"layer {layer}, {group.name}[{index}] has rank {rank}, the adapter {adapter_rank}, "
                        f"the layout allows {site.rank_cap}; the slab was packed for another layout"
                    )
                if rank:
                    a = to_float32(_a_of(slab, site, index, rank).copy())
                    b = to_float32(_b_of(slab, site, index, rank, adapter_rank).copy())
                    modules.append(LoraModule(layer, group.name, index, scale, a, b))
    if adapter_rank != max((len(module.a) for module in modules), default=0):
        raise ValueError(f"no module has the adapter's rank {adapter_rank}; the slab was packed for another layout")
    return modules


def slab_rank(slab: NDArray[np.uint8]) -> int:
    """The rank of the adapter in a slab, the largest of its modules; 0 for an empty slab.

    Args:
        slab: uint8, at least the first 16 bytes.

    Raises:
        ValueError: it does not begin as `pack_slab` makes it.
    """
    rank, *zeros = slab[:HEADER_BYTES].view("<i4").tolist()
    if not 0 <= rank <= MAX_RANK or any(zeros):
        raise ValueError(
            f"the slab begins with {[rank, *zeros]}, which is not a rank of 0 to {MAX_RANK} and zeros; "
            "fill it with this version's pack_slab"
        )
    return int(rank)


def slab_digest(layout: LoraLayout, slab: NDArray[np.uint8]) -> str:
    """SHA-256 of the layout and the bytes, hexadecimal: equal exactly when two adapters compute the same."""
    digest = hashlib.sha256(layout.digest.encode())
    digest.update(np.ascontiguousarray(slab).data)
    return digest.hexdigest()


@contextmanager
def _naming(module: LoraModule) -> Iterator[None]:
    """Errors inside say which module they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{module.name}: {error}") from error


def _rank_of(layout: LoraLayout, module: LoraModule) -> int:
    """The rank of a module that has a place in the layout, by its shapes and its scale; its values are not read."""
    site = layout.site(module.layer, module.group)
    if not 0 <= module.slice_index < site.num_slices:
        raise ValueError(f"there is no such slice; {module.group} has slices 0 to {site.num_slices - 1}")
    a, b = np.shape(module.a), np.shape(module.b)
    _check_shapes(site, module.slice_index, a, b, layout.max_rank)
    if not (math.isfinite(module.scale) and abs(module.scale) <= float(np.finfo(np.float32).max)):
        raise ValueError(f"scale is {module.scale}; it must be a finite float32")
    return int(a[0])


def _check_shapes(site: LoraSite, index: int, a: tuple[int, ...], b: tuple[int, ...], max_rank: int) -> None:
    rows = site.out_features[index]
    if len(a) != 2 or a[1] != site.in_features:
        raise ValueError(f"A has shape {list(a)}; it must be [rank, {site.in_features}]")
    if len(b) != 2 or b[0] != rows or b[1] != a[0]:
        raise ValueError(f"B has shape {list(b)}; it must be [{rows}, {a[0]}]")
    if not 1 <= a[0] <= max_rank:
        raise ValueError(f"rank is {a[0]}; this layout takes 1 to {max_rank}, so make it with a larger max_rank")


def _write(layout: LoraLayout, module: LoraModule, adapter_rank: int, out: NDArray[np.uint8]) -> None:
    site, index, rank = layout.site(module.layer, module.group), module.slice_index, len(module.a)
    places = _a_of(out, site, index, rank), _b_of(out, site, index, rank, adapter_rank)
    for place, factor in zip(places, (module.a, module.b), strict=True):
        values = _ROUND[layout.dtype](factor)
        if not all_finite(values):
            raise ValueError(
                f"a factor has a value that is infinite or NaN, or too large for {layout.dtype}; look at the training"
            )
        place[:] = values


def _entry(slab: NDArray[np.uint8], site: LoraSite, index: int) -> NDArray[Any]:
    start = site.table_offset + index * TABLE_ENTRY
    return slab[start : start + TABLE_ENTRY].view(_ENTRY)


def _a_of(slab: NDArray[np.uint8], site: LoraSite, index: int, rank: int) -> NDArray[Any]:
    """[rank, in_features], a view."""
    return _matrix(slab, site, site.a_start(index), rank, site.in_features)


def _b_of(slab: NDArray[np.uint8], site: LoraSite, index: int, rank: int, adapter_rank: int) -> NDArray[Any]:
    """[out_features, rank], a view."""
    stride = round_up(adapter_rank, RANK_STEP)
    return _matrix(slab, site, site.b_offsets[index], site.out_features[index], stride)[:, :rank]


def _matrix(slab: NDArray[np.uint8], site: LoraSite, start: int, rows: int, columns: int) -> NDArray[Any]:
    size = rows * columns * site.item_bytes
    return slab[start : start + size].view(_ITEMS[site.dtype]).reshape(rows, columns)
