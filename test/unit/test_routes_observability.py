"""Metrics and the log of requests, fed with records."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from prometheus_client.exposition import generate_latest
from unit.stub_runtime import make_tokenizer

from sglang.srt.errors import ConfigError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.observability.logging import SHORT_CHARACTERS, Observers, RequestLog, configure_logging
from sglang.srt.observability.metrics import ServerMetrics

LABELS = {"model_name": "m", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}


def record(**changes):
    fields = {
        "rid": "r1",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "output_ids": [5, 6, 7],
    }
    return SimpleNamespace(**{**fields, **changes})


def test_metrics_count_requests():
    metrics = ServerMetrics("m")
    metrics.first_token(record(), 0.05)
    metrics.inter_token(record(), 0.04, 2)
    metrics.finished(record(), 0.5)
    metrics.finished(record(finish_reason={"type": "abort"}, completion_tokens=0), 0.1)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"sglang:{name}", {**LABELS, **labels})

    assert value("num_requests_total") == 2
    assert value("num_aborted_requests_total") == 1
    assert value("prompt_tokens_total") == 20
    assert value("cached_tokens_total") == 8
    assert value("generation_tokens_total") == 3
    assert value("time_to_first_token_seconds_count") == 1
    assert value("inter_token_latency_seconds_count") == 2
    assert value("inter_token_latency_seconds_sum") == pytest.approx(0.04)
    assert value("e2e_request_latency_seconds_sum") == pytest.approx(0.6)
    assert value("time_to_first_token_seconds_bucket", le="0.06") == 1
    assert b"sglang:num_running_reqs{" in generate_latest(metrics.registry)


@pytest.mark.parametrize(
    ("level", "keys"),
    [
        (0, {"rid", "stream"}),
        (1, {"rid", "stream", "sampling_params"}),
        (2, {"rid", "stream", "sampling_params", "input"}),
    ],
)
def test_log_levels(caplog, level, keys):
    caplog.set_level(logging.INFO)
    log = RequestLog(level, make_tokenizer())
    log.received(GenerateReqInput(rid="r1", text="the", sampling_params={"n": 2}))
    log.finished(record(), 0.5)
    received, finished = (json.loads(r.getMessage().split(": ", 1)[1]) for r in caplog.records)
    assert received.keys() == keys
    assert (finished["rid"], finished["completion_tokens"], finished["seconds"]) == ("r1", 3, 0.5)
    assert ("output" in finished) == (level >= 2)


def test_long_texts_are_shortened_below_level_three(caplog):
    caplog.set_level(logging.INFO)
    text = "a" * 5000
    RequestLog(2, None).received(GenerateReqInput(text=text))
    RequestLog(3, None).received(GenerateReqInput(text=text))
    short, whole = (json.loads(r.getMessage().split(": ", 1)[1])["input"] for r in caplog.records)
    assert short == "a" * SHORT_CHARACTERS + "… (5000 characters)"
    assert whole == text


def test_requests_that_ask_for_no_logs_get_none(caplog):
    caplog.set_level(logging.INFO)
    RequestLog(3, None).received(GenerateReqInput(text="a", no_logs=True))
    assert caplog.records == []


def test_observers_pass_on():
    metrics = [ServerMetrics("a"), ServerMetrics("b")]
    both = Observers(metrics)
    both.first_token(record(), 1.0)
    both.inter_token(record(), 1.0, 1)
    both.finished(record(), 1.0)
    for one in metrics:
        labels = {**LABELS, "model_name": "a" if one is metrics[0] else "b"}
        assert one.registry.get_sample_value("sglang:num_requests_total", labels) == 1


def test_an_unknown_log_level_is_refused():
    with pytest.raises(ConfigError, match="--log-level loud"):
        configure_logging("loud")
