"""Pickles of tensors as torch writes them, made without torch: byte for byte what `pickle.dumps` gives."""

from __future__ import annotations

import pickle
import struct

import numpy as np

STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage", "int64": "LongStorage"}
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Text(bytes):
    """Opcodes that `value` puts into a pickle as they are."""


def value(item: object) -> bytes:
    """Opcodes that push an item: plain data, `Text`, or containers of them."""
    if isinstance(item, Text):
        return bytes(item)
    if isinstance(item, tuple):
        return b"(" + b"".join(map(value, item)) + b"t"
    if isinstance(item, list):
        return b"](" + b"".join(map(value, item)) + b"e"
    if isinstance(item, dict):
        return b"}(" + b"".join(value(key) + value(entry) for key, entry in item.items()) + b"u"
    if isinstance(item, bytes):
        return b"B" + struct.pack("<I", len(item)) + item
    # Between the header of protocol 3 and the stop.
    return pickle.dumps(item, protocol=3)[2:-1]


def name(module: str, attribute: str) -> Text:
    return Text(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")


def call(function: Text, *args: object) -> Text:
    return Text(function + value(args) + b"R")


def dump(item: object) -> bytes:
    return b"\x80\x04" + value(item) + b"."


def image(data: bytes, storage: str = "FloatStorage", numel: int | None = None, **system: object) -> bytes:
    """One storage in torch.save's old format."""
    count = len(data) // 4 if numel is None else numel
    described = value(("storage", name("torch", storage), "1", "cpu", count, None)) + b"Q"
    parts = [value(0x1950A86A20F9469CFC6C), value(1001), value(SYSTEM | system), described, value(["1"])]
    return b"".join(b"\x80\x02" + part + b"." for part in parts) + struct.pack("<q", count) + data


def storage(data: bytes, kind: str = "FloatStorage", numel: int | None = None) -> Text:
    return call(name("torch.storage", "_load_from_bytes"), image(data, kind, numel))


def tensor_over(stored: object, offset: object, size: object, stride: object) -> Text:
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, offset, size, stride, False, hooks)


def tensor(values: np.ndarray, kind: str = "FloatStorage") -> Text:
    """A contiguous tensor; uint16 values with BFloat16Storage are bfloat16."""
    stride = tuple(step // values.itemsize for step in values.strides)
    return tensor_over(storage(values.tobytes(), kind, values.size), 0, values.shape, stride)
