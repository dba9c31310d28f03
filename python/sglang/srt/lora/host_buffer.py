"""Host memory that another process of the same user opens by path: how adapter bytes reach the back.

A buffer owns the file and its mapping; `HostBuffers`, of which `adapter_reader` and `group_calls` have one each, hands
buffers out.
Invariants: the path works from construction to `close`; what the back has mapped by then stays valid. A buffer that was
given back may have other bytes at any time, so it is given back when the back has copied them, or never saw it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading

import numpy as np
from numpy.typing import NDArray

MAX_SPARE_BYTES = 1 << 30
"""Largest buffer that is kept."""


class HostBuffer:
    """Writable anonymous memory with a path.

    Args:
        nbytes: size, at least 1; the memory starts as zeros.

    Attributes:
        path: of the file behind it: `/proc/PID/fd/FD` on Linux, a temporary file elsewhere.
        nbytes: as given.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"a buffer of {nbytes} bytes cannot be mapped")
        self.nbytes = nbytes
        self._unlink: str | None = None
        self._fd = self._open()
        try:
            os.ftruncate(self._fd, nbytes)
            self._mapping = mmap.mmap(self._fd, nbytes)
        except BaseException:
            self._close_file()
            raise
        self._view: NDArray[np.uint8] | None = np.frombuffer(self._mapping, dtype=np.uint8)

    @property
    def view(self) -> NDArray[np.uint8]:
        """The memory, uint8 [nbytes], writable; raises ValueError once closed."""
        if self._view is None:
            raise ValueError("the buffer is closed")
        return self._view

    def close(self) -> None:
        """Give the memory back as soon as nobody holds a view of it; safe to call twice."""
        if self._view is None:
            return
        self._view = None
        self._close_file()
        # A view that someone still holds keeps the mapping; it goes with the view.
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def _open(self) -> int:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("sglang-adapter")
            self.path = f"/proc/{os.getpid()}/fd/{fd}"
            return fd
        fd, self.path = tempfile.mkstemp(prefix="sglang-adapter-")
        self._unlink = self.path
        return fd

    def _close_file(self) -> None:
        os.close(self._fd)
        if self._unlink is not None:
            os.unlink(self._unlink)


class HostBuffers:
    """Makes buffers, and keeps the one given back last: fresh pages take several times as long as the bytes in them.

    Any thread may call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: HostBuffer | None = None

    def take(self, nbytes: int) -> HostBuffer:
        """A buffer with whatever bytes, all zeros when it is new."""
        with self._lock:
            spare = self._spare
            if spare is not None and spare.nbytes == nbytes:
                self._spare = None
                return spare
        return HostBuffer(nbytes)

    def give_back(self, buffer: HostBuffer) -> None:
        """Nobody reads or writes this buffer any more."""
        kept = buffer if buffer.nbytes <= MAX_SPARE_BYTES else None
        with self._lock:
            spare, self._spare = self._spare, kept
        # Past the lock `kept` may be somebody else's already.
        for other in (spare, buffer):
            if other is not None and other is not kept:
                other.close()
