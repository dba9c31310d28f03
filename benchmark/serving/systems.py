"""The systems under measurement: how each is started, held still while others run, asked, and read.

`bench` builds one `System` per `--system`. A server given with a start command is frozen with all its children
(SIGSTOP) whenever it is not its turn, so that an idle loop cannot take cores from the one being measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from machine import CpuMeter, process_family

from sglang.benchmark.http_client import HttpProtocolError, fetch
from sglang.benchmark.load import Backend, CompletionsBackend, NativeBackend, Prompt, run_load, summarise

START_TIMEOUT = 300.0
STOP_TIMEOUT = 30.0


class SystemFailed(Exception):
    """A system did not start, or failed a request; the message says which and how."""


class System:
    """One system: process, name, version and figures. Subclasses know how to talk to it.

    Args:
        name: label in the report.
        command: shell-quoted command that starts it, or None when it is already running.
        log: file that receives the process's output.
    """

    def __init__(self, name: str, command: str | None, log: Path) -> None:
        self.name, self.version = name, "unknown"
        self._command, self._log = command, log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and wait until it answers; raises SystemFailed with the log's path when it does not."""
        if self._command is not None:
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *shlex.split(self._command),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=self._stdout(log.fileno()),
                    stderr=log,
                    limit=1 << 24,
                )
        try:
            await asyncio.wait_for(self._wait_ready(), START_TIMEOUT)
        except asyncio.TimeoutError:
            raise SystemFailed(f"{self.name} was not ready after {START_TIMEOUT:.0f} s, see {self._log}") from None

    async def stop(self) -> None:
        """End the process and its children: asked first, killed after a while."""
        if self._process is None or self._process.returncode is not None:
            return
        family = self._signal(signal.SIGCONT)
        self._process.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await self._process.wait()

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[CpuMeter]:
        """Let the process run for the length of the block; yields a started meter of its CPU time."""
        self._signal(signal.SIGCONT)
        try:
            yield CpuMeter(os.getpid()).start()  # every other system of ours is frozen
        finally:
            self._signal(signal.SIGSTOP)

    async def throughput(self, prompts: list[Prompt], concurrency: int) -> dict[str, float]:
        """Figures of a closed loop, at least `tokens_per_s` (output)."""
        raise NotImplementedError

    async def prefill(self, prompts: list[Prompt]) -> dict[str, float]:
        """Figures of prompts sent one by one for a single token, at least `tokens_per_s` (input)."""
        raise NotImplementedError

    async def counters(self) -> dict[str, float]:
        """Seconds since start that the scheduler loop spent, {"host": ..., "step": ...}; {} when it does not say."""
        return {}

    async def _wait_ready(self) -> None:
        raise NotImplementedError

    def _stdout(self, log: int) -> int:
        return log

    def _signal(self, number: int) -> list[psutil.Process]:
        if self._process is None or self._process.returncode is not None:
            return []
        family = process_family(self._process.pid)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return family

    def _check_alive(self) -> None:
        if self._process is not None and self._process.returncode is not None:
            raise SystemFailed(f"{self.name} ended with code {self._process.returncode}, see {self._log}")


