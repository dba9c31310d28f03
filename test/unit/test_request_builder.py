"""Validation, defaults and tokenising of requests: what reaches the scheduler, and what is refused with which words."""

from __future__ import annotations

import asyncio
import threading

import pytest
from unit.fake_scheduler import CONTEXT_LENGTH, EOS, VOCAB_SIZE, byte_tokenizer, ids_of, make_config

from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.managers import request_builder
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.io_struct.wire import SubmitRequest, unpack
from sglang.srt.managers.request_builder import RequestBuilder
from sglang.srt.sampling.sampling_params import sequence_seed


def builder(*, with_tokenizer: bool = True, **config) -> RequestBuilder:
    return RequestBuilder(make_config(**config), byte_tokenizer() if with_tokenizer else None)


def submit(builder: RequestBuilder, *, max_input_len: int | None = None, **fields) -> list[SubmitRequest]:
    if "input_ids" not in fields:
        fields.setdefault("text", "hi")
    group = builder.open(GenerateReqInput(**fields), stream=False)
    asyncio.run(builder.fill(group, max_input_len))
    return [record.submit for record in group.records]


def prompt_of(request: SubmitRequest) -> list[int]:
    return unpack(request.input_ids, "<i4").tolist()


def test_text_and_ids_become_packed_ids():
    (request,) = submit(builder(), text="héllo")
    assert prompt_of(request) == ids_of("héllo")
    (request,) = submit(builder(), input_ids=[5, 6, 7])
    assert prompt_of(request) == [5, 6, 7]
    assert request.sampling.stop_token_ids == (EOS,)


def test_req_ids_are_never_reused():
    made = builder()
    ids = [request.req_id for _ in range(3) for request in submit(made, text=["a", "b"])]
    assert ids == [1, 2, 3, 4, 5, 6]


def test_batch_fields_are_broadcast_or_per_item():
    requests = submit(
        builder(),
        text=["a", "b"],
        sampling_params=[{"temperature": 0.5}, {"temperature": 0}],
        return_logprob=[True, False],
        logprob_start_len=[0, 0],
        top_logprobs_num=[2, 5],
        token_ids_logprob=[[1, 2], None],
        extra_key="k",
    )
    assert [(r.sampling.temperature, r.sampling.top_k) for r in requests] == [(0.5, VOCAB_SIZE), (1.0, 1)]
    assert [(r.return_logprob, r.logprob_start, r.top_logprobs_num) for r in requests] == [(True, 0, 2), (False, 1, 0)]
    assert [r.token_ids_logprob for r in requests] == [(1, 2), ()]
    assert [r.extra_key for r in requests] == ["k", "k"]


@pytest.mark.parametrize(("start", "expected"), [(None, 3), (-1, 3), (0, 0), (2, 2), (3, 3)])
def test_logprob_start(start, expected):
    (request,) = submit(builder(), input_ids=[1, 2, 3], return_logprob=True, logprob_start_len=start)
    assert request.logprob_start == expected


def test_rids_of_a_batch_and_of_samples():
    group = builder().open(GenerateReqInput(text=["a", "b"], rid="r"), stream=False)
    assert [record.rid for record in group.records] == ["r_0", "r_1"]
    group = builder().open(GenerateReqInput(text=["a", "b"], rid=["x", "y"]), stream=False)
    assert [record.rid for record in group.records] == ["x", "y"]
    group = builder().open(GenerateReqInput(text=["a", "b"], rid="r", sampling_params={"n": 2}), stream=False)
    assert len({record.rid for record in group.records} - {"r", "r_0", "r_1"}) == 4
    assert [record.aliases for record in group.records] == [("r_0", "r")] * 2 + [("r_1", "r")] * 2


def test_given_seeds_and_drawn_seeds():
    requests = submit(builder(), text=["a", "b"], sampling_params={"n": 2, "sampling_seed": 7})
    assert [r.sampling.seed for r in requests] == [7, sequence_seed(7, 1)] * 2
    drawn = [r.sampling.seed for r in submit(builder(random_seed=1), text=["a", "b"], sampling_params={"n": 2})]
    assert len(set(drawn)) == 4
    assert drawn == [r.sampling.seed for r in submit(builder(random_seed=1), text=["a", "b"], sampling_params={"n": 2})]
    assert drawn != [r.sampling.seed for r in submit(builder(random_seed=2), text=["a", "b"], sampling_params={"n": 2})]


def test_preferred_parameters_are_below_the_requests_own():
    made = builder(preferred_sampling_params={"temperature": 0.25, "top_p": 0.5, "max_new_tokens": 500})
    (request,) = submit(made, sampling_params={"top_p": 0.75, "temperature": None})
    assert (request.sampling.temperature, request.sampling.top_p) == (0.25, 0.75)
    assert request.sampling.max_new_tokens == CONTEXT_LENGTH - 2, "a default is lowered to what fits"


def test_bad_preferred_parameters_stop_the_start():
    with pytest.raises(ConfigError, match="--preferred-sampling-params: .*temperature"):
        builder(preferred_sampling_params={"temperature": -1})


def test_context_limits():
    made = builder()
    message = r"The input \(100 tokens\) is longer than the model's context length \(100 tokens\)\."
    with pytest.raises(RequestError, match=message):
        submit(made, input_ids=[1] * 100)
    with pytest.raises(RequestError, match="Requested token count exceeds the model's maximum context length"):
        submit(made, input_ids=[1] * 90, sampling_params={"max_new_tokens": 11})
    (request,) = submit(made, input_ids=[1] * 90, sampling_params={"max_new_tokens": 10})
    assert request.sampling.max_new_tokens == 10
    (request,) = submit(made, input_ids=[1] * 90)
    assert request.sampling.max_new_tokens == 10, "the default of 128 is lowered"
    (request,) = submit(made, input_ids=[1] * 99, sampling_params={"max_new_tokens": 0})
    assert request.sampling.max_new_tokens == 0
    with pytest.raises(RequestError, match=r"longer than the 50 tokens that fit the server's KV cache"):
        submit(made, input_ids=[1] * 51, max_input_len=50)


