"""Sizes as g++ sees them: the functions of geometry.h, the structs of args.h."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from kernels.emulator.build import Sources, structs

STRUCT_OF = {
    "skinny_gemm": "GemmArgs",
    "skinny_gemm_group": "GroupGemmArgs",
    "lora_shrink": "ShrinkArgs",
    "lora_expand_add": "ExpandArgs",
    "fused_add_rmsnorm": "NormArgs",
    "silu_and_mul": "ActivationArgs",
    "qk_norm_rope": "RopeArgs",
}


def struct_of(kernel: str) -> str:
    """The arguments of a kernel, by the start of its name."""
    return STRUCT_OF[max((prefix for prefix in STRUCT_OF if kernel.startswith(prefix)), key=len)]


class Geometry:
    """Calls functions of geometry.h for one vendor, and knows sizes of structs."""

    def __init__(self, warp: int) -> None:
        self.warp = warp
        self._library = _compile()

    def __call__(self, function: str, *args: int) -> int:
        """Of the vendor's warp, which most functions take first."""
        return int(self._library[f"geometry_{function}"](*args))

    def size(self, struct: str) -> int:
        return int(self._library[f"size_{struct}"]())


@lru_cache
def _compile() -> ctypes.CDLL:
    sources = Sources()
    code = ['#include "sgl_kernel/args.h"', '#include "sgl_kernel/geometry.h"', 'extern "C" {']
    code += [f"int size_{name}() {{ return sizeof(sgl::{name}); }}" for name in structs(sources)]
    text = sources.text("include/sgl_kernel/geometry.h")
    for name, parameters in re.findall(r"^constexpr int (\w+)\(([^)]*)\)", text, re.MULTILINE):
        names = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        code.append(f"int geometry_{name}({parameters}) {{ return sgl::{name}({names}); }}")
    with tempfile.TemporaryDirectory() as folder:
        unit, library = Path(folder, "geometry.cc"), Path(folder, "geometry.so")
        unit.write_text("\n".join([*code, "}", ""]))
        command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{sources.root}/include", str(unit), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))
