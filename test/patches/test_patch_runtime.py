"""The owner objects: counted exactly, given back once, never below zero, whatever the order."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_lora_patch import runtime
from sglang_lora_patch.runtime import InstantLock, Lease, Scope, StateTable, UsageCounter

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "release", "again", "increment", "decrement", "adopt", "own", "disown", "finish"]),
        st.integers(0, 3),
    ),
    max_size=60,
)


class Model:
    """The same counts, kept the slow way."""

    def __init__(self):
        self.counter, self.table = UsageCounter(), StateTable()
        self.free, self.gone, self.anonymous = [], [], 0
        self.owned = {rid: [] for rid in range(4)}

    def hold(self, _):
        self.free.append(Lease(self.counter))

    def release(self, i):
        if self.free:
            lease = self.free.pop(i % len(self.free))
            lease.release()
            self.gone.append(lease)

    def again(self, i):
        if self.gone:
            self.gone[i % len(self.gone)].release()

    def increment(self, n):
        self.anonymous += n
        asyncio.run(self.counter.increment(n, notify_all=False))

    def decrement(self, n):
        self.anonymous = max(0, self.anonymous - n)
        asyncio.run(self.counter.decrement(n))

    def adopt(self, _):
        if self.anonymous:
            self.anonymous -= 1
            self.free.append(self.counter.adopt())
        else:
            with pytest.raises(RuntimeError):
                self.counter.adopt()

    def own(self, rid):
        if self.free:
            self.owned[rid].append(self.free.pop())
            self.table.own(str(rid), self.owned[rid][-1])

    def disown(self, rid):
        if self.owned[rid]:
            lease = self.owned[rid].pop()
            self.table.disown(str(rid), lease)
            self.table.disown(str(rid), lease)
            self.gone.append(lease)

    def finish(self, rid):
        self.table.finish(str(rid))
        if self.owned[rid]:
            self.gone.append(self.owned[rid].pop(0))


@given(STEPS)
def test_count_is_the_number_of_holders(steps):
    model = Model()
    for name, argument in steps:
        getattr(model, name)(argument)
        owned = [lease for leases in model.owned.values() for lease in leases]
        assert model.counter.value() == len(model.free) + len(owned) + model.anonymous >= 0
        assert all(lease.live for lease in model.free + owned)
        assert not any(lease.live for lease in model.gone)
    assert not model.table._owners or any(model.owned.values())


@given(st.lists(st.sampled_from(["hold", "release"]), max_size=20))
def test_waiter_returns_exactly_at_zero(steps):
    async def scenario():
        counter = UsageCounter()
        held = [Lease(counter)]
        waiter = asyncio.ensure_future(counter.wait_for_zero())
        for step in steps:
            if step == "hold":
                held.append(Lease(counter))
            elif held:
                held.pop().release()
            empty = not held
            for _ in range(3):
                await asyncio.sleep(0)
            if empty:
                break
        assert waiter.done() == (not held)
        waiter.cancel()

    asyncio.run(scenario())


class Registry:
    """As much of a registry as `acquire` needs."""

    def __init__(self, *names):
        self._counters = {f"id-{name}": UsageCounter() for name in names}

    async def acquire(self, name):
        await self._counters[f"id-{name}"].increment(notify_all=False)
        return f"id-{name}"

    def counts(self):
        return [counter.value() for counter in self._counters.values()]


class Manager:
    """A manager whose `generate_request` does what the test says."""

    def __init__(self, script):
        self.script, self.aborted = script, []
        self.rid_to_state, self.lora_registry = StateTable(), Registry("A", "B")

    @runtime.owns_request
    async def generate_request(self, obj, request=None):
        async for output in self.script(self, obj):
            yield output

    @runtime.dispatches
    def _send_one_request(self, tokenized_obj):
        if tokenized_obj.rid == "broken":
            raise OSError

    @runtime.dispatches
    async def _send_batch_request(self, tokenized_objs):
        await asyncio.sleep(0)

    def abort_request(self, rid):
        self.aborted.append(rid)


def request(rid, lora_id="id-A"):
    return SimpleNamespace(rid=rid, lora_id=lora_id)


async def test_the_call_holds_until_its_first_output():
    async def script(self, obj):
        assert await runtime.acquire(self.lora_registry, ["A", None, "A", "B"]) == ["id-A", None, "id-A", "id-B"]
        assert self.lora_registry.counts() == [1, 1], "one owner an adapter, however often it is named"
        await self._send_batch_request([request("x"), request("y", "id-B")])
        assert self.lora_registry.counts() == [2, 2]
        yield 1
        assert self.lora_registry.counts() == [1, 1]

    manager = Manager(script)
    assert [output async for output in manager.generate_request(None)] == [1]
    manager.rid_to_state.finish("x")
    manager.rid_to_state.finish("x")
    manager.rid_to_state.finish("y")
    assert manager.lora_registry.counts() == [0, 0] and not manager.rid_to_state._owners


async def test_unsent_records_go_and_sent_ones_are_aborted():
    async def script(self, obj):
        for rid in ("unsent", "sent", "done", "broken"):
            self.rid_to_state[rid] = SimpleNamespace()
        await runtime.acquire(self.lora_registry, "A")
        self._send_one_request(request("sent"))
        self._send_one_request(request("done"))
        del self.rid_to_state["done"]
        self._send_one_request(request("broken"))
        yield

    manager = Manager(script)
    manager.rid_to_state["other"] = SimpleNamespace()
    with pytest.raises(OSError):
        await anext(manager.generate_request(None))
    assert sorted(manager.rid_to_state) == ["other", "sent"] and manager.aborted == ["sent"]
    assert manager.lora_registry.counts() == [2, 0], "those that were sent, until the scheduler answers"


@pytest.mark.parametrize("finished", [False, True])
async def test_a_record_dropped_too_early_comes_back(finished):
    async def script(self, obj):
        self.rid_to_state["sent"] = SimpleNamespace(finished=finished)
        await runtime.acquire(self.lora_registry, "A")
        self._send_one_request(request("sent"))
        del self.rid_to_state["sent"]
        raise ValueError
        yield

    manager = Manager(script)
    with pytest.raises(ValueError):
        await anext(manager.generate_request(None))
    assert manager.aborted == ([] if finished else ["sent"])
    assert ("sent" in manager.rid_to_state) is not finished
    manager.rid_to_state.finish("sent")
    assert manager.lora_registry.counts() == [0, 0]


async def test_failed_acquire_gives_back_what_it_had():
    async def script(self, obj):
        await runtime.acquire(self.lora_registry, ["A", "nobody"])
        yield

    manager = Manager(script)
    with pytest.raises(KeyError):
        await anext(manager.generate_request(None))
    assert manager.lora_registry.counts() == [0, 0]


@pytest.mark.parametrize("turns", range(6))
async def test_cancelled_at_any_step(turns):
    async def script(self, obj):
        await asyncio.sleep(0)
        await runtime.acquire(self.lora_registry, "A")
        await asyncio.sleep(0)
        await self._send_batch_request([request("x")])
        await asyncio.sleep(0)
        yield

    manager = Manager(script)
    task = asyncio.ensure_future(anext(manager.generate_request(None)))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    del task
    gc.collect()
    await asyncio.sleep(0.01)
    manager.rid_to_state.finish("x")
    assert manager.lora_registry.counts() == [0, 0]


async def test_dropped_without_closing():
    async def script(self, obj):
        await runtime.acquire(self.lora_registry, "A")
        await asyncio.Event().wait()
        yield

    manager = Manager(script)
    answer = asyncio.ensure_future(anext(manager.generate_request(None)))
    await asyncio.sleep(0)
    assert manager.lora_registry.counts() == [1, 0]
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    assert manager.lora_registry.counts() == [0, 0]


async def test_calls_that_run_side_by_side_do_not_mix():
    async def script(self, obj):
        await runtime.acquire(self.lora_registry, obj)
        await asyncio.sleep(0)
        yield Scope.current()

    manager = Manager(script)
    # One context for both, stepped in turns, as a consumer of two streams does it.
    first, second = manager.generate_request("A"), manager.generate_request("B")
    scopes = [await anext(first), await anext(second)]
    assert scopes[0] is not scopes[1] and Scope.current() is None
    await first.aclose()
    await second.aclose()
    assert manager.lora_registry.counts() == [0, 0]


async def test_acquire_outside_of_a_call_has_no_owner():
    registry = Registry("A")
    assert await runtime.acquire(registry, "A") == "id-A"
    assert registry._counters["id-A"].anonymous == 1


def test_a_waiter_still_finds_a_record_that_is_gone():
    class Record:
        pass

    table, waiter = StateTable(), (None for _ in ())
    table["r"] = Record()
    table.keep_for(waiter, "r")
    del table["r"]
    assert "r" not in table and table.get("r") is None and isinstance(table["r"], Record)
    del waiter
    gc.collect()
    with pytest.raises(KeyError):
        table["r"]


def test_reused_id_ends_in_order():
    table, old, new = StateTable(), UsageCounter(), UsageCounter()
    table.own("r", Lease(old))
    table.own("r", Lease(new))
    table.finish("r")
    assert (old.value(), new.value()) == (0, 1)


async def test_instant_lock_never_suspends():
    entering = InstantLock().writer_lock.__aenter__()
    with pytest.raises(StopIteration):
        entering.send(None)


def test_timeout_variable(monkeypatch):
    monkeypatch.delenv(runtime.TIMEOUT_VARIABLE, raising=False)
    assert runtime.unload_timeout() == runtime.DEFAULT_TIMEOUT
    monkeypatch.setenv(runtime.TIMEOUT_VARIABLE, "2.5")
    assert runtime.unload_timeout() == 2.5
    monkeypatch.setenv(runtime.TIMEOUT_VARIABLE, "0")
    assert runtime.unload_timeout() is None
