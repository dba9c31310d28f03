"""The soak's own eyes: good replies pass, and each way a reply can be wrong is seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark" / "serving"))

import soak_checks as checks
from soak_cases import Case, CaseMaker, Fate, Kind

from sglang.benchmark.http_client import Reply


def native_case(results: int = 1, **body) -> Case:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 3}, **body}
    return Case(0, Kind.NATIVE, "/generate", body, results=results)


def result(ids=(7, 8, 9), text="abc", reason=None, **meta) -> dict:
    reason = {"type": "length", "length": len(ids)} if reason is None else reason
    meta = {"id": "r", "finish_reason": reason, "prompt_tokens": 4, "completion_tokens": len(ids), **meta}
    return {"text": text, "output_ids": list(ids), "meta_info": meta}


def with_logprobs(**changes) -> dict:
    meta = {
        "input_token_logprobs": [],
        "output_token_logprobs": [[-1.0, i, None] for i in (7, 8, 9)],
        "output_token_logprobs_length": 3,
    }
    return result(**(meta | changes))


ABORT = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


@pytest.mark.parametrize(
    ("case", "reply"),
    [
        (native_case(), result()),
        (native_case(2), [result(), result()]),
        (native_case(return_logprob=True), with_logprobs()),
        (native_case(), result(ids=[7, 2], reason={"type": "stop", "matched": 2})),
        (
            native_case(sampling_params={"max_new_tokens": 3, "stop": ["z"]}),
            result(reason={"type": "stop", "matched": "z"}),
        ),
        (native_case(sampling_params={"max_new_tokens": 0}), result(ids=[], text="")),
    ],
)
def test_good_native_replies_pass(case: Case, reply):
    assert checks.native_results(case, reply, abort_allowed=False) == []


@pytest.mark.parametrize(
    ("case", "reply", "says"),
    [
        (native_case(2), result(), "list of 2"),
        (native_case(2), [result()], "list of 2"),
        (native_case(), {"text": "a"}, "missing"),
        (native_case(), result(completion_tokens=2), "output_ids"),
        (native_case(), result(ids=[1, 2]), "max_new_tokens 3"),
        (native_case(), result(ids=[1, 2, 3, 4]), "more than max_new_tokens"),
        (native_case(), result(reason=ABORT), "nobody asked"),
        (native_case(), result(reason={"type": "bored"}), "none of stop"),
        (native_case(), result(reason={"type": "stop", "matched": 2}), "last id"),
        (native_case(), result(reason={"type": "stop", "matched": "q"}), "none of []"),
        (
            native_case(sampling_params={"max_new_tokens": 3, "stop": ["b"]}),
            result(reason={"type": "stop", "matched": "b"}),
            "still holds",
        ),
        (native_case(return_logprob=True), result(), "output logprobs"),
        (native_case(return_logprob=True), with_logprobs(output_token_logprobs_length=2), "logprobs_length"),
        (native_case(return_logprob=True), with_logprobs(output_token_logprobs=[[-1.0, 7, None]]), "1 output"),
        (
            native_case(return_logprob=True),
            with_logprobs(output_token_logprobs=[[-1.0, i, None] for i in (7, 8, 1)]),
            "logprob entry",
        ),
        (native_case(return_logprob=True, logprob_start_len=0), with_logprobs(), "0 input logprobs"),
        (native_case(return_logprob=True, top_logprobs_num=2), with_logprobs(), "output_top"),
    ],
)
def test_bad_native_replies_are_seen(case: Case, reply, says: str):
    problems = checks.native_results(case, reply, abort_allowed=False)
    assert any(says in problem for problem in problems), problems


def test_aborts_pass_when_somebody_asked():
    waiting = result(ids=[], text="", reason=ABORT, output_token_logprobs=[])
    del waiting["meta_info"]["prompt_tokens"]
    assert checks.native_results(native_case(return_logprob=True), waiting, abort_allowed=True) == []


def stream(*events) -> list[bytes]:
    return [*(json.dumps(e).encode() for e in events), b"[DONE]"]


def part(ids, text) -> dict:
    event = result(ids=ids, text=text)
    event["meta_info"]["finish_reason"] = None
    return event


def test_a_good_stream_passes():
    assert checks.native_stream(native_case(), stream(part([7], "a"), result()), abort_allowed=False) == []


@pytest.mark.parametrize(
    ("events", "says"),
    [
        (stream(result())[:-1], "[DONE]"),
        ([*stream(result()), b"[DONE]"], "[DONE]"),
        (stream(part([7], "a")), "none of stop"),
        (stream(result(), result()), "after its end"),
        (stream(part([1], "a"), result()), "took back ids"),
        (stream(part([7], "x"), result()), "took back text"),
        (stream({"error": {"message": "m"}}), "unexpected event"),
        (stream(result() | {"index": 1}), "results [1] of 1"),
    ],
)
def test_bad_streams_are_seen(events: list[bytes], says: str):
    problems = checks.native_stream(native_case(), events, abort_allowed=False)
    assert any(says in problem for problem in problems), problems


def test_openai_streams_end_each_choice_once():
    case = Case(0, Kind.COMPLETIONS, "/v1/completions", {"prompt": "a"}, results=1)
    going = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    ended = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    assert checks.openai_stream(case, stream(going, ended), abort_allowed=False) == []
    assert checks.openai_stream(case, stream(going), abort_allowed=False)
    assert checks.openai_stream(case, stream(ended, going), abort_allowed=False)


@pytest.mark.parametrize(
    ("status", "body", "fine"),
    [
        (400, b'{"error": {"message": "top_p is wrong"}}', True),
        (400, b'{"object": "error", "message": "top_p is wrong", "code": 400}', True),
        (400, b'{"error": {"message": "no"}}', False),
        (500, b'{"error": {"message": "top_p is wrong"}}', False),
        (200, b"{}", False),
        (400, b"top_p", False),
    ],
)
def test_refusals(status: int, body: bytes, fine: bool):
    case = Case(0, Kind.INVALID, "/generate", {}, says="top_p")
    assert (checks.refusal(case, Reply(status, {}, body)) == []) is fine


def test_cases_repeat_for_a_seed_and_cover_everything():
    def make(seed: int) -> list[Case]:
        maker = CaseMaker(seed, "m", 512)
        return [maker.make(i) for i in range(400)]

    cases = make(3)
    assert cases == make(3)
    assert cases != make(4)
    assert {c.kind for c in cases} == set(Kind)
    assert {c.fate for c in cases} == set(Fate)
    assert any(c.repeatable for c in cases)
    assert {c.stream for c in cases if c.kind is Kind.NATIVE} == {True, False}
    rids = [c.body["rid"] for c in cases if c.kind is Kind.NATIVE and "rid" in c.body]
    assert len(rids) == len(set(rids)) > 50
