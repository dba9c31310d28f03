"""args.h as ctypes structures, read from its text."""

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
}


@lru_cache
def argument_types(sources: Sources) -> dict[str, type[ctypes.Structure]]:
    """A structure for every struct of args.h, by its name. A launch checks that the compiler agrees."""
    types: dict[str, type[ctypes.Structure]] = {}
    for struct, fields in structs(sources).items():
        members = []
        for type_, name, length in fields:
            member = ctypes.c_void_p if type_.endswith("*") else types.get(type_) or _SCALARS[type_]
            members.append((name, member * length if length else member))
        types[struct] = type(struct, (ctypes.Structure,), {"_fields_": members})
    return types
