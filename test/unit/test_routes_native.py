"""Native routes over a scripted TokenizerManager: bodies in, golden JSON out."""

from __future__ import annotations

import asyncio
import json

import pytest
from unit.stub_runtime import StubRuntime, events, native_reply

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct.wire import PauseMode
from sglang.srt.managers.tokenizer_manager import ServerStatus


@pytest.fixture
def runtime() -> StubRuntime:
    return StubRuntime()


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_generate_replies_with_the_native_body(runtime, method):
    runtime.manager.replies = [native_reply()]
    async with runtime.client() as client:
        response = await client.request(method, "/generate", content=b'{"text": "a"}')
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == native_reply()


async def test_generate_reads_the_body_as_clients_send_it(runtime):
    runtime.manager.replies = [[native_reply(), native_reply()]]
    body = {
        "input_ids": [1, 2],
        "image_data": [],
        "model": None,
        "sampling_params": {"top_k": 1e8, "temperature": 0.0},
        "return_logprob": "true",
        "logprob_start_len": "3",
        "stream": False,
        "a_field_of_tomorrow": {"x": 1},
    }
    async with runtime.client() as client:
        response = await client.post("/generate", content=json.dumps(body), headers={"content-type": "text/plain"})
    assert len(response.json()) == 2
    obj = runtime.manager.requests[0]
    assert (obj.input_ids, obj.return_logprob, obj.logprob_start_len, obj.image_data) == ([1, 2], True, 3, [])


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not valid"),
        (b"[1]", "object"),
        (b'{"text": 5}', "$.text"),
        (b'{"text": "a", "stream": null}', "$.stream"),
        (b'{"text": "a", "sampling_params": 3}', "$.sampling_params"),
        (b'{"text": "\xff"}', "not valid"),
        (b'{"text": "\\ud800"}', "not valid"),
        (b'{"text": NaN}', "not valid"),
        (b"[" * 100_000, "not valid"),
    ],
)
async def test_bodies_that_do_not_parse_get_the_flat_400(runtime, body, part):
    async with runtime.client() as client:
        response = await client.post("/generate", content=body)
    assert response.status_code == 400
    error = response.json()
    assert part in error.pop("message")
    assert error == {"object": "error", "type": "Bad Request", "param": None, "code": 400}
    assert runtime.manager.requests == []


async def test_refused_requests_get_the_native_400(runtime):
    runtime.manager.error = RequestError("temperature must be >= 0, got -1.")
    async with runtime.client() as client:
        single = await client.post("/generate", json={"text": "a"})
        stream = await client.post("/generate", json={"text": "a", "stream": True})
    for response in (single, stream):
        assert response.status_code == 400
        assert response.json() == {"error": {"message": "temperature must be >= 0, got -1."}}


async def test_overload_is_the_flat_503(runtime):
    runtime.manager.error = ServiceUnavailableError("The request queue is full.")
    async with runtime.client() as client:
        single = await client.post("/generate", json={"text": "a"})
        stream = await client.post("/generate", json={"text": "a", "stream": True})
    for response in (single, stream):
        assert response.status_code == 503
        assert response.json() == {
            "object": "error",
            "message": "The request queue is full.",
            "type": "503",
            "param": None,
            "code": 503,
        }


async def test_a_stream_is_events_and_done(runtime):
    runtime.manager.replies = [native_reply(" t"), native_reply(" the")]
    async with runtime.client() as client:
        response = await client.post("/generate", json={"text": "a", "stream": True})
    payloads = events(response)
    assert [json.loads(p)["text"] for p in payloads[:-1]] == [" t", " the"]
    assert payloads[-1] == "[DONE]"
    assert runtime.manager.closed_streams == 1


@pytest.mark.parametrize("error", [ServiceUnavailableError("the back process died"), RequestError("too late")])
async def test_an_error_after_the_start_is_an_event(runtime, error):
    runtime.manager.replies = [native_reply()]
    runtime.manager.error = error
    async with runtime.client() as client:
        response = await client.post("/generate", json={"text": "a", "stream": True})
    payloads = events(response)
    assert response.status_code == 200
    assert json.loads(payloads[1]) == {"error": {"message": error.message}}
    assert payloads[2:] == ["[DONE]"]


async def test_a_bug_in_a_stream_hides_its_details(runtime, caplog):
    runtime.manager.replies = [native_reply()]
    runtime.manager.error = KeyError("secret")
    async with runtime.client() as client:
        response = await client.post("/generate", json={"text": "a", "stream": True})
    assert "Internal server error" in events(response)[1]
    assert "secret" not in response.text
    assert "a stream failed" in caplog.text


async def test_a_bug_is_the_flat_500(runtime):
    runtime.manager.error = KeyError("secret")
    async with runtime.client() as client:
        response = await client.post("/generate", json={"text": "a"})
    assert response.status_code == 500
    assert response.json()["code"] == 500
    assert "secret" not in response.text


