"""The soak's second client: pauses, continues, flushes, aborts everything, looks around, while the first one sends.

`Controls` also knows when everything was aborted last, which is what tells a legitimate abort from a lost request.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from sglang.benchmark.http_client import HttpProtocolError, Reply, fetch

CONTROL_TIMEOUT = 30.0


@dataclass(slots=True)
class Outcome:
    """What came of the run: counts by what happened, and every violation with its case."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def blame(self, where: str, problems: list[str]) -> None:
        """Record violations."""
        self.violations += [f"{where}: {problem}" for problem in problems]


class Controls:
    """Control operations against one server, chosen by a seed.

    Args:
        every: cases the other client sends between two operations.
        outcome: where counts and violations go.
    """

    def __init__(self, url: str, outcome: Outcome, *, seed: int, every: int) -> None:
        self.url, self.outcome, self.every = url, outcome, every
        self._rng = random.Random(seed)
        self._sent = 0
        self._progress = asyncio.Event()
        self._aborting = 0
        self._last_abort = 0.0

    def case_sent(self) -> None:
        """The other client has sent one more case."""
        self._sent += 1
        self._progress.set()

    def aborted_since(self, started: float) -> bool:
        """Whether everything was, or is being, aborted after this `time.perf_counter`."""
        return self._aborting > 0 or self._last_abort >= started

    async def run(self) -> None:
        """One operation after another, until cancelled."""
        rng = self._rng
        # What aborts everything is rarer, so that most requests still live to their own end.
        operations: dict[Callable[[random.Random], Awaitable[None]], int] = {
            self._pause_abort: 1,
            self._pause_and_continue_at_once: 1,
            self._abort_all: 1,
            self._pause_retract: 3,
            self._pause_in_place: 3,
            self._flush: 3,
            self._look_around: 2,
        }
        next_at = self.every
        while True:
            while self._sent < next_at:
                self._progress.clear()
                await self._progress.wait()
            operation = rng.choices(list(operations), weights=list(operations.values()))[0]
            self.outcome.counts[operation.__name__.lstrip("_")] += 1
            await operation(rng)
            next_at = self._sent + self.every

    async def _pause_abort(self, rng: random.Random) -> None:
        await self.aborting_everything(self.post("/pause_generation", {"mode": "abort"}))
        await asyncio.sleep(rng.choice((0.0, 0.05)))
        if rng.random() < 0.3:
            await self.aborting_everything(self.post("/abort_request", {"abort_all": True}))
        await self.expect("flush while paused (abort)", "POST", "/flush_cache", 200)
        await self.expect("health while paused (abort)", "GET", "/health", 200)
        await self.post("/continue_generation", {})

    async def _pause_retract(self, rng: random.Random) -> None:
        await self.post("/pause_generation", {"mode": "retract"})
        await asyncio.sleep(rng.choice((0.0, 0.05)))
        await self.expect("flush while paused (retract)", "POST", "/flush_cache", 200)
        await self.post("/continue_generation", {})

    async def _pause_in_place(self, rng: random.Random) -> None:
        await self.post("/pause_generation", {"mode": "in_place"})
        await asyncio.sleep(rng.choice((0.0, 0.05)))
        await self.expect("health while paused (in_place)", "GET", "/health", 200)
        if rng.random() < 0.1:
            await self.aborting_everything(self.post("/abort_request", {"abort_all": True}))
        await self.post("/continue_generation", {})

    async def _pause_and_continue_at_once(self, rng: random.Random) -> None:
        pause = self.aborting_everything(self.post("/pause_generation", {"mode": "abort"}))
        await asyncio.gather(pause, self.post("/continue_generation", {"torch_empty_cache": False}))
        await self.post("/continue_generation", {})

    async def _abort_all(self, rng: random.Random) -> None:
        await self.aborting_everything(self.post("/abort_request", {"abort_all": True}))

    async def _flush(self, rng: random.Random) -> None:
        target = rng.choice(("/flush_cache", "/flush_cache?timeout=0.2"))
        reply = await self._reply(rng.choice(("GET", "POST")), target)
        if reply is None:
            return
        if reply.status not in (200, 400) or (reply.status == 200) != reply.body.startswith(b"Cache flushed."):
            self.outcome.blame("flush", [f"{reply.status} {reply.body[:200]!r}"])

    async def _look_around(self, rng: random.Random) -> None:
        for target in ("/health", "/model_info", "/server_info", "/get_load", "/v1/loads?include=all", "/v1/models"):
            await self.expect("info", "GET", target, 200)

    async def aborting_everything(self, operation: Awaitable[Any]) -> None:
        """Await an operation that may end any request."""
        self._aborting += 1
        try:
            await operation
        finally:
            self._aborting -= 1
            self._last_abort = time.perf_counter()

    async def post(self, target: str, body: dict[str, Any]) -> None:
        """Post; anything but 200 is a violation."""
        await self.expect("control", "POST", target, 200, body)

    async def expect(self, what: str, method: str, target: str, status: int, body: Any = None) -> None:
        """Send; anything but `status` is a violation."""
        reply = await self._reply(method, target, body)
        if reply is not None and reply.status != status:
            self.outcome.blame(what, [f"{method} {target} {body or ''} gave {reply.status}: {reply.body[:200]!r}"])

    async def _reply(self, method: str, target: str, body: Any = None) -> Reply | None:
        try:
            return await asyncio.wait_for(fetch(self.url, method, target, body), CONTROL_TIMEOUT)
        except (asyncio.TimeoutError, OSError, HttpProtocolError) as error:
            self.outcome.blame("control", [f"{method} {target} {body or ''}: {type(error).__name__} {error}"])
            return None
