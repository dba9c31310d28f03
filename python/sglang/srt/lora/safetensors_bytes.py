"""Reads the layout of a safetensors file without torch: which tensor lies where.

Called by `adapter_reader` with files and with bytes of requests. The format is eight bytes of header size
(little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Invariant: a `Layout` covers its data exactly, without holes or overlaps, within every budget; checked before any
allocation that follows a number of the file.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import msgspec

from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter import DType

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_DIMS = 8

ITEM_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A row-major tensor; `begin` is its first byte within the data section."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor of a file.

    Attributes:
        entries: by name, in the order of their bytes.
        nbytes: size of the data section.
    """

    entries: dict[str, TensorEntry]
    nbytes: int


class _JsonEntry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_entry = msgspec.json.Decoder(_JsonEntry).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str] | None).decode


def looks_like_safetensors(image: memoryview) -> bool:
    """Whether bytes start like a safetensors file; no pickle does."""
    size = int.from_bytes(image[:PREFIX_BYTES], "little")
    return len(image) > PREFIX_BYTES and size <= MAX_HEADER_BYTES and image[PREFIX_BYTES] == ord("{")


def header_bytes(prefix: bytes) -> int:
    """Size of the JSON header that the first eight bytes announce.

    Raises:
        AdapterError: invalid_adapter; fewer than eight bytes, or more header than MAX_HEADER_BYTES.
    """
    size = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or not 2 <= size <= MAX_HEADER_BYTES:
        raise _invalid(f"announce a header of {size} bytes; it must have 2 to {MAX_HEADER_BYTES}")
    return size


@functools.lru_cache(maxsize=2)
def parse_header(header: bytes, max_bytes: int) -> Layout:
    """Check the JSON header; the last ones are remembered, for the versions of a policy have the same.

    Args:
        header: the JSON text.
        max_bytes: most data that may follow.

    Raises:
        AdapterError: invalid_adapter; the message names the tensor at fault.
    """
    entries = {name: _entry(name, raw) for name, raw in _named_entries(header)}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise _invalid(f"tensor {name!r} starts at byte {entry.begin}, the one before it ends at byte {end}")
        end += entry.nbytes
    if end > max_bytes:
        raise _invalid(f"{end} bytes of tensors exceed this server's limit of {max_bytes}")
    return Layout(entries, end)


def parse_image(image: memoryview, max_bytes: int) -> tuple[Layout, memoryview]:
    """Layout and data section (no copy) of a whole safetensors file in memory.

    Raises:
        AdapterError: invalid_adapter, as `parse_header`, or when the data is cut short or followed by more.
    """
    start = PREFIX_BYTES + header_bytes(bytes(image[:PREFIX_BYTES]))
    if start > len(image):
        raise _invalid(f"the header ends at byte {start}, the file at byte {len(image)}")
    layout = parse_header(bytes(image[PREFIX_BYTES:start]), max_bytes)
    data = image[start:]
    if len(data) != layout.nbytes:
        raise _invalid(f"the header describes {layout.nbytes} bytes of data, there are {len(data)}")
    return layout, data


def _named_entries(header: bytes) -> list[tuple[str, _JsonEntry]]:
    name = "the header"
    try:
        raw = _decode_header(header)
        if "__metadata__" in raw:
            _decode_metadata(raw.pop("__metadata__"))
        if len(raw) > MAX_TENSORS:
            raise _invalid(f"{len(raw)} tensors exceed the limit of {MAX_TENSORS}")
        found = []
        for name, text in raw.items():
            found.append((name, _decode_entry(text)))
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(f"{name!r} is not as the format says: {error}") from error


def _entry(name: str, raw: _JsonEntry) -> TensorEntry:
    if raw.dtype not in _DTYPES:
        raise _invalid(f"tensor {name!r} is {raw.dtype}; adapters are {', '.join(_DTYPES)}")
    # The number of dimensions comes first: the product of many large ones would take for ever.
    if len(raw.shape) > MAX_DIMS or any(size < 0 for size in raw.shape):
        raise _invalid(f"tensor {name!r} has {len(raw.shape)} dimensions or a negative one")
    dtype = _DTYPES[raw.dtype]
    begin, end = raw.data_offsets
    nbytes = math.prod(raw.shape) * ITEM_BYTES[dtype]
    if begin < 0 or end - begin != nbytes:
        raise _invalid(f"tensor {name!r} {raw.dtype} {raw.shape} takes {nbytes} bytes, its offsets are {begin}, {end}")
    return TensorEntry(dtype, tuple(raw.shape), begin, nbytes)


def _invalid(problem: str) -> AdapterError:
    return AdapterError("invalid_adapter", f"safetensors data: {problem}")
