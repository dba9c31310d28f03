"""Pauses of everything and of one adapter: owners, deadlines, and what waits for them."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
from unit.fake_scheduler import RUNNING_ABORT, WAITING_ABORT, Front, clean_front, open_front, settle

from sglang.srt.errors import AdapterError, RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput
from sglang.srt.managers.io_struct.wire import ContinueCall, PauseMode

MODES = list(PauseMode)


@pytest_asyncio.fixture
async def front():
    async with clean_front(lora=True) as front:
        await front.load("a", "/path/of/a")
        await front.load("b")
        yield front


def pausing(front: Front, mode: PauseMode = PauseMode.ABORT, **fields) -> asyncio.Task:
    return asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=mode, **fields)))


async def pause(front: Front, mode: PauseMode = PauseMode.ABORT, **fields) -> None:
    await front.answered(pausing(front, mode, **fields))


async def resume(front: Front, **fields) -> None:
    obj = ContinueGenerationReqInput(**fields)
    await front.answered(asyncio.ensure_future(front.manager.continue_generation(obj)))


async def finish(front: Front, *calls) -> None:
    """Everything that the scheduler has ends well, and so do these calls."""
    await settle()
    for req_id in list(front.scheduler.live):
        front.scheduler.finish(req_id)
    await settle()
    assert all(call.finish_reasons[0]["type"] == "length" for call in calls)


class Clock:
    """The loop's time, moved by hand; an event loop reads it whenever it looks for timers that are due."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        await settle()


@pytest_asyncio.fixture
async def clock(monkeypatch):
    return Clock(monkeypatch)


# ---- owner ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_only_the_owner_or_nobody_ends_a_pause(front, mode):
    await pause(front, mode, owner="trainer")
    with pytest.raises(AdapterError, match="belongs to 'trainer'") as caught:
        await resume(front, owner="evaluator")
    assert (caught.value.code, caught.value.status) == ("busy", 409)
    assert front.manager.paused is mode
    await resume(front, owner="trainer")
    assert front.manager.paused is None
    await pause(front, mode, owner="trainer")
    await resume(front)
    assert front.manager.paused is None


async def test_a_continue_without_a_pause_is_nobodys(front):
    await resume(front, owner="evaluator")
    await pause(front, owner="trainer")
    await resume(front, owner="trainer")
    await resume(front, owner="evaluator")
    assert not any(isinstance(message, ContinueCall) for message in front.scheduler.sent)


async def test_an_unowned_pause_may_be_ended_by_anybody(front):
    await pause(front)
    await resume(front, owner="anybody")
    assert front.manager.paused is None


# ---- deadline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_B12_a_forgotten_pause_ends_by_itself(front, clock, mode):
    await pause(front, mode, owner="trainer", timeout=10.0)
    call = front.call(lora_path="a")
    await clock.advance(9.0)
    assert front.manager.paused is mode
    await clock.advance(2.0)
    assert front.manager.paused is None
    if mode is not PauseMode.ABORT:
        front.scheduler.reply()
        assert not front.scheduler.paused
    await finish(front, call)


async def test_every_pause_has_a_deadline_unless_told_otherwise(front, clock, monkeypatch):
    monkeypatch.setenv("SGLANG_PAUSE_TIMEOUT", "5")
    await pause(front)
    await clock.advance(6.0)
    assert front.manager.paused is None
    await pause(front, timeout=0.0)
    await clock.advance(1e9)
    assert front.manager.paused is PauseMode.ABORT
    await resume(front)


async def test_the_latest_pause_sets_the_deadline_and_continue_takes_it_back(front, clock):
    await pause(front, timeout=5.0)
    await pause(front, timeout=20.0)
    await clock.advance(10.0)
    assert front.manager.paused is PauseMode.ABORT
    await resume(front)
    await pause(front, timeout=0.0)
    await clock.advance(100.0)
    assert front.manager.paused is PauseMode.ABORT, "no deadline is left over from before"
    await resume(front)


async def test_B12_a_deadline_that_passes_while_aborting(front, clock):
    old = await front.running(lora_path="a")
    task = pausing(front, timeout=5.0)
    await settle()
    held = front.call(lora_path="b")
    await clock.advance(6.0)
    assert front.manager.paused is None
    assert not task.done(), "its own records are not gone yet"
    assert len(front.scheduler.live) == 2, "the gate is open"
    front.scheduler.ack()
    await front.answered(task)
    assert old.finish_reasons == [RUNNING_ABORT]
    await finish(front, held)


async def test_a_deadline_after_the_death_of_the_back_does_nothing(clock, caplog):
    async with open_front(lora=True) as front:
        await pause(front, PauseMode.IN_PLACE, timeout=5.0)
        front.manager.back_died("it was killed")
        await clock.advance(6.0)
        assert not caplog.records


