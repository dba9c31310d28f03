"""Imports point down, front and back never meet, and each heavy package has one home."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_law import BACK, FRONT, NAMESPACES, ONLY, SHARED, TRAINER, Import, imports_of, modules, place

MODULES = modules()
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path, MODULES)]
OURS = [found for found in IMPORTS if found.target.split(".")[0] == "sglang"]


def where(found: Import) -> str:
    return f"{found.importer}:{found.line} imports {found.target}"


def test_every_module_has_a_place():
    homeless = [name for name in MODULES if place(name) is None]
    assert not homeless, f"give these a level in test/import_law.py: {homeless}"


def test_every_import_of_ours_exists():
    missing = [where(found) for found in OURS if found.target not in MODULES]
    assert not missing, missing


def breaks_the_law(found: Import) -> bool:
    importer, target = place(found.importer), place(found.target)
    if importer is None or target is None:
        return False
    sides = {importer[1], target[1]}
    return target[0] > importer[0] or sides == {FRONT, BACK}


def test_imports_point_down_and_sides_never_meet():
    broken = [where(found) for found in OURS if breaks_the_law(found)]
    assert not broken, broken


def may_import(found: Import, homes: tuple[str, ...]) -> bool:
    level = place(found.importer)
    if level is not None and level[1] in homes:
        return True
    return any(found.importer == home or found.importer.startswith(home + ".") for home in homes)


@pytest.mark.parametrize("package", sorted(ONLY))
def test_heavy_packages_have_one_home(package: str):
    users = [f for f in IMPORTS if f.target.split(".")[0] == package and not f.typing_only]
    strangers = [where(f) for f in users if not may_import(f, ONLY[package])]
    assert not strangers, strangers


def test_safetensors_for_torch_counts_as_torch():
    users = [f for f in IMPORTS if f.target == "safetensors.torch"]
    assert not [where(f) for f in users if not may_import(f, (BACK, TRAINER))]


def test_no_cycles():
    """No module imports itself through others, at any depth, imports inside functions included."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in OURS:
        if not found.typing_only and found.target != found.importer:
            graph[found.importer].add(found.target)
    while True:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        if not leaves:
            break
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"cycles among {sorted(graph)}"


def test_package_files_pull_in_none_of_their_modules():
    """Importing one module runs the package files above it: what they import themselves must be shared and light."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    eager = [found for found in OURS if found.importer in packages and not (found.typing_only or found.lazy)]
    inner = [found for found in eager if found.target.startswith(found.importer + ".")]
    heavy = [where(found) for found in inner if place(found.target) not in ((0, SHARED), (1, SHARED))]
    assert not heavy, heavy
    assert set(NAMESPACES) <= packages


def test_the_walk_sees_lazy_relative_and_typing_imports(tmp_path: Path):
    source = (
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "from . import errors\n"
        "def f():\n    from ..srt import environ as e\n    import importlib\n"
        "    importlib.import_module('zmq')\n"
    )
    path = tmp_path / "x.py"
    path.write_text(source)
    seen = {(f.target, f.typing_only, f.lazy) for f in imports_of("sglang.srt.x", path, MODULES)}
    assert {
        ("torch", True, False),
        ("sglang.srt.errors", False, False),
        ("sglang.srt.environ", False, True),
        ("zmq", False, True),
    } <= seen


def test_the_law_bites():
    assert breaks_the_law(Import("sglang.srt.utils.x", "sglang.srt.config.resolve", 1))
    assert breaks_the_law(Import("sglang.srt.entrypoints.engine", "sglang.srt.managers.scheduler", 1))
    assert breaks_the_law(Import("sglang.srt.managers.scheduler", "sglang.srt.parser.tokenizer", 1))
    assert breaks_the_law(Import("sglang.srt.ops.x", "sglang.srt.layers.x", 1))
    assert not breaks_the_law(Import("sglang.srt.models.x", "sglang.srt.layers.x", 1))
    assert place("sglang.srt.surprise") is None
