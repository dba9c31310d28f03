"""The engine's loop thread, and the manager as other threads and loops see it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from sglang.srt.entrypoints.engine import Engine, EngineManager, LoopThread
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs


class Manager:
    """Notes which thread it is called on."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.closed = 0
        self.weight_version = "v1"

    async def scheduler_stats(self) -> str:
        self.threads.append(threading.current_thread())
        return "stats"

    async def generate_request(self, obj, request=None):
        try:
            for i in range(obj):
                self.threads.append(threading.current_thread())
                await asyncio.sleep(0)
                yield i
        finally:
            self.closed += 1

    def abort_request(self, rid=None, abort_all=False, prefix=False) -> int:
        self.threads.append(threading.current_thread())
        return 3

    async def fail(self) -> None:
        raise ConfigError("no")

    async def wait_forever(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.closed += 1


@pytest.fixture
def loop():
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture
def manager() -> Manager:
    return Manager()


def test_synchronous_iteration(loop, manager):
    assert list(loop.iterate(manager.generate_request(3))) == [0, 1, 2]
    assert manager.closed == 1


def test_leaving_an_iteration_early_closes_it(loop, manager):
    for item in loop.iterate(manager.generate_request(10)):
        if item == 1:
            break
    assert manager.closed == 1


async def test_everything_runs_on_the_loop_thread(loop, manager):
    proxy = EngineManager(manager, loop)
    assert await proxy.scheduler_stats() == "stats"
    assert [i async for i in proxy.generate_request(2)] == [0, 1]
    assert proxy.abort_request(rid="x") == 3
    assert loop.call(lambda: loop.is_current)
    assert proxy.weight_version == "v1"
    assert {thread.name for thread in manager.threads} == {"sglang-engine"}


async def test_errors_and_cancellation_cross_over(loop, manager):
    proxy = EngineManager(manager, loop)
    with pytest.raises(ConfigError, match="no"):
        await proxy.fail()
    waiting = asyncio.create_task(proxy.wait_forever())
    await proxy.scheduler_stats()  # the loop has started the other one by now
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    while not manager.closed:
        await proxy.scheduler_stats()


def test_stop_cancels_what_still_runs(manager):
    loop = LoopThread()
    future = loop.submit(manager.wait_forever())
    loop.run(manager.scheduler_stats())
    loop.stop()
    assert future.cancelled()
    assert manager.closed == 1


def test_constructor_mistakes_are_value_errors():
    with pytest.raises(ConfigError, match="not_a_flag"):
        Engine(model_path="x", not_a_flag=1)
    with pytest.raises(ConfigError, match="model_path"):
        Engine()
    with pytest.raises(ConfigError, match="not both"):
        Engine(server_args=ServerArgs(model_path="x"), tp_size=1)
    with pytest.raises(ValueError, match="does-not-exist"):
        Engine(model_path="/does-not-exist")


def test_the_engine_needs_no_http():
    code = (
        "import sys, sglang.srt.entrypoints.engine\n"
        "bad = {'fastapi', 'starlette', 'uvicorn', 'torch', 'transformers'} & sys.modules.keys()\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
