"""OpenAI and tokenising routes over a scripted TokenizerManager: what they ask for, golden JSON, event streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from unit.stub_runtime import CONTEXT_LENGTH, StubRuntime, events, native_reply, output_chunk

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.request_state import LogprobExtras

STOP = {"type": "stop", "matched": 2}
LENGTH = {"type": "length", "length": 1}
HI = [{"role": "user", "content": "the"}]


@pytest.fixture
def runtime() -> StubRuntime:
    runtime = StubRuntime()
    runtime.manager.replies = [native_reply()]
    return runtime


async def post(runtime: StubRuntime, path: str, body: dict[str, Any] | None = None, **kwargs: Any):
    async with runtime.client() as client:
        return await client.post(path, json=body, **kwargs)


async def chat(runtime: StubRuntime, **body: Any):
    return await post(runtime, "/v1/chat/completions", {"messages": HI, **body})


async def complete(runtime: StubRuntime, **body: Any):
    return await post(runtime, "/v1/completions", {"prompt": "the", **body})


def chunks(response) -> list[dict[str, Any]]:
    payloads = events(response)
    assert payloads.pop() == "[DONE]"
    return [json.loads(payload) for payload in payloads]


def fixed(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply without what changes from call to call."""
    assert isinstance(reply.pop("created"), int)
    assert reply.pop("id")
    return reply


# ---- chat ----------------------------------------------------------------------------------------------------------


async def test_chat_reply(runtime):
    response = await chat(runtime, model="whatever", rid="mine")
    assert response.json()["id"] == "mine"
    assert fixed(response.json()) == {
        "object": "chat.completion",
        "model": "whatever",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": " the",
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": 2,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "total_tokens": 6,
            "completion_tokens": 1,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "default"},
    }
    [native] = runtime.manager.requests
    assert native.rid == "mine"
    text = runtime.manager.tokenizer.decode(native.input_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"


async def test_a_chat_without_a_limit_may_fill_the_context(runtime):
    await chat(runtime)
    [native] = runtime.manager.requests
    assert native.sampling_params == {"max_new_tokens": CONTEXT_LENGTH - len(native.input_ids)}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"max_tokens": 7}, 7), ({"max_completion_tokens": 8}, 8), ({"max_tokens": 7, "max_completion_tokens": 9}, 9)],
)
async def test_chat_limits(runtime, limits, expected):
    await chat(runtime, **limits)
    assert runtime.manager.requests[0].sampling_params["max_new_tokens"] == expected


async def test_every_sampling_field_reaches_the_engine(runtime):
    await chat(
        runtime,
        max_tokens=4,
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        seed=7,
        stop=["x"],
        stop_token_ids=[4],
        stop_regex="y+",
        min_tokens=2,
        regex=None,
        ignore_eos=True,
        skip_special_tokens=False,
        no_stop_trim=True,
        custom_params={"a": 1},
        user="me",
        priority=3,
        cache_salt="s",
        extra_key="t",
        lora_path=None,
    )
    [native] = runtime.manager.requests
    assert native.sampling_params == {
        "max_new_tokens": 4,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100.0},
        "sampling_seed": 7,
        "stop": ["x"],
        "stop_token_ids": [4],
        "stop_regex": "y+",
        "min_new_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "custom_params": {"a": 1},
    }
    assert (native.priority, native.extra_key, native.lora_path, native.stream) == (3, "st", None, False)


async def test_defaults_rank_below_the_request(runtime):
    runtime = StubRuntime(
        sampling_defaults={"temperature": 0.6, "top_p": 0.95, "top_k": 20}, preferred_sampling_params={"top_p": 0.8}
    )
    runtime.manager.replies = [native_reply()]
    await chat(runtime, max_tokens=1, top_k=5)
    assert runtime.manager.requests[0].sampling_params == {
        "max_new_tokens": 1,
        "temperature": 0.6,
        "top_p": 0.8,
        "top_k": 5,
    }


@pytest.mark.parametrize(
    ("body", "lora_path"),
    [
        ({"model": "tiny:a1"}, "a1"),
        ({"model": "tiny:a1", "lora_path": "a2"}, "a1"),
        ({"model": "tiny", "lora_path": "a2"}, "a2"),
        ({"model": "tiny:"}, None),
        ({"model": None}, None),
    ],
)
async def test_adapters_are_named_by_model_or_lora_path(runtime, body, lora_path):
    await chat(runtime, **body)
    assert runtime.manager.requests[0].lora_path == lora_path


