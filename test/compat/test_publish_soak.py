"""The soak of `benchmark/weight_sync/soak.py`, reduced, and its eyes: a wrong or outdated answer is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import PACKAGE_ROOT, ServerProcess, child_environment
from tiny_model import make_tiny_model

FOLDER = PACKAGE_ROOT.parent / "benchmark" / "weight_sync"
SOAK = FOLDER / "soak.py"


@pytest.mark.slow
def test_training_traffic_leaves_nothing_behind(tmp_path: Path):
    model = make_tiny_model(tmp_path / "tiny", weight_scale=3.0)
    flags = ["--enable-lora", "--max-lora-rank", "16", "--enable-metrics", "--skip-tokenizer-init"]
    with ServerProcess("--model-path", str(model), *flags) as server:
        command = [sys.executable, str(SOAK), "--url", server.url, "--model", str(model), "--scale", "0.3"]
        command += ["--seconds", "8", "--clients", "16", "--every", "0.3"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=180, env=child_environment())
        assert run.stdout, run.stderr + server.log[-2000:]
        report = json.loads(run.stdout)
        assert report["violations"] == 0 and run.returncode == 0, (report, server.log[-4000:])
    counts = report["counts"]
    assert report["publishes"] > 10
    for name in ("answers_proven", "answers_clear", "disconnects", "finish_abort", "finish_length"):
        assert counts[name] > 0, name


@pytest.fixture
def soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of twelve versions, numbered from 101 on, whose adapters answer with tokens of their own, clearly but for
    prompt 4."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import soak as module

    run = module.Soak("http://127.0.0.1:1", make_tiny_model(tmp_path / "tiny"), 1.0, 1, 1.0, 0.3)
    run.told = [[[100 * i + n for n in range(8)]] * module.PROMPTS for i in range(module.FINGERPRINTS)]
    run.clear = [[prompt != 4 for prompt in range(module.PROMPTS)]] * module.FINGERPRINTS
    run.versions = {100 + number: number for number in range(1, 13)}
    return run, module.Answer


@pytest.mark.parametrize(
    ("version", "newest", "prompt", "first", "problem"),
    [
        (108, 8, 3, 100, ""),
        (108, 7, 3, 100, ""),
        (108, 9, 3, 100, "publish 8 answered after publish 9 had returned"),
        (108, 8, 3, 200, "publish 8 gave another adapter's answer"),
        (108, 8, 4, 200, "publish 8 gave another adapter's answer"),
        (113, 8, 3, 100, "version 113 was never published"),
        (108, 8, 3, 5000, "publish 8 gave an answer of no adapter, to prompt 3"),
        (108, 8, 4, 5000, ""),
    ],
)
def test_answers_are_traced_to_their_version(
    soak: Any, version: int, newest: int, prompt: int, first: int, problem: str
):
    run, answer = soak
    run._answers = [answer(prompt, [first + n for n in range(8)], version, newest)]
    run._check_answers()
    assert problem in "".join(run.violations) and bool(run.violations) == bool(problem)


@pytest.mark.parametrize(("host", "gpu", "problem"), [(1.04, 1.0, ""), (1.06, 1.0, "host"), (1.0, 1.02, "GPU")])
def test_growing_memory_is_seen(soak: Any, host: float, gpu: float, problem: str):
    run, _ = soak
    run.memory = [(1 << 30, 1 << 34)] * 20 + [(int(host * (1 << 30)), int(gpu * (1 << 34)))]
    run._check_memory()
    assert problem in "".join(run.violations) and bool(run.violations) == bool(problem)
