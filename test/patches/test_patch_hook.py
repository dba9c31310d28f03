"""The route without installing: one line in a `.pth` file, gated by a variable."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("libcst", reason="the patcher needs libcst: pip install libcst")

from sglang_lora_patch import tree
from toy_stock import RUN, SOURCES, run, write

# Reads the .pth file as the interpreter does with one in site-packages.
START = f"import site; site.addsitedir({str(SOURCES)!r})\n"
REPORT = """
import sys
import sglang.srt.managers.tokenizer_manager as manager
print(hasattr(manager, "_lora_patch"), "libcst" in sys.modules, "sglang_lora_patch" in sys.modules)
"""


@pytest.mark.parametrize("variables", [{}, {"SGLANG_LORA_PATCH": "0"}, {"SGLANG_LORA_PATCH": ""}])
def test_off_costs_nothing(toy, variables):
    done = run(toy, START + "import sys\nprint('sglang_lora_patch' in sys.modules, len(sys.meta_path))", **variables)
    plain = run(toy, "import sys\nprint('sglang_lora_patch' in sys.modules, len(sys.meta_path))")
    assert done.stdout == plain.stdout and done.stdout.startswith("False")
    assert run(toy, START + REPORT, **variables).stdout.split() == ["False", "False", "False"]


def test_on_transforms_what_is_imported_in_children_too(toy):
    files = {file: file.read_bytes() for file in toy.rglob("*.py")}
    code = f"""
import subprocess, sys
child = {START + REPORT!r}
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""
    done = run(toy, code, SGLANG_LORA_PATCH="1")
    assert done.stdout.split() == ["True", "True", "True"], done.stderr
    assert {file: file.read_bytes() for file in toy.rglob("*.py")} == files


def test_on_pays_only_for_the_modules(toy):
    code = START + "import sys, json, sglang\nprint('libcst' in sys.modules)"
    assert run(toy, code, SGLANG_LORA_PATCH="1").stdout.split() == ["False"]


def test_every_path_of_the_toy(toy):
    done = run(toy, START + RUN, SGLANG_LORA_PATCH="1", SGLANG_LORA_PATCH_UNLOAD_TIMEOUT="0.05")
    assert {str(counts[:2]) for counts in json.loads(done.stdout).values()} == {"[0, 0]"}


def test_unknown_version_is_left_alone_loudly(tmp_path):
    site = write(tmp_path / "site", "0.5.99")
    done = run(site, START + REPORT, SGLANG_LORA_PATCH="1")
    assert done.stdout.split()[0] == "False"
    assert done.stderr.count("0.5.99 is not a release this patch knows") == 1


def test_one_unknown_module_leaves_all_alone(toy):
    file = toy / "sglang/srt/lora/lora_registry.py"
    file.write_text(file.read_text().replace("def acquire", "def take"))
    done = run(toy, START + REPORT, SGLANG_LORA_PATCH="1")
    assert done.stdout.split()[0] == "False" and "acquire found 0" in done.stderr


def test_a_patched_tree_is_not_patched_twice(toy):
    tree.apply(tree.find(toy), check_import=False)
    done = run(toy, START + REPORT, SGLANG_LORA_PATCH="1")
    assert done.stdout.split()[0] == "True" and not done.stderr