async def test_numbers_json_cannot_say_become_null(runtime):
    runtime.manager.replies = [native_reply(output_token_logprobs=[[float("-inf"), 1, None]])]
    async with runtime.client() as client:
        response = await client.post("/generate", json={"text": "a"})
    assert response.json()["meta_info"]["output_token_logprobs"] == [[None, 1, None]]


async def test_unknown_routes_and_methods_get_the_flat_body(runtime):
    async with runtime.client() as client:
        missing = await client.get("/nope")
        method = await client.delete("/generate")
    assert missing.status_code == 404
    assert missing.json() == {"object": "error", "message": "Not Found", "type": "404", "param": None, "code": 404}
    assert method.status_code == 405
    assert method.json()["code"] == 405
    assert set(method.headers["allow"].replace(" ", "").split(",")) == {"POST", "PUT"}


@pytest.mark.parametrize("body", [b"", b"{}", b'{"mode": "abort"}'])
async def test_pause_and_continue(runtime, body):
    async with runtime.client() as client:
        paused = await client.post("/pause_generation", content=body)
        continued = await client.post("/continue_generation", content=b"" if not body else b"{}")
    assert paused.json() == {"message": "Generation paused successfully.", "status": "ok"}
    assert continued.json() == {"message": "Generation continued successfully.", "status": "ok"}
    assert runtime.manager.calls == [("pause", "abort"), ("continue", True)]


async def test_pause_takes_the_other_modes_and_refuses_unknown_ones(runtime):
    async with runtime.client() as client:
        for mode in PauseMode:
            assert (await client.post("/pause_generation", json={"mode": mode.value})).status_code == 200
        bad = await client.post("/pause_generation", json={"mode": "sometimes"})
    assert [call[1] for call in runtime.manager.calls] == [mode.value for mode in PauseMode]
    assert (bad.status_code, bad.json()["type"]) == (400, "Bad Request")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_flush_cache_is_text(runtime, method):
    async with runtime.client() as client:
        good = await client.request(method, "/flush_cache", content=b"{}", params={"reset_connector": "true"})
        runtime.manager.flush_result = (False, "")
        failed = await client.request(method, "/flush_cache", params={"timeout": "1.5"})
        runtime.manager.flush_result = (False, "Another flush_cache is already in progress.")
        busy = await client.request(method, "/flush_cache")
        bad = await client.request(method, "/flush_cache", params={"timeout": "-1"})
    assert (good.status_code, good.text) == (200, "Cache flushed.\n")
    assert (failed.status_code, failed.text) == (400, "Flush cache failed.\n")
    assert (busy.status_code, busy.text) == (400, "Another flush_cache is already in progress.")
    assert (bad.status_code, bad.json()["object"]) == (400, "error")
    assert runtime.manager.calls[:2] == [("flush", 0.0), ("flush", 1.5)]


async def test_abort_request_has_an_empty_reply(runtime):
    async with runtime.client() as client:
        responses = [
            await client.post("/abort_request", content=body)
            for body in (
                b'{"rid": "x"}',
                b'{"abort_all": true}',
                b'{"rid": "y", "prefix": true}',
                b'{"lora_name": "a1"}',
                b"",
            )
        ]
    assert [(r.status_code, r.content) for r in responses] == [(200, b"")] * 5
    assert runtime.manager.calls == [
        ("abort", "x", False, False, None),
        ("abort", None, True, False, None),
        ("abort", "y", False, True, None),
        ("abort", None, False, False, "a1"),
        ("abort", None, False, False, None),
    ]


async def test_a_loading_server_answers_503_except_to_ping(runtime):
    runtime.manager.status = ServerStatus.STARTING
    async with runtime.client() as client:
        for path in ("/health", "/health_generate", "/v1/models", "/server_info", "/model_info", "/generate"):
            response = await client.request("POST" if path == "/generate" else "GET", path)
            assert response.status_code == 503, path
            assert response.json()["code"] == 503
        assert (await client.get("/ping")).status_code == 200
        assert (await client.get("/")).text == "SGLang is running"


async def test_the_reply_waits_for_the_client_to_leave(runtime):
    """A non-streaming request learns of the disconnect through `wait_disconnected`."""
    runtime.manager.hang = True
    from sglang.srt.entrypoints.http_server import create_app

    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": b'{"text": "a"}', "more_body": False}]
    sent: list[dict] = []

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("server", 80),
        "client": ("client", 1),
        "root_path": "",
    }
    call = asyncio.create_task(create_app(runtime)(scope, receive, send))
    await asyncio.sleep(0)
    assert not runtime.manager.disconnected.is_set()
    gone.set()
    await asyncio.wait_for(call, 5)
    assert runtime.manager.disconnected.is_set()
    assert sent[0]["status"] == 400  # nobody reads it
