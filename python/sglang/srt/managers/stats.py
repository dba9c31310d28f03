"""Counters and rates of one scheduler. Owned by the scheduler; read through `snapshot`."""

from __future__ import annotations

import time
from collections import deque

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.managers.io_struct.wire import SchedulerStats
from sglang.srt.managers.planner import Planner

PUSH_INTERVAL = 0.1
"""Seconds between two unasked snapshots."""
RATE_WINDOW = 2.0
"""Seconds of the past that rates look at."""


class StatsCollector:
    """Adds up what steps report.

    Args:
        lora: weights of adapter versions; read only.
    """

    def __init__(self, lora: LoRAManager | None = None) -> None:
        self._lora = lora
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.steps = 0
        self.host_seconds = 0.0
        self.step_seconds = 0.0
        self.violations = 0
        self._recent: deque[tuple[float, int, int, int]] = deque()
        self._pushed_at = 0.0
        self._pushed: SchedulerStats | None = None

    def admitted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A request's prompt has been scheduled for the first time."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def step(self, seconds: float, device_seconds: float, generated: int) -> None:
        """One turn of the loop that ran a step: its length, and the part spent waiting for the model."""
        self.steps += 1
        self.step_seconds += seconds
        self.host_seconds += seconds - device_seconds
        self.generated_tokens += generated
        now = time.monotonic()
        self._recent.append((now, self.generated_tokens, self.prompt_tokens, self.cached_tokens))
        while now - self._recent[0][0] > RATE_WINDOW and len(self._recent) > 2:
            self._recent.popleft()

    def snapshot(self, planner: Planner, paused: bool) -> SchedulerStats:
        """State now."""
        throughput, hit_rate = self._rates()
        kv = planner.kv
        return SchedulerStats(
            num_running_reqs=len(planner.live),
            num_waiting_reqs=len(planner.waiting),
            num_retracted_reqs=sum(r.num_retractions > 0 for r in planner.waiting),
            num_waiting_tokens=sum(r.num_known for r in planner.waiting),
            paused=paused,
            num_used_tokens=kv.used,
            num_cached_tokens=kv.cache.evictable_pages * kv.page_size,
            max_total_num_tokens=kv.capacity,
            max_running_requests=kv.table.max_slots,
            gen_throughput=throughput,
            cache_hit_rate=hit_rate,
            prompt_tokens_total=self.prompt_tokens,
            cached_tokens_total=self.cached_tokens,
            generation_tokens_total=self.generated_tokens,
            retractions_total=planner.num_retractions,
            steps_total=self.steps,
            host_seconds_total=self.host_seconds,
            step_seconds_total=self.step_seconds,
            invariant_violations_total=self.violations,
            lora_slots=tuple(planner.lora_slots.versions),
            lora_evictions_total=planner.lora_slots.num_evictions,
            lora_bytes=0 if self._lora is None else self._lora.nbytes,
        )

    def due(self, planner: Planner, paused: bool, idle: bool) -> SchedulerStats | None:
        """A snapshot to push: at most every PUSH_INTERVAL while busy, once on every turn to idle."""
        now = time.monotonic()
        if not idle and now - self._pushed_at < PUSH_INTERVAL:
            return None
        if idle:
            self._recent.clear()
        stats = self.snapshot(planner, paused)
        if stats == self._pushed:
            return None
        self._pushed, self._pushed_at = stats, now
        return stats

    def _rates(self) -> tuple[float, float]:
        if len(self._recent) < 2:
            return 0.0, 0.0
        (t0, g0, p0, c0), (t1, g1, p1, c1) = self._recent[0], self._recent[-1]
        return (g1 - g0) / max(t1 - t0, 1e-6), (c1 - c0) / (p1 - p0) if p1 > p0 else 0.0