async def test_chat_logprobs_have_exact_bytes(runtime):
    euro = runtime.manager.tokenizer.encode("€")
    runtime.manager.replies = [
        native_reply(
            "€",
            tuple(euro),
            output_token_logprobs=[[-0.5, euro[0], None], [float("-inf"), euro[1], None], [-0.25, euro[2], None]],
            output_top_logprobs=[[[-0.5, euro[0], None], [-1.5, 2, None]], None, []],
        )
    ]
    response = await chat(runtime, logprobs=True, top_logprobs=2)
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[byte] for byte in "€".encode()]
    assert [entry["logprob"] for entry in content] == [-0.5, -9999.0, -0.25]
    assert content[0]["top_logprobs"][1] == {"token": "<|im_end|>", "bytes": list(b"<|im_end|>"), "logprob": -1.5}
    assert content[1]["top_logprobs"] == []
    [native] = runtime.manager.requests
    assert (native.return_logprob, native.top_logprobs_num) == (True, 2)


async def test_usage_reports_the_cache_when_asked_to(runtime):
    runtime = StubRuntime(enable_cache_report=True)
    runtime.manager.replies = [[native_reply(), native_reply("b")]]
    response = await chat(runtime, n=2)
    assert response.json()["usage"] == {
        "prompt_tokens": 5,
        "total_tokens": 7,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 3},
        "reasoning_tokens": 0,
    }
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1]


async def test_chat_stream(runtime):
    runtime.manager.outputs = [
        output_chunk(" t", [5], completion_tokens=1),
        output_chunk("", [6], completion_tokens=2),
        output_chunk("he", [7], completion_tokens=3, finish=LENGTH),
    ]
    response = await chat(runtime, stream=True, stream_options={"include_usage": True})
    got = chunks(response)
    assert len({chunk["id"] for chunk in got}) == 1
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}
    null = {"logprobs": None, "finish_reason": None, "matched_stop": None}
    assert [chunk["choices"] for chunk in got] == [
        [{"index": 0, "delta": {"reasoning_content": None, "role": "assistant", "content": ""}, **null}],
        [{"index": 0, "delta": {"reasoning_content": None, "content": " t"}, **null}],
        [{"index": 0, "delta": {"reasoning_content": None, "content": "he"}, **null}],
        [{"index": 0, "delta": {"reasoning_content": None}, **null, "finish_reason": "length"}],
        [],
    ]
    assert ["usage" in chunk for chunk in got] == [False] * 4 + [True]
    assert got[-1]["usage"]["completion_tokens"] == 3
    assert runtime.manager.closed_streams == 1


async def test_chat_stream_with_n_and_running_usage(runtime):
    runtime.manager.outputs = [
        output_chunk("a", [5], index=1),
        output_chunk("b", [5], index=0, finish=STOP),
        output_chunk("c", [6], index=1, completion_tokens=2, finish=STOP),
    ]
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = chunks(await chat(runtime, stream=True, n=2, stream_options=options))
    text = {0: "", 1: ""}
    for chunk in got[:-1]:
        [choice] = chunk["choices"]
        text[choice["index"]] += choice["delta"].get("content", "")
        assert chunk["usage"]["prompt_tokens"] == 5
    assert text == {0: "b", 1: "ac"}
    assert [c["choices"][0]["matched_stop"] for c in got[:-1] if c["choices"][0]["finish_reason"]] == [2, 2]
    assert (got[-1]["usage"]["prompt_tokens"], got[-1]["usage"]["completion_tokens"]) == (5, 3)


