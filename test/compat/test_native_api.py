"""The native API as RL clients use it, against a real server on a tiny model."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from compat.waiting import until

pytestmark = pytest.mark.slow

PROMPT = [10, 20, 30, 40]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


def generate(client: httpx.Client, **body) -> httpx.Response:
    return client.post("/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY, **body})


def total_requests(client: httpx.Client) -> int:
    return client.get("/v1/loads?include=core").json()["loads"][0]["num_total_reqs"]


def test_the_request_of_an_rl_client(tiny):
    reply = generate(
        tiny,
        image_data=[],
        sampling_params={
            "top_p": 1.0,
            "top_k": int(1e8),
            "max_new_tokens": 8,
            "temperature": 1.0,
            "stop_token_ids": [3, 3, None],
            "ignore_eos": False,
            "skip_special_tokens": False,
            "frequency_penalty": 0.0,
        },
        return_logprob=True,
        stream=False,
        model=None,
    ).json()
    meta = reply["meta_info"]
    assert meta["finish_reason"]["type"] in ("stop", "length")
    assert [entry[1] for entry in meta["output_token_logprobs"]] == reply["output_ids"]
    assert all(entry[0] <= 0 and entry[2] is None for entry in meta["output_token_logprobs"])
    assert meta["input_token_logprobs"] == []
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, len(reply["output_ids"]))
    assert meta["weight_version"] == "default"


def test_prompt_logprobs(tiny):
    meta = generate(
        tiny,
        sampling_params={**GREEDY, "max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[5, 6],
    ).json()["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT
    assert meta["input_token_logprobs"][0][0] is None
    assert meta["input_top_logprobs"][0] is None
    assert [len(position) for position in meta["input_top_logprobs"][1:]] == [2, 2, 2]
    assert [[entry[1] for entry in position] for position in meta["output_token_ids_logprobs"]] == [[5, 6]] * 2


def test_single_batch_and_n(tiny):
    one = generate(tiny).json()
    batch = generate(tiny, input_ids=[PROMPT, [7, 8]]).json()
    assert [reply["output_ids"] for reply in batch][0] == one["output_ids"]
    several = generate(tiny, sampling_params={**GREEDY, "n": 2}).json()
    assert [reply["output_ids"] for reply in several] == [one["output_ids"]] * 2
    texts = generate(tiny, input_ids=None, text=["the of", "and"]).json()
    assert len(texts) == 2


def test_streams_are_cumulative_and_agree_with_the_whole(tiny):
    whole = generate(tiny, return_logprob=True).json()
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "stream": True, "return_logprob": True}
    with tiny.stream("POST", "/generate", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        payloads = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert payloads.pop() == "[DONE]"
    events = [json.loads(payload) for payload in payloads]
    for before, after in zip(events, events[1:], strict=False):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
    last = events[-1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert len(last["meta_info"]["output_token_logprobs"]) == 8
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])


def test_a_seed_reproduces(tiny):
    params = {"max_new_tokens": 12, "temperature": 1.0, "sampling_seed": 5, "ignore_eos": True}
    alone = generate(tiny, sampling_params=params).json()
    crowd = generate(tiny, input_ids=[PROMPT, [9], PROMPT], sampling_params=params).json()
    assert crowd[0]["output_ids"] == crowd[2]["output_ids"] == alone["output_ids"]


def test_continuing_an_aborted_request_is_seamless(tiny):
    """RL clients re-send prompt + partial output after an abort."""
    whole = generate(tiny).json()["output_ids"]
    rest = generate(tiny, input_ids=PROMPT + whole[:3], sampling_params={**GREEDY, "max_new_tokens": 5}).json()
    assert whole[:3] + rest["output_ids"] == whole


def test_put_and_plain_content_type(tiny):
    body = json.dumps({"input_ids": PROMPT, "sampling_params": GREEDY})
    assert tiny.put("/generate", content=body, headers={"content-type": "text/plain"}).status_code == 200


def test_health_with_a_body_and_bearer_none(tiny):
    headers = {"Authorization": "Bearer None"}
    for path in ("/health", "/health_generate", "/v1/models", "/model_info", "/server_info", "/get_load", "/ping"):
        assert tiny.request("GET", path, json={}, headers=headers).status_code == 200, path


def test_metrics_count_what_happened(tiny):
    def total(name: str) -> float:
        lines = tiny.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"sglang:{name}{{"))

    before = total("num_requests_total"), total("generation_tokens_total"), total("prompt_tokens_total")
    generate(tiny, input_ids=[PROMPT, PROMPT])
    after = total("num_requests_total"), total("generation_tokens_total"), total("prompt_tokens_total")
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 16, 8]
    assert total("invariant_violations_total") == 0


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_pause_and_continue(tiny, mode):
    long = {"max_new_tokens": 800, "ignore_eos": True, "temperature": 0.0}
    with ThreadPoolExecutor() as pool:
        running = pool.submit(generate, tiny, sampling_params=long, return_logprob=True)
        until(lambda: total_requests(tiny) == 1)
        assert tiny.post("/pause_generation", json={"mode": mode}).json() == {
            "message": "Generation paused successfully.",
            "status": "ok",
        }
        assert tiny.get("/health").status_code == 200
        assert tiny.get("/health_generate").status_code == 200
        waiting = pool.submit(generate, tiny)
        if mode == "abort":
            reply = running.result(timeout=10).json()
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
            assert len(reply["meta_info"]["output_token_logprobs"]) == len(reply["output_ids"])
        else:
            assert not running.done()
        if mode != "in_place":
            assert tiny.post("/flush_cache", json={}).status_code == 200
        assert not waiting.done()
        assert tiny.post("/continue_generation", json={}).json()["status"] == "ok"
        assert waiting.result(timeout=30).json()["meta_info"]["finish_reason"]["type"] == "length"
        if mode != "abort":
            assert len(running.result(timeout=60).json()["output_ids"]) == 800


def test_flush_needs_an_idle_scheduler(tiny):
    long = {"max_new_tokens": 50_000, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        running = pool.submit(generate, tiny, sampling_params=long, rid="long")
        until(lambda: total_requests(tiny) == 1)
        busy = tiny.get("/flush_cache")
        assert (busy.status_code, busy.text.startswith("Flush cache failed.")) == (400, True)
        waiting = pool.submit(tiny.get, "/flush_cache", params={"timeout": 20})
        tiny.post("/abort_request", json={"rid": "long"})
        assert waiting.result(timeout=30).status_code == 200
        assert running.result(timeout=10).json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_aborts_reach_running_and_waiting_requests(tiny):
    long = {"max_new_tokens": 50_000, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(generate, tiny, sampling_params=long, rid=f"run-{i}") for i in range(2)]
        until(lambda: total_requests(tiny) == 2)
        queued = pool.submit(generate, tiny, sampling_params=long, rid="queued", return_logprob=True)
        until(lambda: total_requests(tiny) == 3)
        assert tiny.post("/abort_request", json={"rid": "queued"}).content == b""
        meta = queued.result(timeout=10).json()["meta_info"]
        assert meta["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
        assert meta["output_token_logprobs"] == []
        tiny.post("/abort_request", json={"rid": "run-", "prefix": True})
        for future in running:
            reason = future.result(timeout=10).json()["meta_info"]["finish_reason"]
            assert reason == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    until(lambda: total_requests(tiny) == 0)


def test_hundreds_of_short_connections(tiny_server):
    """Clients that close every connection: nothing may be refused or lost."""
    failures = []

    def worker() -> None:
        for _ in range(5):
            try:
                with httpx.Client(base_url=tiny_server.url, headers={"Connection": "close"}, timeout=120) as client:
                    reply = generate(client, sampling_params={"max_new_tokens": 2})
                    assert reply.status_code == 200, reply.text
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=worker) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
