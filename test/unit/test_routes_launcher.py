"""The back process as the launcher sees it, played by small scripts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable

import msgspec
import psutil
import pytest

from sglang.srt.entrypoints import launcher
from sglang.srt.entrypoints.launcher import BackProcess, describe_exit
from sglang.srt.managers.ipc import Endpoint

ENDPOINT = Endpoint(to_back="ipc:///a", to_front="ipc:///b")


@pytest.fixture
def back(monkeypatch):
    """Starts a script as the back process; returns it and the list of exit codes it reports."""
    processes = []

    def start(script: str, config: object = None) -> tuple[BackProcess, list[int]]:
        monkeypatch.setattr(launcher, "BACK_COMMAND", (sys.executable, "-c", script))
        codes: list[int] = []
        process = BackProcess(config, ENDPOINT, codes.append)
        processes.append(process)
        return process, codes

    yield start
    for process in processes:
        process.kill()


async def until(condition: Callable[[], object]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 20)


WAIT_FOR_END_OF_STDIN = "import sys; sys.stdin.buffer.read()"


async def test_it_gets_one_json_line_and_an_open_stdin(back, tmp_path):
    target = tmp_path / "line"
    script = f"import sys; open({str(target)!r}, 'wb').write(sys.stdin.buffer.readline()); sys.stdin.buffer.read()"
    process, codes = back(script, {"name": "x" * 200_000})  # more than a pipe holds
    await until(lambda: target.exists() and target.read_bytes().endswith(b"\n"))
    message = msgspec.json.decode(target.read_bytes())
    assert message["endpoint"] == {"to_back": "ipc:///a", "to_front": "ipc:///b"}
    assert len(message["config"]["name"]) == 200_000
    assert process.alive
    await process.stop()
    assert codes == [-signal.SIGTERM]


async def test_stop_reaps_and_leaves_no_zombie(back):
    process, codes = back(WAIT_FOR_END_OF_STDIN)
    pid = process.pid
    await process.stop()
    assert not process.alive
    assert not psutil.pid_exists(pid)
    await process.stop()
    assert codes == [-signal.SIGTERM]


async def test_a_stubborn_process_is_killed(back, tmp_path):
    ready = tmp_path / "ready"
    script = (
        f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"
    )
    process, codes = back(script)
    await until(ready.exists)
    await process.stop(grace=0.05)
    assert codes == [-signal.SIGKILL]


async def test_an_exit_is_reported_once_and_reaped(back):
    process, codes = back("import sys; sys.exit(3)")
    await until(lambda: codes)
    assert codes == [3]
    assert not process.alive
    await process.stop()
    assert codes == [3]


async def test_death_by_a_signal_is_reported(back):
    process, codes = back(WAIT_FOR_END_OF_STDIN)
    os.kill(process.pid, signal.SIGKILL)
    await until(lambda: codes)
    assert codes == [-signal.SIGKILL]


async def test_a_terminal_interrupt_does_not_reach_it(back):
    process, _ = back(WAIT_FOR_END_OF_STDIN)
    assert os.getsid(process.pid) != os.getsid(0)
    await process.stop()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with code 0"),
        (1, "exited with code 1"),
        (-9, "was killed by SIGKILL (often the kernel's out-of-memory killer)"),
        (-11, "was killed by SIGSEGV"),
        (-200, "was killed by signal 200"),
    ],
)
def test_exit_codes_in_words(code, text):
    assert describe_exit(code) == text