async def test_streamed_logprobs_come_with_tokens_that_are_no_text_yet(runtime):
    runtime.manager.outputs = [
        output_chunk("", [100], logprobs=[-0.5], top=[[(-0.5, 100)]]),
        output_chunk("x", [101, 102], logprobs=[-1.0, -2.0], top=[[(-1.0, 101)], [(-2.0, 102)]], finish=STOP),
    ]
    got = chunks(await chat(runtime, stream=True, logprobs=True, top_logprobs=1))
    entries = [e for c in got if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert [entry["logprob"] for entry in entries] == [-0.5, -1.0, -2.0]
    assert [len(entry["top_logprobs"]) for entry in entries] == [1, 1, 1]


async def test_errors_of_chat_are_flat(runtime):
    runtime.manager.replies = []
    runtime.manager.error = RequestError("The input (200 tokens) is longer than …")
    for stream in (False, True):
        response = await chat(runtime, stream=stream)
        assert response.status_code == 400
        assert response.json() == {
            "object": "error",
            "message": "The input (200 tokens) is longer than …",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        }


async def test_an_error_in_a_stream_is_an_event(runtime):
    runtime.manager.outputs = [output_chunk("a", [5])]
    runtime.manager.error = ServiceUnavailableError("the back process was killed by SIGKILL")
    got = chunks(await chat(runtime, stream=True))
    assert got[-1]["error"]["code"] == 503
    assert "SIGKILL" in got[-1]["error"]["message"]


@pytest.mark.parametrize(("status", "err_type"), [(400, "BadRequestError"), (503, "ServiceUnavailableError")])
async def test_an_abort_with_a_status_is_an_error(runtime, status, err_type):
    refused = {"type": "abort", "message": "no", "status_code": status, "err_type": None}
    runtime.manager.outputs = [output_chunk("", [], finish=refused)]
    response = await chat(runtime, stream=True)
    assert (response.status_code, response.json()["message"]) == (status, "no")
    runtime.manager.outputs = [output_chunk("a", [5]), output_chunk("", [], finish=refused)]
    assert chunks(await chat(runtime, stream=True))[-1]["error"]["type"] == err_type


async def test_an_abort_by_a_client_is_a_finish_reason(runtime):
    aborted = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    runtime.manager.outputs = [output_chunk("a", [5], finish=aborted)]
    assert chunks(await chat(runtime, stream=True))[-1]["choices"][0]["finish_reason"] == "abort"
    runtime.manager.replies = [native_reply(finish_reason=aborted)]
    assert (await chat(runtime)).json()["choices"][0]["finish_reason"] == "abort"


async def test_chat_messages_as_clients_send_them(runtime):
    messages = [
        {"role": "system", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert (await chat(runtime, messages=messages)).status_code == 200
    text = runtime.manager.tokenizer.decode(runtime.manager.requests[0].input_ids, skip_special_tokens=False)
    assert "<|im_start|>user\na b<|im_end|>" in text
    assert "<|im_start|>assistant\n<|im_end|>" in text


async def test_continue_final_message_leaves_the_turn_open(runtime):
    messages = [*HI, {"role": "assistant", "content": "The answer"}]
    await chat(runtime, messages=messages, continue_final_message=True)
    text = runtime.manager.tokenizer.decode(runtime.manager.requests[0].input_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nThe answer")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"messages": []}, "Messages cannot be empty"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": "hello"}, "$.messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"function": {"name": "f"}}, "tools": [{"function": {"name": "g"}}]}, "'f'"),
        ({"response_format": {"type": "yaml"}}, "yaml"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"n": "many"}, "$.n"),
        ({"stream_options": 3}, "$.stream_options"),
    ],
)
async def test_bad_chats_are_400(runtime, body, part):
    response = await chat(runtime, **body)
    assert (response.status_code, response.json()["object"]) == (400, "error")
    assert part in response.json()["message"]
    assert runtime.manager.requests == []


