"""What a record does with the tokens it is given, and how a call waits for its records."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from unit.fake_scheduler import EOS, byte_tokenizer, ids_of, settle

from sglang.srt.managers.detokenizer import Detokenizer
from sglang.srt.managers.io_struct.wire import Positions, RowLogprobs, pack
from sglang.srt.managers.request_state import (
    LogprobOptions,
    Prompt,
    RequestGroup,
    RequestRecord,
    unpack_positions,
)
from sglang.srt.sampling.sampling_params import SamplingParams

TOKENIZER = byte_tokenizer()


def positions(*alternatives: list[tuple[float, int]]) -> Positions:
    flat = [pair for pairs in alternatives for pair in pairs]
    return Positions(
        counts=pack([len(pairs) for pairs in alternatives], "<i4"),
        ids=pack([token for _, token in flat], "<i4"),
        logprobs=pack([value for value, _ in flat], "<f4"),
    )


def make_record(*, stop: tuple[str, ...] = (), logprobs: bool = False, stream: bool = False) -> RequestRecord:
    options = LogprobOptions(top_num=1, token_ids=(1,)) if logprobs else None
    prompt = Prompt(text=None, token_ids=[1, 2], params=SamplingParams(), max_new_given=False, logprobs=options)
    group = RequestGroup(stream=stream, is_list=False)
    record = RequestRecord(req_id=1, rid="r", group=group, index=0, prompt=prompt, check_stops=bool(stop))
    record.detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True, stop_strings=stop)
    group.prompts.append(prompt)
    group.add(record)
    return record


def test_unpack_positions():
    column = positions([(-0.5, 3), (-1.5, 4)], [], [(-2.0, 5)])
    assert unpack_positions(column) == [[(-0.5, 3), (-1.5, 4)], [], [(-2.0, 5)]]


def test_the_first_prompt_position_has_no_logprob():
    record = make_record(logprobs=True)
    values = np.array([np.nan, -0.25], dtype=np.float32)
    record.accrue([], [], RowLogprobs(input_logprobs=pack(values, "<f4")))
    record.accrue([], [], RowLogprobs(input_logprobs=pack([-0.5], "<f4")))
    assert record.extras.input_logprobs == [None, -0.25, -0.5]


def test_text_is_taken_once_and_unfinished_characters_are_flushed_at_the_end():
    record = make_record()
    euro = ids_of("a€")
    record.accrue(euro[:2], [], None)
    assert record.take_text() == "a"
    assert record.take_text() == ""
    record.accrue(euro[2:3], [], None)
    assert record.take_text() == ""
    record.finish_reason = {"type": "length", "length": 3}
    assert record.take_text() == "\ufffd"
    assert record.take_text() == ""


def test_a_match_truncates_everything_alike():
    record = make_record(stop=("xy",), logprobs=True)
    extras = RowLogprobs(output_top=positions([(-1, 1)], [(-2, 2)]), output_ids=positions([(-3, 1)], [(-4, 1)]))
    record.accrue(ids_of("ax"), [-1.0, -2.0], extras)
    assert record.decode() is None
    assert record.take_text() == "a"
    extras = RowLogprobs(output_top=positions([(-3, 3)], [(-4, 4)]), output_ids=positions([(-5, 1)], [(-6, 1)]))
    record.accrue(ids_of("yz"), [-3.0, -4.0], extras)
    assert record.decode() == "xy"
    assert record.output_ids == ids_of("axy")
    assert record.logprobs == [-1.0, -2.0, -3.0]
    assert record.extras.output_top == [[(-1, 1)], [(-2, 2)], [(-3, 3)]]
    assert record.extras.output_ids == [[(-3, 1)], [(-4, 1)], [(-5, 1)]]
    record.finish_reason = {"type": "stop", "matched": "xy"}
    assert record.take_text() == ""


def test_held_back_text_comes_out_when_the_sequence_ends_otherwise():
    record = make_record(stop=("xy",))
    record.accrue(ids_of("ax"), [], None)
    assert record.decode() is None
    record.finish_reason = {"type": "length", "length": 2}
    assert record.take_text() == "ax"


def test_a_hidden_stop_token_stays_in_the_ids_only():
    record = make_record(stop=("zz",))
    record.accrue([*ids_of("a."), EOS], [], None)
    record.hidden = 1
    record.decode()
    record.finish_reason = {"type": "stop", "matched": EOS}
    assert record.take_text() == "a."
    assert record.output_ids[-1] == EOS


def test_a_row_without_its_logprobs_is_refused():
    record = make_record(logprobs=True)
    with pytest.raises(AssertionError, match="log-probabilities"):
        record.accrue([1], [], None)


def test_meta_info_before_and_after_the_end():
    record = make_record()
    record.accrue([1], [], None)
    assert record.meta_info() == {
        "id": "r",
        "finish_reason": None,
        "prompt_tokens": 2,
        "weight_version": "default",
        "num_retractions": 0,
        "completion_tokens": 1,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
    }
    record.finish_reason, record.finished_at = {"type": "length", "length": 1}, record.created_at + 1.5
    assert record.meta_info()["e2e_latency"] == pytest.approx(1.5)


async def test_updates_come_once_per_notification_and_end_with_the_last_record():
    record = make_record(stream=True)
    group = record.group
    group.notify(record)
    group.notify(record)
    assert await group.next_update() is record
    waiting = asyncio.ensure_future(group.next_update())
    await settle()
    assert not waiting.done()
    group.notify(record)
    record.finish_reason = {"type": "length", "length": 0}
    group.completed(record)
    assert await waiting is record
    assert await group.next_update() is None


async def test_what_accrued_before_an_error_is_delivered_first():
    record = make_record(stream=True)
    record.group.notify(record)
    record.group.fail(ValueError("first"))
    record.group.fail(ValueError("second"))
    assert await record.group.next_update() is record
    with pytest.raises(ValueError, match="first"):
        await record.group.next_update()


async def test_finished_waits_for_all_records():
    record = make_record()
    waiting = asyncio.ensure_future(record.group.finished())
    await settle()
    record.group.notify(record)
    await settle()
    assert not waiting.done()
    record.group.completed(record)
    await waiting
