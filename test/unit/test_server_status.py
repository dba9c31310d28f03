"""The TokenizerManager as a server: starting, full, draining, counting, and getting messages out in the right order."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
from unit.fake_scheduler import RUNNING_ABORT, FakeScheduler, Front, clean_front, make_manager, settle

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import AbortRequests, Finish, FinishInfo, SubmitBatch
from sglang.srt.managers.tokenizer_manager import ServerStatus


@pytest_asyncio.fixture
async def front():
    async with clean_front() as front:
        yield front


async def test_requests_before_ready_are_refused():
    scheduler = FakeScheduler()
    front = Front(make_manager(scheduler), scheduler)
    await front.manager.start()
    assert front.manager.status is ServerStatus.STARTING
    with pytest.raises(ServiceUnavailableError, match="still loading the model"):
        await front.call().task
    with pytest.raises(ServiceUnavailableError, match="not loaded within 0.0 s"):
        await front.manager.wait_ready(0.0)
    waiting = asyncio.ensure_future(front.manager.wait_ready())
    scheduler.ready(max_req_input_len=3)
    await waiting
    assert front.manager.status is ServerStatus.UP
    assert front.manager.ready.max_req_input_len == 3
    with pytest.raises(RequestError, match="longer than the 3 tokens"):
        await front.call(text="four").task
    await front.manager.close()


async def test_a_back_that_fails_while_loading():
    scheduler = FakeScheduler()
    manager = make_manager(scheduler)
    await manager.start()
    waiting = asyncio.ensure_future(manager.wait_ready())
    scheduler.push(wire.BackFailed("WeightError: no such tensor"))
    with pytest.raises(ServiceUnavailableError, match="WeightError: no such tensor"):
        await waiting
    scheduler.ready()
    await settle()
    assert manager.status is ServerStatus.DOWN, "the dead do not come back"
    await manager.close()


async def test_a_full_queue_is_503_and_drains():
    async with clean_front(max_queued_requests=2) as front:
        calls = [front.call() for _ in range(6)]  # 4 run, 2 wait
        await settle()
        with pytest.raises(ServiceUnavailableError, match="The request queue is full."):
            await front.call().task
        front.scheduler.finish(min(front.scheduler.live))
        await settle()
        with pytest.raises(ServiceUnavailableError, match="The request queue is full."):
            await front.call(text=["a", "b"]).task
        calls.append(front.call())
        await settle()
        for req_id in list(front.scheduler.live):
            front.scheduler.finish(req_id)
        await asyncio.gather(*(call.task for call in calls))


async def test_drain_lets_live_requests_finish_and_refuses_new_ones(front: Front):
    call = await front.running()
    drain = asyncio.ensure_future(front.manager.drain(60.0))
    await settle()
    with pytest.raises(ServiceUnavailableError, match="shutting down"):
        await front.call().task
    assert not front.scheduler.aborted
    front.scheduler.finish(front.only)
    assert await drain
    await call.task


async def test_drain_aborts_what_does_not_end_in_time(front: Front):
    call = await front.running()
    drain = asyncio.ensure_future(front.manager.drain(0.0))
    while not front.scheduler.aborted:
        await asyncio.sleep(0)
    assert not drain.done()
    front.scheduler.ack()
    assert await drain
    await call.task
    assert call.finish_reasons == [RUNNING_ABORT]


async def test_drain_does_not_wait_for_a_continue_that_never_comes(front: Front):
    await front.manager.pause_generation()
    held = front.call()
    await settle()
    assert await front.manager.drain(60.0)
    with pytest.raises(ServiceUnavailableError, match="shutting down"):
        await held.task


async def test_drain_gives_up_on_a_scheduler_that_does_not_ack(monkeypatch):
    monkeypatch.setattr(tokenizer_manager, "DRAIN_ACK_SECONDS", 0.0)
    front = await Front.start()
    call = await front.running()
    assert not await front.manager.drain(0.0)
    await front.manager.close()
    with pytest.raises(ServiceUnavailableError):
        await call.task


async def test_one_turn_is_one_message_and_aborts_follow_their_submits(front: Front):
    calls = [front.call(rid=f"r{i}") for i in range(3)]
    await settle()
    calls.append(front.call(rid="r3"))
    for i in (2, 0, 1):
        front.manager.abort_request(f"r{i}")
    await settle()
    kinds = [type(message) for message in front.scheduler.sent]
    assert kinds in ([SubmitBatch, SubmitBatch, AbortRequests], [SubmitBatch, AbortRequests, SubmitBatch])
    assert front.scheduler.batches == [3, 1]
    assert front.scheduler.aborted == [3, 1, 2]
    front.scheduler.ack()
    front.scheduler.finish(front.only)
    await asyncio.gather(*(call.task for call in calls))


async def test_requests_that_cannot_be_sent_fail_and_leave_nothing(front: Front, monkeypatch):
    def refuse(message):
        raise OSError("no buffer space")

    with monkeypatch.context() as patch:
        patch.setattr(front.manager._lifecycle.outbox, "_send", refuse)
        calls = [front.call(), front.call(text=["a", "b"], stream=True)]
        await settle()
    for call in calls:
        with pytest.raises(ServiceUnavailableError, match="no buffer space"):
            await call.task


class Observer:
    """Writes down what a RequestMetrics is told."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def first_token(self, record, seconds) -> None:
        self.seen.append(("first", record.req_id, seconds >= 0))

    def inter_token(self, record, seconds, num_tokens) -> None:
        self.seen.append(("inter", record.req_id, num_tokens))

    def finished(self, record, seconds) -> None:
        self.seen.append(("finished", record.req_id, record.finish_reason["type"]))


