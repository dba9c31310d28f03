"""args.h as ctypes structures, read from its text.

A TensorMap is sixteen words that only a driver understands; `Gpu.tensor_map` has the emulator's own.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from .build import Sources, structs

_SCALARS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
    "TensorMap": ctypes.c_uint64 * 16,
}
_MAP_ALIGN = 128


def make(struct: type[ctypes.Structure]) -> ctypes.Structure:
    """One of zeros, at an address that suits every member."""
    room = (ctypes.c_char * (ctypes.sizeof(struct) + _MAP_ALIGN))()
    return struct.from_buffer(room, -ctypes.addressof(room) % _MAP_ALIGN)


@lru_cache
def argument_types(sources: Sources) -> dict[str, type[ctypes.Structure]]:
    """A structure for every struct of args.h, by its name. A launch checks that the compiler agrees."""
    types: dict[str, type[ctypes.Structure]] = {}
    for struct, fields in structs(sources).items():
        members = []
        for type_, name, length in fields:
            member = ctypes.c_void_p if type_.endswith("*") else types.get(type_) or _SCALARS[type_]
            members.append((name, member * length if length else member))
        made = type(struct, (ctypes.Structure,), {"_fields_": members})
        if any(type_ == "TensorMap" for type_, *_ in fields):  # they come first, at multiples of 128
            members.append(("_end", ctypes.c_uint8 * (-ctypes.sizeof(made) % _MAP_ALIGN)))
            made = type(struct, (ctypes.Structure,), {"_fields_": members})
        types[struct] = made
    return types