async def test_a_continue_at_the_deadline_that_the_scheduler_refuses_is_logged(front, clock, caplog):
    await pause(front, PauseMode.RETRACT, timeout=5.0)
    await clock.advance(6.0)
    front.scheduler.reply(success=False, message="busy")
    await settle()
    assert "could not be continued: The scheduler refused: busy." in caplog.text
    await resume(front)


# ---- one adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["a", "/path/of/a"])
async def test_B9_a_pause_of_one_adapter_leaves_the_others_alone(front, wanted):
    mine, other, base = [await front.running(**f) for f in ({"lora_path": wanted}, {"lora_path": "b"}, {})]
    task = pausing(front, lora_name="a")
    await settle()
    assert front.scheduler.aborted == [front.scheduler.submitted[0].req_id]
    assert not task.done()
    front.scheduler.ack()
    await front.answered(task)
    assert mine.finish_reasons == [RUNNING_ABORT]
    held, late = front.call(lora_path=wanted), front.call(lora_path="b")
    mixed = front.call(text=["x", "y"], lora_path=["b", wanted])
    await settle()
    assert len(front.scheduler.live) == 3
    assert front.manager.num_held == 3
    await finish(front, other, base, late)
    await resume(front, lora_name="a")
    await finish(front, held)
    await mixed.task


async def test_only_abort_pauses_one_adapter(front):
    with pytest.raises(RequestError, match="takes mode abort, got in_place"):
        await pause(front, PauseMode.IN_PLACE, lora_name="a")


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_a_frozen_pause_does_not_let_a_paused_adapter_through(front, mode):
    await pause(front, lora_name="a")
    held, other = front.call(lora_path="a"), front.call(lora_path="b")
    await pause(front, mode)
    assert len(front.scheduler.live) == 1
    await resume(front)
    await finish(front, held, other)


async def test_continue_of_everything_ends_adapter_pauses_too(front):
    await pause(front, lora_name="a")
    await pause(front, lora_name="b")
    await pause(front)
    calls = [front.call(lora_path=name) for name in ("a", "b", None)]
    await settle()
    await resume(front, lora_name="a")
    assert not front.scheduler.live
    await resume(front)
    await finish(front, *calls)


async def test_the_deadline_of_one_adapters_pause(front, clock):
    await pause(front, lora_name="a", timeout=5.0)
    await pause(front, lora_name="b", timeout=50.0)
    calls = [front.call(lora_path=name) for name in ("a", "b")]
    await clock.advance(6.0)
    assert [request.version_id for request in front.scheduler.live.values()] == [1]
    await clock.advance(60.0)
    await finish(front, *calls)


# ---- held requests -------------------------------------------------------------------------------------------------


async def test_names_are_looked_up_when_the_gate_opens(front):
    await pause(front)
    moved, gone, new = front.call(lora_path="a"), front.call(lora_path="b"), front.call(lora_path="c")
    await settle()
    assert front.manager.lora_registry.num_leases == 0
    await front.load("a", "/2", upsert=True)
    await front.answered(front.unloading("b"))
    await front.load("c")
    await resume(front)
    await settle()
    with pytest.raises(AdapterError, match="not loaded any more: b"):
        await gone.task
    assert [request.version_id for request in front.scheduler.live.values()] == [3, 4]
    await finish(front, moved, new)


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("how", ["disconnect", "cancel", "abort", "abort adapter", "drain"])
async def test_held_requests_can_leave_before_the_gate_opens(front, adapter, how):
    await pause(front, lora_name=adapter)
    call = front.call(lora_path="a", rid="r", sampling_params={"n": 2})
    await settle()
    assert front.manager.num_held == 2
    if how == "disconnect":
        call.client.disconnect()
    elif how == "cancel":
        call.task.cancel()
    elif how == "drain":
        assert await front.manager.drain(0.0)
    else:
        by_name = how == "abort adapter"
        matched = front.manager.abort_request(None if by_name else "r", lora_name="a" if by_name else None)
        assert matched == 2
    await settle()
    assert call.done
    assert (front.manager.num_held, front.manager.records, front.manager.lora_registry.num_leases) == (0, {}, 0)
    if how.startswith("abort"):
        assert call.finish_reasons == [WAITING_ABORT] * 2
    await resume(front)
    assert not front.scheduler.submitted


async def test_a_pause_that_the_scheduler_refuses_is_an_error(front):
    task = pausing(front, PauseMode.IN_PLACE)
    await settle()
    front.scheduler.reply(success=False, message="no")
    with pytest.raises(RequestError, match="The scheduler refused: no"):
        await front.answered(task)
    await resume(front)


async def test_pause_and_continue_of_a_dead_back():
    async with open_front(lora=True) as front:
        task = pausing(front, PauseMode.IN_PLACE)
        await settle()
        front.manager.back_died("it was killed")
        with pytest.raises(ServiceUnavailableError):
            await task
        with pytest.raises(ServiceUnavailableError):
            await front.manager.continue_generation()
