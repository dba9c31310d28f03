"""Compiles the CPU kernels for the processor they run on, once per machine, and loads them.

Called by ops/packed and ops/cpu/kernels. The library is kept in the user's cache directory under a name that hashes
source, compiler and processor, so a new one of any of the three is built anew. Without a C++ compiler there is no
library, and the callers use torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("packed_linear.cpp", "decode.cpp"))
FLAGS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-fPIC", "-fopenmp", "-w")
BUILD_SECONDS = 120


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, built if need be; None, with one warning, where it cannot be built or loaded."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        logger.warning("no C++ compiler: CPU kernels cannot be built, weights are widened to float32 and run on torch")
        return None
    # Loaded into this process by torch already: linking a second OpenMP would put two thread pools on the same cores.
    assert torch.backends.openmp.is_available()
    try:
        path = _cache_directory() / f"kernels-{_fingerprint(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", b"") or b""
        logger.warning("CPU kernels cannot be built, running on torch instead: %s %s", error, output.decode()[-500:])
        return None


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(root) / "sglang" / "cpu_kernels"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=BUILD_SECONDS).stdout
    parts = [*(source.read_bytes() for source in SOURCES), version, " ".join(FLAGS).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at: the instruction sets, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.machine())


def _build(compiler: str, path: Path) -> None:
    """Compile next to the target and move it there, so that a concurrent start never loads half a file."""
    logger.info("building CPU kernels for this processor (once)")
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        library = Path(directory) / "kernels.so"
        objects = [str(Path(directory) / f"{source.stem}.o") for source in SOURCES]
        commands = [
            *([compiler, *FLAGS, "-c", str(s), "-o", o] for s, o in zip(SOURCES, objects, strict=True)),
            [compiler, "-shared", "-o", str(library), *objects, "-lm"],
        ]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
        os.replace(library, path)
