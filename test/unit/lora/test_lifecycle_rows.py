"""Failures of real LoRA servers, one test a row of the matrix: A1 to A41, and what a front decides of B, D and F.

Every request here runs on adapter `a` (version 1). The `front` fixture ends each test with what the failures have in
common: the adapter must unload at once, without a lease left, and the scheduler must have freed it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect

import pytest
import pytest_asyncio
from unit.fake_scheduler import (
    RUNNING_ABORT,
    WAITING_ABORT,
    FakeReader,
    FakeScheduler,
    FakeThreads,
    Front,
    Row,
    clean_front,
    make_manager,
    open_front,
    settle,
)

from sglang.srt.errors import AdapterError, RequestError, ServiceUnavailableError
from sglang.srt.lora.lease import Lease, VersionState
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.io_struct import GenerateReqInput, PauseGenerationReqInput
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo, PauseMode, StageAdapterCall, SubmitRequest
from sglang.srt.managers.request_lifecycle import RequestLifecycle
from sglang.srt.managers.request_state import RecordState
from sglang.srt.managers.tokenizer_manager import ServerStatus


@contextlib.asynccontextmanager
async def adapter_front(**options):
    """A front with adapter `a`; afterwards everything unloads without waiting for anybody."""
    async with clean_front(lora=True, **options) as front:
        await front.load("a")
        yield front
        await settle()
        assert front.manager.lora_registry.num_leases == 0
        for name in front.names:
            assert (await front.answered(front.unloading(name, timeout=0.0))).success
        assert sorted(front.scheduler.freed) == sorted(set(front.scheduler.freed))


@pytest_asyncio.fixture
async def front():
    async with adapter_front() as front:
        yield front


def ask(front: Front, **fields):
    return front.call(**{"lora_path": "a"} | fields)


async def running(front: Front, **fields):
    return await front.running(**{"lora_path": "a"} | fields)


async def paused(front: Front, mode: PauseMode = PauseMode.ABORT) -> None:
    task = asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=mode)))
    await front.answered(task)


async def resumed(front: Front) -> None:
    await front.answered(asyncio.ensure_future(front.manager.continue_generation()))


def holders(front: Front) -> int:
    """Sequences that hold a version, by the registry; by the records it must be the same."""
    registry = front.manager.lora_registry
    by_records = [record for record in front.manager.records.values() if record.lease is not None]
    by_registry = sum(version.num_holders for version in registry.versions.values())
    assert by_registry == len(by_records)
    return by_registry


def refuse(front: Front, req_id: int, status: int) -> None:
    err_type = "BadRequestError" if status == 400 else ""
    info = FinishInfo(message="refused", status_code=status, err_type=err_type, was_running=False)
    front.scheduler.emit(req_id, (), Finish.ABORT, info=info)


def finish_all(front: Front) -> None:
    for req_id in list(front.scheduler.live):
        front.scheduler.finish(req_id, "z")


# ---- A: accounting -------------------------------------------------------------------------------------------------


async def test_a01_abort_of_a_waiting_request(front):
    call = ask(front, rid="r")
    await settle()
    front.manager.abort_request("r")
    await settle()
    assert holders(front) == 1, "until the echo"
    front.scheduler.ack()
    await settle()
    assert call.finish_reasons == [WAITING_ABORT]
    assert holders(front) == 0


@pytest.mark.parametrize("finish_first", [True, False])
async def test_a02_abort_of_a_running_request_with_two_terminal_messages(front, finish_first):
    call = await running(front, rid="r")
    front.manager.abort_request("r")
    rows = [Row(front.only, [64], Finish.LENGTH), Row(front.only, (), Finish.ABORT, FinishInfo(message="Aborted"))]
    first, second = rows if finish_first else rows[::-1]
    front.scheduler.step(first)
    front.scheduler.late(second)
    await call.task
    assert front.manager.counters.late_rows == 1


@pytest.mark.parametrize("status", [503, 500, 400])
@pytest.mark.parametrize("consumer", ["waiting", "gone", "slow stream"])
async def test_a03_a04_refused_by_the_scheduler(front, status, consumer):
    call = ask(front, stream=consumer == "slow stream")
    await settle()
    if consumer == "gone":
        call.client.disconnect()
        await settle()
    refuse(front, front.only, status)
    await settle()
    assert holders(front) == 0
    if consumer == "slow stream":
        assert call.finish_reasons[0]["status_code"] == status
    else:
        assert isinstance(call.error, RequestError if status == 400 or consumer == "gone" else ServiceUnavailableError)


INVALID = {
    "too long": {"input_ids": [1] * 100},
    "too many new tokens": {"sampling_params": {"max_new_tokens": 99}},
    "sampling range": {"sampling_params": {"temperature": -1}},
    "sampling key": {"sampling_params": {"temprature": 1}},
    "sampling type": {"sampling_params": [1]},
    "regex": {"sampling_params": {"regex": "a+"}},
    "stop regex": {"sampling_params": {"stop_regex": "("}},
    "out of vocabulary": {"input_ids": [1, 257]},
    "negative id": {"input_ids": [-1]},
    "id type": {"input_ids": ["x"]},
    "empty": {"text": ""},
    "no prompt": {"text": None, "input_ids": None},
    "two prompts": {"text": "a", "input_ids": [1]},
    "logprob start": {"return_logprob": True, "logprob_start_len": 99},
    "logprob id": {"return_logprob": True, "token_ids_logprob": [257]},
    "top logprobs": {"return_logprob": True, "top_logprobs_num": -1},
    "image": {"image_data": ["x"]},
    "adapter type": {"text": ["a", "b"], "lora_path": ["a", 5]},
    "adapter list": {"lora_path": ["a"]},
    "adapter count": {"text": ["a", "b"], "lora_path": ["a"]},
    "extra key": {"text": ["a", "b"], "extra_key": ["x", 5]},
    "priority": {"priority": 2**40},
    "n": {"sampling_params": {"n": 0}},
    "unlike n": {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
    "huge n": {"sampling_params": {"n": 10**6}},
    "rids": {"text": ["a", "b"], "rid": ["x", "x"]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", INVALID.values(), ids=INVALID)
async def test_a05_every_validator(front, fields, stream):
    for _ in range(3):
        call = ask(front, stream=stream, **fields)
        await settle()
        assert isinstance(call.error, RequestError)
    assert (holders(front), front.manager.records) == (0, {})
    assert not front.scheduler.submitted


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("how", ["item", "adapter"])
async def test_a06_one_bad_item_of_a_batch(front, bad, how):
    prompts, names = [[1], [2], [3], [4]], ["a", None, "a", "a"]
    if how == "item":
        prompts[bad] = [257]
    else:
        names[bad] = "unknown"
    call = front.call(input_ids=prompts, lora_path=names)
    await settle()
    assert isinstance(call.error, RequestError)
    assert not front.scheduler.submitted
    assert holders(front) == 0


@pytest.mark.parametrize("dispatched", range(1, 4))
async def test_a06_one_item_refused_after_dispatch(front, dispatched):
    call = ask(front, text=["w", "x", "y", "z"])
    await settle()
    ids = list(front.scheduler.live)
    refuse(front, ids[dispatched], 400)
    await settle()
    assert isinstance(call.error, RequestError)
    assert holders(front) == 3, "the others are with the scheduler, and held until it acks"
    assert sorted(front.scheduler.aborted) == sorted(set(ids) - {ids[dispatched]})
    front.scheduler.ack()


@pytest.mark.parametrize("rid", [None, "r"])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize("batch", [1, 2])
async def test_a07_n_samples_share_a_lease_and_balance(front, batch, n, rid):
    call = ask(front, text="x" if batch == 1 else ["x", "y"], rid=rid, sampling_params={"n": n})
    await settle()
    assert front.manager.lora_registry.num_leases == batch
    for left in range(batch * n, 0, -1):
        assert holders(front) == left == len(front.scheduler.live)
        front.scheduler.finish(min(front.scheduler.live))
        await settle()
    await call.task
    assert holders(front) == 0


async def test_a08_failure_between_validation_and_fan_out(front, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(RequestLifecycle, "admit", fail)
    call = ask(front, text=["x", "y"], sampling_params={"n": 4})
    await settle()
    assert isinstance(call.error, RuntimeError)
    assert (holders(front), front.manager.records, front.manager.rid_to_state) == (0, {}, {})


@pytest.mark.parametrize("stage", ["unsent", "dispatched", "running", "one finished"])
@pytest.mark.parametrize("how", ["rid", "adapter", "disconnect", "cancel"])
async def test_a09_n_samples_lost_at_each_await(front, stage, how):
    call = ask(front, rid="parent", sampling_params={"n": 3})
    await settle(1 if stage == "unsent" else 12)
    if stage in ("running", "one finished"):
        front.scheduler.step(*(Row(req_id, [64]) for req_id in front.scheduler.live))
    if stage == "one finished":
        front.scheduler.finish(min(front.scheduler.live))
        await settle()
    if how == "rid":
        front.manager.abort_request("parent")
    elif how == "adapter":
        front.manager.abort_request(lora_name="a")
    elif how == "disconnect":
        call.client.disconnect()
    else:
        call.task.cancel()
    await settle()
    assert holders(front) == len(front.scheduler.live)
    assert set(front.scheduler.live) <= front.scheduler.asked_to_end
    front.scheduler.ack()
    await settle()
    assert call.done
    assert holders(front) == 0


@pytest.mark.parametrize("how", ["disconnect", "cancel", "abort", "back dies"])
async def test_a10_owner_gone_while_it_waits_for_admission(how):
    async with open_front(lora=True) as front:
        await front.load("a")
        await paused(front)
        call = ask(front, rid="r")
        await settle()
        assert holders(front) == 0, "nothing is acquired before the request can run"
        leave = {
            "disconnect": call.client.disconnect,
            "cancel": call.task.cancel,
            "abort": lambda: front.manager.abort_request("r"),
            "back dies": lambda: front.manager.back_died("it was killed"),
        }
        leave[how]()
        front.manager._lifecycle.open_gates()
        await settle()
        assert call.done
        assert (holders(front), front.manager.records, front.scheduler.submitted) == (0, {}, [])


@pytest.mark.parametrize("bad", range(3))
async def test_a11_a_list_of_adapters_is_leased_whole_or_not_at_all(front, bad):
    await front.load("b")
    names = ["a", "b", "a"]
    names[bad] = "unknown"
    call = front.call(text=["x", "y", "z"], lora_path=names)
    await settle()
    assert isinstance(call.error, AdapterError)
    assert holders(front) == 0
    names[bad] = "b"
    call = front.call(text=["x", "y", "z"], lora_path=names)
    await settle()
    assert [r.version_id for r in front.scheduler.submitted] == [{"a": 1, "b": 2}[name] for name in names]
    finish_all(front)
    await call.task


@pytest.mark.parametrize("turns", range(6))
async def test_a12_acquire_against_unload(front, turns):
    """The scheduler refuses a request that names what is not staged, so every interleaving is told here."""
    call = ask(front)
    await settle(turns)
    unload = front.unloading("a")
    await settle()
    if front.scheduler.live:
        assert not unload.done()
        finish_all(front)
    else:
        assert isinstance(call.error, AdapterError)
    assert (await front.answered(unload)).success
    await settle()
    assert call.done


async def test_a13_stream_disconnect_holds_until_the_ack(front):
    call = await running(front, stream=True)
    call.client.disconnect()
    await settle()
    assert call.done
    unload = front.unloading("a")
    await settle()
    assert holders(front) == 1
    assert not unload.done()
    assert not front.scheduler.freed
    front.scheduler.ack()
    assert (await front.answered(unload)).success


async def test_a14_disconnect_while_rows_are_on_their_way(front):
    call = await running(front, stream=True)
    call.client.disconnect()
    front.scheduler.emit(front.only, "xyz")
    await settle()
    assert holders(front) == 1
    front.scheduler.ack()


@pytest.mark.parametrize("yields", range(3))
async def test_a15_generator_closed_at_each_yield(front, yields):
    generator = front.manager.generate_request(GenerateReqInput(text="hi", stream=True, lora_path="a"))
    for _ in range(yields):
        step = asyncio.ensure_future(anext(generator))
        await settle()
        front.scheduler.emit(front.only, "a")
        await step
    await generator.aclose()
    await settle()
    assert holders(front) == len(front.scheduler.live)
    front.scheduler.ack()


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("turns", range(8))
async def test_a15_a16_client_lost_after_any_number_of_turns(front, monkeypatch, turns, stream, how):
    monkeypatch.setattr("sglang.srt.managers.request_builder.OFF_LOOP_CHARACTERS", 0)
    call = ask(front, text=["x", "y"], stream=stream)
    await settle(turns)
    if how == "disconnect":
        call.client.disconnect()
    else:
        call.task.cancel()
    await settle()
    assert call.done
    assert holders(front) == len(front.scheduler.live)
    front.scheduler.ack()


async def test_a18_output_after_the_record_has_gone(front):
    call = await running(front)
    req_id = front.only
    front.scheduler.finish(req_id)
    await call.task
    front.scheduler.late(Row(req_id, [64]), Row(req_id, [65], Finish.LENGTH))
    await settle()
    assert front.manager.counters.late_rows == 2


async def test_a19_rid_reuse_with_the_old_consumer_suspended(front):
    old = front.manager.generate_request(GenerateReqInput(text="hi", stream=True, rid="r", lora_path="a"))
    first = asyncio.ensure_future(anext(old))
    await settle()
    front.scheduler.emit(front.only, "a")
    await first
    front.scheduler.finish(front.only)
    await settle()
    new = await running(front, rid="r")
    await old.aclose()
    await settle()
    assert holders(front) == 1, "the old consumer released what is not its own"
    assert not front.scheduler.aborted
    front.scheduler.finish(front.only)
    await new.task


async def test_a20_release_of_what_was_never_acquired(front):
    call = ask(front, lora_path="unknown", rid="r")
    await settle()
    assert front.manager.abort_request("r") == 0
    assert isinstance(call.error, AdapterError)
    await front.manager.lora_registry.release(None)
    await front.manager.lora_registry.release([None])


async def test_a21_a23_release_is_a_plain_call(front):
    """No task, no coroutine and no callback in between, so nothing can be collected or lost."""
    for function in (Lease.release, LoRARegistry.lease_ended, RequestLifecycle._close):
        assert not inspect.iscoroutinefunction(function)
    call = await running(front, stream=True)
    (record,) = front.manager.records.values()
    call.client.disconnect()
    del call
    await settle()
    gc.collect()
    front.manager._lifecycle._close(record)
    assert holders(front) == 0, "in the same step"
    front.scheduler.ack()
    await settle()
    assert front.manager.counters.late_rows == 1


async def test_a22_a_second_release_after_the_unload():
    async with open_front(lora=True) as front:
        await front.load("a")
        call = await running(front)
        ((holder, record),) = front.manager.records.items()
        held = record.lease
        finish_all(front)
        await call.task
        await front.answered(front.unloading("a"))
        assert not held.release(holder)
        assert front.manager.lora_registry.double_releases == 1
        assert front.scheduler.freed == [1]


async def test_a24_a_leaked_reference_blocks_its_own_unload_only():
    async with open_front(lora=True) as front:
        await front.load("a")
        leaked = front.manager.lora_registry.lease([("a", [-99])])
        unload = front.unloading("a")
        reply = await front.unloading("a", timeout=0.0)
        assert (reply.error_code, reply.num_holders) == ("busy", None)
        await front.load("b")
        await front.load("a", "/2")
        assert (await front.answered(front.unloading("b"))).success
        assert not unload.done()
        leaked[0].release(-99)
        assert (await front.answered(unload)).success


async def test_a25_unload_cancelled_and_backend_failure():
    async with open_front(lora=True) as front:
        front.scheduler.auto_free = False
        await front.load("a")
        unload = front.unloading("a")
        await settle()
        unload.cancel()
        await settle()
        (listed,) = front.manager.adapter_calls.listing()["adapters"]
        assert listed["state"] == "freeing"
        again = front.unloading("a")
        await settle()
        front.scheduler.reply(success=False, message="rank 1")
        await settle()
        assert again.done()
        assert front.manager.adapters.free_failures == 1
        await front.load("a")


async def test_a26_the_same_name_twice_is_refused_before_anything_is_staged(front):
    reply = await front.load_refused("a")
    assert reply.error_code == "already_loaded"
    assert len([m for m in front.scheduler.sent if isinstance(m, StageAdapterCall)]) == 1
    assert front.reader.reads == ["/adapters/a"]


async def test_a27_fifty_loads_of_one_name(front):
    tasks = [front.loading("b") for _ in range(50)]
    assert {(await front.answered(task)).lora_version for task in tasks} == {2}
    assert front.reader.reads.count("/adapters/b") == 1


async def test_a28_a29_a_held_request_is_admitted_with_its_lease_or_not_at_all(front):
    await front.load("b")
    await paused(front)
    kept, lost = ask(front), ask(front, lora_path="b")
    await settle()
    unload = front.unloading("b")
    front.manager._lifecycle.open_gates()
    assert holders(front) == 2, "leased in the step that opened the gate"
    await settle()
    assert not unload.done()
    late = ask(front, lora_path="b")
    await settle()
    assert isinstance(late.error, AdapterError), "nothing reloads by itself"
    assert front.reader.reads.count("/adapters/b") == 1
    await resumed(front)
    finish_all(front)
    await asyncio.gather(kept.task, lost.task, unload)


async def test_a30_requests_of_an_adapter_that_is_still_loading_leave_nothing_behind(front):
    for turn in range(10):
        load = front.loading(f"x{turn}")
        await settle()
        call = ask(front, lora_path=f"x{turn}")
        call.client.disconnect()
        await settle()
        assert isinstance(call.error, RequestError)
        assert (await front.answered(load)).success
        assert (await front.answered(front.unloading(f"x{turn}"))).success
    assert list(front.scheduler.staged) == [1]


@pytest.mark.parametrize("message", ["Request waiting timeout reached.", "Request running timeout reached."])
async def test_a33_scheduler_timeouts_release(front, message):
    call = await running(front)
    info = FinishInfo(message=message, status_code=503, was_running="running" in message)
    front.scheduler.emit(front.only, (), Finish.ABORT, info=info)
    with pytest.raises(ServiceUnavailableError, match=message):
        await call.task
    assert holders(front) == 0


@pytest.mark.parametrize("by", ["rid", "prefix", "all", "adapter"])
async def test_a34_abort_of_a_request_that_a_pause_holds(front, by):
    await paused(front)
    call = ask(front, rid="r1")
    await settle()
    how = {
        "rid": {"rid": "r1"},
        "prefix": {"rid": "r", "prefix": True},
        "all": {"abort_all": True},
        "adapter": {"lora_name": "a"},
    }
    assert front.manager.abort_request(**how[by]) == 1
    await resumed(front)
    await settle()
    assert call.finish_reasons == [WAITING_ABORT]
    assert not front.scheduler.submitted


async def test_a35_prefix_all_and_adapter_aborts_reach_every_place(front):
    await front.load("b", "/path/of/b")
    calls = [
        await running(front, rid="j1"),
        ask(front, rid="j2", lora_path="b"),
        ask(front, rid="j3", lora_path="/path/of/b"),
        ask(front, rid="k", lora_path=None),
    ]
    await settle()
    assert front.manager.abort_request("j", prefix=True) == 3
    assert front.manager.abort_request(lora_name="b") == 2
    assert front.manager.abort_request(abort_all=True) == 4
    await settle()
    assert len(front.scheduler.aborted) == 4, "each once"
    front.scheduler.ack()
    await asyncio.gather(*(call.task for call in calls))
    assert front.manager.abort_request(lora_name="b") == 0


async def test_a36_a37_death_of_the_back_zeroes_the_ledger():
    async with open_front(lora=True) as front:
        front.scheduler.auto_free = False
        for name in "abc":
            await front.load(name)
        calls = [await running(front), await running(front, lora_path="b", stream=True), ask(front, lora_path="c")]
        await front.load("b", "/2", upsert=True)
        unloads = [front.unloading(name) for name in "ac"]
        await settle()
        front.manager.back_died("it was killed")
        await settle()
        assert all(call.done for call in calls)
        assert all(isinstance(call.error, ServiceUnavailableError) for call in calls)
        assert all(unload.result().success for unload in unloads)
        assert (holders(front), front.manager.lora_registry.double_releases) == (0, 0)
        assert front.manager.status is ServerStatus.DOWN
        listed = front.manager.adapter_calls.listing()["adapters"]
        assert [(entry["lora_name"], entry["lora_version"]) for entry in listed] == [("b", 4)], "what to load again"
        with pytest.raises(ServiceUnavailableError):
            await ask(front, lora_path="b").task


async def test_a38_every_way_of_asking_takes_the_same_lease(front):
    chunks = front.call(chunks=True, stream=True, lora_path="a")
    await settle()
    assert holders(front) == 1
    finish_all(front)
    await chunks.task


async def test_a40_requests_before_the_server_is_up_hold_nothing(monkeypatch):
    FakeThreads(monkeypatch)
    scheduler = FakeScheduler()
    front = Front(make_manager(scheduler, lora=True, reader=FakeReader()), scheduler)
    await front.manager.start()
    with pytest.raises(ServiceUnavailableError):
        await ask(front).task
    assert holders(front) == 0
    probe = GenerateReqInput(text="hi", log_metrics=False)
    assert probe.lora_path is None, "probes run on the base model"
    await front.manager.close()


async def test_a41_a_stream_that_has_ended_is_not_aborted(front):
    call = await running(front, stream=True)
    finish_all(front)
    await call.task
    call.client.disconnect()
    await settle()
    assert front.manager.counters.aborted_total == 0
    assert not front.scheduler.asked_to_end


# ---- B: pauses and switches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_b06_b11_sync_under_a_frozen_pause(front, mode):
    call = await running(front)
    await paused(front, mode)
    reply = await front.unloading("a")
    assert (reply.success, reply.num_holders) == (True, 1), "at once, and it says who is left"
    for step in (2, 3):
        await front.load("a", f"/{step}", upsert=True)
    queued = ask(front)
    await settle()
    await resumed(front)
    assert [request.version_id for request in front.scheduler.live.values()] == [1, 3], "the pinned versions"
    finish_all(front)
    await asyncio.gather(call.task, queued.task)


async def test_b08_publish_needs_no_flush(front):
    call, queued = await running(front), ask(front)
    await settle()
    await paused(front, PauseMode.RETRACT)
    await front.load("a", "/2", upsert=True)
    await resumed(front)
    finish_all(front)
    await asyncio.gather(call.task, queued.task)
    assert not [message for message in front.scheduler.sent if "Flush" in type(message).__name__]


async def test_b10_no_id_means_two_adapters(front):
    survivor = await running(front)
    front.manager.abort_request(lora_name="a")
    unload = front.unloading("a")
    await front.load("b")
    await front.load("a", "/other")
    late = ask(front)
    await settle()
    front.scheduler.ack()
    finish_all(front)
    await asyncio.gather(survivor.task, late.task, unload)
    assert survivor.reply["meta_info"]["lora_version"] == 1
    assert late.reply["meta_info"]["lora_version"] == 3


@pytest.mark.parametrize("failure", ["read", "stage"])
async def test_b12_a_failed_load_under_a_pause_leaves_a_pause_that_ends(front, failure, monkeypatch):
    loop, now = asyncio.get_running_loop(), 0.0
    monkeypatch.setattr(loop, "time", lambda: now)
    await paused(front)
    if failure == "read":
        front.reader.errors["/2"] = AdapterError("invalid_adapter", "bad")
    load = front.loading("a", "/2", upsert=True)
    await settle()
    if failure == "stage":
        front.scheduler.reply(success=False, message="rank 1")
    assert not (await front.answered(load)).success
    call = ask(front)
    await settle()
    now = 1e6
    await settle()
    assert front.manager.paused is None
    finish_all(front)
    await call.task


@pytest.mark.parametrize("mode", ["finish_old", "switch"])
async def test_b13_every_token_says_which_policy_made_it(front, mode):
    call = await running(front)
    req_id = front.only
    for step in (2, 3):
        await front.load("a", f"/{step}", upsert=True, mode=mode)
        front.scheduler.emit(req_id, "bc")
        await settle()
    front.scheduler.finish(req_id, "d")
    await call.task
    meta = call.reply["meta_info"]
    spans = meta.get("lora_version_spans", [[0, meta["lora_version"]]])
    told = [max(s for s in spans if s[0] <= i)[1] for i in range(meta["completion_tokens"])]
    assert told == front.scheduler.made_by[req_id] == ([1] * 6 if mode == "finish_old" else [1, 2, 2, 3, 3, 3])


# ---- D: eviction and memory ----------------------------------------------------------------------------------------


async def test_d02_a_name_used_again_is_another_version(front):
    await front.answered(front.unloading("a"))
    version = await front.load("a", "/other")
    call = await running(front)
    assert front.scheduler.live[front.only].version_id == version.version_id == 2
    finish_all(front)
    await call.task


async def test_d04_pins_leave_room():
    async with adapter_front(max_loras_per_batch=2) as front:
        await front.load("pinned", pinned=True)
        assert (await front.load_refused("second", pinned=True)).error_code == "capacity"


async def test_d06_a_busy_victim_blocks_nobody():
    async with adapter_front(max_loaded_loras=1) as front:
        calls = [await running(front)]
        for step in range(5):
            await front.load(f"v{step}")
            calls.append(await running(front, lora_path=f"v{step}"))
        assert len(front.scheduler.staged) == 6, "all are held"
        assert list(front.names) == ["v4"]
        finish_all(front)
        await asyncio.gather(*(call.task for call in calls))
        await settle()
        assert len(front.scheduler.staged) == 1


async def test_d07_the_cap_holds_for_each_route():
    async with adapter_front(max_loaded_loras=1) as front:
        for step, load in enumerate([front.loading, front.loading_tensors] * 2):
            assert (await front.answered(load(f"v{step}", f"/{step}"))).success
            assert list(front.names) == [f"v{step}"]
        assert (await front.answered(front.loading_tensors("v3", "/x", upsert=True))).success
        assert front.manager.adapters.evictions == 4


async def test_d08_a_policy_a_step_for_ever():
    async with adapter_front(keep_last=2) as front:
        calls = []
        for step in range(200):
            await front.load(f"policy-v{step}", "/shm/policy")
            calls.append(await running(front, lora_path=f"policy-v{step}"))
            if step % 4 == 3:
                finish_all(front)
                await asyncio.gather(*(call.task for call in calls))
                calls.clear()
                await settle()
                assert len(front.scheduler.staged) == 3
            assert len(front.scheduler.staged) <= 7
        assert len(front.scheduler.freed) == 198


# ---- F: the API ----------------------------------------------------------------------------------------------------


async def test_f04_f05_publishing_reads_once_and_is_seen_at_once(front):
    for step in range(3):
        await front.load("a", "/shm", upsert=True)
        calls = [await running(front) for _ in range(3)]
        assert {request.version_id for request in front.scheduler.live.values()} == {step + 2}
        finish_all(front)
        await asyncio.gather(*(call.task for call in calls))
    assert front.reader.reads.count("/shm") == 3
    assert not {"upsert", "mode"} & set(SubmitRequest.__struct_fields__)


async def test_f09_holders_of_a_retired_name_finish_on_it(front):
    call = await running(front, sampling_params={"n": 2})
    unload = front.unloading("a")
    await settle()
    front.scheduler.step(*(Row(req_id, [65]) for req_id in front.scheduler.live))
    await settle()
    (version,) = front.manager.lora_registry.versions.values()
    assert version.state is VersionState.RETIRING
    finish_all(front)
    await asyncio.gather(call.task, unload)
    assert {body["meta_info"]["lora_name"] for body in call.reply} == {"a"}


async def test_f10_an_unload_has_a_deadline_and_says_how_far_it_is(front):
    call = await running(front, sampling_params={"n": 4})
    for left in (4, 3):
        reply = await front.unloading("a", timeout=0.0)
        assert reply.error_code == "busy"
        assert f"{left} running ones" in reply.error_message
        front.scheduler.finish(min(front.scheduler.live))
        await settle()
    reply = asyncio.ensure_future(asyncio.shield(front.unloading("a", abort=True)))
    await settle()
    front.scheduler.ack()
    assert (await reply).success
    await call.task
    assert call.finish_reasons[2:] == [RUNNING_ABORT] * 2


async def test_f12_one_schema_for_every_route(front):
    fields = {"upsert": True, "mode": "switch", "pinned": True}
    for load in (front.loading, front.loading_tensors):
        call = await running(front)
        assert (await front.answered(load("a", "/x", **fields))).success
        finish_all(front)
        await call.task
        assert len(call.reply["meta_info"]["lora_version_spans"]) == 2


async def test_records_stay_until_the_ack_whatever_the_client_does(front):
    """The rule behind 2A, said once: DISPATCHED plus a lease ends with a terminal row and with nothing else."""
    call = await running(front, rid="r")
    (record,) = front.manager.records.values()
    for leave in (lambda: front.manager.abort_request("r"), call.client.disconnect, call.task.cancel):
        leave()
        await settle()
        assert record.state is RecordState.DISPATCHED
        assert holders(front) == 1
    front.scheduler.ack()
