"""Round trips to the scheduler, alone and through the TokenizerManager that owns them (flush, statistics)."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
from unit.fake_scheduler import Front, clean_front, settle

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.control_client import ControlClient
from sglang.srt.managers.io_struct import PauseGenerationReqInput, wire
from sglang.srt.managers.io_struct.wire import CallReply, FlushCacheCall, PauseMode, SchedulerStats


@pytest_asyncio.fixture
async def front():
    async with clean_front() as front:
        yield front


async def test_calls_are_sent_when_made_and_answered_by_id():
    sent = []
    control = ControlClient(sent.append)
    calls = [control.pause(PauseMode.RETRACT), control.resume(), control.flush_cache(), control.stats()]
    expected = [wire.PauseCall(1, PauseMode.RETRACT), wire.ContinueCall(2), wire.FlushCacheCall(3), wire.StatsCall(4)]
    assert sent == expected
    for call_id in (3, 1, 4, 2):
        control.resolve(CallReply(call_id, True, message=str(call_id)))
    assert [reply.message for reply in await asyncio.gather(*calls)] == ["1", "2", "3", "4"]
    await settle()
    assert control.num_pending == 0


async def test_a_cancelled_caller_leaves_nothing_and_its_late_reply_is_dropped():
    control = ControlClient(lambda message: None)
    call = control.stats()
    call.cancel()
    await settle()
    assert control.num_pending == 0
    control.resolve(CallReply(1, True))
    control.resolve(CallReply(99, True))


async def test_death_fails_pending_and_later_calls():
    control = ControlClient(lambda message: None)
    call = control.stats()
    control.fail_all(ServiceUnavailableError("dead"))
    with pytest.raises(ServiceUnavailableError, match="dead"):
        await call
    with pytest.raises(ServiceUnavailableError, match="dead"):
        control.flush_cache()
    await settle()
    assert control.num_pending == 0


async def test_a_call_that_cannot_be_sent_is_not_kept():
    def refuse(message):
        raise OSError("closed")

    control = ControlClient(refuse)
    with pytest.raises(OSError, match="closed"):
        control.stats()
    assert control.num_pending == 0


async def test_a_call_goes_behind_the_requests_made_before_it(front: Front):
    call = front.call()
    await settle(1)
    stats = asyncio.ensure_future(front.manager.scheduler_stats())
    await settle()
    assert [type(message).__name__ for message in front.scheduler.sent] == ["SubmitBatch", "StatsCall"]
    front.scheduler.reply(stats=SchedulerStats(num_running_reqs=3))
    assert (await stats).num_running_reqs == 3
    assert front.manager.stats.num_running_reqs == 3
    front.scheduler.push(wire.StatsPush(SchedulerStats(num_running_reqs=1)))
    front.scheduler.finish(front.only)
    await call.task
    assert front.manager.stats.num_running_reqs == 1


async def test_flush_success_and_refusal(front: Front):
    flush = asyncio.ensure_future(front.manager.flush_cache())
    await settle()
    again = await front.manager.flush_cache()
    assert again == (False, "Another flush_cache is already in progress.")
    front.scheduler.reply()
    assert await flush == (True, "Cache flushed.")
    flush = asyncio.ensure_future(front.manager.flush_cache())
    await settle()
    front.scheduler.reply(False, "2 running requests own KV pages")
    assert await flush == (False, "Flush cache failed. 2 running requests own KV pages")


async def test_flush_with_a_timeout_waits_for_the_requests_in_flight(front: Front):
    call = await front.running()
    flush = asyncio.ensure_future(front.manager.flush_cache(timeout=60.0))
    await settle()
    front.scheduler.reply(False, "busy")
    await settle()
    assert not flush.done()
    assert not front.scheduler.calls, "it waits for the request, it does not poll"
    front.scheduler.finish(front.only)
    await call.task
    await settle()
    assert front.scheduler.calls == [FlushCacheCall(2)]
    front.scheduler.reply()
    assert (await flush)[0]


async def test_a_pause_the_scheduler_refuses_is_an_error(front: Front):
    pause = asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=PauseMode.RETRACT)))
    await settle()
    front.scheduler.reply(False, "not now")
    with pytest.raises(RequestError, match="not now"):
        await pause
    resume = asyncio.ensure_future(front.manager.continue_generation())
    await settle()
    front.scheduler.reply()
    await resume
