"""The load generator: sends prompts to a server at a fixed concurrency or rate and measures what comes back.

Used by `sglang.bench_serving` and `benchmark/serving`. Prompts are token ids, so that every server does the same work.
Times are `time.perf_counter` seconds of this process. A failed request is a `RequestResult` with `error` set.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from sglang.benchmark.http_client import Exchange, HttpProtocolError


@dataclass(slots=True, frozen=True)
class Prompt:
    """Token ids to send, and the number of tokens to generate."""

    ids: list[int]
    output_len: int


@dataclass(slots=True)
class RequestResult:
    """One request as its client saw it.

    Fields:
        output_tokens: as reported by the server.
        started, ended: seconds.
        arrivals: (seconds, tokens known so far) of each event that brought tokens; one entry when not streamed.
        text: generated text.
        error: None, or what went wrong.
    """

    prompt_tokens: int
    output_tokens: int = 0
    started: float = 0.0
    ended: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds until the first token."""
        return self.arrivals[0][0] - self.started if self.arrivals else self.ended - self.started

    def token_gaps(self) -> list[float]:
        """Seconds between tokens; an event with k tokens counts as k gaps of a k-th of its wait."""
        gaps: list[float] = []
        for (before, seen), (now, total) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(now - before) / (total - seen)] * (total - seen)
        return gaps


class Backend(Protocol):
    """How to ask one kind of server for one prompt."""

    async def send(self, prompt: Prompt) -> RequestResult:
        """Send, wait for the end, never raise."""
        ...


class _Meta(msgspec.Struct):
    completion_tokens: int = 0


