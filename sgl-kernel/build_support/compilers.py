"""Finds the compiler of a vendor's device code. CMake asks `python compilers.py cuda|rocm`; the version and the build's
requirements ask here too, so that all agree.

Nothing but the standard library is needed. A compiler is a command line: a path, or several words.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

ZIGLANG = "ziglang==0.17.1"
"""A clang with an AMD back end and a linker, as a Python package; its word `clang` is undocumented, hence the pin."""
OLDEST_CLANG = 20  # the first one that knows gfx950
_CLANGS = ("amdclang++", "clang++-22", "clang++-23", "clang++", "clang++-21", "clang++-20")


class MissingCompiler(Exception):
    """Nothing on this machine compiles for the vendor."""


def find_nvcc() -> str:
    """nvcc: of $CUDA_HOME, else on the path, else where CUDA is by default.

    Raises:
        MissingCompiler: says what to install.
    """
    home = os.environ.get("CUDA_HOME")
    for place in (home and f"{home}/bin", None, "/usr/local/cuda/bin"):
        if place != "" and (found := shutil.which("nvcc", path=place)):
            return os.path.realpath(found)
    raise MissingCompiler("no nvcc: install CUDA 12.8 or newer, or set CUDA_HOME")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """(13, 0) of CUDA 13.0."""
    found = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if not found:
        raise MissingCompiler(f"{nvcc} --version names no release")
    return int(found[1]), int(found[2])


def find_clang() -> str:
    """A clang that compiles for all AMD GPUs: ROCm's, the system's, else that of Python's package ziglang.

    Raises:
        MissingCompiler: says what to install.
    """
    if found := system_clang():
        return found
    if importlib.util.find_spec("ziglang"):
        return shlex.join([sys.executable, "-m", "ziglang", "clang"])
    raise MissingCompiler(
        f"no clang {OLDEST_CLANG} or newer with an AMD GPU back end: install clang-22, ROCm or `pip install {ZIGLANG}`"
    )


def system_clang() -> str | None:
    """The path of a clang that is new enough and has the back end."""
    folders = [f"{root}/llvm/bin" for root in (os.environ.get("ROCM_PATH"), "/opt/rocm") if root]
    for path in (os.pathsep.join(folders), None):
        for name in _CLANGS:
            found = shutil.which(name, path=path)
            if found and _version(found) >= OLDEST_CLANG and "amdgcn" in _output(found, "--print-targets"):
                return found
    return None


def _version(clang: str) -> int:
    found = re.search(r"clang version (\d+)", _output(clang, "--version"))
    return int(found[1]) if found else 0


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def main(argv: list[str]) -> int:
    """Print the compiler of one vendor."""
    try:
        print({"cuda": find_nvcc, "rocm": find_clang}[argv[0]]())
    except MissingCompiler as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
