"""Host buffers: opened by another process, closed once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from sglang.srt.lora import host_buffer
from sglang.srt.lora.host_buffer import HostBuffer, HostBuffers


def test_starts_as_zeros_and_is_writable():
    buffer = HostBuffer(10)
    assert buffer.view.dtype == np.uint8 and buffer.view.tolist() == [0] * 10
    buffer.view[3] = 7
    assert Path(buffer.path).read_bytes() == bytes([0, 0, 0, 7, 0, 0, 0, 0, 0, 0])
    buffer.close()


def test_another_process_reads_it_by_path():
    buffer = HostBuffer(5)
    buffer.view[:] = list(b"hello")
    code = "import sys; sys.stdout.write(open(sys.argv[1]).read())"
    assert subprocess.check_output([sys.executable, "-c", code, buffer.path]) == b"hello"
    buffer.close()


def test_close_is_idempotent_and_ends_the_path():
    buffer = HostBuffer(8)
    buffer.close()
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.view
    # The descriptor's number may have been taken since; our file is gone in any case.
    assert not os.path.exists(buffer.path) or "sglang-adapter" not in os.readlink(buffer.path)


def test_a_view_survives_close():
    buffer = HostBuffer(4)
    held = buffer.view
    held[0] = 9
    buffer.close()
    assert held.tolist() == [9, 0, 0, 0]


def test_what_the_back_has_mapped_survives_close():
    buffer = HostBuffer(4)
    buffer.view[:] = 5
    mapped = np.memmap(buffer.path, dtype=np.uint8, mode="r")
    buffer.close()
    assert mapped.tolist() == [5, 5, 5, 5]


def test_descriptors_do_not_leak():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        HostBuffer(4096).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_memfd_a_temporary_file_goes_with_close(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    buffer = HostBuffer(3)
    buffer.view[:] = 1
    assert Path(buffer.path).parent == tmp_path and Path(buffer.path).read_bytes() == b"\1\1\1"
    buffer.close()
    assert not list(tmp_path.iterdir())


def test_no_bytes_are_refused():
    with pytest.raises(ValueError, match="0 bytes"):
        HostBuffer(0)


def test_the_buffer_given_back_last_is_the_next_of_its_size():
    buffers = HostBuffers()
    first, second = buffers.take(100), buffers.take(100)
    first.view[:] = 7
    buffers.give_back(first)
    again = buffers.take(100)
    assert again is first and again.view.tolist() == [7] * 100 and Path(again.path).stat().st_size == 100
    buffers.give_back(first)
    buffers.give_back(second)
    with pytest.raises(ValueError, match="closed"):
        _ = first.view
    assert buffers.take(99) is not second and buffers.take(100) is second


def test_a_buffer_that_another_thread_takes_while_it_is_given_back_stays_open():
    buffers = HostBuffers()
    buffer, taken = buffers.take(8), []

    class ThenTaken:
        """A lock that another thread was waiting for."""

        def __enter__(self):
            pass

        def __exit__(self, *_):
            buffers._lock = threading.Lock()
            taken.append(buffers.take(8))

    buffers._lock = ThenTaken()
    buffers.give_back(buffer)
    assert taken == [buffer] and buffer.view.tolist() == [0] * 8


def test_a_buffer_larger_than_the_limit_is_not_kept(monkeypatch):
    monkeypatch.setattr(host_buffer, "MAX_SPARE_BYTES", 10)
    buffers = HostBuffers()
    small, large = buffers.take(10), buffers.take(11)
    buffers.give_back(small)
    buffers.give_back(large)
    for closed in (small, large):
        with pytest.raises(ValueError, match="closed"):
            _ = closed.view
