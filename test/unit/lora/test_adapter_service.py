"""Loads, upserts, evictions and unloads, on a scheduler stepped by hand and a reader without files.

The `front` fixture checks at the end that no lease is left, that nothing was released or freed twice, and that the
scheduler has exactly the versions that names mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

import pytest
import pytest_asyncio
from unit.fake_scheduler import (
    RUNNING_ABORT,
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

from sglang.srt.errors import AdapterError, ServiceUnavailableError
from sglang.srt.lora.lease import LoRARef, VersionState
from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, LoRAUpdateOutput, PauseGenerationReqInput
from sglang.srt.managers.io_struct.wire import (
    FreeAdapterCall,
    PauseMode,
    StageAdapterCall,
    SubmitBatch,
    SwitchVersionCall,
)


@pytest_asyncio.fixture
async def front():
    async with clean_front(lora=True) as front:
        yield front


def kinds(front: Front) -> list[str]:
    return [type(call).__name__ for call in front.scheduler.calls]


def finish_all(front: Front) -> None:
    for req_id in list(front.scheduler.live):
        front.scheduler.finish(req_id, "z")


async def ended(*tasks) -> None:
    """Wait for these, whatever comes of them."""
    await settle()
    assert all(task.done() for task in tasks), "something hangs"


# ---- load ----------------------------------------------------------------------------------------------------------


async def test_a_load_reads_stages_and_only_then_publishes(front):
    front.threads.slow = True
    task = front.loading("a", pinned=True)
    await settle()
    assert (front.reader.reads, front.scheduler.sent) == ([], [])
    front.threads.go_all()
    await settle()
    assert kinds(front) == ["StageAdapterCall"]
    assert front.manager.lora_registry.num_registered_loras == 0
    with pytest.raises(AdapterError, match="never been loaded"):
        await front.call(lora_path="a").task
    reply = await front.answered(task)
    assert (reply.success, reply.lora_version, reply.digest, reply.rank, reply.nbytes) == (
        True, 1, "/adapters/a", 1, 64,
    )  # fmt: skip
    assert reply.loaded_adapters == {"a": "/adapters/a"}
    assert front.manager.adapter_calls.listing()["adapters"] == [
        {
            "lora_name": "a", "lora_path": "/adapters/a", "state": "serving", "lora_version": 1, "rank": 1,
            "digest": "/adapters/a", "num_tensors": 2, "nbytes": 64, "num_leases": 0, "num_holders": 0, "pinned": True,
            "source": "path",
        }
    ]  # fmt: skip


async def test_without_lora_everything_is_refused():
    async with clean_front() as front:
        for task in (front.loading("a"), front.loading_tensors("a", "t"), front.unloading("a")):
            assert (await front.answered(task)).error_code == "not_enabled"


@pytest.mark.parametrize("name", ["", "a b", "a\n", "x" * 257, "a:b", "é"])
async def test_bad_names_are_refused(front, name):
    assert (await front.load_refused(name)).error_code == "invalid_adapter"
    assert not front.reader.reads


async def test_tensors_load_as_paths_do(front):
    reply = await front.answered(front.loading_tensors("a", "t1"))
    assert reply.loaded_adapters == {"a": "__tensor__"}
    both = front.loading_tensors("b", "t1", serialized_named_tensors=["t1"])
    assert (await front.answered(both)).error_code == "invalid_adapter"
    assert front.names == {"a": 1}


async def test_A27_identical_loads_in_progress_are_one(front):
    tasks = [front.loading("a") for _ in range(50)]
    await settle()
    tasks += [front.loading("a") for _ in range(5)]
    await settle()
    assert kinds(front) == ["StageAdapterCall"]
    replies = [await front.answered(task) for task in tasks]
    assert {reply.lora_version for reply in replies} == {1}
    assert front.reader.reads == ["/adapters/a"]
    assert (await front.load_refused("a")).error_code == "already_loaded"


async def test_A27_a_joined_load_that_fails_fails_for_all(front):
    tasks = [front.loading("a") for _ in range(3)]
    await settle()
    front.scheduler.reply(success=False, message="rank 1: out of memory")
    replies = [await front.answered(task) for task in tasks]
    assert [reply.error_code for reply in replies] == ["invalid_adapter"] * 3
    assert "rank 1: out of memory" in replies[0].error_message
    await front.load("a")


async def test_loads_of_one_name_that_differ_run_one_after_the_other(front):
    first = front.loading("a", "/1")
    rest = [front.loading("a", "/2"), front.loading("a", "/3", upsert=True), front.loading("a", "/4", upsert=True)]
    await settle()
    assert front.reader.reads == ["/1"]
    assert (await front.answered(first)).lora_version == 1
    replies = [await front.answered(task) for task in rest]
    assert [reply.error_code for reply in replies] == ["already_loaded", None, None]
    assert front.reader.reads == ["/1", "/3", "/4"]
    assert front.names == {"a": 3}
    assert front.scheduler.freed == [1, 2]


async def test_an_upsert_never_joins_one_that_has_read_older_bytes(front):
    front.reader.contents["/shm"] = "step 1"
    tasks = [front.loading("a", "/shm", upsert=True)]
    await settle()
    front.reader.contents["/shm"] = "step 2"
    tasks.append(front.loading("a", "/shm", upsert=True))
    digests = [(await front.answered(task)).digest for task in tasks]
    assert digests == ["step 1", "step 2"]


async def test_the_same_tensors_under_another_config_are_another_adapter(front):
    configs = [{"lora_alpha": 16}, {"lora_alpha": 16}, {"lora_alpha": 32}]
    tasks = [front.loading_tensors("a", "t", config_dict=config) for config in configs]
    replies = [await front.answered(task) for task in tasks]
    assert [reply.success for reply in replies] == [True, True, False], "the third is a duplicate of another kind"
    assert len(front.reader.reads) == 1


async def test_different_names_load_side_by_side(front):
    tasks = [front.loading(name) for name in "abc"]
    await settle()
    assert kinds(front) == ["StageAdapterCall"] * 3
    for place in (2, 0, 0):
        front.scheduler.reply(place=place)
    await ended(*tasks)
    assert front.names == {"a": 1, "b": 2, "c": 3}


async def test_a_load_that_has_just_ended_is_not_joined():
    """In the turn in which it ends, somebody unloads the adapter and somebody else loads it again."""

    async def unload_and_load() -> LoRAUpdateOutput:
        front.manager.lora_registry.retire(front.manager.lora_registry.resolve("a"))
        obj = LoadLoRAAdapterReqInput(lora_name="a", lora_path="/adapters/a")
        return await front.manager.load_lora_adapter(obj)

    others: list[asyncio.Task] = []

    def on_publish(seconds: float) -> None:
        if not others:
            others.append(asyncio.ensure_future(unload_and_load()))

    async with clean_front(lora=True, on_publish=on_publish) as front:
        assert (await front.answered(front.loading("a"))).lora_version == 1
        assert (await front.answered(others[0])).lora_version == 2
        assert front.names == {"a": 2}


STAGES = ["reading", "staging", "switching"]


async def upsert_at(front: Front, stage: str) -> asyncio.Task:
    """An upsert (switch) over version 1, which a request runs on, stopped at a stage."""
    await front.load("a", "/1")
    await front.running(lora_path="a")
    front.threads.slow = stage == "reading"
    task = front.loading("a", "/2", upsert=True, mode="switch")
    await settle()
    if stage == "switching":
        front.scheduler.reply()
        await settle()
        assert kinds(front) == ["SwitchVersionCall"]
    return task


@pytest.mark.parametrize("stage", STAGES)
async def test_a_load_goes_on_without_its_caller(front, stage):
    task = await upsert_at(front, stage)
    task.cancel()
    await ended(task)
    front.threads.go_all()
    await settle()
    while front.scheduler.calls:
        front.scheduler.reply()
        await settle()
    assert front.names == {"a": 2}
    finish_all(front)


@pytest.mark.parametrize("unloading", [False, True])
@pytest.mark.parametrize("stage", STAGES)
async def test_the_back_dies_during_a_load(stage, unloading):
    async with open_front(lora=True) as front:
        task = await upsert_at(front, stage)
        unloads = [front.unloading("a")] if unloading else []
        await settle()
        front.manager.back_died("it was killed")
        front.threads.go_all()
        await ended(task, *unloads)
        with pytest.raises(ServiceUnavailableError, match="it was killed"):
            task.result()
        registry = front.manager.lora_registry
        assert registry.num_leases == 0
        assert all(version.state is VersionState.SERVING for version in registry.versions.values())
        assert set(registry.versions) == set(front.names.values())
        assert front.reader.all_closed
        assert all(unload.result().success for unload in unloads)
        with pytest.raises(ServiceUnavailableError):
            await front.loading("b")


@pytest.mark.parametrize("frees_sent", [False, True])
async def test_the_back_dies_during_an_unload(frees_sent):
    async with open_front(lora=True) as front:
        front.scheduler.auto_free = False
        await front.load("a")
        call = await front.running(lora_path="a")
        task = front.unloading("a")
        await settle()
        if frees_sent:
            front.scheduler.finish(front.only)
            await settle()
            assert kinds(front) == ["FreeAdapterCall"]
        front.manager.back_died("it was killed")
        await ended(task, call.task)
        assert task.result().success, "its memory went with the back"
        assert not front.manager.lora_registry.versions
        assert front.manager.adapters.free_failures == 0
        with contextlib.suppress(ServiceUnavailableError):
            call.task.result()


@pytest.mark.parametrize("error", [AdapterError("path_unreadable", "not yet"), OSError("disk"), MemoryError()])
async def test_what_cannot_be_read_leaves_nothing(front, error):
    front.reader.errors["/adapters/a"] = error
    task = front.loading("a")
    await ended(task)
    if isinstance(error, AdapterError):
        assert task.result().error_code == "path_unreadable"
    else:
        assert task.exception() is error
    assert not front.manager.lora_registry.versions
    assert not front.scheduler.sent
    del front.reader.errors["/adapters/a"]
    await front.load("a")


async def test_C25_A26_a_failed_stage_leaves_nothing_and_the_old_version_serves(front):
    await front.load("a", "/1")
    call = await front.running(lora_path="a")
    task = front.loading("a", "/2", upsert=True)
    await settle()
    front.scheduler.reply(success=False, message="no room")
    reply = await front.answered(task)
    assert (reply.success, reply.loaded_adapters) == (False, {"a": "/1"})
    assert list(front.manager.lora_registry.versions) == [1]
    front.scheduler.finish(front.only)
    await call.task
    assert (await front.load("a", "/2", upsert=True)).version_id == 3, "an id is not used again"


async def test_a_load_that_cannot_be_sent_leaves_nothing(front, monkeypatch):
    def refuse(message):
        raise OSError("no buffer space")

    with monkeypatch.context() as patch:
        patch.setattr(front.manager._lifecycle.outbox, "_send", refuse)
        task = front.loading("a")
        await ended(task)
    assert isinstance(task.exception(), OSError)
    assert not front.manager.lora_registry.versions


async def test_a_free_that_cannot_be_sent_does_not_harm_whoever_ended_the_lease(monkeypatch):
    def refuse(message):
        if isinstance(message, FreeAdapterCall):
            raise OSError("no buffer space")

    async with open_front(lora=True) as front:
        await front.load("a")
        call = await front.running(lora_path="a")
        pause = asyncio.ensure_future(front.manager.pause_generation())
        unload = front.unloading("a")
        await settle()
        monkeypatch.setattr(front.manager._lifecycle.outbox, "_send", refuse)
        front.scheduler.ack()
        await ended(call.task, pause, unload)
        assert front.manager.adapters.free_failures == 1
        assert call.finish_reasons == [RUNNING_ABORT]
        assert not front.manager.records


async def test_a_refused_free_is_counted_and_the_name_usable():
    async with open_front(lora=True) as front:
        front.scheduler.auto_free = False
        await front.load("a")
        unload = front.unloading("a")
        await settle()
        front.scheduler.reply(success=False, message="no such version")
        await ended(unload)
        assert unload.result().success
        assert front.manager.adapters.free_failures == 1
        await front.load("a")


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "victim"), [("lru", "b"), ("fifo", "a")])
async def test_eviction_policy(policy, victim):
    async with clean_front(lora=True, max_loaded_loras=3, eviction_policy=policy) as front:
        for name in "abc":
            await front.load(name)
        used = await front.running(lora_path="a")
        finish_all(front)
        await used.task
        await front.load("d")
        assert set(front.names) == set("abcd") - {victim}
        assert front.manager.adapters.evictions == 1


async def test_D6_eviction_prefers_the_idle_and_never_waits_for_the_busy():
    async with clean_front(lora=True, max_loaded_loras=3) as front:
        await front.load("a")
        call = await front.running(lora_path="a")
        for name in "bcd":
            await front.load(name)
        assert set(front.names) == {"a", "c", "d"}
        other = await front.running(lora_path="c")
        await front.load("e")
        assert set(front.names) == {"c", "d", "e"}, "nobody has named d yet, a is the least recently used of the busy"
        assert front.manager.adapter_calls.listing()["adapters"][0]["state"] == "retiring"
        with pytest.raises(AdapterError, match="not loaded any more: a"):
            await front.call(lora_path="a").task
        finish_all(front)
        await asyncio.gather(call.task, other.task)
        assert call.reply["meta_info"]["lora_name"] == "a"


async def test_D4_pins_leave_a_slot_and_are_never_evicted():
    async with clean_front(lora=True, max_loras_per_batch=3, max_loaded_loras=3) as front:
        await front.load("a", pinned=True)
        await front.load("b", pinned=True)
        assert (await front.load_refused("c", pinned=True)).error_code == "capacity"
        for name in "cde":
            await front.load(name)
        assert set(front.names) == {"a", "b", "e"}
        await front.load("a", "/other", upsert=True, pinned=True)
        assert (await front.load_refused("e", "/e", upsert=True, pinned=True)).error_code == "capacity"


async def test_D4_pins_that_load_side_by_side_are_counted_when_they_are_published():
    async with clean_front(lora=True, max_loras_per_batch=2) as front:
        tasks = [front.loading(name, pinned=True) for name in "ab"]
        replies = [await front.answered(task) for task in tasks]
        assert [reply.error_code for reply in replies] == [None, "capacity"]
        assert (list(front.names), front.scheduler.freed) == (["a"], [2])


async def test_a_server_full_of_pins_takes_no_more():
    async with clean_front(lora=True, max_loras_per_batch=3, max_loaded_loras=2) as front:
        for name in "ab":
            await front.load(name, pinned=True)
        assert (await front.load_refused("c")).error_code == "capacity"
        await front.load("a", "/new", upsert=True)
        await front.load("c")
        assert set(front.names) == {"b", "c"}


async def test_D8_keep_last_retires_old_policies_of_the_family_only():
    async with clean_front(lora=True, keep_last=2) as front:
        await front.load("other-v1")
        await front.load("plain")
        await front.load("policy-v0", pinned=True)
        await front.load("policy-v1")
        call = await front.running(lora_path="policy-v1")
        for step in range(2, 30):
            await front.load(f"policy-v{step}", "/shm/policy")
        assert set(front.names) == {"other-v1", "plain", "policy-v0", "policy-v28", "policy-v29"}
        assert len(front.scheduler.staged) == 6, "policy-v1 is held"
        finish_all(front)
        await call.task
        assert call.reply["meta_info"]["lora_version"] == 4


# ---- upsert --------------------------------------------------------------------------------------------------------


def spans(call) -> list:
    meta = call.reply["meta_info"]
    return meta.get("lora_version_spans", [[0, meta["lora_version"]]])


async def test_upsert_finish_old_keeps_running_requests_on_their_version(front):
    await front.load("a", "/1")
    old = await front.running(lora_path="a")
    await front.load("a", "/2", upsert=True)
    new = await front.running(lora_path="a")
    assert {request.version_id for request in front.scheduler.live.values()} == {1, 2}
    finish_all(front)
    await asyncio.gather(old.task, new.task)
    assert (spans(old), spans(new)) == ([[0, 1]], [[0, 2]])
    await settle()
    assert front.scheduler.freed == [1]


async def test_upsert_switch_moves_requests_and_tells_which_tokens_are_whose(front):
    await front.load("a", "/1")
    call = await front.running(lora_path="a", sampling_params={"n": 2})
    waiting = front.call(lora_path="a")
    await settle()
    task = front.loading("a", "/2", upsert=True, mode="switch")
    await settle()
    front.scheduler.reply()
    await settle()
    assert not task.done()
    assert front.scheduler.sent[-1] == SwitchVersionCall(front.scheduler.calls[0].call_id, 1, 2)
    front.scheduler.step(*(Row(req_id, [64]) for req_id in front.scheduler.live))
    assert (await front.answered(task)).lora_version == 2
    assert front.scheduler.freed == [1]
    finish_all(front)
    await asyncio.gather(call.task, waiting.task)
    assert [body["meta_info"]["lora_version_spans"] for body in call.reply] == [[[0, 1], [2, 2]]] * 2
    assert spans(waiting) == [[0, 1], [1, 2]]


async def test_rows_right_behind_the_answer_to_a_switch_are_the_new_versions(front):
    """The answer and the next step can be read in one go, before any task has run."""
    await front.load("a", "/1")
    call = await front.running(lora_path="a")
    short = await front.running(lora_path="a")
    task = front.loading("a", "/2", upsert=True, mode="switch")
    await settle()
    front.scheduler.reply()
    await settle()
    long_id, short_id = front.scheduler.live
    front.scheduler.reply()
    front.scheduler.emit(long_id, "bc")
    front.scheduler.finish(short_id, "d")
    await ended(task, short.task)
    finish_all(front)
    await call.task
    assert (spans(call), spans(short)) == ([[0, 1], [1, 2]], [[0, 1], [1, 2]])
    assert front.scheduler.made_by[long_id] == [1, 2, 2, 2]


async def test_a_switch_before_the_first_token_leaves_one_span(front):
    await front.load("a", "/1")
    call = front.call(lora_path="a")
    await settle()
    await front.load("a", "/2", upsert=True, mode="switch")
    finish_all(front)
    await call.task
    assert (spans(call), call.reply["meta_info"]["lora_version"]) == ([[0, 2]], 2)


async def test_a_refused_switch_is_a_publish_all_the_same(front):
    await front.load("a", "/1")
    call = await front.running(lora_path="a")
    task = front.loading("a", "/2", upsert=True, mode="switch")
    await settle()
    front.scheduler.reply()
    await settle()
    front.scheduler.reply(success=False, message="cannot")
    assert (await front.answered(task)).success
    assert front.names == {"a": 2}
    finish_all(front)
    await call.task
    assert spans(call) == [[0, 1]]


async def test_switches_in_a_row_end_on_the_newest(front):
    await front.load("a", "/1")
    call = await front.running(lora_path="a")
    for path in ("/2", "/3", "/4"):
        await front.load("a", path, upsert=True, mode="switch")
        front.scheduler.emit(front.only, "b")
        await settle()
    finish_all(front)
    await call.task
    assert spans(call) == [[0, 1], [1, 2], [2, 3], [3, 4]]


@pytest.mark.parametrize("holder_ends", [False, True])
async def test_an_unload_during_a_switch_waits_for_both_versions(front, holder_ends):
    await front.load("a", "/1")
    call = await front.running(lora_path="a")
    load = front.loading("a", "/2", upsert=True, mode="switch")
    await settle()
    front.scheduler.reply()
    await settle()
    unload = front.unloading("a")
    await settle()
    if holder_ends:
        finish_all(front)
        await call.task
    assert not unload.done()
    await front.answered(load)
    if not holder_ends:
        assert front.scheduler.freed == [1]
        assert list(front.scheduler.staged) == [2], "what runs has moved there"
        finish_all(front)
    await ended(unload, call.task)
    assert not front.scheduler.staged


async def test_a_new_request_of_the_same_turn_is_sent_before_the_switch(front):
    await front.load("a", "/1")
    first = await front.running(lora_path="a")
    load = front.loading("a", "/2", upsert=True, mode="switch")
    await settle()
    second = front.call(lora_path="a")
    front.scheduler.reply()
    await settle()
    sent = [type(m) for m in front.scheduler.sent if isinstance(m, SubmitBatch | SwitchVersionCall)]
    assert sent == [SubmitBatch, SubmitBatch, SwitchVersionCall]
    await front.answered(load)
    finish_all(front)
    await asyncio.gather(first.task, second.task)
    assert {tuple(map(tuple, spans(call))) for call in (first, second)} == {((0, 1), (1, 2)), ((0, 2),)}


# ---- unload --------------------------------------------------------------------------------------------------------


async def test_an_idle_adapter_is_unloaded_when_the_back_has_freed_it(front):
    front.scheduler.auto_free = False
    await front.load("a")
    unload = front.unloading("a")
    await settle()
    assert not unload.done()
    reply = await front.answered(unload)
    assert (reply.success, reply.nbytes, reply.num_holders, reply.loaded_adapters) == (True, 64, 0, {})
    reply = await front.answered(front.unloading("a"))
    assert (reply.error_code, reply.success) == ("adapter_not_found", False)


async def test_A24_an_unload_waits_for_its_holders_and_for_nobody_else(front):
    for name in "ab":
        await front.load(name)
    calls = [await front.running(lora_path=name) for name in ("a", "b")]
    unload = front.unloading("a")
    await settle()
    await front.load("c")
    await front.load("b", "/b2", upsert=True)
    await front.load("a", "/a2")
    assert front.names == {"c": 3, "b": 4, "a": 5}
    assert not unload.done()
    front.scheduler.finish(min(front.scheduler.live))
    await ended(unload)
    finish_all(front)
    await asyncio.gather(*(call.task for call in calls))


@pytest.mark.parametrize("timeout", [0.0, 0.01])
async def test_F10_a_timeout_says_who_holds_on_and_a_second_unload_joins(front, timeout):
    await front.load("a")
    call = await front.running(lora_path="a", sampling_params={"n": 3})
    reply = await front.unloading("a", timeout=timeout)
    assert reply.error_code == "busy"
    assert "3 running ones (" in reply.error_message
    assert all(record.rid in reply.error_message for record in front.manager.records.values())
    again = [front.unloading("a") for _ in range(2)]
    finish_all(front)
    assert all([(await front.answered(task)).success for task in again])
    await call.task


async def test_b6_a_pause_ends_the_wait_of_an_unload(front):
    """Its holders cannot end before the pause does; the version is retired all the same."""
    await front.load("a")
    call = await front.running(lora_path="a")
    unload = front.unloading("a")
    await settle()
    assert not unload.done()
    pause = asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=PauseMode.IN_PLACE)))
    await settle()
    reply = await unload
    assert (reply.success, reply.num_holders) == (True, 1)
    front.scheduler.reply()
    await pause
    resume = asyncio.ensure_future(front.manager.continue_generation())
    await settle()
    front.scheduler.reply()
    await resume
    finish_all(front)
    await front.answered(call.task)


async def test_a_file_system_that_hangs_does_not_hang_the_name(front, monkeypatch):
    monkeypatch.setenv("SGLANG_LORA_READ_TIMEOUT", "0.01")
    front.threads.slow = True
    refused = await front.loading("a")
    assert refused.error_code == "path_unreadable"
    front.threads.go_all()
    await settle()
    assert len(front.reader.made) == 1
    assert front.reader.all_closed, "what was read too late is given back"
    await front.load("a")


async def test_an_unload_that_aborts(front):
    await front.load("a")
    running, unsent = await front.running(lora_path="a", sampling_params={"n": 2}), front.call(lora_path="a")
    await settle(1)
    unload = front.unloading("a", abort=True)
    await settle()
    assert len(front.scheduler.aborted) == 2 + (len(front.scheduler.submitted) - 2)
    assert not unload.done(), "the scheduler has not acked"
    front.scheduler.ack()
    assert (await front.answered(unload)).success
    await asyncio.gather(running.task, unsent.task)
    assert running.finish_reasons == [RUNNING_ABORT] * 2


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
@pytest.mark.parametrize("abort", [False, True])
async def test_B6_an_unload_under_a_frozen_pause_does_not_wait_for_its_end(front, mode, abort):
    await front.load("a")
    call = await front.running(lora_path="a")
    pause = asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=mode)))
    await front.answered(pause)
    unload = front.unloading("a", abort=abort)
    await settle()
    if abort:
        front.scheduler.ack()
    else:
        assert (unload.result().success, unload.result().num_holders) == (True, 1)
    await ended(unload)
    await front.load("a", "/2")
    await front.answered(asyncio.ensure_future(front.manager.continue_generation()))
    finish_all(front)
    await call.task


async def test_A25_an_unload_whose_caller_leaves_goes_on(front):
    await front.load("a")
    call = await front.running(lora_path="a")
    unload = front.unloading("a")
    await settle()
    unload.cancel()
    await ended(unload)
    again = front.unloading("a")
    finish_all(front)
    assert (await front.answered(again)).success
    await call.task


async def test_an_unload_does_not_touch_a_load_in_progress(front):
    load = front.loading("a")
    await settle()
    assert (await front.unloading("a")).error_code == "adapter_not_found"
    assert (await front.answered(load)).success
    upsert = front.loading("a", "/2", upsert=True)
    await settle()
    assert (await front.unloading("a")).success
    assert (await front.answered(upsert)).success
    assert front.names == {"a": 2}


async def test_upstream_register_cannot_be_published_over(front):
    load = front.loading("a")
    await settle()
    assert isinstance(front.scheduler.calls[0], StageAdapterCall)
    await front.manager.lora_registry.register(LoRARef(lora_name="a"))
    front.scheduler.staged[2] = front.scheduler.calls[0].adapter
    assert (await front.answered(load)).error_code == "already_loaded"
    assert front.scheduler.freed == [1]
    assert front.names == {"a": 2}


# ---- at launch -----------------------------------------------------------------------------------------------------


async def preloading(**errors: Exception) -> tuple[Front, asyncio.Task]:
    """A front that loads `a` and `b` before it is up."""
    scheduler, reader = FakeScheduler(), FakeReader(errors={f"/{name}": error for name, error in errors.items()})
    preload = (("a", "/a", True), ("b", "/b", False))
    front = Front(make_manager(scheduler, lora=True, reader=reader, preload=preload), scheduler, reader)
    await front.manager.start()
    scheduler.ready()
    return front, asyncio.ensure_future(front.manager.wait_ready())


async def test_the_server_is_up_when_its_adapters_are(monkeypatch):
    FakeThreads(monkeypatch)
    front, ready = await preloading()
    await settle()
    assert not ready.done()
    await front.answered(ready)
    assert front.names == {"a": 1, "b": 2}
    await front.check_clean()
    await front.manager.close()


@pytest.mark.parametrize("error", [AdapterError("path_unreadable", "not yet"), OSError("disk"), MemoryError("full")])
async def test_a_server_whose_adapters_do_not_load_says_so(monkeypatch, error):
    FakeThreads(monkeypatch)
    front, ready = await preloading(b=error)
    await settle()
    front.scheduler.reply()
    await ended(ready)
    assert re.search(f"--lora-paths b=/b: .*{error}", str(ready.exception()))
    await front.manager.close()
