"""The distribution's version: the package's own, and which GPUs the wheel is for as a local version (+cu130, +rocm)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from compilers import find_nvcc, nvcc_version

VERSION_FILE = Path(__file__).parents[1] / "python/sgl_kernel/version.py"


def dynamic_metadata(field: str, settings: Mapping[str, object] | None = None, *_: object) -> str:
    """Called by scikit-build-core for `version`."""
    found = re.search(r'__version__ = "([^"]+)"', VERSION_FILE.read_text())
    assert found and field == "version"
    return found[1] + local_version(os.environ.get("SGL_KERNEL_TARGET", "cpu"))


def local_version(target: str) -> str:
    """What a target adds: the CUDA release decides which drivers can run the wheel, the ROCm release does not."""
    if target == "cuda":
        return "+cu{}{}".format(*nvcc_version(find_nvcc()))
    if target in ("rocm", "cpu"):
        return "+rocm" if target == "rocm" else ""
    raise ValueError(f"SGL_KERNEL_TARGET must be cuda, rocm or cpu, got {target!r}")
