"""Where and on what a benchmark ran: commit, device, versions, and how busy the machine was with other things."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

QUIET_WINDOW = 3.0
QUIET_CORES = 0.2
ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The checkout's commit, with ``+changes`` when the tree differs from it, or ``unknown``."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device() -> dict[str, Any]:
    """CPU model, cores this process may use, memory."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def process_family(pid: int) -> list[psutil.Process]:
    """A process and everything below it; empty when it has gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass(slots=True)
class CpuMeter:
    """Cores used since `start`, by a process with all its children and by the rest of the machine.

    `others` is what makes two figures comparable: when it is not near 0, something else had a share of the cores.
    """

    pid: int
    _wall: float = 0.0
    _own: float = 0.0
    _total: float = 0.0

    def start(self) -> CpuMeter:
        """Begin, counting from now."""
        self._wall, self._own, self._total = time.perf_counter(), self._own_seconds(), _busy_seconds()
        return self

    def stop(self) -> dict[str, float]:
        """Cores used on average: {"own": ..., "others": ...}."""
        wall = time.perf_counter() - self._wall
        own = self._own_seconds() - self._own
        others = max(0.0, _busy_seconds() - self._total - own)
        return {"own": round(own / wall, 2), "others": round(others / wall, 2)}

    def _own_seconds(self) -> float:
        seconds = 0.0
        for process in process_family(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


async def wait_until_quiet(limit: float) -> bool:
    """Wait until the whole machine has used less than `QUIET_CORES` over a window; False when `limit` seconds pass."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        before = _busy_seconds()
        await asyncio.sleep(QUIET_WINDOW)
        if (_busy_seconds() - before) / QUIET_WINDOW < QUIET_CORES:
            return True
    return limit <= 0
