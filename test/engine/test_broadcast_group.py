"""Groups of threads instead of processes: bytes arrive, and whatever goes wrong ends in time and says so."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang.srt.lora.host_buffer import HostBuffer
from sglang.srt.managers import group_control
from sglang.srt.managers.group_control import GroupControl
from sglang.srt.managers.io_struct import wire
from sglang.srt.weight_sync import broadcast_group
from sglang.srt.weight_sync.broadcast_group import (
    BroadcastError,
    BroadcastGroup,
    BrokenGroupError,
    CancelledError,
    GroupSpec,
    open_store,
)

CPU = torch.device("cpu")


def never() -> str:
    return ""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def members(pool: ThreadPoolExecutor, store: Any, size: int = 3, name: str = "g") -> list[BroadcastGroup]:
    specs = [GroupSpec(name, "127.0.0.1", store.port, rank, size, "gloo") for rank in range(size)]
    return list(pool.map(lambda spec: BroadcastGroup(spec, CPU, 10), specs))


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def test_bytes_arrive_at_all(pool):
    store = open_store()
    sender, *receivers = members(pool, store)
    for number, size in enumerate((1, 1000, 64_000_001)):
        image = torch.arange(size, dtype=torch.int64).to(torch.uint8)
        memories = [torch.zeros_like(image) for _ in receivers]
        waiting = [pool.submit(r.receive, str(number), m, 10.0) for r, m in zip(receivers, memories, strict=True)]
        sender.send(str(number), image, 10.0, never)
        for future, memory in zip(waiting, memories, strict=True):
            future.result()
            assert torch.equal(memory, image)


def test_what_is_called_off_costs_nothing(pool):
    store = open_store()
    sender, *receivers = members(pool, store)
    image, memory = torch.ones(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    waiting = pool.submit(receivers[0].receive, "a", memory, 10.0)
    with within(2), pytest.raises(CancelledError, match="the other is full"):
        sender.send("a", image, 10.0, lambda: "the other is full")
    with pytest.raises(CancelledError, match="called the broadcast off: the other is full"):
        waiting.result()
    # Late ones leave the group as good as before, too.
    with within(2), pytest.raises(BroadcastError, match="server 1 of the group was not ready"):
        sender.send("b", image, 0.2, never)
    with within(2), pytest.raises(BroadcastError, match="'c' did not come within 0.2 s"):
        receivers[0].receive("c", memory, 0.2)
    futures = [pool.submit(r.receive, "d", torch.zeros_like(memory), 10.0) for r in receivers]
    sender.send("d", image, 10.0, never)
    assert [future.result() for future in futures] == [None, None]


def test_a_member_that_does_not_come(pool):
    store = open_store()
    first, second = (GroupSpec("g", "127.0.0.1", store.port, rank, 3, "gloo") for rank in (0, 1))
    waiting = pool.submit(BroadcastGroup, second, CPU, 10)
    with within(2), pytest.raises(CancelledError, match="has no room"):
        BroadcastGroup(first, CPU, 10, lambda: "has no room")
    with within(2), pytest.raises(CancelledError, match="has no room"):
        waiting.result()
    other = GroupSpec("h", "127.0.0.1", store.port, 0, 2, "gloo")
    with within(2), pytest.raises(BrokenGroupError, match="not joined in time by its member 1 of 2"):
        BroadcastGroup(other, CPU, 0.3)


def waiting_receiver(pool, store):
    """A member, and its wait for an image that nobody sends."""
    _, receiver, _ = members(pool, store)
    waiting = pool.submit(receiver.receive, "a", torch.zeros(10, dtype=torch.uint8), 30.0)
    time.sleep(0.1)
    return receiver, waiting


def test_the_end_of_the_trainer_is_the_end_of_the_group(pool):
    stores = [open_store()]
    _, waiting = waiting_receiver(pool, stores[0])
    stores.clear()
    with within(3), pytest.raises(BrokenGroupError, match="group 'g' is broken"):
        waiting.result()


def test_closing_ends_what_waits(pool):
    store = open_store()
    receiver, waiting = waiting_receiver(pool, store)
    receiver.close()
    with within(3), pytest.raises(BrokenGroupError, match="closed or replaced"):
        waiting.result()


def test_a_collective_that_one_leaves_ends_by_the_deadline(pool):
    store = open_store()
    sender, receiver, absent = members(pool, store)
    absent._store.set("a/2", "")  # says that it is ready, and is not
    image = torch.ones(64_000_000, dtype=torch.uint8)
    waiting = pool.submit(receiver.receive, "a", torch.zeros_like(image), 1.0)
    with within(4), pytest.raises(BrokenGroupError):
        sender.send("a", image, 1.0, never)
    with contextlib.suppress(BrokenGroupError):  # it may have got all before
        waiting.result()


def test_an_end_of_a_member_of_nccl_does_not_end_the_process(monkeypatch):
    seen: dict[str, Any] = {}

    class FakeNccl:
        class Options:
            _timeout = None

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            seen.update(os.environ)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    broadcast_group._connect(GroupSpec("g", "a", 1, 0, 2, "nccl"), None, 1.0)
    assert seen["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == seen["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


# ---- the back's calls ----------------------------------------------------------------------------------------------


class Bench:
    """A GroupControl, polled by hand."""

    def __init__(self) -> None:
        self.replies: dict[int, tuple[bool, str, str]] = {}
        self.control = GroupControl(CPU, self._reply)

    def _reply(self, call_id: int, success: bool, message: str = "", code: str = "") -> None:
        assert call_id not in self.replies, "answered twice"
        self.replies[call_id] = success, message, code

    def handle(self, message: Any) -> None:
        self.control.handlers[type(message)](message)

    def answer(self, call_id: int, seconds: float = 10.0) -> tuple[bool, str, str]:
        end = time.monotonic() + seconds
        while call_id not in self.replies:
            assert time.monotonic() < end, "no answer"
            self.control.poll()
            time.sleep(0.005)
        return self.replies[call_id]


def join_call(call_id: int, store: Any, seconds: float = 10.0) -> wire.JoinGroupCall:
    return wire.JoinGroupCall(call_id, "g", "127.0.0.1", store.port, 1, 2, "gloo", seconds)


def test_a_call_fills_the_fronts_buffer(pool):
    bench, store = Bench(), open_store()
    sending = pool.submit(BroadcastGroup, GroupSpec("g", "127.0.0.1", store.port, 0, 2, "gloo"), CPU, 10)
    bench.handle(join_call(1, store))
    assert bench.control.pending
    assert bench.answer(1) == (True, "", "")
    buffer = HostBuffer(1000)
    bench.handle(wire.ReceiveCall(2, "g", "a", buffer.path, 1000, 10.0))
    image = torch.arange(1000).to(torch.uint8)
    sending.result().send("a", image, 10.0, never)
    assert bench.answer(2) == (True, "", "")
    assert buffer.view.tolist() == image.tolist()
    assert not bench.control.pending
    bench.handle(wire.ReceiveCall(3, "g", "b", buffer.path, 1000, 0.2))
    assert bench.answer(3) == (False, "broadcast 'b' did not come within 0.2 s", "broadcast_failed")
    bench.handle(wire.ReceiveCall(4, "g", "c", buffer.path, 1000, 10.0))
    bench.handle(wire.ReceiveCall(5, "g", "d", buffer.path, 1000, 10.0))
    bench.handle(wire.LeaveGroupCall(6, "g"))
    assert bench.answer(6)[0]
    for call_id in (4, 5):
        assert bench.answer(call_id) == (False, "group 'g' was closed or replaced", "no_group")
    bench.handle(wire.ReceiveCall(7, "g", "e", buffer.path, 1000, 10.0))
    assert bench.answer(7)[2] == "no_group"


def test_a_broken_group_says_why_until_it_is_made_again(pool):
    bench, stores = Bench(), [open_store()]
    sending = pool.submit(BroadcastGroup, GroupSpec("g", "127.0.0.1", stores[0].port, 0, 2, "gloo"), CPU, 10)
    bench.handle(join_call(1, stores[0]))
    assert bench.answer(1)[0]
    sending.result()
    stores.clear()
    buffer = HostBuffer(10)
    bench.handle(wire.ReceiveCall(2, "g", "a", buffer.path, 10, 10.0))
    assert bench.answer(2)[2] == "no_group"
    bench.handle(wire.ReceiveCall(3, "g", "a", buffer.path, 10, 10.0))
    success, message, code = bench.answer(3)
    assert (success, code) == (False, "no_group")
    assert "group 'g' is broken" in message and "make it with /init_weights_update_group" in message
    stores.append(open_store())
    sending = pool.submit(BroadcastGroup, GroupSpec("g", "127.0.0.1", stores[0].port, 0, 2, "gloo"), CPU, 10)
    bench.handle(join_call(4, stores[0]))
    assert bench.answer(4)[0]
    sending.result()


def test_what_never_comes_back_is_answered_all_the_same(monkeypatch):
    stuck = threading.Event()

    def hang(*args: Any) -> Callable[[], None]:
        stuck.wait(20)
        raise RuntimeError("woken")

    monkeypatch.setattr(group_control, "BroadcastGroup", hang)
    monkeypatch.setattr(group_control, "OVERDUE_SECONDS", 0.1)
    bench, store = Bench(), open_store()
    bench.handle(join_call(1, store, 0.1))
    success, message, code = bench.answer(1)
    assert (success, code) == (False, "no_group")
    assert "has not come back in time" in message
    assert not bench.control.pending
    stuck.set()
