"""Life and death of requests in the front. Tests named after rows (A1, A2, ...) hold failures seen in real systems.

Every test runs against a scheduler that is stepped by hand, and the `front` fixture checks at the end of each that no
record is left, that every request the scheduler was sent has ended once, and that nothing was closed twice.
"""

from __future__ import annotations

import asyncio
import gc

import pytest
import pytest_asyncio
from unit.fake_scheduler import EOS, RUNNING_ABORT, WAITING_ABORT, Front, Row, SlowTokenizer, clean_front, settle

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo, StepOutput
from sglang.srt.managers.request_state import RecordState
from sglang.srt.managers.tokenizer_manager import ServerStatus


@pytest_asyncio.fixture
async def front():
    async with clean_front() as front:
        yield front


async def test_A1_abort_while_waiting_gets_its_reply(front):
    call = front.call(rid="r", return_logprob=True)
    await settle()
    assert front.manager.abort_request("r") == 1
    await settle()
    assert front.scheduler.aborted == [front.only]
    assert not call.done, "the reply comes with the ack"
    front.scheduler.ack()
    await call.task
    assert call.reply["meta_info"]["finish_reason"] == WAITING_ABORT
    assert call.reply["meta_info"]["output_token_logprobs"] == []
    assert call.reply["output_ids"] == []
    assert call.reply["text"] == ""


@pytest.mark.parametrize("finish_first", [True, False])
async def test_A2_finish_and_abort_echo_in_both_orders(front, finish_first):
    call = await front.running(rid="r")
    req_id = front.only
    front.manager.abort_request("r")
    finish, echo = Row(req_id, [64], Finish.LENGTH), Row(req_id, (), Finish.ABORT, FinishInfo(message="Aborted"))
    first, second = (finish, echo) if finish_first else (echo, finish)
    front.scheduler.step(first)
    front.scheduler.late(second)
    await call.task
    expected = {"type": "length", "length": 2} if finish_first else RUNNING_ABORT
    assert call.finish_reasons == [expected]
    assert front.manager.counters.late_rows == 1


async def test_A2_abort_while_running_keeps_the_partial_output(front):
    call = front.call(rid="r", return_logprob=True)
    await settle()
    front.scheduler.emit(front.only, "abc", logprobs=[-1.0, -2.0, -3.0])
    await settle()
    front.manager.abort_request("r")
    front.manager.abort_request("r")
    await settle()
    front.scheduler.ack()
    await call.task
    assert call.reply["text"] == "abc"
    assert call.reply["meta_info"]["finish_reason"] == RUNNING_ABORT
    assert [e[:2] for e in call.reply["meta_info"]["output_token_logprobs"]] == [[-1.0, 64], [-2.0, 65], [-3.0, 66]]


def refuse(front: Front, req_id: int, status: int, message: str) -> None:
    err_type = "BadRequestError" if status == 400 else ""
    info = FinishInfo(message=message, status_code=status, err_type=err_type, was_running=False)
    front.scheduler.emit(req_id, (), Finish.ABORT, info=info)


async def test_A3_scheduler_503_with_a_waiting_client(front):
    call = front.call()
    await settle()
    refuse(front, front.only, 503, "Request waiting timeout reached.")
    with pytest.raises(ServiceUnavailableError, match="Request waiting timeout reached."):
        await call.task


async def test_A3_scheduler_503_without_a_client(front):
    call = front.call()
    await settle()
    call.client.disconnect()
    await settle()
    refuse(front, front.only, 503, "Request running timeout reached.")
    await settle()
    assert isinstance(call.error, RequestError)


async def test_A3_scheduler_503_with_a_client_that_does_not_read(front):
    generator = front.manager.generate_request(GenerateReqInput(text="hi", stream=True))
    first = asyncio.ensure_future(anext(generator))
    await settle()
    front.scheduler.emit(front.only, "a")
    await first
    refuse(front, front.only, 503, "out of memory")
    await settle()
    assert not front.manager.records, "closed without the client's help"
    last = await anext(generator)
    assert last["meta_info"]["finish_reason"]["status_code"] == 503
    with pytest.raises(StopAsyncIteration):
        await anext(generator)


async def test_A3_one_refused_item_ends_the_batch(front):
    call = front.call(text=["a", "b", "c"])
    await settle()
    first, second, third = front.scheduler.live
    refuse(front, second, 503, "The request queue is full.")
    await settle()
    assert isinstance(call.error, ServiceUnavailableError)
    assert front.scheduler.aborted == [first, third]
    front.scheduler.ack()


