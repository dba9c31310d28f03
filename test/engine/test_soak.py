"""The soak of `benchmark/serving/soak.py`, reduced: a tiny random model, a small cache, every kind of abuse at once.

The full size, on this model and on a real one, is run by the command in that module's docstring.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import PACKAGE_ROOT, ServerProcess, child_environment
from tiny_model import make_tiny_model

SOAK = PACKAGE_ROOT.parent / "benchmark" / "serving" / "soak.py"
REQUESTS = 400


@pytest.mark.slow
def test_soak_leaves_nothing_behind(tmp_path: Path):
    model = make_tiny_model(tmp_path / "tiny", weight_scale=3.0)
    # 2,048 tokens of cache for 24 clients with prompts of up to 200 tokens: prefixes are evicted, requests retracted.
    flags = ["--max-total-tokens", "2048", "--chunked-prefill-size", "64", "--max-running-requests", "16"]
    with ServerProcess("--model-path", str(model), "--enable-metrics", *flags) as server:
        command = [sys.executable, str(SOAK), "--url", server.url, "--requests", str(REQUESTS), "--control-every", "12"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=child_environment())
        assert run.stdout, run.stderr
        report = json.loads(run.stdout)
        assert report["violations"] == [], server.log[-4000:]
        assert run.returncode == 0
    counts = report["counts"]
    assert counts["finish_length"] > 0
    assert counts["finish_stop"] > 0
    assert counts["finish_abort"] > 0
    assert counts["replays"] > 0
    assert sum(counts[f"native_{fate}"] for fate in ("read", "drop", "abort")) > REQUESTS // 2
