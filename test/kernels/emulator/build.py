"""Compiles kernels for the emulator: one small library for every .cu file and vendor, kept by the hash of what went in.

The runtime is compiled once and linked into each. Set `CXX` to use another compiler than g++; clang++ works as well.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
KERNEL_ROOT = HERE.parents[2] / "sgl-kernel"
RUNTIME = ("launch.cpp", "memory.cpp", "instructions.cpp", "warpgroup.cpp", "hooks.cpp")
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -ffp-contract=off -Wall -Wno-unknown-pragmas".split()
KEPT_SECONDS = 7 * 86400
# Every access of a kernel calls the runtime: see hooks.cpp.
CHECKS = ["-fsanitize=thread,alignment,bounds"]


@dataclass(frozen=True)
class Sources:
    """Kernels as text, so that tests can change some of it.

    Attributes:
        root: has include/sgl_kernel and csrc/kernels.
        changed: text of files that differ from those on disk, by path relative to `root`.
        optimize: how far to; ``-O0`` compiles in a third of the time and runs three times as long.
    """

    root: Path = KERNEL_ROOT
    changed: tuple[tuple[str, str], ...] = ()
    optimize: str = "-O1"

    def text(self, path: str) -> str:
        """Of a file, e.g. ``csrc/kernels/gemm.h``."""
        return dict(self.changed).get(path) or (self.root / path).read_text()

    def add(self, path: str, text: str) -> Sources:
        """The same with another file."""
        return replace(self, changed=(*((p, t) for p, t in self.changed if p != path), (path, text)))

    def replace(self, path: str, old: str, new: str) -> Sources:
        """The same with one passage of a file replaced; it must be there exactly once."""
        text = self.text(path)
        assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
        return self.add(path, text.replace(old, new))


def build_library(sources: Sources, kernel_file: str, vendor: str) -> Path:
    """The library of one .cu file of csrc/kernels for ``cuda`` or ``hip``."""
    flags = [*FLAGS, *CHECKS, sources.optimize, "-DSGL_EMULATE", f"-DSGL_EMULATE_{vendor.upper()}"]
    unit = f"csrc/kernels/{kernel_file}"
    used = _reachable(sources, unit)
    texts = {path: sources.text(path) for path in used}
    objects = [_runtime_object(name) for name in RUNTIME]
    key = _key(*flags, *texts.values(), *_emulator_texts())
    library = _cache() / f"{kernel_file}-{vendor}-{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        for path, text in texts.items():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        glue = Path(folder, "glue.cpp")
        glue.write_text(f'#include "{folder}/{unit}"\n{_describe_layout(sources)}')
        include = [f"-I{folder}/include", f"-I{folder}/csrc/kernels", f"-I{HERE}"]
        made = Path(folder, "made.so")
        _run(*flags, *include, "-c", str(glue), "-o", f"{folder}/glue.o")
        # Linked without the sanitizers: their libraries would take over the process.
        _run("-shared", "-Wl,-Bsymbolic", f"{folder}/glue.o", *objects, "-o", str(made))
        made.rename(library)
    return library


def structs(sources: Sources) -> dict[str, list[tuple[str, str, int]]]:
    """Fields of every struct of args.h: type, name, length of an array or 0."""
    text = re.sub(r"//[^\n]*", "", sources.text("include/sgl_kernel/args.h"))
    lengths = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    found = {}
    for struct, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for type_, names in re.findall(r"((?:const )?\w+\*?) ([\w, \[\]]+);", body):
            for name, length in re.findall(r"(\w+)(?:\[(\w+)\])?", names):
                fields.append((type_, name, lengths[length] if length else 0))
        found[struct] = fields
    return found


def _describe_layout(sources: Sources) -> str:
    """C++ that tells how the compiler lays the structs of args.h out, and what geometry.h says."""
    code = [
        "#include <cstddef>",
        '#include "sgl_kernel/geometry.h"',
        'extern "C" {',
        "#pragma GCC visibility push(default)",
    ]
    for struct, fields in structs(sources).items():
        offsets = ", ".join(f"offsetof(sgl::{struct}, {name})" for _, name, _ in fields)
        code.append(f"extern const size_t layout_{struct}[] = {{sizeof(sgl::{struct}), {offsets}}};")
    geometry = sources.text("include/sgl_kernel/geometry.h")
    for name, parameters in re.findall(r"^constexpr int (\w+)\(([^)]*)\)", geometry, re.MULTILINE):
        names = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        code.append(f"int geometry_{name}({parameters}) {{ return sgl::{name}({names}); }}")
    for name in re.findall(r"^constexpr int (\w+) = ", geometry, re.MULTILINE):
        code.append(f"int geometry_{name}() {{ return sgl::{name}; }}")
    return "\n".join([*code, "}", ""])


def _reachable(sources: Sources, unit: str) -> list[str]:
    """The unit, args.h, geometry.h and all that they include of the kernels' own files."""
    found: set[str] = set()
    queue = [unit, "include/sgl_kernel/args.h", "include/sgl_kernel/geometry.h"]
    while queue:
        path = queue.pop()
        found.add(path)
        for name in re.findall(r'#include "([^"]+)"', sources.text(path)):
            places = (f"{Path(path).parent}/{name}", f"include/{name}")
            queue += [p for p in places if p not in found and (sources.root / p).exists()]
    return sorted(found)


@lru_cache
def _runtime_object(name: str) -> str:
    flags = [*FLAGS, "-O2"]
    made = _cache() / f"{name}-{_key(*flags, *_emulator_texts())}.o"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            _run(*flags, "-c", str(HERE / name), "-o", f"{folder}/made.o")
            Path(folder, "made.o").rename(made)
    return str(made)


@lru_cache
def _emulator_texts() -> tuple[str, ...]:
    return tuple(p.read_text() for p in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]))


@lru_cache
def _compiler() -> tuple[str, str]:
    name = os.environ.get("CXX", "g++")
    return name, subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout


@lru_cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sgl-kernel-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for old in folder.glob("*.*"):
        if old.is_file() and old.stat().st_mtime < time.time() - KEPT_SECONDS:
            old.unlink(missing_ok=True)
    return folder


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((*_compiler(), *parts)).encode()).hexdigest()[:20]


def _run(*arguments: str) -> None:
    result = subprocess.run([_compiler()[0], *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr}")
