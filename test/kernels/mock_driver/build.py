"""One build of every target a session, kept by the hash of what goes in; most of a second run's time is saved."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "sgl-kernel"
KEPT_SECONDS = 7 * 86400
SUFFIX = {"cuda": "fatbin", "rocm": "hipfb"}
sys.path.insert(0, str(PROJECT / "build_support"))
import compilers  # noqa: E402 - what the build itself uses


@dataclass(frozen=True)
class Build:
    """What `pip wheel` made of a target: the wheel, its library, and the code objects inside of it by source."""

    target: str
    folder: Path
    wheel: Path
    library: Path

    @property
    def images(self) -> dict[str, Path]:
        suffix = SUFFIX.get(self.target, "none")
        return {path.stem: path for path in sorted((self.folder / "build").glob(f"*.{suffix}"))}

    def cached(self, variable: str) -> str:
        """The value of a variable of CMake's cache."""
        for line in (self.folder / "build/CMakeCache.txt").read_text().splitlines():
            if line.startswith(f"{variable}:"):
                return line.split("=", 1)[1]
        raise KeyError(variable)


def build(target: str) -> Build:
    """The wheel of a target by a user's command, with what is installed here. Skips where a tool is missing."""
    built = _build(target)
    if isinstance(built, str):
        pytest.fail(f"the build for {target} failed:\n{built}", pytrace=False)
    return built


@lru_cache
def _build(target: str) -> Build | str:
    """The build, or what was printed by one that failed, so that it is tried once a session."""
    for module in ("scikit_build_core", "tvm_ffi"):
        if not importlib.util.find_spec(module):
            pytest.skip(f"{module} is not installed; `make venv` installs it")
    if not shutil.which("g++") or not (shutil.which("cmake") or importlib.util.find_spec("cmake")):
        pytest.skip("g++ or cmake is not installed")
    folder = _cache() / f"{target}-{_digest(_native_files(), _tools(target))}"
    python = _digest(sorted((PROJECT / "python").rglob("*.py")), "")
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dist = folder / f"dist-{python}"
        if not dist.exists() and (text := _pip_wheel(target, folder, dist)):
            return text
    (wheel,) = dist.glob("*.whl")
    return Build(target, folder, wheel, dist / "sgl_kernel/_sgl_kernel.so")


def compiler(vendor: str) -> str:
    """The compiler of a vendor's device code. Skips where there is none."""
    try:
        return {"cuda": compilers.find_nvcc, "rocm": compilers.find_clang}[vendor]()
    except compilers.MissingCompiler as error:
        pytest.skip(str(error))


def _pip_wheel(target: str, folder: Path, dist: Path) -> str:
    """Fill `dist`; what pip printed, if it failed."""
    command = [sys.executable, "-m", "pip", "wheel", str(PROJECT), "--no-deps", "--no-index", "--no-build-isolation"]
    env = os.environ | {"SGL_KERNEL_TARGET": target, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        options = ["-w", made, f"-Cbuild-dir={folder}/build"]
        done = subprocess.run(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        if done.returncode:
            return done.stdout
        (wheel,) = Path(made).glob("*.whl")
        zipfile.ZipFile(wheel).extract("sgl_kernel/_sgl_kernel.so", made)
        Path(made).rename(dist)
        Path(made).mkdir()
    return ""


def _native_files() -> list[Path]:
    folders = (PROJECT / "csrc", PROJECT / "include", PROJECT / "build_support")
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".cu", ".cc", ".h", ".py", ".map")
    ]
    return sorted([*files, ROOT / "CMakeLists.txt", PROJECT / "pyproject.toml"])


def _tools(target: str) -> str:
    from importlib.metadata import version

    words = [sys.executable, str(PROJECT), version("apache-tvm-ffi"), version("scikit-build-core")]
    if target != "cpu":
        words.append(compiler(target))
    return "\0".join(words)


def _digest(files: list[Path], more: str) -> str:
    digest = hashlib.sha256(more.encode())
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@lru_cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sgl-kernel-build-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for old in folder.iterdir():
        if old.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return folder
