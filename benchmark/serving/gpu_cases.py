"""The cases of `gpu.py`: what is sent to a server, and the figures of each, as one record a case.

Every case takes a `Bench` and gives its records to `Bench.emit` as soon as it has them, so that a run that is cut off
leaves what it has measured.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpu_load import Job, Load, Outcome, Record, run_job, spread, warm_up
from gpu_server import Server

PREFILL_REQUESTS = 64
SYNC_WINDOW = 0.5
"""Seconds before a publish and after it whose gaps are compared."""
PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of the cases; the defaults are those of the published tables.

    Attributes:
        requests: of a decode case per unit of concurrency; from 256 on there is one.
        mixed_concurrencies: where `mixed_adapters` adapters take turns.
        sync_tokens: tokens of a stream; it must outlast two windows and a publish.
    """

    concurrencies: tuple[int, ...] = (1, 16, 64, 256)
    mixed_concurrencies: tuple[int, ...] = (16, 64)
    mixed_adapters: int = 4
    requests: int = 2
    prompt_tokens: int = 256
    output_tokens: int = 512
    prefill_tokens: int = 2048
    prefill_requests: int = PREFILL_REQUESTS
    stream_concurrency: int = 256
    sync_streams: int = 64
    sync_tokens: int = 1000
    sync_rounds: int = 5


