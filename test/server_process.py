"""A real server as a child process, for tests that need the whole of it.

    with ServerProcess("--model-path", path) as server:
        httpx.get(server.url + "/health")

Leaving the block asks the server to stop and fails unless it does so properly: exit code 0 and no process left.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import httpx
import psutil

PACKAGE_ROOT = Path(__file__).resolve().parents[1] / "python"


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def child_environment() -> dict[str, str]:
    """The environment for child processes that import sglang, installed or not."""
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


class ServerProcess:
    """`python -m sglang.launch_server` on a free port of 127.0.0.1.

    Args:
        flags: launch flags without host and port.
        ready_timeout, stop_timeout: seconds to `/health` 200, and from SIGTERM to the exit.
    """

    def __init__(self, *flags: str, ready_timeout: float = 120.0, stop_timeout: float = 30.0) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._ready_timeout, self._stop_timeout = ready_timeout, stop_timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._command = [sys.executable, "-m", "sglang.launch_server", *flags]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, env=child_environment())
        try:
            self._wait_ready()
        except BaseException:
            self._kill()
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.process is not None and self.process.returncode is None:
                self.stop()  # unless the test has ended the server itself and waited for it
        finally:
            self._kill()
            self._log.close()

    def stop(self) -> None:
        """SIGTERM; raises AssertionError unless the server exits with 0 in time and leaves no child behind."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(self._stop_timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no exit {self._stop_timeout:.0f} s after SIGTERM\n{self.log[-4000:]}") from None
        _, alive = psutil.wait_procs(children, timeout=5)
        assert code == 0, f"exit code {code}\n{self.log[-4000:]}"
        assert not alive, f"left behind: {alive}"

    def _wait_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self._ready_timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with code {self.process.returncode}\n{self.log[-4000:]}")
            try:
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {self._ready_timeout:.0f} s\n{self.log[-4000:]}")

    def _kill(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()


@contextmanager
def together(first: ServerProcess, second: ServerProcess) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers, which start at the same time."""
    pair = first, second
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ServerProcess.__enter__, pair))
    try:
        yield pair
    finally:
        for server in pair:
            server.__exit__(None, None, None)
