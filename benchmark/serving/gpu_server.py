"""The server that `gpu.py` measures: its launch flags, its start, its end, and what machine and versions it runs on.

A started server gets a process group of its own and a log file; whatever happens, `stop` leaves none of it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import machine

from sglang.benchmark.http_client import HttpProtocolError, fetch
from sglang.version import __version__

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
COMMON_FLAGS = "--host 127.0.0.1 --device auto --skip-tokenizer-init".split()
LORA_FLAGS = f"--enable-lora --max-lora-rank 16 --max-loras-per-batch 8 --lora-target-modules {TARGETS}".split()
READY_TIMEOUT, STOP_TIMEOUT = 300.0, 30.0
LOG_TAIL = 40


class ServerFailed(Exception):
    """The server did not start or died; the message ends with the tail of its log."""


class Server:
    """A server of ours, or one that runs already.

    Args:
        name: `lora` or `plain` for one that is started, `given` for one that is not.
        url: of a running server; None starts one on a free port with `flags`.
    """

    def __init__(self, name: str, flags: list[str], log: Path, url: str | None = None) -> None:
        self.name, self.flags, self.log = name, flags, log
        self._command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.ready_s: float | None = None
        if url is None:
            port = str(free_port())
            self._command = [sys.executable, "-m", "sglang.launch_server", *flags, "--port", port]
            url = f"http://127.0.0.1:{port}"
        self.url = url.rstrip("/")

    async def __aenter__(self) -> Server:
        try:
            await self.start()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    async def start(self) -> None:
        """Start and wait until /health answers 200; `ready_s` is how long that took."""
        started = time.perf_counter()
        if self._command:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        while not await self._healthy():
            self.check()
            if time.perf_counter() - started > READY_TIMEOUT:
                raise ServerFailed(f"no /health after {READY_TIMEOUT:.0f} s\n{self.log_tail()}")
            await asyncio.sleep(0.05)
        self.ready_s = time.perf_counter() - started if self._command else None

    def check(self) -> None:
        """Raise ServerFailed when the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise ServerFailed(f"the server ended with code {self._process.returncode}\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The end of the log, for people."""
        if not self._command:
            return "(not started here)"
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else ["(no log)"]
        return "\n".join([f"--- end of {self.log}", *lines[-LOG_TAIL:]])

    def stop(self) -> None:
        """End it: politely, then with everything that is left of its group."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    async def post(self, target: str, body: dict[str, Any]) -> tuple[int, str, float]:
        """A control call: status, body, and the seconds it took."""
        started = time.perf_counter()
        reply = await fetch(self.url, "POST", target, body)
        return reply.status, reply.body.decode(errors="replace"), time.perf_counter() - started

    async def versions_adapters(self) -> bool:
        """Whether adapters can be published over a name, as ours; stock has no list of versions."""
        return (await fetch(self.url, "GET", "/lora_adapters")).status == 200

    async def version(self) -> str:
        """As the server itself says."""
        reply = await fetch(self.url, "GET", "/server_info")
        return str(reply.json().get("version", "unknown")) if reply.status == 200 else "unknown"

    async def _healthy(self) -> bool:
        try:
            return (await fetch(self.url, "GET", "/health")).status == 200
        except (OSError, HttpProtocolError):
            return False


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def import_seconds() -> float:
    """Wall time of a new interpreter that imports the server's front."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import sglang.srt.entrypoints.http_server"], check=True)
    return time.perf_counter() - started


def environment() -> dict[str, Any]:
    """Commit or package version, machine, GPU, driver and versions; asks nvidia-smi and imports no torch."""
    commit = machine.commit()
    return {
        "commit": __version__ if commit == "unknown" else commit,
        "device": machine.device() | _gpu(),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("torch", "triton")},
    }


def _gpu() -> dict[str, str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"gpu": "none", "driver": "none"}
    name, _, driver = output.splitlines()[0].partition(", ")
    return {"gpu": name, "driver": driver}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
