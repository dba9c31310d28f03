"""The control of the training loop: a server that loses a count stops it at an eviction; ours does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from server_process import PACKAGE_ROOT, child_environment

CONTROL = PACKAGE_ROOT.parent / "benchmark" / "rl" / "leak_control.py"
STEPS = 5


@pytest.mark.slow
def test_one_lost_count_stops_the_loop_and_ours_loses_none():
    command = [sys.executable, str(CONTROL), "--steps", str(STEPS), "--timeout", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=child_environment())
    assert run.returncode == 0, run.stderr[-4000:]
    leaking, repaired, ours = (json.loads(line) for line in run.stdout.splitlines())
    assert run.stderr.count("was aborted while it waited") == 3, "the same event in each run"

    # Two names fit. The third publish evicts the first name, the fourth the second: whichever the event was on.
    (name,) = leaking["counted"]
    assert leaking["publishes"] == int(name.removeprefix("lora_v")) + 1 < STEPS
    assert f"it has not loaded lora_v{leaking['publishes'] + 1}" in leaking["error"]
    assert name in leaking["error"] and "waits for ever" in leaking["error"] and "http://127.0.0.1:" in leaking["error"]

    assert repaired["publishes"] == ours["publishes"] == STEPS
    assert repaired["error"] is None and ours["error"] is None and repaired["counted"] == {}
