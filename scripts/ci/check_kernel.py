"""Run where sgl-kernel is installed and torch is not: it imports, works on the host and says why it cannot go on."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

TOLD = {
    "cpu": r"this build of sgl-kernel holds no GPU code: install its \+cu or \+rocm wheel",
    "cuda": r"no NVIDIA driver: libcuda\.so\.1 could not be loaded",
    "rocm": r"no ROCm runtime: libamdhip64\.so could not be loaded; install ROCm or a ROCm build of torch",
}
DRIVERS = ("libcuda.so.1", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so")


def hide_drivers() -> None:
    """Start again where no driver can be loaded, so that this says the same on a machine with a GPU."""
    if "HIDDEN_DRIVERS" in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in DRIVERS:
            Path(folder, name).write_text("no library")
        env = {**os.environ, "HIDDEN_DRIVERS": folder, "LD_LIBRARY_PATH": folder}
        sys.exit(os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *sys.argv], env))


def refusal() -> tuple[str, str]:
    """The target of the library, and what its first call says here."""
    import tvm_ffi

    folder = find_spec("sgl_kernel").submodule_search_locations[0]  # type: ignore[union-attr,index]
    library = tvm_ffi.load_module(str(Path(folder, "_sgl_kernel.so")))
    try:
        library.preload(0)
    except RuntimeError as error:
        return library.target(), str(error)
    sys.exit("a call without a driver did not fail")


def main() -> None:
    """Exit 1 with what is wrong, or print what was seen."""
    hide_drivers()
    import sgl_kernel

    assert not find_spec("torch"), "this environment is to have no torch"
    assert not {"numpy", "tvm_ffi"} & set(sys.modules), "importing sgl_kernel is to import nothing else"
    layout = sgl_kernel.LoraLayout([sgl_kernel.LoraGroup("o", 16, (8,))], 2, 4)
    assert layout.slab_bytes > 0
    target, told = refusal()
    assert re.match(TOLD[target], told), told
    found = version("sgl-kernel")
    assert {"cuda": "+cu", "rocm": "+rocm"}.get(target, "") in found and ("+" in found) == (target != "cpu"), found
    sys.stdout.write(f"sgl-kernel {found}, target {target}: imports without torch; a call says: {told}\n")


if __name__ == "__main__":
    main()
