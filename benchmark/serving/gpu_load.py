"""The parent's half of the load generator: splits a job over `gpu_client` processes and turns replies into figures.

Called by `gpu_cases`. Prompts are random ids from a seed that never repeats in a run, so no prefix cache can help.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

CLIENT = Path(__file__).with_name("gpu_client.py")
LANES_PER_PROCESS = 64
"""A client process follows so many streams at 1 ms per token with room to spare; `client_cpu` of a result proves it."""
MAX_PROCESSES = 8
READ_LIMIT = 1 << 28


class LoadFailed(Exception):
    """A client process ended without an outcome."""


@dataclass(frozen=True, slots=True)
class Job:
    """Requests of one run.

    Attributes:
        seed: of the prompts; two jobs with the same seed send the same prompts.
        vocab: ids are drawn from this range.
        loras: adapters the requests take in turn; none is the base model.
        timeout: seconds one request may take.
    """

    url: str
    seed: str
    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    vocab: tuple[int, int]
    loras: tuple[str, ...] = ()
    stream: bool = False
    timeout: float = 300.0

    def split(self) -> list[dict[str, Any]]:
        """The job of each client process, as `gpu_client` reads it."""
        count = min(MAX_PROCESSES, os.cpu_count() or 1, -(-self.concurrency // LANES_PER_PROCESS))
        requests = [self._request(number) for number in range(self.requests)]
        lanes = [len(range(i, self.concurrency, count)) for i in range(count)]
        return [
            {"url": self.url, "timeout": self.timeout, "lanes": lanes[i], "requests": requests[i::count]}
            for i in range(count)
        ]

    def _request(self, number: int) -> dict[str, Any]:
        return {
            "id": number,
            "seed": f"{self.seed}/{number}",
            "vocab": self.vocab,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "lora": self.loras[number % len(self.loras)] if self.loras else None,
            "stream": self.stream,
        }


@dataclass(frozen=True, slots=True)
class Record:
    """One request as its client saw it (see `gpu_client`); `arrivals` are seconds since `started`, one an event."""

    id: int
    status: int
    started: float
    ended: float
    arrivals: Sequence[float]
    tokens: int
    error: str = ""
    finish: str = ""
    version: int | None = None

    @property
    def aborted(self) -> bool:
        """Ended by the server before its time; servers say so as a finish reason or as an error."""
        return self.finish == "abort" or "abort" in self.error.lower()

    @property
    def failed(self) -> bool:
        """No proper reply, for another reason than an abort."""
        return bool(self.error) and not self.aborted

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def largest_gap(self, start: float, end: float) -> float | None:
        """The largest gap that ended in this span of the clock; None when there is none."""
        moments = [self.started + offset for offset in self.arrivals]
        found = [b - a for a, b in zip(moments, moments[1:], strict=False) if start < b <= end]
        return max(found, default=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All requests of a job; `cpu` is the largest share of a core that a client process needed."""

    records: list[Record]
    cpu: float = 0.0

    @property
    def wall(self) -> float:
        """Seconds from the first send to the last end."""
        return max(r.ended for r in self.records) - min(r.started for r in self.records)

    @property
    def aborted(self) -> int:
        """Requests that the server ended before their time."""
        return sum(r.aborted for r in self.records)

    @property
    def complete(self) -> list[Record]:
        """Requests that ran to their end."""
        return [r for r in self.records if not r.aborted and not r.failed and r.tokens]

    def figures(self) -> dict[str, Any]:
        """Counts, tokens/s, and milliseconds per token and request: latency over tokens, prefill included, averaged."""
        good = self.complete
        failed = [r for r in self.records if r.failed]
        found: dict[str, Any] = {"requests": len(self.records), "failed": len(failed), "aborted": self.aborted}
        if failed:
            found["error"] = failed[0].error
        found |= {"wall_s": round(self.wall, 3), "client_cpu": round(self.cpu, 2)}
        if good:
            pace = [(r.ended - r.started) / r.tokens * 1e3 for r in good]
            found["ms_per_token"] = round(float(np.mean(pace)), 3)
            found["tokens_per_s"] = round(sum(r.tokens for r in good) / self.wall, 1)
        return found

    def stream_figures(self) -> dict[str, Any]:
        """Of streamed requests: first event, gaps between events, the largest gap of each stream, events a token."""
        good = [r for r in self.complete if r.arrivals]
        tokens = sum(r.tokens for r in good)
        found = {"events_per_token": round(sum(len(r.arrivals) for r in good) / tokens, 3)} if tokens else {}
        found |= spread("ttft", [r.arrivals[0] for r in good])
        found |= spread("gap", [gap for r in good for gap in r.gaps])
        return found | spread("largest_gap", [max(r.gaps) for r in good if r.gaps])


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, {} of nothing."""
    if not seconds:
        return {}
    p50, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
    return {f"{name}_p50_ms": round(float(p50), 3), f"{name}_p99_ms": round(float(p99), 3)}


@dataclass(slots=True)
class Load:
    """A job in progress: `async with Load(job) as load` starts the clients, `go` lets them send, `finish` collects."""

    job: Job
    _processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def __aenter__(self) -> Load:
        try:
            for part in self.job.split():
                process = await asyncio.create_subprocess_exec(
                    sys.executable, str(CLIENT), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                    limit=READ_LIMIT,
                )  # fmt: skip
                self._processes.append(process)
                self._write(process, json.dumps(part))
            await self._expect("ready")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def go(self) -> None:
        """Start sending, in all processes at once."""
        for process in self._processes:
            self._write(process, "go")

    async def streaming(self) -> None:
        """Wait until every stream that may run has its first token."""
        await self._expect("streaming")

    async def finish(self) -> Outcome:
        """Wait for the end."""
        parts = await self._expect("results")
        records = [Record(**item) for part in parts for item in part["results"]]
        return Outcome(sorted(records, key=lambda r: r.id), max(part["cpu"] for part in parts))

    async def _expect(self, key: str) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(self._read(process, key) for process in self._processes)))

    async def _read(self, process: asyncio.subprocess.Process, key: str) -> dict[str, Any]:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if key in message:
                return message
            if "results" in message:
                errors = [item["error"] for item in message["results"] if item["error"]]
                raise LoadFailed(f"the requests ended before they were {key}: {errors[:1]}")
        raise LoadFailed(f"a client process ended with code {await process.wait()}")

    def _write(self, process: asyncio.subprocess.Process, line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")


async def run_job(job: Job) -> Outcome:
    """Run a job from start to end."""
    async with Load(job) as load:
        load.go()
        return await load.finish()


async def warm_up(job: Job, output_tokens: int = 8) -> None:
    """One short request a lane, so that no adapter, shape or kernel is new when the measurement begins."""
    count = min(job.requests, job.concurrency)
    await run_job(replace(job, seed=f"{job.seed}/warm", requests=count,
                          output_tokens=min(output_tokens, job.output_tokens)))  # fmt: skip
