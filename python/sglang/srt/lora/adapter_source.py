"""Where the bytes of an adapter come from: files of a directory, a safetensors image, or a client's pickle.

Called by adapter_reader. Invariant: a file is opened once, below the root, and what is read is what was checked.
"""

from __future__ import annotations

import base64
import bisect
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from sglang.srt.errors import AdapterError
from sglang.srt.lora.problems import MAX_LISTED, invalid
from sglang.srt.lora.safetensors_bytes import (
    PREFIX_BYTES,
    Layout,
    TensorEntry,
    header_bytes,
    parse_header,
    parse_image,
)
from sglang.srt.lora.tensor_unpickler import RawTensor

CONFIG_FILE, WEIGHTS_FILE, ADDED_TOKENS_FILE = "adapter_config.json", "adapter_model.safetensors", "added_tokens.json"

MAX_JSON_BYTES = 16 << 20
_BASE64_SLICE = 1 << 18
"""Characters that are decoded at once: other threads have to wait for it."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class TensorSource(Protocol):
    """Tensors of one adapter, row-major and one behind the other: shapes at once, bytes later, by several threads."""

    layout: Layout

    def read(self, begin: int, target: NDArray[np.uint8]) -> None:
        """Fill uint8 [n] with the bytes from `begin` on, which may be those of several tensors."""

    def finish(self) -> None:
        """Called when all are read; raises AdapterError when what was read cannot be trusted."""


class ImageTensors:
    """A safetensors image in memory."""

    def __init__(self, image: memoryview, max_bytes: int) -> None:
        self.layout, data = parse_image(image, max_bytes)
        self._data = np.frombuffer(data, dtype=np.uint8)

    def read(self, begin: int, target: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        target[:] = self._data[begin : begin + len(target)]

    def finish(self) -> None:
        """See TensorSource."""


class PickledTensors:
    """Tensors of a pickle, of any strides."""

    def __init__(self, tensors: Mapping[str, RawTensor]) -> None:
        self._values = [tensor.values for tensor in tensors.values()]
        self._begins = [0, *itertools.accumulate(values.size * values.itemsize for values in self._values)]
        entries = {
            name: TensorEntry(tensor.dtype, tensor.values.shape, begin, end - begin)
            for (name, tensor), begin, end in zip(tensors.items(), self._begins, self._begins[1:], strict=False)
        }
        self.layout = Layout(entries, self._begins[-1])

    def read(self, begin: int, target: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        done = 0
        while done < len(target):
            index = bisect.bisect_right(self._begins, begin + done) - 1
            part = _bytes_from(self._values[index], begin + done - self._begins[index], len(target) - done)
            target[done : done + len(part)] = part
            done += len(part)

    def finish(self) -> None:
        """See TensorSource."""


class FileTensors:
    """A safetensors file.

    Raises:
        AdapterError: path_unreadable when it is shorter or longer than it says, or changes meanwhile.
    """

    def __init__(self, fd: int, described: str, max_bytes: int) -> None:
        self._fd, self._described = fd, described
        self._before = os.fstat(fd)
        prefix = os.pread(fd, PREFIX_BYTES, 0)
        if len(prefix) < PREFIX_BYTES:
            self._unreadable("is not written completely")
        self._start = PREFIX_BYTES + header_bytes(prefix)
        if self._start > self._before.st_size:
            self._unreadable("is not written completely")
        self.layout = parse_header(os.pread(fd, self._start - PREFIX_BYTES, PREFIX_BYTES), max_bytes)
        end = self._start + self.layout.nbytes
        if end != self._before.st_size:
            self._unreadable(f"has {self._before.st_size} bytes, its header describes {end}")

    def read(self, begin: int, target: NDArray[np.uint8]) -> None:
        """See TensorSource."""
        position, rest = self._start + begin, target.data
        while rest:
            count = os.preadv(self._fd, [rest], position)
            if count == 0:
                self._unreadable("became shorter while it was read")
            position, rest = position + count, rest[count:]

    def finish(self) -> None:
        """See TensorSource."""
        after = os.fstat(self._fd)
        if (after.st_size, after.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            self._unreadable("changed while it was read")

    def _unreadable(self, problem: str) -> NoReturn:
        raise AdapterError("path_unreadable", f"{self._described} {problem}; load it again when it is complete")


def _bytes_from(values: NDArray[Any], start: int, most: int) -> NDArray[np.uint8]:
    """Row-major bytes of a matrix of any strides, from `start` to its end, `most` of them at most."""
    row = values.shape[1] * values.itemsize
    first, last = start // row, -(-(start + most) // row)
    rows = np.ascontiguousarray(values[first:last]).reshape(-1).view(np.uint8)
    return rows[start - first * row :][:most]


class AdapterDirectory:
    """Files of an adapter's directory, none of them outside the root.

    Raises:
        AdapterError: adapter_not_found; the message says what is there instead.
    """

    def __init__(self, path: str, root: str | None) -> None:
        if not path or "\0" in path:
            raise AdapterError("adapter_not_found", f"{path!r} is no path of an adapter")
        self._path = path
        self._root = None if root is None else os.path.realpath(root)
        self._real = self._inside(os.path.join(root or "", path))
        self.names = self._list()
        if CONFIG_FILE not in self.names:
            raise AdapterError("adapter_not_found", f"{path!r} holds no {CONFIG_FILE}, only {self._shown()}")
        if WEIGHTS_FILE not in self.names:
            self._refuse_other_weights()

    def describe(self, name: str) -> str:
        """A file as messages call it."""
        return repr(os.path.join(self._path, name))

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Descriptor of a regular file, for reading; any failure to read it becomes path_unreadable."""
        path = self._inside(os.path.join(self._real, name))
        try:
            # Not blocking: a pipe in the place of a file must not hold the thread.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError("not a regular file")
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            raise AdapterError("path_unreadable", f"{self.describe(name)} cannot be read: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; one that does not parse is taken for half-written."""
        with self.open(name) as fd:
            text = os.pread(fd, MAX_JSON_BYTES, 0)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError("path_unreadable", f"{self.describe(name)} is no complete JSON: {error}") from error
        if not isinstance(value, dict):
            raise invalid(f"{self.describe(name)} is not a JSON object")
        return value

    def _inside(self, path: str) -> str:
        """The real path, links followed; refused without a look at what is there when it leaves the root."""
        real = os.path.realpath(path)
        if self._root is not None and os.path.commonpath([self._root, real]) != self._root:
            raise AdapterError("adapter_not_found", f"{self._path!r} is outside --lora-root {self._root}")
        return real

    def _list(self) -> list[str]:
        try:
            return sorted(os.listdir(self._real))
        except NotADirectoryError:
            raise AdapterError("adapter_not_found", f"{self._path!r} is no directory; pass the adapter's") from None
        except FileNotFoundError:
            hint = "; names on the hub are not fetched: download it first" if _HUB_ID.fullmatch(self._path) else ""
            raise AdapterError("adapter_not_found", f"there is no directory {self._path!r}{hint}") from None
        except OSError as error:
            raise AdapterError("path_unreadable", f"{self._path!r} cannot be read: {error}") from error

    def _refuse_other_weights(self) -> NoReturn:
        other = [name for name in self.names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if other:
            raise invalid(
                f"{self._path!r} has its weights in {other[0]}, a pickle, not in {WEIGHTS_FILE}; convert them"
            )
        raise AdapterError("adapter_not_found", f"{self._path!r} holds no {WEIGHTS_FILE}, only {self._shown()}")

    def _shown(self) -> str:
        return ", ".join(self.names[:MAX_LISTED]) or "nothing"


def decode_payload(
    payload: str | list[str] | bytes | bytearray | memoryview, max_bytes: int
) -> bytes | bytearray | memoryview:
    """The bytes behind base64; of a list, whose items are the same for every rank, behind the first."""
    if isinstance(payload, list):
        if not payload or not all(isinstance(item, str) for item in payload):
            raise invalid("a list of serialized tensors must hold base64 strings, at least one")
        payload = payload[0]
    if isinstance(payload, bytes | bytearray | memoryview):
        return payload
    if len(payload) * 3 // 4 > max_bytes + MAX_JSON_BYTES:
        raise invalid(f"{len(payload)} characters of base64 exceed this server's limit of {max_bytes} bytes")
    image = bytearray()
    for start in range(0, len(payload), _BASE64_SLICE):
        piece = payload[start : start + _BASE64_SLICE]
        try:
            image += base64.b64decode(piece, validate=True)
        except ValueError as error:
            raise invalid(f"serialized tensors are not base64: {error}") from error
        if piece.endswith("=") and start + len(piece) < len(payload):
            raise invalid(f"serialized tensors are not base64: it ends at character {start + len(piece)}")
    return image
