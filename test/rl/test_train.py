"""Whole runs of the smallest recipe: real server, real publisher, a few steps; interrupted in every way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sglang.rl.config import load_recipe
from sglang.rl.train import Run, main

SMALL = (
    "rollout.groups=4",
    "rollout.samples=4",
    "task.eval={greedy: {count: 8}, sampled: {count: 8}}",
    "checkpoint_every=2",
    "eval.every=2",
)

pytestmark = pytest.mark.slow


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(["tiny-cpu", *SMALL, "steps=2", "--out", str(out)])
    first = lines(out)
    assert [line["step"] for line in first] == [0, 1, 2]
    assert {"eval/greedy", "eval/sampled", "logp_gap/mean"} <= first[0].keys()
    assert first[0]["logp_gap/mean"] < 1e-4, "servers and trainer compute one function"
    assert first[2]["logp_gap/mean"] < 1e-2, "adapters travel in bfloat16 at most"
    trained = [line for line in first if "ratio/mean" in line]
    assert trained and all(math.isclose(line["ratio/mean"], 1.0, abs_tol=1e-4) for line in trained)
    assert all(line["staleness/max"] <= 1 and line["sync/seconds"] > 0 for line in first[1:])
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "checkpoints" / "step_000002" / "adapter" / "adapter_config.json").exists()
    main(["tiny-cpu", *SMALL, "steps=4", "--out", str(out), "--resume"])
    second = lines(out)
    assert [line["step"] for line in second] == [0, 1, 2, 3, 4] and second[:3] == first
    assert [line["version"] for line in second[1:]] == [0, 1, 2, 3]


def test_a_server_that_dies_is_started_again_with_its_policy(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-cpu", (*SMALL, "steps=4", f"out={tmp_path / 'run'}"))
    run = Run(recipe, resume=False)
    director = run._director
    assert director is not None
    steps, publish = [], director.publish

    def publish_and_kill(adapter: Any, number: int) -> float:
        seconds = publish(adapter, number)
        steps.append(number)
        if number == 2:
            process = director._servers._process
            assert process is not None
            process.kill()
            process.wait()
        return seconds

    director.publish = publish_and_kill  # type: ignore[method-assign]
    try:
        run.run()
    finally:
        run.close()
    found = lines(tmp_path / "run")
    assert steps == [1, 2, 3, 4] and [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert all(line["staleness/max"] <= 1 for line in found[1:])
    assert found[4]["logp_gap/mean"] < 1e-2, "the new server serves the policy of step 4"
