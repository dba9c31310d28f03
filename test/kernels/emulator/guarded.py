"""Arrays beside a page that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded_array(values: NDArray[Any], side: str, align: int) -> NDArray[Any]:
    """A copy of `values` that ends before a forbidden page, as close as `align` lets it, or begins right after one."""
    room = -(-max(values.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for guard in (base, base + mmap.PAGESIZE + room):
        if _libc.mprotect(guard, mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = mmap.PAGESIZE + ((room - values.nbytes) // align * align if side == "end" else 0)
    copy = np.frombuffer(pages, values.dtype, values.size, start).reshape(values.shape)
    copy[...] = values
    return copy