async def test_A4_scheduler_400(front):
    call, stream = front.call(), front.call(stream=True)
    await settle()
    for req_id in list(front.scheduler.live):
        refuse(front, req_id, 400, "bad grammar")
    with pytest.raises(RequestError, match="bad grammar") as caught:
        await call.task
    assert (caught.value.status, caught.value.err_type) == (400, "BadRequestError")
    await stream.task
    expected = {"type": "abort", "message": "bad grammar", "status_code": 400, "err_type": "BadRequestError"}
    assert stream.finish_reasons == [expected]


BAD_REQUESTS = {
    "too long": {"input_ids": [1] * 100},
    "too many new tokens": {"sampling_params": {"max_new_tokens": 99}},
    "sampling range": {"sampling_params": {"temperature": -1}},
    "sampling key": {"sampling_params": {"temprature": 1}},
    "stop regex": {"sampling_params": {"stop_regex": "("}},
    "out of vocabulary": {"input_ids": [1, 257]},
    "logprob id": {"return_logprob": True, "token_ids_logprob": [257]},
    "image": {"image_data": ["x"]},
    "adapter": {"lora_path": "nobody"},
}


@pytest.mark.parametrize("fields", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_A5_invalid_requests_leave_nothing(front, fields, stream):
    call = front.call(rid="r", stream=stream, **fields)
    await settle()
    with pytest.raises(RequestError):
        await call.task
    assert not front.manager.records
    assert not front.manager.rid_to_state
    assert not front.scheduler.sent


@pytest.mark.parametrize("bad", range(3))
async def test_A6_one_bad_item_stops_the_whole_batch(front, bad):
    prompts = [[1, 2], [3], [4]]
    prompts[bad] = [5, 257]
    call = front.call(input_ids=prompts, rid=["x", "y", "z"])
    with pytest.raises(RequestError, match="257"):
        await call.task
    await settle()
    assert not front.scheduler.sent
    assert not front.manager.records


@pytest.mark.parametrize("rid", [None, "r"])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize("batch", [1, 2])
async def test_A7_n_samples_close_once_each_without_warm_up(front, batch, n, rid):
    texts = "a" if batch == 1 else ["a", "b"]
    call = front.call(text=texts, rid=rid, sampling_params={"n": n})
    await settle()
    submitted = front.scheduler.submitted
    assert len(submitted) == batch * n
    assert len({request.req_id for request in submitted}) == batch * n
    for place, request in reversed(list(enumerate(submitted))):
        front.scheduler.finish(request.req_id, [place])
    await call.task
    bodies = call.reply if batch * n > 1 else [call.reply]
    assert [body["output_ids"] for body in bodies] == [[place] for place in range(batch * n)]
    assert len({body["meta_info"]["id"] for body in bodies}) == batch * n


async def test_A8_failure_between_opening_and_fan_out(front, monkeypatch):
    def fail(text):
        raise ValueError("no such merge")

    monkeypatch.setattr(front.manager.tokenizer, "encode", fail)
    call = front.call(text=["a", "b"], rid="r", sampling_params={"n": 4})
    with pytest.raises(RequestError, match="no such merge"):
        await call.task
    assert not front.manager.records


@pytest.mark.parametrize("stage", ["unsent", "dispatched", "one finished"])
@pytest.mark.parametrize("how", ["rid", "prefix", "disconnect"])
async def test_A9_n_samples_end_together(front, stage, how):
    call = front.call(rid="parent", sampling_params={"n": 3})
    await settle(1 if stage == "unsent" else 12)
    if stage == "one finished":
        front.scheduler.finish(min(front.scheduler.live), "done")
        await settle()
    left = {"unsent": 3, "dispatched": 3, "one finished": 2}[stage]
    if how == "disconnect":
        call.client.disconnect()
    else:
        assert front.manager.abort_request("parent" if how == "rid" else "par", prefix=how == "prefix") == left
    await settle()
    assert front.scheduler.ack() == len(front.scheduler.submitted) - (stage == "one finished")
    await settle()
    assert call.done
    if how != "disconnect":
        assert len(call.reply) == 3
        assert call.finish_reasons.count(WAITING_ABORT) == left


async def test_A13_stream_disconnect_aborts_now_and_keeps_the_record_until_the_ack(front):
    call = await front.running(stream=True, rid="r")
    assert len(call.items) == 1
    (record,) = front.manager.records.values()
    call.client.disconnect()
    await settle()
    assert call.done
    assert front.scheduler.aborted == [record.req_id]
    assert record.state is RecordState.DISPATCHED
    duplicate = front.call(rid="r")
    with pytest.raises(RequestError, match="Duplicate request ID detected: r"):
        await duplicate.task
    front.scheduler.ack()
    await settle()
    assert record.state is RecordState.CLOSED
    again = await front.running(rid="r")
    front.scheduler.finish(front.only)
    await again.task


async def test_A14_rows_between_disconnect_and_ack_are_swallowed(front):
    call = await front.running(stream=True)
    (record,) = front.manager.records.values()
    call.client.disconnect()
    await settle()
    front.scheduler.emit(record.req_id, "zzz")
    await settle()
    assert record.output_ids == [64]
    assert front.manager.counters.late_rows == 0
    front.scheduler.finish(record.req_id, "z")
    await settle()
    assert record.state is RecordState.CLOSED
    assert front.manager.counters.aborted_total == 0, "it had finished"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("stage", ["tokenising", "held", "unsent", "waiting", "running"])
async def test_A15_A16_client_lost_at_each_await(front, monkeypatch, stage, how, stream):
    slow = SlowTokenizer(monkeypatch)
    if stage != "tokenising":
        slow.go.set()
    if stage == "held":
        await front.manager.pause_generation()
    call = front.call(text=["a", "b"], stream=stream, rid="r")
    await settle(1 if stage == "unsent" else 12)
    if stage == "running":
        front.scheduler.step(*(Row(req_id, [64]) for req_id in front.scheduler.live))
        await settle()
    assert not call.done
    if how == "disconnect":
        call.client.disconnect()
    else:
        call.task.cancel()
    await settle()
    if stage in ("tokenising", "held"):
        assert not front.manager.records
        assert not front.manager._lifecycle._held
        assert not front.scheduler.submitted
    slow.go.set()
    await front.manager.continue_generation()
    await settle()
    assert call.done
    assert set(front.scheduler.aborted) == set(front.scheduler.live)
    front.scheduler.ack()


async def test_A15_generator_closed_at_a_yield(front):
    generator = front.manager.generate_request(GenerateReqInput(text="hi", stream=True))
    first = asyncio.ensure_future(anext(generator))
    await settle()
    front.scheduler.emit(front.only, "a")
    await first
    await generator.aclose()
    await settle()
    assert front.scheduler.ack() == 1


async def test_A15_generator_forgotten_at_a_yield(front):
    generator = front.manager.generate_request(GenerateReqInput(text="hi", stream=True))
    first = asyncio.ensure_future(anext(generator))
    await settle()
    front.scheduler.emit(front.only, "a")
    await first
    del generator, first
    gc.collect()
    await settle()
    assert front.scheduler.ack() == 1


async def test_A18_late_rows_are_counted_never_fatal(front):
    call = await front.running()
    req_id = front.only
    front.scheduler.finish(req_id)
    await call.task
    front.scheduler.late(Row(req_id, [64]), Row(req_id, [65], Finish.LENGTH), Row(999, [1]))
    other = await front.running()
    assert front.manager.counters.late_rows == 3
    front.scheduler.finish(front.only)
    await other.task


async def test_A19_rid_reuse_with_the_old_consumer_suspended(front):
    old = front.manager.generate_request(GenerateReqInput(text="hi", stream=True, rid="r"))
    first = asyncio.ensure_future(anext(old))
    await settle()
    front.scheduler.emit(front.only, "a")
    await first
    front.scheduler.finish(front.only, "b")
    await settle()
    new = await front.running(rid="r")
    assert (await anext(old))["text"] == "ab"
    await old.aclose()
    assert not front.scheduler.aborted, "the old call's end is not the new one's"
    assert "r" in front.manager.rid_to_state
    front.scheduler.finish(front.only, "c")
    await new.task
    assert new.reply["text"] == "ac"


async def test_A19_duplicate_rids_are_refused_whole(front):
    call = await front.running(rid="b")
    for fields in ({"rid": "b"}, {"text": ["x", "y"], "rid": ["a", "b"]}, {"text": ["x", "y"], "rid": ["c", "c"]}):
        with pytest.raises(RequestError, match="Duplicate request ID detected: [bc]"):
            await front.call(**fields).task
    assert list(front.manager.rid_to_state) == ["b"]
    front.scheduler.finish(front.only)
    await call.task


async def test_A19_a_rid_is_free_as_soon_as_its_reply_is_complete(front):
    call = front.call(rid="r", sampling_params={"stop": "x"})
    await settle()
    front.scheduler.emit(front.only, "ax")
    await call.task
    assert front.scheduler.stopped == [front.only]
    again = front.call(rid="r", sampling_params={"stop": "x"})
    await settle()
    front.scheduler.ack()
    front.scheduler.finish(front.only, "b")
    await again.task
    assert again.reply["text"] == "b"


async def test_rid_to_state_may_be_popped_by_outside_code(front):
    call = await front.running(rid="r")
    front.manager.rid_to_state.pop("r")
    front.scheduler.finish(front.only, "b")
    await call.task
    assert call.reply["text"] == "ab"


# ---- abort by name -------------------------------------------------------------------------------------------------


async def test_A35_prefix_and_abort_all_reach_every_place(front):
    running = await front.running(rid="job1::a")
    front.scheduler.started.clear()
    waiting = front.call(rid="job1::b")
    family = front.call(rid="job1::c", text=["x", "y"])
    other = front.call(rid="job2::a")
    await settle()
    assert front.manager.abort_request("job1::", prefix=False) == 0
    assert front.manager.abort_request("nobody") == 0
    assert front.manager.abort_request(None) == 0
    assert front.manager.abort_request("", prefix=True) == 0
    assert front.manager.abort_request("job1::", prefix=True) == 4
    await settle()
    assert len(front.scheduler.aborted) == 4
    front.scheduler.ack()
    await asyncio.gather(running.task, waiting.task, family.task)
    held = front.call(text="z")
    assert front.manager.abort_request(abort_all=True) == 1
    await settle(1)
    assert front.manager.abort_request(abort_all=True) == 2
    await settle()
    front.scheduler.ack()
    await asyncio.gather(other.task, held.task)
    assert front.manager.abort_request(abort_all=True) == 0


async def test_the_rid_of_a_batch_aborts_all_of_it(front):
    call = front.call(rid="r", text=["x", "y"], sampling_params={"n": 2})
    await settle()
    assert front.manager.abort_request("r_1") == 2
    assert front.manager.abort_request("r") == 4
    await settle()
    front.scheduler.ack()
    await call.task
    assert call.finish_reasons == [WAITING_ABORT] * 4


# ---- the back dies -------------------------------------------------------------------------------------------------


async def test_A36_death_of_the_back_fails_everything_at_once():
    front = await Front.start()
    calls = [await front.running(), front.call(stream=True), front.call(text=["a", "b"], sampling_params={"n": 2})]
    await settle()
    stats = asyncio.ensure_future(front.manager.scheduler_stats())
    drain = asyncio.ensure_future(front.manager.pause_generation())
    held = front.call()
    await settle()
    front.manager.back_died("it was killed")
    front.manager.back_died("again")
    await drain
    for call in [*calls, held]:
        with pytest.raises(ServiceUnavailableError, match="it was killed"):
            await call.task
    with pytest.raises(ServiceUnavailableError, match="it was killed"):
        await stats
    assert not front.manager.records
    assert not front.manager.rid_to_state
    assert front.manager.status is ServerStatus.DOWN
    for later in (front.call().task, front.manager.pause_generation(), front.manager.flush_cache()):
        with pytest.raises(ServiceUnavailableError):
            await later
    await front.manager.close()


async def test_A36_a_reply_that_is_complete_survives_the_death():
    front = await Front.start()
    call = front.call(sampling_params={"stop": "x"})
    await settle()
    front.scheduler.emit(front.only, "ax")
    await asyncio.sleep(0)
    front.manager.back_died("it was killed")
    await call.task
    assert call.reply["text"] == "a"
    await front.manager.close()


async def test_an_error_in_the_reader_is_the_death_of_the_back():
    front = await Front.start()
    call = await front.running()
    front.scheduler.push(StepOutput(req_ids=bytes(8), finish=b"", num_tokens=bytes(4), tokens=b""))
    with pytest.raises(ServiceUnavailableError, match="reading the scheduler's messages failed"):
        await call.task
    await front.manager.close()


async def test_eos_is_the_scheduler_business(front):
    call = await front.running()
    front.scheduler.emit(front.only, [65, EOS], Finish.STOP, info=FinishInfo(matched=EOS))
    await call.task
    assert call.reply["text"] == "ab"
    assert call.reply["output_ids"] == [64, 65, EOS]
    assert call.finish_reasons == [{"type": "stop", "matched": EOS}]
