"""Reads code objects with nothing of ours: clang's bundles, ELF files and what compilers note in them about kernels."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kernels.mock_driver.build import compilers


@dataclass(frozen=True)
class Kernel:
    """Bytes of its explicit arguments, most threads of a block, bytes of memory a thread for spills and arrays."""

    args: int
    threads: int
    scratch: int


Kernels = dict[str, dict[str, Kernel]]
"""By source, then by name."""


def sections(elf: bytes) -> list[tuple[str, int, bytes]]:
    """(name, type, content) of every section of a 64-bit ELF file."""
    assert elf[:5] == b"\x7fELF\x02"
    offset, size, count, names = struct.unpack_from("<Q10xHHH", elf, 40)
    heads = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + size * i) for i in range(count)]
    strings = elf[heads[names][4] :]

    def content(head: tuple[int, ...]) -> bytes:
        return b"" if head[1] == 8 else elf[head[4] : head[4] + head[5]]  # 8: nothing in the file

    return [(strings[h[0] : strings.index(b"\0", h[0])].decode(), h[1], content(h)) for h in heads]


def unbundle(data: bytes) -> dict[str, bytes]:
    """The entries of clang's offload bundle."""
    assert data.startswith(b"__CLANG_OFFLOAD_BUNDLE__")
    (count,), at = struct.unpack_from("<Q", data, 24), 32
    entries = {}
    for _ in range(count):
        offset, size, length = struct.unpack_from("<QQQ", data, at)
        entries[data[at + 24 : at + 24 + length].decode()] = data[offset : offset + size]
        at += 24 + length
    return entries


def rocm_objects(bundle: Path) -> dict[str, bytes]:
    """The code object of every architecture."""
    prefix = "hipv4-amdgcn-amd-amdhsa--"
    return {
        name[len(prefix) :]: data for name, data in unbundle(bundle.read_bytes()).items() if name.startswith(prefix)
    }


def rocm_kernels(code_object: bytes) -> dict[str, Kernel]:
    """The kernels of one code object, from its metadata note."""
    found = {}
    for entry in _metadata(code_object)["amdhsa.kernels"]:
        explicit = [arg for arg in entry[".args"] if not arg[".value_kind"].startswith("hidden_")]
        end = max(arg[".offset"] + arg[".size"] for arg in explicit)
        found[entry[".name"]] = Kernel(end, entry[".max_flat_workgroup_size"], entry[".private_segment_fixed_size"])
    return found


def _metadata(code_object: bytes) -> Any:
    (note,) = (content for _, kind, content in sections(code_object) if kind == 7)
    name_size, size, kind = struct.unpack_from("<III", note)
    assert (note[12 : 12 + name_size], kind) == (b"AMDGPU\0", 32)
    start = 12 + (name_size + 3) // 4 * 4
    return msgspec.msgpack.decode(note[start : start + size])


def tool(name: str) -> str:
    """A program of CUDA or LLVM, from Triton's package where the system has none. Skips where there is neither."""
    for candidate in (f"{name}-22", name):
        found = shutil.which(candidate)
        if found and (not name.startswith("llvm") or _llvm_version(found) >= compilers.OLDEST_CLANG):
            return found
    spec = find_spec("triton")
    if spec and spec.origin and (found := shutil.which(name, path=f"{Path(spec.origin).parent}/backends/nvidia/bin")):
        return found
    where = (
        "LLVM 20 or newer (`apt install llvm-22`)"
        if name.startswith("llvm")
        else "triton (`pip install triton`) or CUDA"
    )
    pytest.skip(f"{name} is not installed; it comes with {where}")


def _llvm_version(program: str) -> int:
    found = re.search(r"LLVM version (\d+)", _printed(program, "--version"))
    return int(found[1]) if found else 0


def _printed(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cubins(fatbin: Path) -> dict[str, bytes]:
    """The machine code of every architecture of a fat binary, by names like sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "--extract-elf", "all", str(fatbin.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return {path.name.split(".")[-2]: path.read_bytes() for path in Path(folder).glob("*.cubin")}


def cuda_kernels(cubin: bytes) -> dict[str, Kernel]:
    """The kernels of one cubin, from the records in its .nv.info sections."""
    found = {}
    for name, _, content in sections(cubin):
        if not name.startswith(".nv.info."):
            continue
        values, at = {}, 0
        while at < len(content):
            kind, attribute, word = struct.unpack_from("<BBH", content, at)
            values[attribute] = content[at + 4 : at + 4 + word] if kind == 4 else word
            at += 4 + (word if kind == 4 else 0)
        x, y, z = struct.unpack("<III", values[0x05])  # EIATTR_MAX_THREADS
        (size,) = struct.unpack_from("<I", values[0x17], 8)  # EIATTR_KPARAM_INFO, of the one parameter
        found[name[len(".nv.info.") :]] = Kernel(size >> 18, x * y * z, 0)
    return found


def disassemble_rocm(code_object: bytes) -> str:
    """Instructions of AMD's, one a line."""
    with tempfile.NamedTemporaryFile(suffix=".hsaco") as file:
        file.write(code_object)
        file.flush()
        return _printed(tool("llvm-objdump"), "-d", file.name)


def disassemble_cuda(cubin: bytes) -> str:
    """Instructions of NVIDIA's, one a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _printed(tool("nvdisasm"), "-c", file.name)


def by_function(disassembly: str) -> dict[str, str]:
    """A disassembly cut at the labels of its functions."""
    parts = re.split(r"^(?:\.text\.(\w+):|[0-9a-f]{16} <(\w+)>:)$", disassembly, flags=re.MULTILINE)
    return {a or b: text for a, b, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
