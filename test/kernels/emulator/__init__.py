"""Runs the real kernels on the CPU: every GPU thread is a fiber, every access is checked.

    gpu = Gpu("cuda")                                   # or "hip": other warps, other matrix instructions
    x = gpu.array("x", bf16_bits, role="input")         # a copy that ends at a page that nobody may touch
    y = gpu.array("y", poison, role="output")
    gpu.launch("skinny_gemm_16", gpu.args("GemmArgs", x=x, y=y, ...), grid=(4, 1), threads=256, shared=4096)

A launch raises `KernelError` for what would be undefined or a race on a GPU, whether or not it did harm this time: an
access outside of every array or of the wrong one (see `Gpu.array`), a misaligned one, a read of shared memory that
nobody wrote or whose copy has not arrived, two accesses that no barrier orders (the block's, or the warp's own), a warp
that is not together at a matrix product, a barrier that some thread never reaches, a block that leaves while its shared
memory is read or without having waited for the previous kernel; of Hopper's copies and products, a tile that is used
before its arrival was waited for or overwritten while a product may read it, sums that are touched before theirs, and
arrivals that never come or are too many.

A new .cu file is one line in `KERNEL_FILES`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import argument_types, make
from .build import Sources, build_library
from .guarded import guarded_array

KERNEL_FILES = {
    "skinny_gemm_": "gemm.cu",
    "lora_shrink_": "gemm.cu",
    "lora_expand_add_": "expand.cu",
    "fused_add_rmsnorm": "norm.cu",
    "silu_and_mul": "activation.cu",
    "qk_norm_rope_": "rope.cu",
}
"""Which file of csrc/kernels has the kernels whose names begin so."""

VENDORS = ("cuda", "hip")
CLUSTERS = (("cuda", 1), ("cuda", 2), ("cuda", 4), ("hip", 1))
"""Every vendor with sizes of clusters that it has."""
ROLES = {"static": (False, False), "input": (False, True), "output": (True, True)}
"""What may be done with an array: (written, not to be touched before wait_for_previous_kernel)."""


class KernelError(Exception):
    """The kernel did something that a GPU would not forgive."""


class _Region(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_int32),
        ("dependent", ctypes.c_int32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("args", ctypes.c_void_p),
        ("args_bytes", ctypes.c_int64),
        ("regions", ctypes.POINTER(_Region)),
        *((name, ctypes.c_int32) for name in "num_regions grid_x grid_y threads shared_bytes cluster warp".split()),
        ("seed", ctypes.c_uint32),
    ]


@lru_cache
def _library(sources: Sources, kernel_file: str, vendor: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(build_library(sources, kernel_file, vendor)))


class Gpu:
    """One emulated device and the arrays on it.

    Args:
        vendor: ``cuda`` (warps of 32, asynchronous copies, clusters) or ``hip`` (waves of 64, none of these).
        sources: other kernels than those of this repository.
        side: where arrays touch a page that nobody may touch: ``end`` or ``start``.
    """

    def __init__(self, vendor: str, sources: Sources | None = None, side: str = "end") -> None:
        self.vendor = vendor
        self.warp = {"cuda": 32, "hip": 64}[vendor]
        self.sources = sources or Sources()
        self._side = side
        self._arrays: list[tuple[NDArray[Any], bytes, tuple[bool, bool]]] = []

    def array(self, name: str, values: NDArray[Any], role: str = "static", align: int = 16) -> NDArray[Any]:
        """A copy of `values` on the device. Every access of a kernel must lie in such an array.

        Args:
            name: used in errors.
            role: ``static`` for what no kernel of the step writes (weights, adapters, the batch), ``input`` for what
                the kernel before may have written: not to be touched before wait_for_previous_kernel. ``output`` is
                an input that may also be written, by one thread at a time.
            align: bytes that the array's address is a multiple of.
        """
        copy = guarded_array(values, self._side, align)
        self._arrays.append((copy, name.encode(), ROLES[role]))
        return copy

    def tensor_map(self, rows: NDArray[Any], columns: int, tile_rows: int) -> list[int]:
        """What copies of tiles take: the first `columns` of every row of an array, in tiles of so many rows."""
        return [rows.ctypes.data, len(rows), columns, rows.strides[0] // rows.itemsize, tile_rows, *[0] * 11]

    def args(self, struct: str, **fields: Any) -> ctypes.Structure:
        """A struct of args.h by its name. Arrays become addresses, None becomes null, and what is not named is 0."""
        args = make(argument_types(self.sources)[struct])
        for name, value in fields.items():
            if name not in dict(args._fields_):
                raise AttributeError(f"{struct} has no {name}")
            if isinstance(value, Sequence):
                value = getattr(args, name).__class__(*value)
            setattr(args, name, value.ctypes.data if isinstance(value, np.ndarray) else value)
        return args

    def geometry(self, function: str, *sizes: int) -> int:
        """The value of a function of geometry.h, or of a constant."""
        return int(getattr(_library(self.sources, "expand.cu", self.vendor), f"geometry_{function}")(*sizes))

    def launch(
        self,
        name: str,
        args: ctypes.Structure,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        cluster: int = 1,
        seed: int = 0,
        file: str | None = None,
    ) -> None:
        """Run a kernel to its end.

        Args:
            name: as in the .cu file.
            grid: blocks along x and y.
            threads: of a block.
            shared: bytes of dynamic shared memory.
            cluster: blocks of a cluster, neighbours along x.
            seed: draws the order of blocks, warps and lanes.
            file: of csrc/kernels, if not the one that `KERNEL_FILES` says.

        Raises:
            KernelError: see above; the text has kernel, block, thread and what was touched.
        """
        library = _library(self.sources, file or _file_of(name), self.vendor)
        _check_layout(library, args)
        regions = (_Region * len(self._arrays))(
            *(_Region(a.ctypes.data, a.nbytes, label, *role) for a, label, role in self._arrays)
        )
        launch = _Launch(name.encode(), ctypes.addressof(args), ctypes.sizeof(args), regions, len(regions))
        launch.grid_x, launch.grid_y = grid
        launch.threads, launch.shared_bytes, launch.cluster = threads, shared, cluster
        launch.warp, launch.seed = self.warp, seed
        error = ctypes.create_string_buffer(1000)
        if library.emu_launch(ctypes.byref(launch), getattr(library, name), error, len(error)):
            raise KernelError(error.value.decode())


def _file_of(kernel: str) -> str:
    for prefix, file in KERNEL_FILES.items():
        if kernel.startswith(prefix):
            return file
    raise KeyError(f"{kernel} begins with none of {', '.join(KERNEL_FILES)}; see KERNEL_FILES")


def _check_layout(library: ctypes.CDLL, args: ctypes.Structure) -> None:
    """That Python and C++ lay the arguments out alike."""
    kind = type(args)
    names = [name for name, *_ in kind._fields_ if not name.startswith("_")]
    actual = list((ctypes.c_size_t * (len(names) + 1)).in_dll(library, f"layout_{kind.__name__}"))
    assert actual == [ctypes.sizeof(kind), *(getattr(kind, name).offset for name in names)], kind.__name__
