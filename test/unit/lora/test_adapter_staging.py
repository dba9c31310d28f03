"""Loads in two steps: what is staged, committed, dropped or forgotten, on a scheduler stepped by hand."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import pytest_asyncio
from unit.fake_scheduler import Front, clean_front, settle

from sglang.srt.lora.lease import VersionState
from sglang.srt.managers.io_struct import (
    CommitLoRAAdapterReqInput,
    DropLoRAAdapterReqInput,
    LoRAUpdateOutput,
    StageLoRAAdapterReqInput,
)
from sglang.srt.managers.io_struct.wire import StageAdapterCall, SwitchVersionCall


@pytest_asyncio.fixture
async def front():
    async with clean_front(lora=True) as front:
        yield front


def staging(front: Front, name: str, path: str, **fields) -> asyncio.Task[LoRAUpdateOutput]:
    obj = StageLoRAAdapterReqInput(lora_name=name, lora_path=path, **fields)
    return asyncio.ensure_future(front.manager.adapter_calls.stage(obj))


async def stage(front: Front, name: str, path: str, **fields) -> LoRAUpdateOutput:
    return await front.answered(staging(front, name, path, **fields))


async def commit(front: Front, name: str, version: int, **fields) -> LoRAUpdateOutput:
    obj = CommitLoRAAdapterReqInput(lora_name=name, lora_version=version, **fields)
    return await front.answered(asyncio.ensure_future(front.manager.adapter_calls.commit(obj)))


async def drop(front: Front, name: str, version: int) -> LoRAUpdateOutput:
    return await front.manager.adapter_calls.drop(DropLoRAAdapterReqInput(lora_name=name, lora_version=version))


async def test_a_staged_version_is_no_names_until_it_is_committed(front):
    await front.load("a", "/1")
    staged = await stage(front, "a", "/2")
    assert (staged.success, staged.lora_version, staged.digest, staged.state) == (True, 2, "/2", "staging")
    assert front.names == {"a": 1}
    committed = await commit(front, "a", 2, digest="/2")
    assert (committed.success, committed.lora_version, committed.state) == (True, 2, "serving")
    assert front.names == {"a": 2}
    assert front.scheduler.freed == [1]


async def test_a_publication_is_timed_from_its_stage_to_its_commit():
    took: list[float] = []
    async with clean_front(lora=True, on_publish=took.append) as front:
        await stage(front, "a", "/1")
        assert took == []
        await commit(front, "a", 1)
        await commit(front, "a", 1)
        assert len(took) == 1


async def test_a_first_version_may_be_staged_as_well(front):
    await stage(front, "new", "/1")
    assert front.names == {}
    assert (await commit(front, "new", 1)).loaded_adapters == {"new": "/1"}


async def test_a_commit_may_be_repeated(front):
    await stage(front, "a", "/1")
    for _ in range(3):
        assert (await commit(front, "a", 1, digest="/1")).state == "serving"
    assert front.names == {"a": 1}


async def test_staging_the_same_again_is_the_same_version(front):
    tasks = [staging(front, "a", "/1") for _ in range(3)]
    replies = [await front.answered(task) for task in tasks]
    assert {reply.lora_version for reply in replies} == {1}
    await commit(front, "a", 1)
    served = await stage(front, "a", "/1")
    assert (served.lora_version, served.state) == (1, "serving")
    assert (await commit(front, "a", 1)).success
    pinned = await stage(front, "a", "/1", pinned=True)
    assert (pinned.lora_version, pinned.state) == (2, "staging")
    await drop(front, "a", 2)


async def test_a_name_has_one_staged_version(front):
    await stage(front, "a", "/1")
    await stage(front, "a", "/2")
    assert front.scheduler.freed == [1]
    refused = await commit(front, "a", 1)
    assert (refused.success, refused.error_code) == (False, "adapter_not_found")
    assert "Stage it again" in refused.error_message
    assert (await commit(front, "a", 2)).success


@pytest.mark.parametrize(
    ("name", "version", "fields"),
    [("a", 7, {}), ("b", 1, {}), ("a", 1, {"digest": "other"})],
)
async def test_what_was_not_staged_is_not_committed(front, name, version, fields):
    await stage(front, "a", "/1")
    assert (await commit(front, name, version, **fields)).error_code == "adapter_not_found"
    assert front.names == {}
    await drop(front, "a", 1)


async def test_a_replaced_version_is_not_committed_again(front):
    await stage(front, "a", "/1")
    await commit(front, "a", 1)
    call = await front.running(lora_path="a")
    await front.load("a", "/2", upsert=True)
    assert front.manager.lora_registry.versions[1].state is VersionState.RETIRING
    assert (await commit(front, "a", 1)).error_code == "adapter_not_found"
    front.scheduler.finish(front.only)
    await settle()
    assert call.done


async def test_a_drop_frees_and_may_be_repeated(front):
    await stage(front, "a", "/1")
    for _ in range(2):
        assert (await drop(front, "a", 1)).success
    assert front.scheduler.freed == [1]
    await stage(front, "a", "/2")
    await commit(front, "a", 2)
    await drop(front, "a", 2)
    assert front.names == {"a": 2}


async def test_an_uncommitted_version_is_dropped_when_its_time_is_over(front, monkeypatch):
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    await stage(front, "a", "/1", timeout=5.0)
    now += 3.0
    await stage(front, "a", "/1", timeout=5.0)  # the time starts again
    now += 3.0
    await settle()
    assert front.scheduler.freed == []
    now += 3.0
    await settle()
    assert front.scheduler.freed == [1]
    assert (await commit(front, "a", 1)).error_code == "adapter_not_found"
    await stage(front, "a", "/2", timeout=5.0)
    await commit(front, "a", 2)
    now += 30.0
    await settle()
    assert front.names == {"a": 2}


async def test_a_stage_that_fails_leaves_nothing(front):
    task = staging(front, "a", "/1")
    await settle()
    front.scheduler.reply(success=False, message="rank 1: out of memory")
    assert "out of memory" in (await front.answered(task)).error_message
    assert (await commit(front, "a", 1)).error_code == "adapter_not_found"
    for fields in ({}, {"lora_path": "/1", "tensors": bytearray(b"x")}):
        obj = StageLoRAAdapterReqInput(lora_name="a", **fields)
        assert (await front.manager.adapter_calls.stage(obj)).error_code == "invalid_adapter"


async def test_tensors_are_staged_as_directories_are(front):
    obj = StageLoRAAdapterReqInput(lora_name="a", tensors=bytearray(b"image"), config_dict={"r": 1})
    staged = await front.answered(asyncio.ensure_future(front.manager.adapter_calls.stage(obj)))
    assert staged.success
    assert "image" in front.reader.reads[0]
    assert (await commit(front, "a", 1)).loaded_adapters == {"a": "__tensor__"}


async def test_a_commit_in_mode_switch_moves_running_requests(front):
    await front.load("a", "/1")
    call = await front.running(lora_path="a")
    await stage(front, "a", "/2")
    await commit(front, "a", 2, mode="switch")
    assert any(isinstance(message, SwitchVersionCall) for message in front.scheduler.sent)
    front.scheduler.finish(front.only, "b")
    await settle()
    assert call.reply["meta_info"]["lora_version_spans"] == [[0, 1], [1, 2]]
    assert front.scheduler.freed == [1]


async def test_who_staged_may_leave(front):
    task = staging(front, "a", "/1")
    await settle()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert [type(call) for call in front.scheduler.calls] == [StageAdapterCall]
    assert (await stage(front, "a", "/1")).lora_version == 1
    await drop(front, "a", 1)


async def test_a_commit_counts_towards_the_limits():
    async with clean_front(lora=True, max_loaded_loras=2, max_loras_per_batch=2) as front:
        await front.load("a")
        await front.load("b")
        await stage(front, "c", "/c")
        assert front.names == {"a": 1, "b": 2}
        await commit(front, "c", 3)
        assert front.names == {"b": 2, "c": 3}
        await front.load("p", pinned=True)
        await stage(front, "q", "/q")
        assert (await commit(front, "q", 5)).success
        refused = await stage(front, "r", "/r", pinned=True)
        assert refused.error_code == "capacity"


async def test_a_commit_looks_for_room_again():
    async with clean_front(lora=True, max_loras_per_batch=2) as front:
        await stage(front, "q", "/q", pinned=True)
        pinned = await front.load("p", pinned=True)
        assert (await commit(front, "q", 1)).error_code == "capacity"
        assert front.names == {"p": pinned.version_id}
        await front.answered(front.unloading("p"))
        assert (await commit(front, "q", 1)).success, "it was staged all the time"


async def test_without_lora_there_is_nothing_to_stage():
    async with clean_front() as front:
        assert (await stage(front, "a", "/1")).error_code == "not_enabled"
        assert (await commit(front, "a", 1)).error_code == "not_enabled"
        assert (await drop(front, "a", 1)).error_code == "not_enabled"
