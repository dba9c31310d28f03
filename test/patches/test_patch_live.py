"""A live stock server over HTTP, with the import hook and without. Opt-in: imports torch and stock's dependencies."""

from __future__ import annotations

import contextlib

import httpx
import pytest
import stock

VERSION = "0.5.12"
PATIENCE = 3.0  # seconds for an answer that takes milliseconds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not stock.ASKED_FOR, reason=stock.MISSING)]


class Client:
    """One trainer at one server."""

    def __init__(self, http, log):
        self.http, self.log = http, log

    def generate(self, tokens=1, prompt=4, rid=None, **parameters):
        body = {"input_ids": [1] * prompt, "lora_path": "A", "rid": rid}
        body["sampling_params"] = {"max_new_tokens": tokens, **parameters}
        return self.http.post("/generate", json=body)

    def load(self, name):
        return self.http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": "p"}).status_code

    def unload(self, name):
        return self.http.post("/unload_lora_adapter", json={"lora_name": name}).status_code


def normal(client):
    assert client.generate().json()["meta_info"]["finish_reason"]["type"] == "length"


def prompt_too_long(client):
    assert client.generate(prompt=100).status_code == 400


def disconnect_queued(client):
    with pytest.raises(httpx.ReadTimeout):
        client.generate(tokens=4, rid="left")
    stock.wait_for(client.log, "request left queue")
    stock.wait_for(client.log, "abort left")


def n8(client):
    assert len(client.generate(n=8).json()) == 8


LEAKS = (prompt_too_long, disconnect_queued, n8)


@contextlib.contextmanager
def serve(hook):
    tree = stock.stock_tree(VERSION)
    if tree is None:
        pytest.skip(f"no wheel of sglang {VERSION}: {stock.HOW}")
    with (
        stock.serve(tree, SGLANG_LORA_PATCH=hook, SGLANG_REQUEST_STATE_WAIT_TIMEOUT="1") as (url, log),
        httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http,
    ):
        assert ("patched" in log.read_text().split()) == (hook == "1")
        yield Client(http, log)


def test_with_the_hook_every_unload_answers():
    with serve("1") as client:
        for way in (normal, *LEAKS):
            assert client.load("A") == 200
            way(client)
            assert (way.__name__, client.unload("A")) == (way.__name__, 200)
        assert client.load("B") == 200


@pytest.mark.parametrize("leak", LEAKS)
def test_without_it_one_request_ends_unloads_and_loads(leak):
    with serve("0") as client:
        assert client.load("A") == 200
        normal(client)
        assert client.unload("A") == 200
        assert client.load("A") == 200
        leak(client)
        with pytest.raises(httpx.ReadTimeout):
            client.unload("A")
        with pytest.raises(httpx.ReadTimeout):
            client.load("B")
