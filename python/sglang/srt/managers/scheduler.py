"""The back's loop: receive, launch a step, send what an earlier step produced.

Run by scheduler_process; tests step it by hand. State has owners: requests and pause SchedulerControl, queue and memory
Planner, rows to send OutputProcessor, device ModelRunner; the loop owns only the steps in flight.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Protocol

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.managers import invariants
from sglang.srt.managers.batch import StepPlan
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.output_processor import OutputProcessor
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.scheduler_control import SchedulerControl
from sglang.srt.managers.stats import StatsCollector
from sglang.srt.model_executor.model_runner import ModelRunner, StepResult

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 100
"""How long an idle loop sleeps at most; a message wakes it at once."""
STAGING_POLL_MS = 1
"""The same while an adapter is staged or received: nothing wakes the loop when that is done."""


class Channel(Protocol):
    """The part of ipc.BackChannel that the scheduler uses."""

    def receive(self, timeout_ms: int = 0) -> list[wire.ToBack]:
        """Messages waiting now; wait up to `timeout_ms` for the first."""
        ...

    def send(self, message: wire.ToFront) -> None:
        """Queue one message for the front."""
        ...


class Scheduler:
    """The loop and the steps in flight; everything else belongs to a collaborator.

    Args:
        depth: steps that may be launched before the oldest one's results are read (0: read at once, 1: overlap).
        lora: weights of adapter versions, the runner's own; None without --enable-lora.
    """

    def __init__(
        self,
        channel: Channel,
        runner: ModelRunner,
        planner: Planner,
        vocab_size: int,
        depth: int,
        lora: LoRAManager | None = None,
    ) -> None:
        self.channel = channel
        self.runner = runner
        self.planner = planner
        self.depth = depth
        self.vocab_size = vocab_size
        self.lora = lora
        self.stats = StatsCollector(lora)
        self.outputs = OutputProcessor(planner, channel.send, on_finish=lambda request: self.control.forget(request))
        self.control = SchedulerControl(
            planner, self.outputs, self.stats, channel.send, self.drain, lora, runner.device
        )
        self._in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self._device_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether another step could do something."""
        return bool(self._in_flight) or (self.control.paused is None and bool(self.control.requests))

    def run(self, stopping: threading.Event) -> None:
        """Step until told to stop."""
        while not stopping.is_set():
            idle_ms = STAGING_POLL_MS if self.control.working else IDLE_POLL_MS
            self.step(wait_ms=0 if self.busy else idle_ms)

    def step(self, wait_ms: int = 0) -> None:
        """One turn: receive, launch, read the oldest step, send."""
        messages = self.channel.receive(wait_ms)
        started = time.perf_counter()
        self._device_seconds, generated = 0.0, self.outputs.num_generated
        for message in messages:
            self.control.handle(message)
        answered = self.control.working and self.control.poll()
        plan = self.planner.next_step(bool(self._in_flight)) if self.control.paused is None else None
        if plan is not None:
            self._launch(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > self.depth):
            self._read_oldest()
        self.outputs.flush()
        if plan is not None:
            seconds = time.perf_counter() - started
            self.stats.step(seconds, self._device_seconds, self.outputs.num_generated - generated)
        if messages or answered or plan is not None:
            self._report()

    def drain(self) -> None:
        """Read the results of every step in flight."""
        while self._in_flight:
            self._read_oldest()
        self.outputs.flush()

    def _launch(self, plan: StepPlan) -> None:
        for segment in plan.sampled:
            if not segment.is_decode:
                segment.request.create_penalties(self.vocab_size, self.runner.device)
        started = time.perf_counter()
        result = self.runner.launch(plan.inputs)
        self._device_seconds += time.perf_counter() - started
        self.planner.commit(plan)
        for request in plan.first_chunks:
            self.stats.admitted(len(request.prompt), request.cached_tokens)
        self._in_flight.append((plan, result))

    def _read_oldest(self) -> None:
        plan, result = self._in_flight.popleft()
        started = time.perf_counter()
        sample, scores = result.read()
        self._device_seconds += time.perf_counter() - started
        self.outputs.process(plan, sample, scores)

    def _report(self) -> None:
        """Push statistics when due; when idle, check the books first."""
        idle = not self.busy
        if idle and not self.control.requests:
            versions = frozenset() if self.lora is None else self.lora.versions
            for text in invariants.violations(self.planner, len(self.control.requests), versions):
                self.stats.violations += 1
                logger.error("scheduler invariant violated: %s", text)
        stats = self.stats.due(self.planner, self.control.paused is not None, idle)
        if stats is not None:
            self.channel.send(wire.StatsPush(stats))
