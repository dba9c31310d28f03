"""The log of a run, and the pictures drawn from it."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch

from sglang.rl import metrics
from sglang.rl.metrics import RunLog, read_log, summary
from sglang.rl.plots import plot_curves, plot_runs, read_series


def names():
    return [value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)]


def test_names_are_distinct():
    assert len(set(names())) == len(names())


def test_one_line_a_step_flushed_at_once(tmp_path):
    with RunLog(tmp_path / "new" / "run") as log:
        log.log(1, {metrics.REWARD_MEAN: 0.5, metrics.HANGS: 0})
        text = log.path.read_text()
        assert json.loads(text) == {"step": 1, "reward/mean": 0.5, "hangs": 0}
        log.log(2, {metrics.LOSS: torch.tensor(1.5), metrics.TOKENS_PER_STEP: np.int64(7)})
        assert (
            text.endswith("\n") and log.path.read_text().splitlines()[1] == '{"step": 2, "loss": 1.5, "tokens/step": 7}'
        )


def test_numbers_that_json_has_not_are_null(tmp_path):
    with RunLog(tmp_path) as log:
        log.log(1, {metrics.KL: math.nan, metrics.RATIO_MAX: math.inf, metrics.LOSS: torch.tensor(-math.inf)})
    assert read_log(log.path) == [{"step": 1, "kl": None, "ratio/max": None, "loss": None}]


def test_resume_forgets_what_came_after_and_a_torn_line(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(5):
            log.log(step, {metrics.LOSS: step})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    with RunLog(tmp_path) as log:
        log.resume(2)
        log.log(3, {metrics.LOSS: 30})
    assert [(line["step"], line["loss"]) for line in read_log(log.path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    with RunLog(tmp_path) as log:
        log.resume(-1)
    assert log.path.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_tensorboard_one_warning(tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with RunLog(tmp_path) as log:
        log.log(1, {metrics.LOSS: 1})
        log.log(2, {metrics.LOSS: 1})
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["tensorboard is not installed: metrics go to metrics.jsonl only"]


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    class Writer:
        made = []

        def __init__(self, log_dir, purge_step=None):
            self.dir, self.purge, self.scalars, self.closed = log_dir, purge_step, [], False
            self.made.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def flush(self):
            pass

        def close(self):
            self.closed = True

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(metrics, "_tensorboard_is_there", lambda: True)
    with RunLog(tmp_path) as log:
        log.resume(3)
        log.log(4, {metrics.LOSS: 1.5, metrics.KL: math.nan})
    (writer,) = Writer.made
    assert (writer.dir, writer.purge, writer.scalars, writer.closed) == (str(tmp_path), 4, [("loss", 1.5, 4)], True)


def test_the_line_for_people():
    values = {
        metrics.REWARD_MEAN: 0.25,
        "eval/math500": 0.7,
        metrics.SYNC_SECONDS: None,
        metrics.TOKENS_PER_SECOND: 9e3,
    }
    assert summary(values) == "reward 0.250  math500 0.700  tokens/s 9,000"


def test_progress_is_logged_where_there_is_no_terminal(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "_live_progress", lambda total: None)
    now = iter([100.0, 110.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    caplog.set_level(logging.INFO, "sglang.rl.metrics")
    with RunLog(tmp_path, total_steps=400) as log:
        log.log(20, {metrics.REWARD_MEAN: 0.1, "eval/a": 0.5})
        log.log(21, {metrics.REWARD_MEAN: 0.2})
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert lines == ["step 20/400  reward 0.100  a 0.500", "step 21/400  reward 0.200  a 0.500  ETA 1:03:10"]


def test_progress_is_drawn_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with RunLog(tmp_path, total_steps=10) as log:
        log.log(3, {metrics.REWARD_MEAN: 0.125})
    drawn = capsys.readouterr().err
    assert "reward 0.125" in drawn
    assert "3/10" in drawn


# ---- plots ---------------------------------------------------------------------------------------------------------


def write_run(path, steps=30):
    with RunLog(path) as log:
        for step in range(steps):
            values = {name: step * 0.1 for name in names() if not name.endswith("/") and name != metrics.STEP}
            if step % 10 == 0:
                values |= {"eval/math500": 0.7, "eval/aime": math.nan if step == 10 else 0.1}
            log.log(step, values)
    return log.path


def test_series_leave_out_what_is_missing(tmp_path):
    series = read_series(write_run(tmp_path))
    assert series["eval/aime"] == ([0, 20], [0.1, 0.1])
    assert len(series[metrics.REWARD_MEAN][0]) == 30


def test_curves_of_one_run_and_of_several(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=9)
    plot_curves(first, tmp_path / "plots" / "one.png")
    plot_runs({"m2po": first, "grpo": second}, tmp_path / "two.png")
    for picture in (tmp_path / "plots" / "one.png", tmp_path / "two.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_log_with_nothing_to_draw_is_an_error(tmp_path):
    with RunLog(tmp_path) as log:
        log.log(1, {metrics.LR: 0.1})
    with pytest.raises(ValueError, match=r"nothing to draw in .*metrics\.jsonl"):
        plot_curves(log.path, tmp_path / "x.png")
    with pytest.raises(OSError):
        plot_curves(tmp_path / "none.jsonl", tmp_path / "x.png")


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    path = write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sglang\[train\]"):
        plot_curves(path, tmp_path / "x.png")
