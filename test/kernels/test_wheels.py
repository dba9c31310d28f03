"""The wheels: what is in them, and that they work where there is neither torch nor a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from kernels.mock_driver.build import PROJECT, Build, build, compiler, compilers

pytestmark = pytest.mark.slow
FUNCTIONS = "fused_add_rmsnorm lora_expand_add lora_shrink qk_norm_rope rmsnorm silu_and_mul skinny_gemm"
EXPORTS = {f"__tvm_ffi_{name}" for name in [*FUNCTIONS.split(), "preload", "target"]}

VERSION = (PROJECT / "python/sgl_kernel/version.py").read_text().split('__version__ = "')[1].split('"')[0]
NEEDED = ("apache-tvm-ffi", "numpy", "typing-extensions")
"""What the wheel requires, and what that requires."""


@pytest.fixture(scope="module", params=["cpu", "rocm", "cuda"])
def built(request: pytest.FixtureRequest) -> Build:
    return build(request.param)


def _readelf(library: Path, *options: str) -> str:
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed; it comes with binutils, as gcc does")
    return subprocess.run(["readelf", "-W", *options, str(library)], check=True, capture_output=True, text=True).stdout


def _local(target: str) -> str:
    if target == "cuda":
        return "+cu{}{}".format(*compilers.nvcc_version(compiler("cuda")))
    return {"cpu": "", "rocm": "+rocm"}[target]


def test_content(built: Build) -> None:
    stem = f"sgl_kernel-{VERSION}{_local(built.target)}"
    assert built.wheel.name == f"{stem}-py3-none-linux_x86_64.whl"
    files = set(zipfile.ZipFile(built.wheel).namelist())
    python = {str(path.relative_to(PROJECT / "python")) for path in (PROJECT / "python").rglob("*.py")}
    info = {f"{stem}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
    licence = files - python - info - {"sgl_kernel/_sgl_kernel.so", "sgl_kernel/py.typed"}
    assert files >= python | info | {"sgl_kernel/_sgl_kernel.so", "sgl_kernel/py.typed"}
    assert re.fullmatch(rf"{re.escape(stem)}\.dist-info/(licenses/)?LICENSE", licence.pop()) and not licence


def test_metadata(built: Build) -> None:
    wheel = zipfile.ZipFile(built.wheel)
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("sgl-kernel", VERSION + _local(built.target))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sorted(re.split(r"[<>=]", line)[0] for line in metadata.get_all("Requires-Dist")) == [
        "apache-tvm-ffi",
        "numpy",
    ]


def test_library_needs_nothing_of_a_vendor(built: Build) -> None:
    dynamic = _readelf(built.library, "--dynamic")
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libtvm_ffi.so" in needed
    assert needed <= {
        "libtvm_ffi.so",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_library_exports_its_functions_only(built: Build) -> None:
    symbols = [line.split() for line in _readelf(built.library, "--dyn-syms").splitlines() if re.match(r" +\d+:", line)]
    defined = {words[7] for words in symbols if len(words) > 7 and words[6] != "UND"}
    assert defined == EXPORTS
    assert ".symtab" not in _readelf(built.library, "--sections")


def test_wheel_fits_a_manylinux_policy(built: Build) -> None:
    if not importlib.util.find_spec("auditwheel"):
        pytest.skip("auditwheel is not installed; `pip install auditwheel` installs it")
    command = [sys.executable, "-m", "auditwheel", "show", str(built.wheel)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"manylinux_2_\d+_x86_64", text), text  # which one depends on the machine that built it


# ---- in an environment of its own ------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import sgl_kernel
assert not {"torch", "numpy", "tvm_ffi"} & set(sys.modules)
import numpy as np
from sgl_kernel import LoraGroup, LoraLayout, LoraModule, BatchShape, build_batch, pack_slab, unpack_slab
layout = LoraLayout([LoraGroup("o", 16, (8,))], 2, 4)
a, b = np.ones((3, 16), np.float32), np.ones((8, 3), np.float32)
slab = np.zeros(layout.slab_bytes, np.uint8)
pack_slab(layout, [LoraModule(1, "o", 0, 0.5, a, b)], slab)
modules = list(unpack_slab(layout, slab))
words = build_batch(np.array([0, -1], np.int32), np.array([3, 0], np.int32), BatchShape(4, 2, 16))
try:
    import torch
except ImportError:
    torch = None
import tvm_ffi
from importlib.metadata import version
from pathlib import Path
library = tvm_ffi.load_module(str(Path(sgl_kernel.__file__).with_name("_sgl_kernel.so")))
try:
    library.preload(0)
except RuntimeError as error:
    text = str(error)
print(json.dumps({
    "version": version("sgl-kernel"), "file": sgl_kernel.__file__, "modules": len(modules), "words": len(words),
    "torch": torch is not None, "target": library.target(), "error": text,
}))
"""
ERRORS = {
    "cpu": r"this build of sgl-kernel holds no GPU code: install its \+cu or \+rocm wheel",
    "cuda": r"no NVIDIA driver: libcuda\.so\.1 could not be loaded \(.+\)",
    "rocm": r"no ROCm runtime: libamdhip64\.so could not be loaded; install ROCm or a ROCm build of torch",
}
DRIVERS = ("libcuda.so.1", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")


def _environment(folder: Path) -> Path:
    """A virtual environment without torch: what the wheel needs is linked from this one, as nothing is downloaded."""
    from importlib.metadata import distribution

    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in NEEDED:
        found = distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
    return folder / "bin/python"


def test_installed(built: Build, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-index", str(built.wheel)], check=True, capture_output=True)
    hidden = tmp_path / "drivers"  # those of a machine that has a GPU
    hidden.mkdir()
    for name in DRIVERS:
        (hidden / name).write_text("no library")
    env = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(hidden)}
    done = subprocess.run([str(python), "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"].startswith(str(tmp_path)) and not told["torch"]
    assert (told["target"], told["version"]) == (built.target, VERSION + _local(built.target))
    assert told["modules"] == 1 and told["words"] > 8
    assert re.fullmatch(ERRORS[built.target], told["error"])


# ---- the version -----------------------------------------------------------------------------------------------------


def test_an_unknown_target_has_no_version() -> None:
    sys.path.insert(0, str(PROJECT / "build_support"))
    from kernel_version import local_version

    assert local_version("cpu") == "" and local_version("rocm") == "+rocm"
    with pytest.raises(ValueError, match="SGL_KERNEL_TARGET must be cuda, rocm or cpu, got 'metal'"):
        local_version("metal")
