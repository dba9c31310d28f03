"""`import sglang` is cheap, and the front process never loads torch."""

from __future__ import annotations

import os
import subprocess
import sys

from import_law import FRONT, SHARED, modules, place

IMPORT_BUDGET_SECONDS = 0.1
TRIES = 5


def run(code: str) -> str:
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_sglang_takes_less_than_100_ms():
    code = "import time; start = time.perf_counter(); import sglang; print(time.perf_counter() - start)"
    best = min(float(run(code)) for _ in range(TRIES))
    assert best < IMPORT_BUDGET_SECONDS


def test_import_sglang_loads_nothing_else():
    loaded = run("import sys; before = set(sys.modules); import sglang; print(*sorted(set(sys.modules) - before))")
    foreign = {name for name in loaded.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"sglang", "sglang.version"}


def test_the_front_loads_neither_torch_nor_transformers():
    front = [name for name in modules() if (level := place(name)) is not None and level[1] in (FRONT, SHARED)]
    assert "sglang.srt.entrypoints.http_server" in front
    heavy = ("torch", "transformers", "triton", "xgrammar", "scipy", "pandas")
    code = (
        f"import importlib, sys\nfor name in {front!r}:\n    importlib.import_module(name)\n"
        f"print(*(name for name in {heavy!r} if name in sys.modules))"
    )
    assert run(code).split() == []


def test_public_names_load_on_first_use():
    code = (
        "import sys, sglang\n"
        "assert 'sglang.srt.server_args' not in sys.modules\n"
        "assert sglang.ServerArgs(model_path='x').port == 30000\n"
        "assert {'Engine', 'ServerArgs', '__version__'} <= set(dir(sglang))\n"
        "try:\n    sglang.Nonsense\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    assert "Nonsense" in run(code)


def test_version_is_upstreams_with_a_local_part():
    from importlib import metadata

    import sglang

    release, _, local = sglang.__version__.partition("+")
    assert tuple(map(int, release.split("."))) >= (0, 5, 12)
    assert local.startswith("lora.")
    assert metadata.version("sglang") == sglang.__version__
