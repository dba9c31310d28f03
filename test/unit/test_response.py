"""Bodies, events and chunks that clients get, through a TokenizerManager on a scheduler stepped by hand."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import pytest_asyncio
from unit.fake_scheduler import EOS, Front, Row, clean_front, ids_of, settle

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo, Positions, RowLogprobs, pack
from sglang.srt.managers.response import abort_error, finish_reason


@pytest_asyncio.fixture
async def front():
    async with clean_front() as front:
        yield front


def positions(*alternatives: list[tuple[float, int]]) -> Positions:
    flat = [pair for pairs in alternatives for pair in pairs]
    values, ids = [value for value, _ in flat], [token for _, token in flat]
    return Positions(pack([len(pairs) for pairs in alternatives], "<i4"), pack(ids, "<i4"), pack(values, "<f4"))


REASONS = [
    (Finish.STOP, FinishInfo(matched=7), {"type": "stop", "matched": 7}),
    (Finish.STOP, FinishInfo(matched=0), {"type": "stop", "matched": 0}),
    (Finish.STOP, FinishInfo(message="NaN happened"), {"type": "stop", "matched": "NaN happened"}),
    (Finish.LENGTH, FinishInfo(), {"type": "length", "length": 5}),
    (
        Finish.ABORT,
        FinishInfo(message="Aborted"),
        {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None},
    ),
    (Finish.ABORT, FinishInfo(was_running=False), {"type": "abort", "message": "Abort in waiting queue"}),
    (
        Finish.ABORT,
        FinishInfo(message="no", status_code=400, err_type="BadRequestError"),
        {"type": "abort", "message": "no", "status_code": 400, "err_type": "BadRequestError"},
    ),
]


@pytest.mark.parametrize(("finish", "info", "expected"), REASONS)
def test_finish_reason(finish, info, expected):
    assert finish_reason(finish, info, 5) == expected


def test_abort_error():
    refused = abort_error({"type": "abort", "message": "no", "status_code": 400, "err_type": None})
    assert isinstance(refused, RequestError)
    assert (refused.status, refused.err_type, refused.message) == (400, "BadRequestError", "no")
    full = abort_error({"type": "abort", "message": "full", "status_code": 503, "err_type": None})
    assert isinstance(full, ServiceUnavailableError)
    assert abort_error({"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}) is None
    assert abort_error({"type": "abort", "message": "Abort in waiting queue"}) is None
    assert abort_error({"type": "length", "length": 1}) is None


async def test_a_plain_body(front: Front):
    call = front.call(text="hey", rid="r")
    await settle()
    front.scheduler.emit(front.only, "ab", cached_tokens=2)
    front.scheduler.emit(front.only, "c", Finish.LENGTH, info=FinishInfo(num_retractions=1))
    await call.task
    body = call.reply
    latency = body["meta_info"].pop("e2e_latency")
    assert latency > 0
    assert body == {
        "text": "abc",
        "output_ids": ids_of("abc"),
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": "length", "length": 3},
            "prompt_tokens": 3,
            "weight_version": "default",
            "num_retractions": 1,
            "completion_tokens": 3,
            "cached_tokens": 2,
            "reasoning_tokens": 0,
        },
    }


async def test_the_weight_version_is_the_one_at_the_end(front: Front):
    call = front.call()
    await settle()
    front.manager.weight_version = "v2"
    front.scheduler.finish(front.only)
    await call.task
    assert call.reply["meta_info"]["weight_version"] == "v2"


async def test_logprobs_of_prompt_and_output(front: Front):
    fields = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [5]}
    call = front.call(input_ids=[10, 11], return_text_in_logprobs=False, **fields)
    await settle()
    extras = RowLogprobs(
        input_logprobs=pack(np.array([np.nan, -0.5], np.float32), "<f4"),
        input_top=positions([], [(-0.25, 1), (-0.5, 11)]),
        input_ids=positions([], [(-4.0, 5)]),
        output_top=positions([(-1.0, 64), (-2.0, 65)]),
        output_ids=positions([(-8.0, 5)]),
    )
    front.scheduler.emit(front.only, [64], logprobs=[-1.0], extras=extras)
    extras = RowLogprobs(output_top=positions([(-0.125, 66), (-3.0, 65)]), output_ids=positions([(-16.0, 5)]))
    front.scheduler.emit(front.only, [65], Finish.LENGTH, logprobs=[-3.0], extras=extras)
    await call.task
    meta = call.reply["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 10, None], [-0.5, 11, None]]
    assert meta["input_top_logprobs"] == [None, [[-0.25, 1, None], [-0.5, 11, None]]]
    assert meta["input_token_ids_logprobs"] == [None, [[-4.0, 5, None]]]
    assert meta["output_token_logprobs"] == [[-1.0, 64, None], [-3.0, 65, None]]
    assert meta["output_token_logprobs_length"] == 2
    assert meta["output_top_logprobs"] == [[[-1.0, 64, None], [-2.0, 65, None]], [[-0.125, 66, None], [-3.0, 65, None]]]
    assert meta["output_token_ids_logprobs"] == [[[-8.0, 5, None]], [[-16.0, 5, None]]]


async def test_logprob_defaults_text_and_a_later_start(front: Front):
    call = front.call(input_ids=[1, 2, 3], return_logprob=True, logprob_start_len=2, return_text_in_logprobs=True)
    plain = front.call(return_logprob=True)
    await settle()
    first, second = front.scheduler.live
    extras = RowLogprobs(input_logprobs=pack([-0.5], "<f4"))
    front.scheduler.emit(first, [64, EOS], Finish.LENGTH, logprobs=[-1.0, -2.0], extras=extras)
    front.scheduler.emit(second, "a", Finish.LENGTH, logprobs=[-1.0])
    await asyncio.gather(call.task, plain.task)
    meta = call.reply["meta_info"]
    assert meta["input_token_logprobs"] == [[-0.5, 3, "$"]]
    assert meta["output_token_logprobs"] == [[-1.0, 64, "a"], [-2.0, EOS, "<eos>"]]
    assert plain.reply["meta_info"]["input_token_logprobs"] == []
    assert "output_top_logprobs" not in plain.reply["meta_info"]


async def test_scoring_without_new_tokens(front: Front):
    params = {"max_new_tokens": 0}
    call = front.call(input_ids=[1, 2], return_logprob=True, logprob_start_len=0, sampling_params=params)
    await settle()
    extras = RowLogprobs(input_logprobs=pack(np.array([np.nan, -0.5], np.float32), "<f4"))
    front.scheduler.emit(front.only, [], Finish.LENGTH, extras=extras)
    await call.task
    assert call.finish_reasons == [{"type": "length", "length": 0}]
    assert call.reply["meta_info"]["input_token_logprobs"] == [[None, 1, None], [-0.5, 2, None]]
    assert call.reply["meta_info"]["output_token_logprobs"] == []


async def test_n_and_batches_are_lists_in_order(front: Front):
    call = front.call(text=["a", "b"], sampling_params={"n": 2})
    single = front.call(text="a", sampling_params={"n": 2})
    one = front.call(text=["a"])
    await settle()
    for req_id in reversed(list(front.scheduler.live)):
        front.scheduler.finish(req_id, [req_id])
    await asyncio.gather(call.task, single.task, one.task)
    assert [body["output_ids"] for body in call.reply] == [[1], [2], [3], [4]]
    assert [body["output_ids"] for body in single.reply] == [[5], [6]]
    assert [body["output_ids"] for body in one.reply] == [[7]]
    assert "index" not in call.reply[0]


async def test_streamed_events_are_cumulative_and_may_be_kept(front: Front):
    call = front.call(stream=True, return_logprob=True)
    await settle()
    for text in ("a", "bc"):
        front.scheduler.emit(front.only, text, logprobs=[-1.0] * len(text))
        await settle()
    front.scheduler.emit(front.only, "d", Finish.LENGTH, logprobs=[-1.0])
    await call.task
    assert [item["text"] for item in call.items] == ["a", "abc", "abcd"]
    assert [len(item["output_ids"]) for item in call.items] == [1, 3, 4]
    assert [len(item["meta_info"]["output_token_logprobs"]) for item in call.items] == [1, 3, 4]
    assert [item["meta_info"]["finish_reason"] is None for item in call.items] == [True, True, False]
    assert ["e2e_latency" in item["meta_info"] for item in call.items] == [False, False, True]
    assert "index" not in call.items[0]


async def test_what_accrues_within_a_tick_is_one_event(front: Front):
    call = front.call(stream=True, text=["x", "y"])
    await settle()
    for text in ("a", "b", "c"):
        front.scheduler.step(*(Row(req_id, ids_of(text)) for req_id in front.scheduler.live))
    await settle()
    assert [(item["index"], item["text"]) for item in call.items] == [(0, "abc"), (1, "abc")]
    first, second = front.scheduler.live
    front.scheduler.emit(first, "d")
    front.scheduler.finish(first, "e")
    front.scheduler.finish(second)
    await call.task
    assert [(item["index"], item["text"]) for item in call.items[2:]] == [(0, "abcde"), (1, "abc")]
    assert len(call.finish_reasons) == 2


@pytest.mark.parametrize("params", [{}, {"stream_interval": 3}])
async def test_stream_interval(params):
    async with clean_front(stream_interval=1 if params else 3) as front:
        call = front.call(stream=True, sampling_params=params)
        await settle()
        for text in "abcdefg":
            front.scheduler.emit(front.only, text)
            await settle()
        assert [item["text"] for item in call.items] == ["a", "abcd", "abcdefg"]
        front.scheduler.finish(front.only, "h")
        await call.task
        assert call.items[-1]["text"] == "abcdefgh"


async def test_incremental_streaming():
    async with clean_front(incremental_streaming=True) as front:
        call, plain = front.call(stream=True, return_logprob=True), front.call()
        await settle()
        first, second = front.scheduler.live
        for text in ("a", "bc"):
            front.scheduler.emit(first, text, logprobs=[-1.0] * len(text))
            front.scheduler.emit(second, text)
            await settle()
        front.scheduler.finish(first)
        front.scheduler.finish(second)
        await asyncio.gather(call.task, plain.task)
        assert [item["text"] for item in call.items] == ["a", "bc", ""]
        assert [item["output_ids"] for item in call.items] == [[64], [65, 66], []]
        assert [item["meta_info"]["output_token_logprobs_length"] for item in call.items] == [1, 2, 0]
        assert [item["meta_info"]["completion_tokens"] for item in call.items] == [1, 3, 3]
        assert plain.reply["text"] == "abc"


async def test_chunks_carry_deltas(front: Front):
    fields = {"return_logprob": True, "top_logprobs_num": 1, "sampling_params": {"n": 2}}
    call = front.call(chunks=True, **fields)
    await settle()
    first, second = front.scheduler.live
    for text in ("a", "b"):
        extras = RowLogprobs(output_top=positions([(-0.5, 1)]))
        front.scheduler.emit(first, text, logprobs=[-1.0], extras=extras, cached_tokens=1)
        await settle()
    front.scheduler.finish(first)
    front.scheduler.finish(second)
    await call.task
    mine = [chunk for chunk in call.items if chunk.index == 0]
    assert [(chunk.text, chunk.token_ids, chunk.logprobs) for chunk in mine] == [
        ("a", [64], [-1.0]),
        ("b", [65], [-1.0]),
        ("", [], []),
    ]
    assert [chunk.output_top for chunk in mine] == [[[(-0.5, 1)]], [[(-0.5, 1)]], []]
    assert mine[0].output_ids_logprobs is None
    assert [chunk.finish_reason for chunk in mine] == [None, None, {"type": "length", "length": 2}]
    assert (mine[0].record.prompt_tokens, mine[0].record.cached_tokens, mine[0].record.completion_tokens) == (2, 1, 2)


async def test_stop_string_completes_the_reply_and_truncates_all_of_it(front: Front):
    call = front.call(return_logprob=True, sampling_params={"stop": ["XY"]})
    await settle()
    req_id = front.only
    front.scheduler.emit(req_id, "abX", logprobs=[-1.0, -2.0, -3.0])
    front.scheduler.emit(req_id, "Ycd", logprobs=[-4.0, -5.0, -6.0])
    await call.task
    assert call.reply["text"] == "ab"
    assert call.reply["output_ids"] == ids_of("abXY")
    assert call.reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "XY"}
    assert call.reply["meta_info"]["output_token_logprobs_length"] == 4
    assert call.reply["meta_info"]["completion_tokens"] == 4
    assert front.scheduler.stopped == [req_id]
    front.scheduler.emit(req_id, "late", logprobs=[-1.0] * 4)
    await settle()
    assert list(front.manager.records) == [req_id], "kept until the scheduler's own end"
    front.scheduler.ack()
    await settle()
    assert front.manager.counters.late_rows == 0


async def test_stop_string_in_the_last_row_sends_nothing(front: Front):
    call = front.call(sampling_params={"stop": "x", "no_stop_trim": True})
    await settle()
    front.scheduler.finish(front.only, "abxc")
    await call.task
    assert call.reply["text"] == "abx"
    assert call.finish_reasons == [{"type": "stop", "matched": "x"}]
    assert not front.scheduler.stopped


async def test_text_that_may_begin_a_stop_string_is_held_back(front: Front):
    call = front.call(stream=True, sampling_params={"stop": "END"})
    await settle()
    for text in ("aE", "N", "d"):
        front.scheduler.emit(front.only, text)
        await settle()
    assert [item["text"] for item in call.items] == ["a", "a", "aENd"]
    assert [len(item["output_ids"]) for item in call.items] == [2, 3, 4]
    front.scheduler.finish(front.only, "E")
    await call.task
    assert call.items[-1]["text"] == "aENdE"


@pytest.mark.parametrize(("trim", "text"), [(True, "a"), (False, "a.")])
async def test_a_stop_token_is_in_the_ids_and_not_in_the_text(front: Front, trim: bool, text: str):
    dot = ids_of(".")[0]
    call = front.call(sampling_params={"stop_token_ids": [dot], "no_stop_trim": not trim})
    await settle()
    front.scheduler.emit(front.only, [64, dot], Finish.STOP, info=FinishInfo(matched=dot))
    await call.task
    assert call.reply["text"] == text
    assert call.reply["output_ids"] == [64, dot]
    assert call.finish_reasons == [{"type": "stop", "matched": dot}]


async def test_without_a_tokenizer_there_is_no_text():
    async with clean_front(with_tokenizer=False) as front:
        call = front.call(input_ids=[1], return_logprob=True, return_text_in_logprobs=True)
        stream = front.call(input_ids=[1], chunks=True)
        await settle()
        first, second = front.scheduler.live
        front.scheduler.emit(first, [64], Finish.LENGTH, logprobs=[-1.0])
        front.scheduler.finish(second, [65])
        await asyncio.gather(call.task, stream.task)
        assert "text" not in call.reply
        assert call.reply["meta_info"]["output_token_logprobs"] == [[-1.0, 64, None]]
        assert [(chunk.text, chunk.token_ids) for chunk in stream.items] == [("", [65])]


async def test_a_row_that_cannot_be_processed_fails_its_own_client_only(front: Front):
    broken, fine = front.call(return_logprob=True), front.call()
    await settle()
    first, second = front.scheduler.live
    front.scheduler.step(Row(first, [64]), Row(second, [64]))
    await settle()
    assert isinstance(broken.error, AssertionError)
    assert front.scheduler.aborted == [first]
    front.scheduler.ack()
    front.scheduler.finish(second, "b")
    await fine.task
    assert fine.reply["text"] == "ab"
