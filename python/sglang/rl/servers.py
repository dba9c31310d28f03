"""The inference servers of a run: those that the recipe names, or one that the run starts, watches and starts again.

Owned by `director` on rank 0. Invariant: `ensure` returns only when every server answers /health, and says which of
them may have been started since it was called last: those have lost every adapter, and the policy must be published
again.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from sglang.rl.config import ServerSection

logger = logging.getLogger(__name__)

START_TIMEOUT = 600.0
"""Seconds until a server must answer: a large model is read from a slow disk."""
STOP_TIMEOUT = 20.0
_HEALTH_TIMEOUT = 10.0
_POLL = 0.2


class ServerError(RuntimeError):
    """A server that does not come up; the message says what it wrote last."""


class Servers:
    """Inference servers.

    Args:
        log: file that the output of a server of our own goes to.
        extra: flags of a server of our own, behind the recipe's.
    """

    def __init__(self, section: ServerSection, model_path: str, log: Path, extra: tuple[str, ...] = ()) -> None:
        self._section = section
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._known: set[str] = set()
        if section.urls:
            self.urls = tuple(url.rstrip("/") for url in section.urls)
            self._command: list[str] = []
        else:
            port = _free_port()
            self.urls = (f"http://127.0.0.1:{port}",)
            flags = ["--model-path", model_path, "--port", str(port), "--enable-lora", *section.args, *extra]
            self._command = [sys.executable, "-m", "sglang.launch_server", *flags]

    def ensure(self) -> list[str]:
        """Wait until all answer, starting ours if it has gone; the URLs of servers that are new.

        Raises:
            ServerError: one does not answer in time, or ours ends while it starts.
        """
        if self._command and (self._process is None or self._process.poll() is not None):
            self._start()
        return [url for url in self.urls if self._is_new(url)]

    def close(self) -> None:
        """Stop a server of ours, with everything that it started."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._output is not None:
            self._output.close()
            self._output = None

    def _start(self) -> None:
        if self._process is not None:
            logger.warning("the server ended with code %s; starting it again", self._process.returncode)
        self.close()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._output = self._log.open("ab")
        self._process = subprocess.Popen(
            self._command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # On a CPU its threads and the trainer's share the cores: who waits must not spin.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._known.clear()

    def _is_new(self, url: str) -> bool:
        """Wait for a server; whether it had not answered before, or not all the time."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers(url):
            self._known.discard(url)
            if self._process is not None and self._process.poll() is not None:
                raise ServerError(f"the server ended with code {self._process.returncode}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{url} did not answer within {START_TIMEOUT:.0f} s; {self._tail()}")
            time.sleep(_POLL)
        new = url not in self._known
        self._known.add(url)
        return new

    def _answers(self, url: str) -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_HEALTH_TIMEOUT) as reply:
                reply.read()
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _tail(self) -> str:
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _end_with_parent() -> None:
    """In the child: SIGTERM when the trainer has gone, however it went (prctl(PR_SET_PDEATHSIG), Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
