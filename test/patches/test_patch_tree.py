"""Apply, verify, revert and status on disk: whole or not at all, and back bit for bit."""

from __future__ import annotations

import json
import os
import shutil

import pytest

pytest.importorskip("libcst", reason="the patcher needs libcst: pip install libcst")

from sglang_lora_patch import tree
from sglang_lora_patch.__main__ import main
from sglang_lora_patch.transform import Refusal
from toy_stock import RUN, TARGETS, run, write


def snapshot(site):
    """Content, mode and time of every file."""
    files = sorted(file for file in site.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {
        str(file.relative_to(site)): (file.read_bytes(), file.stat().st_mode, file.stat().st_mtime_ns) for file in files
    }


@pytest.fixture(autouse=True)
def no_hook(monkeypatch):
    monkeypatch.delenv("SGLANG_LORA_PATCH", raising=False)


def test_apply_verify_revert(toy):
    (toy / "sglang" / TARGETS[0]).chmod(0o640)
    before = snapshot(toy)
    found = tree.find(toy)
    assert found.version == "0.5.12" and tree.state(found) == "clean"
    assert tree.apply(found) == TARGETS
    assert tree.state(found) == "patched"
    assert tree.verify(found)["TokenizerManager"].count("generate_request") == 1
    after = snapshot(toy)
    changed = {path for path in before if before[path][:2] != after[path][:2]}
    assert changed == {f"sglang/{path}" for path in TARGETS}
    assert tree.revert(found) == TARGETS
    assert snapshot(toy) == before and tree.state(found) == "clean"


def test_the_patched_tree_needs_nothing_of_the_patcher(toy):
    tree.apply(tree.find(toy), check_import=False)
    code = "import sys, sglang.srt.managers.tokenizer_manager as t\n"
    code += "print(t._lora_patch.__name__, 'sglang_lora_patch' in sys.modules)"
    assert run(toy, code).stdout.split() == ["sglang._lora_patch.runtime", "False"]


def test_every_path_of_the_toy(toy):
    stock = json.loads(run(toy, RUN).stdout)
    assert stock["abort_queued"] == [1, 1, ["A"]] and stock["too_long"][0] == 1
    assert stock["failed_by_scheduler"][0] < 0 and "KeyError" in stock["n3"]
    assert "Timeout" in stock["evict_busy"] and "Timeout" in stock["unload_busy"]
    tree.apply(tree.find(toy), check_import=False)
    patched = json.loads(run(toy, RUN, SGLANG_LORA_PATCH_UNLOAD_TIMEOUT="0.05").stdout)
    backends = {"evict_busy": ["B", "C"], "unload_busy": ["B"], "evict_and_use_again": ["A", "B", "C"]}
    backends |= {"unload_cancelled": [], "load_the_leaving_too_long": []}
    assert patched == {path: [0, 0, backends.get(path, ["A"])] for path in stock}


def test_hard_links_are_not_written_through(toy, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(toy, store, copy_function=lambda source, target: os.link(source, target))
    before = snapshot(store)
    tree.apply(tree.find(toy), check_import=False)
    assert snapshot(store) == before


def test_stale_byte_code_goes(toy):
    cached = toy / "sglang/srt/lora/__pycache__/lora_registry.cpython-311.pyc"
    cached.parent.mkdir()
    cached.write_bytes(b"old")
    tree.apply(tree.find(toy), check_import=False)
    assert not cached.exists()


@pytest.mark.parametrize("version", ["0.5.8", "0.5.22", "0.5.23", "0.5.12+lora.1"])
def test_refused_version_changes_nothing(tmp_path, capsys, version):
    site = write(tmp_path / "site", version)
    before = snapshot(site)
    assert main(["apply", "--site", str(site)]) == 1
    assert version in capsys.readouterr().err and snapshot(site) == before


def test_refused_structure_changes_nothing(toy, capsys):
    file = toy / "sglang" / TARGETS[0]
    file.write_text(file.read_text().replace("def acquire", "def take"))
    before = snapshot(toy)
    assert main(["apply", "--site", str(toy)]) == 1
    assert "acquire found 0" in capsys.readouterr().err and snapshot(toy) == before


def test_failed_import_puts_everything_back(toy):
    (toy / "sglang/srt/managers/io_struct.py").write_text("raise RuntimeError('no driver')\n")
    before = snapshot(toy)
    with pytest.raises(Refusal, match=r"no driver.*--no-import"):
        tree.apply(tree.find(toy))
    assert snapshot(toy) == before


def test_failed_write_puts_everything_back(toy, monkeypatch):
    before, replace, calls = snapshot(toy), tree._replace, []

    def full_disk(file, *args, **kwargs):
        calls.append(file)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(file, *args, **kwargs)

    monkeypatch.setattr(tree, "_replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        tree.apply(tree.find(toy), check_import=False)
    assert snapshot(toy) == before


def test_changed_after_the_patch(toy):
    found = tree.find(toy)
    before = snapshot(toy)
    tree.apply(found, check_import=False)
    file = toy / "sglang" / TARGETS[0]
    file.write_text(file.read_text() + "\n# edited\n")
    assert tree.state(found) == "damaged"
    with pytest.raises(Refusal, match="--force"):
        tree.revert(found)
    tree.revert(found, force=True)
    assert snapshot(toy) == before


def test_lost_original(toy):
    found = tree.find(toy)
    tree.apply(found, check_import=False)
    (found.folder / "original" / f"{TARGETS[0]}.orig").unlink()
    with pytest.raises(Refusal, match=r"reinstall sglang 0\.5\.12"):
        tree.revert(found)
    assert tree.state(found) == "patched"


def test_reinstalled_over_the_patch(toy):
    found = tree.find(toy)
    originals = {path: (toy / "sglang" / path).read_bytes() for path in TARGETS}
    tree.apply(found, check_import=False)
    for path, data in originals.items():
        (toy / "sglang" / path).write_bytes(data)
    assert tree.state(found) == "stale"
    assert tree.apply(found, check_import=False) == TARGETS
    assert tree.state(found) == "patched"


def test_command_line(toy, capsys):
    assert main(["status", "--site", str(toy)]) == 0
    assert main(["apply", "--site", str(toy)]) == 0
    assert main(["verify", "--site", str(toy)]) == 0
    assert main(["apply", "--site", str(toy)]) == 1
    assert main(["revert", "--site", str(toy)]) == 0
    assert main(["revert", "--site", str(toy)]) == 1
    shown = capsys.readouterr()
    assert "clean" in shown.out and "imported and checked" in shown.out and "put back" in shown.out
    assert "patched already" in shown.err and "is not patched" in shown.err


def test_wrong_folder(tmp_path):
    with pytest.raises(Refusal, match="no sglang package"):
        tree.find(tmp_path, "0.5.12")
