"""Reads the layout of a safetensors file without torch: which tensor lies where.

Called by `adapter_reader` with files and with bytes of requests. The format is eight bytes of header size
(little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the data. A slab (`ops.slab_image`) is one
tensor of bytes, and says so in the header's metadata.
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
from sglang.srt.ops.slab_image import LAYOUT_KEY, TENSOR

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
        entries: by name, in the order of their bytes; none of a slab, whose layout tells them.
        nbytes: size of the data section.
        slab: the description of its layout, if the data are a slab.
    """

    entries: dict[str, TensorEntry]
    nbytes: int
    slab: str | None = None


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
    named, metadata = _named_entries(header)
    slab = metadata.get(LAYOUT_KEY)
    if slab is not None:
        return Layout({}, _slab_bytes(named, max_bytes), slab)
    entries = {name: _entry(name, raw) for name, raw in named}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            raise _invalid(f"tensor {name!r} starts at byte {entry.begin}, the one before it ends at byte {end}")
        end += entry.nbytes
    _check_budget(end, max_bytes)
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


def _named_entries(header: bytes) -> tuple[list[tuple[str, _JsonEntry]], dict[str, str]]:
    """The tensors, and the metadata."""
    name, metadata = "the header", None
    try:
        raw = _decode_header(header)
        if "__metadata__" in raw:
            metadata = _decode_metadata(raw.pop("__metadata__"))
        if len(raw) > MAX_TENSORS:
            raise _invalid(f"{len(raw)} tensors exceed the limit of {MAX_TENSORS}")
        found = []
        for name, text in raw.items():
            found.append((name, _decode_entry(text)))
        return found, metadata or {}
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


def _slab_bytes(named: list[tuple[str, _JsonEntry]], max_bytes: int) -> int:
    """The size of a slab, which is the one tensor of its file."""
    if [name for name, _ in named] != [TENSOR]:
        raise _invalid(f"with {LAYOUT_KEY} in the metadata there must be {TENSOR!r} alone, not {len(named)} tensors")
    raw = named[0][1]
    size = raw.data_offsets[1]
    if raw.dtype != "U8" or raw.shape != [size] or raw.data_offsets[0] != 0 or size < 1:
        raise _invalid(
            f"tensor {TENSOR!r} is {raw.dtype} {raw.shape[:MAX_DIMS]} at offsets {raw.data_offsets}; it must be U8 [n] "
            "at 0, n"
        )
    _check_budget(size, max_bytes)
    return size


def _check_budget(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise _invalid(f"{nbytes} bytes of tensors exceed this server's limit of {max_bytes}")


def _invalid(problem: str) -> AdapterError:
    return AdapterError("invalid_adapter", f"safetensors data: {problem}")