async def test_structured_output_becomes_a_grammar(runtime):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "function", "function": {"name": "g"}},
    ]
    for body in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}},
        {"response_format": {"type": "json_schema", "schema": schema}},
        {"tools": tools, "tool_choice": "required"},
        {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "g"}}, "parallel_tool_calls": False},
        {"response_format": {"type": "text"}, "tools": tools, "tool_choice": "auto"},
    ):
        await chat(runtime, **body)
    schemas = [json.loads(r.sampling_params.get("json_schema", "null")) for r in runtime.manager.requests]
    assert schemas[:3] == [{"type": "object"}, schema, schema]
    assert [item["properties"]["name"]["const"] for item in schemas[3]["items"]["anyOf"]] == ["f", "g"]
    assert schemas[4]["maxItems"] == 1
    assert schemas[4]["items"]["anyOf"][0]["properties"]["parameters"] == {"type": "object"}
    assert schemas[5] is None
    assert runtime.manager.requests[5].sampling_params["skip_special_tokens"] is False


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_other_content_types_are_refused(runtime, path):
    for headers in ({}, {"content-type": "text/plain"}):
        response = await post(runtime, path, content=b"{}", headers=headers)
        assert (response.status_code, response.json()["type"]) == (400, "Bad Request")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert "application/json" not in (await post(runtime, path, content=b"{}", headers=headers)).json()["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_without_a_tokenizer_there_is_no_text(runtime, path):
    runtime.manager.tokenizer = None
    body = {"messages": HI, "prompt": "a", "tokens": [1]}
    if path == "/tokenize":
        del body["messages"]
    response = await post(runtime, path, body)
    assert (response.status_code, response.json()["code"]) == (400, 400)
    assert "--skip-tokenizer-init" in response.json()["message"]


# ---- completions ---------------------------------------------------------------------------------------------------


async def test_completion_reply(runtime):
    response = await complete(runtime)
    assert fixed(response.json()) == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": " the", "logprobs": None, "finish_reason": "stop", "matched_stop": 2}],
        "usage": {
            "prompt_tokens": 5,
            "total_tokens": 6,
            "completion_tokens": 1,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "default"},
    }
    [native] = runtime.manager.requests
    assert (native.text, native.sampling_params, native.return_logprob) == ("the", {"max_new_tokens": 16}, False)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("a", "text"), (["a", "b"], "text"), ([1, 2], "input_ids"), ([[1, 2], [3]], "input_ids"), ([[1, 2]], "input_ids")],
)
async def test_completion_prompts(runtime, prompt, field):
    runtime.manager.replies = [[native_reply()]]
    await complete(runtime, prompt=prompt)
    assert getattr(runtime.manager.requests[0], field) == prompt


async def test_echo_with_logprobs_scores_the_prompt(runtime):
    """What lm-eval sends: token prompts, echo, logprobs 1, one new token."""
    entries = [[None, 100, None], [-1.0, 101, None]]
    runtime.manager.replies = [
        [
            native_reply(
                " the",
                (261,),
                input_token_logprobs=entries,
                input_top_logprobs=[None, [[-0.5, 102, None]]],
                output_token_logprobs=[[-0.1, 261, None]],
                output_top_logprobs=[[[-0.1, 261, None]]],
            )
        ]
    ]
    response = await complete(runtime, prompt=[[100, 101]], echo=True, logprobs=1, max_tokens=1)
    [native] = runtime.manager.requests
    assert (native.logprob_start_len, native.top_logprobs_num, native.return_logprob) == (0, 1, True)
    decode = runtime.manager.tokenizer.decode
    [choice] = response.json()["choices"]
    assert choice["text"] == decode([100, 101]) + " the"
    tokens = [decode([100]), decode([101]), decode([261])]
    assert choice["logprobs"] == {
        "text_offset": [0, len(tokens[0]), len(tokens[0]) + len(tokens[1])],
        "token_logprobs": [None, -1.0, -0.1],
        "tokens": tokens,
        "top_logprobs": [None, {decode([102]): -0.5}, {tokens[2]: -0.1}],
    }


async def test_logprobs_zero_has_no_alternatives(runtime):
    runtime.manager.replies = [native_reply(output_token_logprobs=[[-0.1, 261, None]])]
    response = await complete(runtime, logprobs=0)
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == []
    assert runtime.manager.requests[0].return_logprob is True


async def test_no_new_tokens_is_a_valid_wish(runtime):
    await complete(runtime, max_tokens=0, echo=True)
    assert runtime.manager.requests[0].sampling_params == {"max_new_tokens": 0}


async def test_echo_counts_prompts_by_n(runtime):
    runtime.manager.replies = [[native_reply(text) for text in ("1", "2", "3", "4")]]
    response = await complete(runtime, prompt=["a", "b"], n=2, echo=True)
    assert [choice["text"] for choice in response.json()["choices"]] == ["a1", "a2", "b3", "b4"]
    assert response.json()["usage"]["prompt_tokens"] == 10