class _NativeReply(msgspec.Struct):
    text: str = ""
    meta_info: _Meta | None = None
    error: Any = None


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _OpenAIReply(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class HttpBackend:
    """What the HTTP backends share: posting, timing, streaming. Subclasses say what to send and how to read it.

    Args:
        base_url: ``http://host:port``.
        stream: ask for server-sent events.
        ignore_eos: generate exactly `output_len` tokens.
        extra: merged into every body.
    """

    target = ""

    def __init__(
        self, base_url: str, *, stream: bool = True, ignore_eos: bool = True, extra: dict[str, Any] | None = None
    ) -> None:
        self.base_url, self.stream, self.ignore_eos, self.extra = base_url, stream, ignore_eos, extra or {}

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The JSON to post."""
        raise NotImplementedError

    def read(self, payload: bytes, result: RequestResult) -> None:
        """Update `text`, `output_tokens` and `error` from one event, or from the whole reply when not streamed."""
        raise NotImplementedError

    async def send(self, prompt: Prompt) -> RequestResult:
        """Send, wait for the end, never raise."""
        result = RequestResult(prompt_tokens=len(prompt.ids), started=time.perf_counter())
        try:
            async with Exchange(self.base_url, "POST", self.target, self.body(prompt) | self.extra) as exchange:
                await self._receive(exchange, result)
        except (OSError, HttpProtocolError, msgspec.DecodeError) as error:
            result.error = f"{type(error).__name__}: {error}"
        result.ended = time.perf_counter()
        if result.error is None and result.output_tokens == 0 and prompt.output_len > 0:
            result.error = "the server reported no generated token"
        return result

    async def _receive(self, exchange: Exchange, result: RequestResult) -> None:
        if exchange.status != 200:
            result.error = f"HTTP {exchange.status}: {(await exchange.body())[:300].decode(errors='replace')}"
        elif not self.stream:
            self.read(await exchange.body(), result)
            result.arrivals.append((time.perf_counter(), result.output_tokens))
        else:
            async for payload in exchange.events():
                if payload == b"[DONE]":
                    break
                seen = result.output_tokens
                self.read(payload, result)
                if result.output_tokens > seen:
                    result.arrivals.append((time.perf_counter(), result.output_tokens))


class NativeBackend(HttpBackend):
    """SGLang's `/generate` (cumulative events)."""

    target = "/generate"
    _decoder = msgspec.json.Decoder(_NativeReply)

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The JSON to post."""
        sampling = {"temperature": 0.0, "max_new_tokens": prompt.output_len, "ignore_eos": self.ignore_eos}
        return {"input_ids": prompt.ids, "sampling_params": sampling, "stream": self.stream}

    def read(self, payload: bytes, result: RequestResult) -> None:
        """Take over the cumulative text and count."""
        reply = self._decoder.decode(payload)
        if reply.error is not None or reply.meta_info is None:
            result.error = payload[:300].decode(errors="replace")
            return
        result.text = reply.text
        result.output_tokens = reply.meta_info.completion_tokens


class CompletionsBackend(HttpBackend):
    """`/v1/completions` of vLLM, SGLang and others (events carry deltas; counts come from continuous usage)."""

    target = "/v1/completions"
    _decoder = msgspec.json.Decoder(_OpenAIReply)

    def __init__(self, base_url: str, model: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self.model = model

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The JSON to post."""
        body = {
            "model": self.model,
            "prompt": prompt.ids,
            "max_tokens": prompt.output_len,
            "temperature": 0.0,
            "ignore_eos": self.ignore_eos,
            "stream": self.stream,
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return body

    def read(self, payload: bytes, result: RequestResult) -> None:
        """Add the delta, take over the count."""
        reply = self._decoder.decode(payload)
        if reply.error is not None:
            result.error = payload[:300].decode(errors="replace")
            return
        for choice in reply.choices:
            result.text += choice.text
        if reply.usage is not None:
            result.output_tokens = max(result.output_tokens, reply.usage.completion_tokens)


@dataclass(slots=True)
class LoadResult:
    """All requests of one run; `wall` is the seconds from the first send to the last byte."""

    wall: float
    results: list[RequestResult]

    @property
    def errors(self) -> list[str]:
        """Messages of the failed requests."""
        return [r.error for r in self.results if r.error is not None]


async def run_load(
    backend: Backend,
    prompts: Sequence[Prompt],
    *,
    concurrency: int | None = None,
    request_rate: float = float("inf"),
    seed: int = 0,
) -> LoadResult:
    """Send every prompt once.

    Args:
        concurrency: requests in flight at most; None for no limit. With an infinite rate this is a closed loop.
        request_rate: mean requests per second of a Poisson process, or infinity to send as soon as there is room.
    """
    room = asyncio.Semaphore(concurrency or max(1, len(prompts)))
    rng = random.Random(seed)

    async def one(prompt: Prompt) -> RequestResult:
        async with room:
            return await backend.send(prompt)

    started = time.perf_counter()
    tasks: list[asyncio.Task[RequestResult]] = []
    for prompt in prompts:
        tasks.append(asyncio.create_task(one(prompt)))
        if request_rate != float("inf"):
            await asyncio.sleep(rng.expovariate(request_rate))
    results = list(await asyncio.gather(*tasks))
    return LoadResult(wall=time.perf_counter() - started, results=results)


def summarise(load: LoadResult) -> dict[str, float]:
    """Figures of a run: counts, tokens/s over the wall time, latencies in milliseconds (of successful requests)."""
    good = [r for r in load.results if r.error is None]
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    figures = {
        "completed": len(good),
        "failed": len(load.results) - len(good),
        "wall_s": load.wall,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "request_throughput": len(good) / load.wall,
        "input_throughput": prompt_tokens / load.wall,
        "output_throughput": output_tokens / load.wall,
    }
    figures |= _spread("ttft", (r.ttft for r in good))
    figures |= _spread("itl", (gap for r in good for gap in r.token_gaps()))
    figures |= _spread("e2e", (r.ended - r.started for r in good))
    return {name: round(value, 4) for name, value in figures.items()}


def _spread(name: str, seconds: Iterable[float]) -> dict[str, float]:
    values = np.fromiter(seconds, dtype=float) * 1e3
    if not len(values):
        return {}
    p50, p99 = np.percentile(values, [50, 99])
    return {f"{name}_mean_ms": float(values.mean()), f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}


def random_prompts(
    count: int, *, input_len: int, output_len: int, range_ratio: float = 1.0, vocab_size: int, seed: int
) -> list[Prompt]:
    """Prompts of random ids; lengths are uniform between `range_ratio` times the given length and that length."""
    rng = random.Random(seed)

    def length(longest: int) -> int:
        return rng.randint(max(1, int(longest * range_ratio)), longest)

    return [
        Prompt(ids=[rng.randrange(vocab_size) for _ in range(length(input_len))], output_len=length(output_len))
        for _ in range(count)
    ]


def parse_extra(text: str | None) -> dict[str, Any]:
    """A JSON object given on a command line; raises ValueError on anything else."""
    value = json.loads(text) if text else {}
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    return value
