"""The route without `apply`: transform the modules while they are imported.

Owns one import finder. It is installed by `sglang_lora_patch.pth` when the variable `SGLANG_LORA_PATCH` is set to
anything but 0; otherwise that line reads the environment and this module is never imported. The files on disk stay as
they are. All modules are planned together at the first import of one of them: either all are transformed or, with one
message, none.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

VARIABLE = "SGLANG_LORA_PATCH"
TARGETS = (
    "sglang.srt.managers.tokenizer_manager",
    "sglang.srt.managers.tokenizer_control_mixin",
    "sglang.srt.managers.tokenizer_communicator_mixin",
    "sglang.srt.lora.lora_registry",
)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from changed source; the byte code cache belongs to the file on disk and is not used."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._changed = source

    def get_code(self, fullname: str) -> CodeType:
        code = self.source_to_code(self._changed, self.get_filename(fullname))
        assert isinstance(code, CodeType)
        return code


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `TARGETS` as everybody else would, and hands out their changed source."""

    def __init__(self) -> None:
        self._plans: dict[Path, dict[str, bytes]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec with our loader for a module to change; None for every other."""
        if fullname not in TARGETS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return spec
        file = Path(spec.origin)
        package = file.parents[fullname.count(".") - 1]
        changed = self._plan(package).get(file.relative_to(package).as_posix())
        if changed is not None:
            spec.loader = _Loader(fullname, spec.origin, changed)
        return spec

    def _plan(self, package: Path) -> dict[str, bytes]:
        if package not in self._plans:
            self._plans[package] = _plan(package)
        return self._plans[package]


def _plan(package: Path) -> dict[str, bytes]:
    # Imported here: only a process that comes to one of the modules pays for libcst.
    from . import transform, tree, versions

    try:
        found = tree.find(package.parent, os.environ.get(f"{VARIABLE}_ASSUME"))
        if tree.state(found) == "patched":
            return {}
        reason = versions.why_not(found.version)
        if reason is not None:
            raise transform.Refusal(reason)
        return transform.plan(found.package, transform.INSTALLED_RUNTIME)
    except transform.Refusal as refusal:
        sys.stderr.write(f"sglang-lora-patch: {VARIABLE} is set, but {refusal}\n")
        return {}


def install() -> None:
    """Put the finder first in line, once."""
    if not any(isinstance(each, Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, Finder())