def test_auto_truncate():
    made = builder(allow_auto_truncate=True)
    (request,) = submit(made, input_ids=list(range(120)), sampling_params={"max_new_tokens": 50})
    assert prompt_of(request) == list(range(99))
    assert request.sampling.max_new_tokens == 1
    (request,) = submit(made, input_ids=list(range(120)), max_input_len=50)
    assert len(prompt_of(request)) == 50


def test_truncation_does_not_touch_the_clients_list():
    ids = list(range(120))
    submit(builder(allow_auto_truncate=True), input_ids=ids)
    assert len(ids) == 120


def test_priority_counts_only_when_enabled():
    assert submit(builder(), priority=3)[0].priority == 0
    assert submit(builder(enable_priority=True), priority=3)[0].priority == 3


REFUSED = {
    "empty ids": ({"input_ids": []}, "The prompt is empty"),
    "empty text": ({"text": ""}, "The prompt is empty"),
    "both": ({"text": "a", "input_ids": [1]}, "Either text, input_ids or input_embeds should be provided."),
    "id too large": ({"input_ids": [1, VOCAB_SIZE]}, f"holds {VOCAB_SIZE}, which is outside the vocabulary"),
    "id negative": ({"input_ids": [1, -3]}, "holds -3, which is outside the vocabulary"),
    "id huge": ({"input_ids": [2**40]}, "input_ids must be a list of token ids"),
    "id of text": ({"input_ids": [1, "a"]}, "input_ids must be a list of token ids"),
    "id fractional": ({"input_ids": [1.5]}, "input_ids must be a list of token ids"),
    "surrogate": ({"text": "a\ud800"}, "surrogate"),
    "top negative": ({"return_logprob": True, "top_logprobs_num": -1}, r"top_logprobs_num must be in \[0, 257\]"),
    "top of text": ({"return_logprob": True, "top_logprobs_num": "many"}, "top_logprobs_num must be an integer"),
    "start": ({"return_logprob": True, "logprob_start_len": 3}, r"logprob_start_len \(3\) is larger than .* \(2\)"),
    "start negative": ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len must be in"),
    "ids nested": ({"return_logprob": True, "token_ids_logprob": [[1]]}, "must be a flat list"),
    "ids too large": ({"return_logprob": True, "token_ids_logprob": [257]}, "token_ids_logprob must be in"),
    "ids mixed": (
        {"text": ["a", "b"], "return_logprob": True, "token_ids_logprob": [[1], 2]},
        "token_ids_logprob must be a list",
    ),
    "ids short": ({"text": ["a", "b"], "token_ids_logprob": [[1]]}, "has 1 entries for a batch of 2 prompts"),
    "params short": ({"text": ["a", "b"], "sampling_params": [{}]}, "has 1 entries for a batch of 2 prompts"),
    "params of text": ({"sampling_params": "hot"}, "sampling_params"),
    "mixed n": ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, r"same n, got \[1, 2\]"),
    "per item and n": (
        {"text": ["a", "b"], "return_logprob": [True, True], "sampling_params": {"n": 2}},
        "return_logprob cannot be a list per prompt together with n=2",
    ),
    "ids per item and n": (
        {"text": ["a", "b"], "token_ids_logprob": [[1], [2]], "sampling_params": {"n": 2}},
        "token_ids_logprob cannot be a list per prompt together with n=2",
    ),
    "absurd n": ({"sampling_params": {"n": 10**9}}, "more than the 65536 sequences"),
    "zero n": ({"sampling_params": {"n": 0}}, "n must be at least 1"),
    "priority": ({"priority": 2**70}, "priority must be in"),
    "extra key": ({"extra_key": 5}, "extra_key must be a string"),
    "twice the same rid": ({"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request ID detected: x"),
    "adapter": ({"lora_path": "x"}, "LoRA adapter 'x' was requested, but LoRA is not enabled."),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(fields, message):
    with pytest.raises(RequestError, match=message) as caught:
        submit(builder(), **fields)
    assert caught.value.status == 400


@pytest.mark.parametrize("params", [{"stop": "x"}, {"stop_regex": "x"}])
def test_without_a_tokenizer_text_is_refused(params):
    made = builder(with_tokenizer=False)
    with pytest.raises(RequestError, match="--skip-tokenizer-init"):
        submit(made, text="a")
    with pytest.raises(RequestError, match="--skip-tokenizer-init"):
        submit(made, input_ids=[1], sampling_params=params)


def test_without_a_tokenizer_ids_do():
    made = builder(with_tokenizer=False)
    group = made.open(GenerateReqInput(input_ids=[1]), stream=False)
    asyncio.run(made.fill(group, None))
    assert group.records[0].detokenizer is None


@pytest.mark.parametrize(("length", "on_loop"), [(10, True), (60, False)])
def test_long_texts_are_tokenised_off_the_loop(monkeypatch, length, on_loop):
    monkeypatch.setattr(request_builder, "OFF_LOOP_CHARACTERS", 50)
    made = builder()
    threads = []
    encode = made._tokenizer.encode
    monkeypatch.setattr(made._tokenizer, "encode", lambda text: threads.append(threading.get_ident()) or encode(text))
    submit(made, text="x" * length)
    assert (threads == [threading.get_ident()]) is on_loop
