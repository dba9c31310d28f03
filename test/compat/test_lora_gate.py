"""The gate of `benchmark/weight_sync/gate.py`, reduced: publish under fire, and nothing may hang, leak or lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import PACKAGE_ROOT, ServerProcess, child_environment
from tiny_model import make_tiny_model

GATE = PACKAGE_ROOT.parent / "benchmark" / "weight_sync" / "gate.py"
PUBLISHES = 50


@pytest.mark.slow
def test_publishing_under_fire(tmp_path: Path):
    model = make_tiny_model(tmp_path / "tiny")
    flags = ["--enable-lora", "--max-loaded-loras", "4", "--max-loras-per-batch", "4", "--enable-metrics"]
    with ServerProcess("--model-path", str(model), *flags) as server:
        command = [sys.executable, str(GATE), "--url", server.url, "--model", str(model), "--publishes", str(PUBLISHES)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=child_environment())
        assert run.stdout, run.stderr
        report = json.loads(run.stdout)
        assert report["violations"] == [], server.log[-4000:]
        assert run.returncode == 0
    counts = report["counts"]
    assert report["publishes"] == PUBLISHES
    assert min(counts[name] for name in ("disconnect", "finish_abort", "finish_length", "over_long")) > 0
