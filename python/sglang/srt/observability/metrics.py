"""Prometheus metrics under stock's names, one registry per server.

`ServerMetrics` hears of requests from the TokenizerManager (it implements `RequestMetrics`) and reads gauges from the
latest scheduler statistics when it is scraped, so every series exists before the first request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sglang.srt.managers.adapter_service import AdapterStats
from sglang.srt.managers.io_struct.wire import SchedulerStats
from sglang.srt.managers.request_state import RequestRecord

LABELS = ("model_name", "engine_type", "tp_rank", "pp_rank")

TIME_TO_FIRST_TOKEN_BUCKETS = (
    *(0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8),
    *(1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08),
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0),
)
LATENCY_BUCKETS = (
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0),
    *(100.0, 200.0, 400.0, 600.0, 1200.0, 1800.0, 2400.0),
)

PUBLISH_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

_GAUGES: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "num_running_reqs": ("Requests that run", lambda s: s.num_running_reqs),
    "num_queue_reqs": ("Requests that wait in the queue", lambda s: s.num_waiting_reqs),
    "num_retracted_reqs": ("Requests sent back to the queue", lambda s: s.num_retracted_reqs),
    "num_paused_reqs": ("Running requests that a pause holds", lambda s: s.num_running_reqs if s.paused else 0),
    "num_used_tokens": ("KV tokens owned by live requests", lambda s: s.num_used_tokens),
    "max_total_num_tokens": ("KV token capacity", lambda s: s.max_total_num_tokens),
    "token_usage": ("Share of the KV capacity in use", lambda s: s.num_used_tokens / max(s.max_total_num_tokens, 1)),
    "gen_throughput": ("Output tokens per second", lambda s: s.gen_throughput),
    "cache_hit_rate": ("Share of prompt tokens found in the prefix cache", lambda s: s.cache_hit_rate),
    "lora_pool_slots_used": ("Adapter slots in use", lambda s: sum(map(bool, s.lora_slots))),
    "lora_pool_slots_total": ("Adapter slots", lambda s: len(s.lora_slots)),
    "lora_pool_utilization": (
        "Share of the adapter slots in use",
        lambda s: sum(map(bool, s.lora_slots)) / max(len(s.lora_slots), 1),
    ),
    "lora_host_bytes": ("Host memory of adapter versions", lambda s: s.lora_bytes),
}
_COUNTERS: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "num_retracted_requests": ("Retractions", lambda s: s.retractions_total),
    "scheduler_steps": ("Steps of the scheduler's loop", lambda s: s.steps_total),
    "scheduler_seconds": ("Time spent in steps", lambda s: s.step_seconds_total),
    "scheduler_host_seconds": ("The part of it outside the model", lambda s: s.host_seconds_total),
    "lora_slot_evictions": ("Adapter versions that lost their slot", lambda s: s.lora_evictions_total),
    "invariant_violations": ("Accounting errors; anything but 0 is a bug", lambda s: s.invariant_violations_total),
}


class ServerMetrics:
    """The metrics of one server.

    Args:
        model_name: value of the `model_name` label.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        values = {"model_name": model_name, "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}
        self._labels = [values[name] for name in LABELS]
        self._scheduler = _SchedulerCollector(self._labels)
        self.registry.register(self._scheduler)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the prefix cache")
        self._generation_tokens = self._counter("generation_tokens", "Output tokens of finished requests")
        self._requests = self._counter("num_requests", "Requests finished")
        self._aborted = self._counter("num_aborted_requests", "Requests aborted")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From request to first token", TIME_TO_FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request", INTER_TOKEN_BUCKETS
        )
        self._publish = self._histogram(
            "lora_publish_seconds", "From a load request to the published adapter", PUBLISH_BUCKETS
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "From request to end", LATENCY_BUCKETS)

    def watch(self, stats: Callable[[], SchedulerStats], adapters: Callable[[], AdapterStats]) -> None:
        """Take the gauges from what these return at scrape time."""
        self._scheduler.stats = stats
        self._scheduler.adapters = adapters

    def published(self, seconds: float) -> None:
        """Note the load of an adapter, from the request to the first moment it can be named."""
        self._publish.observe(seconds)

    def first_token(self, record: RequestRecord, seconds: float) -> None:
        """Note the time to the first token."""
        self._first_token.observe(seconds)

    def inter_token(self, record: RequestRecord, seconds: float, num_tokens: int) -> None:
        """Note the time between tokens, averaged over those that came together."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def finished(self, record: RequestRecord, seconds: float) -> None:
        """Note the end of a request."""
        self._requests.inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cached_tokens.inc(record.cached_tokens)
        self._generation_tokens.inc(record.completion_tokens)
        self._latency.observe(seconds)
        if record.finish_reason is not None and record.finish_reason["type"] == "abort":
            self._aborted.inc()

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"sglang:{name}", help_text, LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"sglang:{name}", help_text, LABELS, registry=self.registry, buckets=buckets)
        return histogram.labels(*self._labels)


class _SchedulerCollector(Collector):
    """Series that mirror the scheduler's statistics."""

    def __init__(self, labels: list[str]) -> None:
        self.stats: Callable[[], SchedulerStats] = SchedulerStats
        self.adapters: Callable[[], AdapterStats] = AdapterStats
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for name, (help_text, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"sglang:{name}", help_text, labels=LABELS)
            gauge.add_metric(self._labels, read(stats))
            yield gauge
        for name, (help_text, read) in _COUNTERS.items():
            counter = CounterMetricFamily(f"sglang:{name}", help_text, labels=LABELS)
            counter.add_metric(self._labels, read(stats))
            yield counter
        yield from self._adapter_series()

    def _adapter_series(self) -> Iterator[Metric]:
        adapters = self.adapters()
        for name, (help_text, value) in {
            "lora_leases": ("Requests that hold an adapter version", adapters.leases),
            "lora_oldest_lease_seconds": ("Age of the oldest of them", adapters.oldest_lease),
        }.items():
            gauge = GaugeMetricFamily(f"sglang:{name}", help_text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        versions = GaugeMetricFamily("sglang:lora_versions", "Adapter versions in memory", labels=[*LABELS, "state"])
        for state, count in adapters.versions.items():
            versions.add_metric([*self._labels, state], count)
        yield versions
        for name, (help_text, value) in {
            "lora_evictions": ("Adapters whose name was taken for newer ones", adapters.evictions),
            "lora_double_releases": ("Leases released twice; anything but 0 is a bug", adapters.double_releases),
            "lora_free_failures": ("Versions the scheduler would not free; likewise", adapters.free_failures),
        }.items():
            counter = CounterMetricFamily(f"sglang:{name}", help_text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
