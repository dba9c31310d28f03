"""What must be true of a server after a run that abused it: no lease, no stray adapter, clean books.

Used by gate and soak.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import machine

from sglang.benchmark.http_client import fetch

_QUIET_SECONDS = 30.0
_ZEROS = ("lora_leases", "lora_double_releases_total", "lora_free_failures_total", "invariant_violations_total")


async def left_behind(url: str, most_adapters: int) -> list[str]:
    """What is wrong once the last client has gone."""
    deadline = time.perf_counter() + _QUIET_SECONDS
    while True:
        listed = (await fetch(url, "GET", "/lora_adapters")).json()["adapters"]
        left = [a for a in listed if a["num_holders"] or a["state"] != "serving"]
        if not left or time.perf_counter() > deadline:
            break
        await asyncio.sleep(0.1)
    problems = [f"left afterwards: {left or listed}"] if left or len(listed) > most_adapters else []
    metrics = (await fetch(url, "GET", "/metrics")).body.decode()
    for name in _ZEROS:
        values = re.findall(rf"^sglang:{name}{{[^}}]*}} (\S+)$", metrics, re.MULTILINE)
        if [float(v) for v in values] != [0.0]:
            problems.append(f"sglang:{name} is {values}, expected one 0")
    return problems


def server_rss(url: str) -> int:
    """Bytes of memory that the processes of the server on this machine have; 0 when there is none at this port."""
    port = int(url.rsplit(":", 1)[1])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return sum(_rss(p.pid) for p in machine.process_family(connection.pid))
    return 0


def _rss(pid: int) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
