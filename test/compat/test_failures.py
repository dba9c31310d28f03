"""What goes wrong around a server: clients that leave, requests that are no good, processes that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from compat.conftest import LONG_CONTEXT
from compat.waiting import until
from server_process import ServerProcess, child_environment, free_port
from tiny_model import VOCAB_SIZE, make_tiny_model

pytestmark = pytest.mark.slow

PROMPT = [10, 20, 30]
ENDLESS = {"max_new_tokens": 90_000, "ignore_eos": True, "temperature": 0.0}
SHORT = {"max_new_tokens": 2}
DISCONNECT_SECONDS = 1.0
"""How soon a request whose client has gone must have ended."""


def loads(client: httpx.Client) -> tuple[int, int]:
    """(running, waiting) requests."""
    load = client.get("/v1/loads?include=core").json()["loads"][0]
    return load["num_running_reqs"], load["num_waiting_reqs"]


def post(client: httpx.Client, **body) -> httpx.Response:
    return client.post("/generate", json={"input_ids": PROMPT, "sampling_params": ENDLESS, **body})


def open_request(server: ServerProcess, **body) -> socket.socket:
    """A request whose connection the test holds in its own hands."""
    payload = json.dumps({"input_ids": PROMPT, "sampling_params": ENDLESS, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(payload)
    connection.sendall(head + payload)
    return connection


# ---- clients that leave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_running_request(tiny_server, tiny, stream):
    connection = open_request(tiny_server, stream=stream)
    until(lambda: loads(tiny) == (1, 0))
    connection.close()
    assert until(lambda: loads(tiny) == (0, 0)) < DISCONNECT_SECONDS


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_queued_request(tiny_server, tiny, stream):
    running = [open_request(tiny_server) for _ in range(2)]
    until(lambda: loads(tiny) == (2, 0))
    queued = open_request(tiny_server, stream=stream)
    until(lambda: loads(tiny) == (2, 1))
    queued.close()
    assert until(lambda: loads(tiny) == (2, 0)) < DISCONNECT_SECONDS
    for connection in running:
        connection.close()
    assert until(lambda: loads(tiny) == (0, 0)) < DISCONNECT_SECONDS


def test_a_client_that_leaves_while_paused_is_forgotten(tiny_server, tiny):
    def is_known() -> bool:
        """Whether the rid is taken, asked with a request that is refused in either case."""
        refusal = post(tiny, rid="held", input_ids=[VOCAB_SIZE]).json()["error"]["message"]
        return "Duplicate" in refusal

    tiny.post("/pause_generation", json={})
    held = open_request(tiny_server, rid="held")
    until(is_known)
    held.close()
    assert until(lambda: not is_known()) < DISCONNECT_SECONDS
    assert tiny.post("/continue_generation", json={}).status_code == 200
    assert loads(tiny) == (0, 0)


def test_a_storm_of_resets_leaves_nothing(tiny_server, tiny):
    """An evaluation starts: every rollout is cancelled at once."""
    connections = [open_request(tiny_server, stream=i % 2 == 0) for i in range(60)]
    until(lambda: sum(loads(tiny)) == 60)
    for connection in connections:
        # RST instead of FIN, as a cancelled client sends it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()
    until(lambda: loads(tiny) == (0, 0))
    assert post(tiny, sampling_params=SHORT).status_code == 200
    info = tiny.get("/server_info").json()["internal_states"][0]["scheduler"]
    assert (info["num_used_tokens"], info["invariant_violations_total"]) == (0, 0)


def test_half_a_request_is_no_request(tiny_server, tiny):
    with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert post(tiny, sampling_params=SHORT).status_code == 200


# ---- requests that are no good -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"input_ids": [1] * (LONG_CONTEXT + 1)}, "longer than the model's context length"),
        ({"sampling_params": {"max_new_tokens": LONG_CONTEXT}}, "maximum context length"),
        ({"input_ids": [VOCAB_SIZE]}, "vocabulary"),
        ({"input_ids": [-1]}, "vocabulary"),
        ({"input_ids": [2**40]}, "input_ids"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": None}, "Either text"),
        ({"text": "a"}, "Either text"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"sampling_params": {"temperature": -0.1}}, "temperature"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"top_k": 0}}, "top_k"),
        ({"sampling_params": {"min_p": 2}}, "min_p"),
        ({"sampling_params": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ({"sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}}, "min_new_tokens"),
        ({"sampling_params": {"logit_bias": {"x": 1}}}, "logit_bias"),
        ({"sampling_params": {"stop_token_ids": [10**6]}}, "stop_token_ids"),
        ({"sampling_params": {"stop_regex": "("}}, "stop_regex"),
        ({"sampling_params": {"n": 0}}, "n must be"),
        ({"sampling_params": {"n": 10**9}}, "n="),
        ({"sampling_params": {"regex": "a+"}}, "structured output"),
        ({"sampling_params": {"tempature": 1}}, "tempature"),
        ({"sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
        ({"return_logprob": True, "token_ids_logprob": [10**6]}, "token_ids_logprob"),
        ({"lora_path": "a1"}, "--enable-lora"),
        ({"image_data": ["x"]}, "image"),
    ],
)
def test_bad_requests_are_400_in_the_native_body(tiny, body, part, stream):
    response = post(tiny, stream=stream, **{"sampling_params": SHORT, **body})
    assert response.status_code == 400, response.text
    assert part in response.json()["error"]["message"]
    assert loads(tiny) == (0, 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"text": "\xff"}', b'{"text": {}}', b"null", b'{"stream": null}'])
def test_bad_json_is_400_in_the_flat_body(tiny, body):
    response = tiny.post("/generate", content=body)
    assert (response.status_code, response.json()["object"]) == (400, "error")


def test_a_rid_in_flight_cannot_be_taken_again(tiny_server, tiny):
    connection = open_request(tiny_server, rid="mine")
    until(lambda: loads(tiny) == (1, 0))
    response = post(tiny, rid="mine")
    assert response.status_code == 400
    assert response.json() == {"error": {"message": "Duplicate request ID detected: mine"}}
    assert post(tiny, rid=["mine", "other"], input_ids=[PROMPT, PROMPT]).status_code == 400
    connection.close()
    until(lambda: post(tiny, rid="mine", sampling_params=SHORT).status_code == 200)


def test_an_http2_preface_is_a_400(tiny_server):
    with socket.create_connection(("127.0.0.1", tiny_server.port), timeout=10) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00")
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["object"] == "error"


def test_a_full_queue_is_503(tiny_model):
    flags = ["--max-running-requests", "1", "--max-queued-requests", "1", "--max-total-tokens", str(LONG_CONTEXT)]
    with (
        ServerProcess("--model-path", tiny_model, *flags) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        first = open_request(server)
        until(lambda: loads(client) == (1, 0))
        second = open_request(server)
        until(lambda: loads(client) == (1, 1))
        response = post(client)
        assert response.status_code == 503
        assert response.json() == {
            "object": "error",
            "message": "The request queue is full.",
            "type": "503",
            "param": None,
            "code": 503,
        }
        assert client.get("/health").status_code == 200
        assert client.get("/health_generate").status_code == 200
        first.close()
        second.close()


# ---- processes that end --------------------------------------------------------------------------------------------


def test_sigterm_lets_live_requests_end(tiny_model, monkeypatch):
    monkeypatch.setenv("SGLANG_DRAIN_TIMEOUT", "60")
    flags = ["--max-total-tokens", str(LONG_CONTEXT)]
    with (
        ServerProcess("--model-path", tiny_model, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor() as pool,
    ):
        live = pool.submit(post, client, sampling_params={**ENDLESS, "max_new_tokens": 800})
        until(lambda: loads(client) == (1, 0))
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/health").status_code == 503)
        refused = post(client, sampling_params=SHORT)
        assert (refused.status_code, refused.json()["code"]) == (503, 503)
        reply = live.result(timeout=60).json()
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 800}
        assert server.process.wait(30) == 0
        assert psutil.wait_procs(children, timeout=5)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_end_in_time_is_aborted(tiny_model, monkeypatch, number):
    monkeypatch.setenv("SGLANG_DRAIN_TIMEOUT", "0.2")
    with (
        ServerProcess("--model-path", tiny_model, "--max-total-tokens", str(LONG_CONTEXT)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor() as pool,
    ):
        live = pool.submit(post, client)
        until(lambda: loads(client) == (1, 0))
        server.process.send_signal(number)
        reply = live.result(timeout=30).json()
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once(tiny_model):
    with ServerProcess("--model-path", tiny_model, "--max-total-tokens", str(LONG_CONTEXT)) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        connection = open_request(server)
        with httpx.Client(base_url=server.url) as client:
            until(lambda: loads(client) == (1, 0))
            server.process.send_signal(signal.SIGTERM)
            until(lambda: client.get("/health").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 128 + signal.SIGTERM
        assert psutil.wait_procs(children, timeout=5)[1] == []
        connection.close()


def test_a_killed_back_process_fails_everything_with_503(tiny_model):
    with (
        ServerProcess("--model-path", tiny_model, "--max-total-tokens", str(LONG_CONTEXT)) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor() as pool,
    ):
        [back] = psutil.Process(server.process.pid).children()
        live = pool.submit(post, client)
        until(lambda: loads(client) == (1, 0))
        with client.stream(
            "POST", "/generate", json={"input_ids": PROMPT, "sampling_params": ENDLESS, "stream": True}
        ) as s:
            lines = s.iter_lines()
            next(lines)
            os.kill(back.pid, signal.SIGKILL)
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert "SIGKILL" in json.loads(rest[-2])["error"]["message"]
        assert rest[-1] == "[DONE]"
        failed = live.result(timeout=10)
        assert (failed.status_code, failed.json()["type"]) == (503, "503")
        assert client.get("/health").status_code == 503
        assert post(client).status_code == 503
        assert client.post("/pause_generation", json={}).status_code == 503
        assert "was killed by SIGKILL" in server.log
        assert psutil.Process(server.process.pid).children() == []  # reaped, no zombie
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 1


def test_the_back_leaves_when_the_front_is_killed(tiny_model):
    with ServerProcess("--model-path", tiny_model) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        server.process.wait()
        assert psutil.wait_procs(children, timeout=20)[1] == []


def test_sigterm_while_the_model_loads_is_a_clean_end(tiny_model):
    port = str(free_port())
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", tiny_model, "--port", port]
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as process:
        until(lambda: answers(f"http://127.0.0.1:{port}/ping"))
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert "cannot start" not in log
    assert psutil.wait_procs(children, timeout=5)[1] == []


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def launch(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang.launch_server", *flags]
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120, check=False)


def test_weights_that_do_not_fit_end_the_start(tmp_path: Path):
    model = make_tiny_model(tmp_path / "broken")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    run = launch("--model-path", str(model), "--port", str(free_port()))
    assert run.returncode == 1
    assert "layers.2" in run.stderr
    assert "the server cannot start" in run.stderr


def test_a_taken_port_ends_the_start_before_anything_is_loaded(tiny_model, tiny_server):
    run = launch("--model-path", tiny_model, "--port", str(tiny_server.port))
    assert run.returncode == 1
    assert str(tiny_server.port) in run.stderr
    assert "ready; try" not in run.stderr