class HttpSystem(System):
    """A server: ours or stock SGLang (`sglang`, native API), or anything with `/v1/completions` (`openai`)."""

    def __init__(self, name: str, command: str | None, log: Path, *, kind: str, url: str, stream: bool) -> None:
        super().__init__(name, command, log)
        self._kind, self._url, self._stream = kind, url, stream
        self._model = ""

    async def throughput(self, prompts: list[Prompt], concurrency: int) -> dict[str, float]:
        """Output tokens/s, time to first token and time between tokens (milliseconds)."""
        figures = await self._run(self._backend(self._stream), prompts, concurrency)
        names = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
        return {"tokens_per_s": figures["output_throughput"]} | {n: figures[n] for n in names if n in figures}

    async def prefill(self, prompts: list[Prompt]) -> dict[str, float]:
        """Input tokens/s."""
        figures = await self._run(self._backend(False), prompts, 1)
        return {"tokens_per_s": figures["input_throughput"]}

    async def counters(self) -> dict[str, float]:
        """The scheduler's own clock, from `/server_info` of servers that report it."""
        if self._kind != "sglang":
            return {}
        states = (await fetch(self._url, "GET", "/server_info")).json().get("internal_states") or [{}]
        scheduler = states[0].get("scheduler") or {}
        names = {"host": "host_seconds_total", "step": "step_seconds_total"}
        return {short: scheduler[name] for short, name in names.items() if name in scheduler}

    def _backend(self, stream: bool) -> Backend:
        if self._kind == "sglang":
            return NativeBackend(self._url, stream=stream)
        return CompletionsBackend(self._url, self._model, stream=stream)

    async def _run(self, backend: Backend, prompts: list[Prompt], concurrency: int) -> dict[str, float]:
        load = await run_load(backend, prompts, concurrency=concurrency)
        if load.errors:
            raise SystemFailed(f"{self.name} failed {len(load.errors)} of {len(prompts)} requests: {load.errors[0]}")
        figures = summarise(load)
        wanted = sum(p.output_len for p in prompts)
        if figures["output_tokens"] != wanted:
            raise SystemFailed(f"{self.name} generated {figures['output_tokens']:.0f} tokens instead of {wanted}")
        return figures

    async def _wait_ready(self) -> None:
        while True:
            self._check_alive()
            with contextlib.suppress(OSError, HttpProtocolError):
                if (await fetch(self._url, "GET", "/health")).status == 200:
                    break
            await asyncio.sleep(0.5)
        self._model = (await fetch(self._url, "GET", "/v1/models")).json()["data"][0]["id"]
        info = await fetch(self._url, "GET", "/server_info" if self._kind == "sglang" else "/version")
        if info.status == 200:
            self.version = str(info.json().get("version", "unknown"))


class TransformersSystem(System):
    """`transformers` generate over a static batch, in `hf_worker`."""

    def __init__(self, name: str, command: str | None, log: Path, *, model: str) -> None:
        worker = Path(__file__).with_name("hf_worker.py")
        own = shlex.join([sys.executable, str(worker), "--model", model])
        super().__init__(name, command or own, log)

    async def throughput(self, prompts: list[Prompt], concurrency: int) -> dict[str, float]:
        """Output tokens/s over batches of `concurrency` prompts."""
        seconds, tokens = 0.0, 0
        for i in range(0, len(prompts), concurrency):
            batch = prompts[i : i + concurrency]
            seconds += await self._generate(batch)
            tokens += sum(p.output_len for p in batch)
        return {"tokens_per_s": tokens / seconds}

    async def prefill(self, prompts: list[Prompt]) -> dict[str, float]:
        """Input tokens/s, one prompt at a time."""
        seconds = [await self._generate([prompt]) for prompt in prompts]
        return {"tokens_per_s": sum(len(p.ids) for p in prompts) / sum(seconds)}

    def _stdout(self, log: int) -> int:
        return asyncio.subprocess.PIPE

    async def _wait_ready(self) -> None:
        answer = await self._read()
        self.version = f"{answer['version']} (torch {answer['torch']}, {answer['threads']} threads)"

    async def _generate(self, prompts: list[Prompt]) -> float:
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"ids": [p.ids for p in prompts], "output_len": prompts[0].output_len}
        started = time.perf_counter()
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        await self._process.stdin.drain()
        answer = await self._read()
        if any(len(ids) != request["output_len"] for ids in answer["ids"]):
            raise SystemFailed(f"{self.name} generated {[len(ids) for ids in answer['ids']]} tokens")
        return time.perf_counter() - started

    async def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise SystemFailed(f"{self.name} ended, see {self._log}")
        return json.loads(line)


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum, rounded for people."""
    return {"min": round(min(values), 2), "median": round(statistics.median(values), 2), "max": round(max(values), 2)}