@dataclass(slots=True)
class Bench:
    """A server, the adapters to use with it, and where records go.

    Attributes:
        adapters: directories; the first ones are loaded under `names`.
        emit: takes a finished record.
        tag: part of every prompt's seed and adapter's name: a server that is given may have seen earlier runs.
    """

    server: Server
    settings: Settings
    vocab_size: int
    adapters: list[str]
    emit: Callable[[dict[str, Any]], None]
    names: list[str] = field(default_factory=list)
    tag: str = field(default_factory=lambda: f"{time.time_ns():x}")
    _jobs: Iterator[int] = field(default_factory=itertools.count)

    async def load_adapters(self) -> str:
        """Load as many as the cases use; the server's message when it does not take them, else nothing."""
        for number in range(self.settings.mixed_adapters):
            name = f"bench-{self.tag}-{number}"
            body = {"lora_name": name, "lora_path": self.adapters[number]}
            status, text, _ = await self.server.post("/load_lora_adapter", body)
            if status != 200:
                return f"HTTP {status}: {text[:300]}"
            self.names.append(name)
        return ""

    def job(self, concurrency: int, count: int, prompt: int, output: int, **options: Any) -> Job:
        """A job with prompts that nobody has sent before; low ids are left out, special tokens among them."""
        seed = f"{self.tag}/{next(self._jobs)}"
        vocab = (min(1000, self.vocab_size // 8), self.vocab_size - min(2000, self.vocab_size // 8))
        return Job(self.server.url, seed, count, concurrency, prompt, output, vocab, **options)

    def record(self, case: str, traffic: str, figures: dict[str, Any], **more: Any) -> None:
        """Give out one record."""
        self.emit({"case": case, "server": self.server.name, "traffic": traffic, **more, **figures})


def traffic_name(loras: tuple[str, ...]) -> str:
    """`base`, `1 adapter`, `4 adapters`."""
    return "base" if not loras else "1 adapter" if len(loras) == 1 else f"{len(loras)} adapters"


async def decode(bench: Bench, loras: tuple[str, ...], concurrencies: tuple[int, ...]) -> None:
    """Closed loops, not streamed: milliseconds per token, tokens/s."""
    for concurrency in concurrencies:
        figures = (await _closed_loop(bench, concurrency, loras, stream=False)).figures()
        bench.record("decode", traffic_name(loras), figures, concurrency=concurrency, **_sizes(bench.settings))


async def prefill(bench: Bench, loras: tuple[str, ...]) -> None:
    """Long prompts at once for one token each: seconds, the better of two runs (the first also warms up)."""
    s = bench.settings
    runs = []
    for _ in range(2):
        job = bench.job(s.prefill_requests, s.prefill_requests, s.prefill_tokens, 1, loras=loras)
        runs.append(await run_job(job))
    best = min(runs, key=lambda outcome: outcome.wall)
    figures = best.figures()
    figures.pop("ms_per_token", None)
    figures["tokens_per_s"] = round(len(best.complete) * s.prefill_tokens / best.wall, 1)  # input tokens here
    figures["runs_s"] = [round(run.wall, 3) for run in runs]
    bench.record("prefill", traffic_name(loras), figures, prompt_tokens=s.prefill_tokens)


async def streaming(bench: Bench, loras: tuple[str, ...]) -> None:
    """The same load not streamed and streamed, one after the other: ratio of tokens/s, and the gaps."""
    concurrency = bench.settings.stream_concurrency
    whole = (await _closed_loop(bench, concurrency, loras, stream=False)).figures()
    streamed = await _closed_loop(bench, concurrency, loras, stream=True)
    figures = streamed.figures() | streamed.stream_figures()
    figures["tokens_per_s_whole"] = whole.get("tokens_per_s")
    if "tokens_per_s" in figures and "tokens_per_s" in whole:
        figures["ratio"] = round(figures["tokens_per_s"] / whole["tokens_per_s"], 3)
    bench.record("streaming", traffic_name(loras), figures, concurrency=concurrency, **_sizes(bench.settings))


async def _closed_loop(bench: Bench, concurrency: int, loras: tuple[str, ...], *, stream: bool) -> Outcome:
    s = bench.settings
    count = concurrency if concurrency >= 256 else concurrency * s.requests
    job = bench.job(concurrency, count, s.prompt_tokens, s.output_tokens, loras=loras, stream=stream)
    await warm_up(job)
    return await run_job(job)


def _sizes(settings: Settings) -> dict[str, int]:
    return {"prompt_tokens": settings.prompt_tokens, "output_tokens": settings.output_tokens}


# ---- Publishing under load -------------------------------------------------------------------------------------------


async def sync(bench: Bench) -> None:
    """Publish under streams, without a pause and with one, each several times; a record a round and a summary each."""
    upsert = await bench.server.versions_adapters()
    for way, change in (("publish", _publish), ("pause", _pause_and_load)):
        publisher = Publisher(bench, way, upsert=upsert and way == "publish")
        await publisher.load_next()
        rounds = []
        for number in range(bench.settings.sync_rounds):
            rounds.append(await _sync_round(bench, publisher, change))
            bench.record("sync", way, rounds[-1], round=number)
        bench.record("sync_summary", way, summarise_rounds(rounds), rounds=len(rounds))


@dataclass(slots=True)
class Publisher:
    """Loads one adapter after the other: over one name where the server can, else under names of their own."""

    bench: Bench
    way: str
    upsert: bool
    _count: int = 0

    def name(self, ahead: int = 0) -> str:
        """What requests name to run on the newest version, or on one that is not there yet."""
        name = f"{self.way}-{self.bench.tag}"
        return name if self.upsert else f"{name}-v{self._count + ahead}"

    async def load_next(self) -> float:
        """Milliseconds it took; raises RuntimeError when the server refuses."""
        self._count += 1
        path = self.bench.adapters[self._count % len(self.bench.adapters)]
        body = {"lora_name": self.name(), "lora_path": path} | ({"upsert": True} if self.upsert else {})
        return await _control(self.bench.server, "/load_lora_adapter", body)


async def _publish(server: Server, publisher: Publisher) -> dict[str, float]:
    return {"load_ms": await publisher.load_next()}


async def _pause_and_load(server: Server, publisher: Publisher) -> dict[str, float]:
    """What clients of stock do: abort everything, load, empty the prefix cache, go on."""
    return {
        "pause_ms": await _control(server, "/pause_generation", {"mode": "abort"}),
        "load_ms": await publisher.load_next(),
        "flush_ms": await _control(server, "/flush_cache", {}),
        "continue_ms": await _control(server, "/continue_generation", {}),
    }


async def _control(server: Server, target: str, body: dict[str, Any]) -> float:
    """Milliseconds of a call that must succeed."""
    status, text, seconds = await server.post(target, body)
    if status != 200:
        raise RuntimeError(f"{target} got {status}: {text[:300]}")
    return seconds * 1e3


async def _sync_round(bench: Bench, publisher: Publisher, change: Callable[..., Any]) -> dict[str, Any]:
    s = bench.settings
    prompt, old, new = s.prompt_tokens // 2, (publisher.name(),), (publisher.name(ahead=1),)
    streams = bench.job(s.sync_streams, s.sync_streams, prompt, s.sync_tokens, loras=old, stream=True)
    probe = bench.job(1, 1, prompt, PROBE_TOKENS, loras=new, stream=True)
    async with Load(streams) as load, Load(probe) as probing:  # both are ready before the clock runs
        load.go()
        await load.streaming()
        await asyncio.sleep(SYNC_WINDOW)
        started = time.perf_counter()
        steps = await change(bench.server, publisher)
        called = time.perf_counter()
        probing.go()
        first = (await probing.finish()).records[0]
        outcome = await load.finish()
    figures = {name: round(value, 2) for name, value in steps.items()}
    figures |= {"total_ms": round((called - started) * 1e3, 2)}
    return figures | sync_figures(outcome.records, first, started)


def sync_figures(records: list[Record], probe: Record, started: float) -> dict[str, Any]:
    """Aborts, largest gap of each stream before and after the call (99th percentile), first token of the new version.

    Args:
        started: when the call began, on the clock of the records.
    """
    first = probe.started + probe.arrivals[0] if probe.arrivals else None
    end = max(started + SYNC_WINDOW, first or 0.0)
    # An aborted stream has no gap, it has an end.
    before = [r.largest_gap(started - SYNC_WINDOW, started) for r in records if not r.aborted]
    after = [r.largest_gap(started, end) for r in records if not r.aborted]
    figures: dict[str, Any] = {
        "streams": len(records),
        "aborted": sum(r.aborted for r in records),
        "failed": sum(r.failed for r in records),
        # Streams that ended on their own before the new version spoke were not disturbed by it, and prove nothing.
        "running": sum(r.ended > (first or started) for r in records),
        "first_token_ms": None if first is None else round((first - started) * 1e3, 2),
        "adapter_versions": sorted({r.version for r in [*records, probe] if r.version is not None}),
    }
    figures |= spread("gap_before", [gap for gap in before if gap is not None])
    figures |= spread("gap_after", [gap for gap in after if gap is not None])
    if "gap_before_p99_ms" in figures and "gap_after_p99_ms" in figures:
        figures["gap_growth_ms"] = round(figures["gap_after_p99_ms"] - figures["gap_before_p99_ms"], 3)
    errors = [r.error for r in [probe, *records] if r.failed]
    return figures | ({"error": errors[0]} if errors else {})


def summarise_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Aborts and failures added up, medians and maxima of the times."""
    found: dict[str, Any] = {key: sum(r[key] for r in rounds) for key in ("aborted", "failed", "streams")}
    for name in ("load_ms", "pause_ms", "total_ms", "first_token_ms", "gap_before_p99_ms", "gap_after_p99_ms",
                 "gap_growth_ms"):  # fmt: skip
        values = [r[name] for r in rounds if r.get(name) is not None]
        if values:
            found |= {name: round(statistics.median(values), 2), f"{name}_max": round(max(values), 2)}
    return found