async def test_completion_stream(runtime):
    extras = LogprobExtras(input_logprobs=[None, -1.0], input_top=[[], [(-0.5, 102)]])
    runtime.manager.outputs = [
        output_chunk("x", [261], logprobs=[-0.1], top=[[(-0.1, 261)]], prompt_ids=(100, 101), extras=extras),
        output_chunk("y", [102], logprobs=[-0.2], top=[[(-0.2, 102)]], completion_tokens=2, finish=LENGTH),
    ]
    options = {"include_usage": True}
    response = await complete(runtime, prompt="ab", stream=True, echo=True, logprobs=1, stream_options=options)
    got = chunks(response)
    assert {chunk["object"] for chunk in got} == {"text_completion"}
    first, second = (chunk["choices"][0] for chunk in got[:2])
    assert (first["text"], second["text"]) == ("abx", "y")
    assert first["logprobs"]["token_logprobs"] == [None, -1.0, -0.1]
    assert second["logprobs"]["text_offset"] == [sum(map(len, first["logprobs"]["tokens"]))]
    assert (first["finish_reason"], second["finish_reason"]) == (None, "length")
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"prompt": ""}, "Prompt cannot be empty"),
        ({"prompt": []}, "Prompt cannot be empty"),
        ({"prompt": ["a", ""]}, "Prompt cannot be empty"),
        ({"prompt": None}, "$.prompt"),
        ({"prompt": 5}, "$.prompt"),
        ({"prompt": ["a", 1]}, "mixes"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
async def test_bad_completions_are_400(runtime, body, part):
    response = await complete(runtime, **body)
    assert (response.status_code, response.json()["object"]) == (400, "error")
    assert part in response.json()["message"]
    assert runtime.manager.requests == []


async def test_token_zero_is_a_prompt(runtime):
    await complete(runtime, prompt=[0, 5])
    assert runtime.manager.requests[0].input_ids == [0, 5]


# ---- models, tokenize ----------------------------------------------------------------------------------------------


async def test_models():
    runtime = StubRuntime(served_model_name="org/tiny")
    async with runtime.client() as client:
        listing = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/tiny")).json()
        missing = await client.get("/v1/models/other")
    created = one.pop("created")
    assert isinstance(created, int)
    assert one == {
        "id": "org/tiny",
        "object": "model",
        "owned_by": "sglang",
        "root": "org/tiny",
        "parent": None,
        "max_model_len": CONTEXT_LENGTH,
    }
    assert listing["object"] == "list"
    assert [{**m, "created": created} for m in listing["data"]] == [{**one, "created": created}]
    assert missing.status_code == 404
    assert missing.json() == {
        "error": {
            "message": "The model 'other' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenize_and_back(runtime, prefix):
    ids = runtime.manager.tokenizer.encode("the cat")
    one = (await post(runtime, f"{prefix}/tokenize", {"prompt": "the cat"})).json()
    assert one == {"tokens": ids, "count": len(ids), "max_model_len": CONTEXT_LENGTH}
    many = (await post(runtime, f"{prefix}/tokenize", {"prompt": ["the cat", ""]})).json()
    assert (many["tokens"], many["count"]) == ([ids, []], [len(ids), 0])
    talk = (await post(runtime, f"{prefix}/tokenize", {"messages": HI})).json()
    await chat(runtime)
    assert talk["tokens"] == runtime.manager.requests[0].input_ids
    assert (await post(runtime, f"{prefix}/detokenize", {"tokens": ids})).json() == {"text": "the cat"}
    both = await post(runtime, f"{prefix}/detokenize", {"tokens": [ids, [2], []], "skip_special_tokens": False})
    assert both.json() == {"text": ["the cat", "<|im_end|>", ""]}
    assert (await post(runtime, f"{prefix}/detokenize", {"tokens": []})).json() == {"text": ""}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": HI}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**30]}),
        ("/detokenize", {"tokens": [[1], 2]}),
        ("/detokenize", {"tokens": "abc"}),
    ],
)
async def test_bad_tokenizing_is_400(runtime, path, body):
    response = await post(runtime, path, body)
    assert (response.status_code, response.json()["object"]) == (400, "error")
