"""What pip calls to build the wheel: scikit-build-core, which runs CMake, with two additions.

On a machine without a clang for AMD GPUs a build for ROCm asks for one from Python's package index. Source
distributions are refused: CMakeLists.txt and LICENSE lie above this project.
"""

from __future__ import annotations

import os
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import build_editable as build_editable
from scikit_build_core.build import build_wheel as build_wheel
from scikit_build_core.build import prepare_metadata_for_build_editable as prepare_metadata_for_build_editable
from scikit_build_core.build import prepare_metadata_for_build_wheel as prepare_metadata_for_build_wheel

from compilers import ZIGLANG, system_clang

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What has to be installed before `build_wheel`."""
    return [*_build.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """What has to be installed before `build_editable`."""
    return [*_build.get_requires_for_build_editable(config_settings), *_compiler()]


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Refused."""
    raise RuntimeError(
        "sgl-kernel has no source distribution: build a wheel from the repository (pip wheel ./sgl-kernel)"
    )


def _compiler() -> list[str]:
    return [ZIGLANG] if os.environ.get("SGL_KERNEL_TARGET") == "rocm" and system_clang() is None else []
