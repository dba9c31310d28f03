"""`benchmark/serving/bench.py` end to end on a tiny model: both kinds of system, every phase, the report's shape."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import PACKAGE_ROOT, child_environment, free_port
from tiny_model import make_tiny_model

BENCH = PACKAGE_ROOT.parent / "benchmark" / "serving" / "bench.py"


@pytest.mark.slow
def test_bench_measures_a_server_beside_transformers(tmp_path: Path):
    model, port = make_tiny_model(tmp_path / "tiny"), free_port()
    server = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    command = [sys.executable, str(BENCH), "--model", str(model), "--log-dir", str(tmp_path), "--rounds", "2"]
    command += ["--system", f"ours=sglang@http://127.0.0.1:{port}", "--start", f"ours={shlex.join(server)}"]
    command += ["--system", "hf=transformers", "--concurrency", "1", "4", "--requests-per-slot", "1"]
    command += ["--output-len", "8", "--prefill-len", "64", "--prefill-requests", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=child_environment())
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["baseline"] == "hf"
    assert set(report["systems"]) == {"ours", "hf"}
    ours = report["systems"]["ours"]
    assert set(ours) == {"c1", "c4", "prefill"}
    assert ours["c4"]["ttft_p50_ms"]["median"] > 0
    assert 0 < ours["c4"]["host_share"]["median"] < 1
    for phase, ratio in report["ratios"]["ours"].items():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"], phase