async def test_metrics_and_counters_hear_of_every_request_once():
    observer = Observer()
    async with clean_front(metrics=observer) as front:
        call, probe, lost = front.call(text="abc"), front.call(log_metrics=False), front.call()
        await settle()
        first, second, third = front.scheduler.live
        front.scheduler.emit(first, "a", cached_tokens=2)
        front.scheduler.emit(first, "bc", Finish.LENGTH)
        front.scheduler.finish(second, "a")
        lost.client.disconnect()
        await settle()
        front.scheduler.ack()
        await asyncio.gather(call.task, probe.task)
        await settle()
        assert observer.seen == [
            ("first", first, True),
            ("inter", first, 2),
            ("finished", first, "length"),
            ("finished", third, "abort"),
        ]
        counters = front.manager.counters
        assert (counters.requests_total, counters.aborted_total) == (2, 1)
        assert (counters.prompt_tokens_total, counters.cached_tokens_total) == (5, 2)
        assert counters.generation_tokens_total == 4


class LeakPatch:
    """What AstraFlow's patch of stock does around `generate_request`: after it ends, look, pop, release."""

    def __init__(self, manager) -> None:
        self.manager = manager
        self.popped = 0

    async def generate_request(self, obj, request=None):
        try:
            async for item in self.manager.generate_request(obj, request):
                yield item
        finally:
            assert hasattr(self.manager.server_args, "enable_lora")
            rids = [obj.rid] if obj.is_single else [obj[i].rid for i in range(obj.batch_size)]
            for rid in rids:
                if rid in self.manager.rid_to_state:
                    self.manager.rid_to_state.pop(rid)
                    self.popped += 1
                    await self.manager.lora_registry.release(obj.lora_id)


async def test_astraflow_patch_finds_nothing_to_do_after_a_normal_end(front: Front):
    patch = LeakPatch(front.manager)
    call = Front(patch, front.scheduler).call(text=["a", "b"], rid="r", sampling_params={"stop": "x"})
    await settle()
    first, second = front.scheduler.live
    front.scheduler.emit(first, "x")
    info = FinishInfo(matched=256)
    front.scheduler.emit(second, [256], Finish.STOP, info=info)
    await call.task
    assert patch.popped == 0
    front.scheduler.ack()


async def test_astraflow_patch_may_pop_what_still_waits_for_its_ack(front: Front):
    patch = LeakPatch(front.manager)
    call = Front(patch, front.scheduler).call(rid="r")
    await settle()
    call.client.disconnect()
    await settle()
    assert patch.popped == 1
    assert call.done
    assert len(front.manager.records) == 1
    front.scheduler.ack()
