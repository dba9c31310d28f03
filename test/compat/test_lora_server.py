"""Adapters and how a server is started: flags, slots, a back that dies, and `sglang.Engine`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import adapters
import httpx
import psutil
import pytest
from compat.lora_client import PROMPT, SHORT, generate, listing, load, say, tokens_of
from compat.waiting import until
from server_process import ServerProcess

import sglang
from sglang.srt.errors import AdapterError, RequestError

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serve(model: str, *flags: str) -> Iterator[tuple[ServerProcess, httpx.Client]]:
    """A server and a client of it."""
    with (
        ServerProcess("--model-path", model, *flags) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield server, client


def test_lora_paths_in_every_form(tiny_model, lora_config, tmp_path):
    named, bare, pinned = (say(lora_config, tmp_path / name, 100 + i) for i, name in enumerate(("n", "b", "p")))
    item = f'{{"lora_name": "pin", "lora_path": "{pinned}", "pinned": true}}'
    with serve(tiny_model, "--lora-paths", f"named={named}", str(bare), item) as (_, client):
        assert [a["lora_name"] for a in listing(client)] == ["named", str(bare), "pin"]
        assert [a["pinned"] for a in listing(client)] == [False, False, True]
        replies = generate(client, ["named", str(bare), "pin"], input_ids=[PROMPT] * 3)
        assert [tokens_of(reply) for reply in replies] == [{100}, {101}, {102}]


def test_a_server_does_not_start_without_its_adapters(tiny_model, tmp_path):
    with pytest.raises(AssertionError, match="--lora-paths a="):
        ServerProcess("--model-path", tiny_model, "--lora-paths", f"a={tmp_path / 'nowhere'}").__enter__()


def test_require_root_and_retention(tiny_model, lora_config, tmp_path):
    """E20, H5, D8: three flags, one server."""
    root = tmp_path / "root"
    flags = ["--enable-lora", "--require-adapter", "--lora-root", str(root), "--lora-keep-last", "2"]
    with serve(tiny_model, *flags) as (_, client):
        outside = say(lora_config, tmp_path / "outside", 100)
        for path in (outside, root / ".." / "outside"):
            assert load(client, "o", path).json()["error_code"] == "adapter_not_found"
        for number in range(5):
            load(client, f"policy-v{number}", say(lora_config, root / "policy", 110 + number)).raise_for_status()
        load(client, "judge", say(lora_config, root / "judge", 120)).raise_for_status()
        until(lambda: [a["lora_name"] for a in listing(client)] == ["policy-v3", "policy-v4", "judge"])
        assert tokens_of(generate(client, "policy-v4")) == {114}
        refused = client.post("/generate", json={"input_ids": PROMPT, "sampling_params": SHORT})
        assert refused.status_code == 400
        assert "--require-adapter" in refused.json()["error"]["message"]
        chat = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/v1/chat/completions", json=chat).status_code == 400
        assert client.get("/health_generate").status_code == 200


def test_b5_many_adapters_share_two_slots(tiny_model, lora_config, tmp_path):
    flags = ["--enable-lora", "--max-loras-per-batch", "2", "--enable-metrics"]
    with serve(tiny_model, *flags) as (_, client):
        names = [f"a{i}" for i in range(50)]
        for i, name in enumerate(names):
            load(client, name, say(lora_config, tmp_path / "a", 100 + i)).raise_for_status()
        replies = generate(client, names, input_ids=[PROMPT] * 50)
        assert [tokens_of(reply) for reply in replies] == [{100 + i} for i in range(50)]


def test_a36_a_dead_back_leaves_no_lease(tiny_model, lora_config, tmp_path):
    with serve(tiny_model, "--enable-lora", "--enable-metrics") as (server, client):
        assert server.process is not None
        load(client, "a", say(lora_config, tmp_path / "a", 100)).raise_for_status()
        body = {"input_ids": PROMPT, "sampling_params": {**SHORT, "max_new_tokens": 90_000}, "lora_path": "a"}
        with client.stream("POST", "/generate", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            (back,) = psutil.Process(server.process.pid).children(recursive=True)
            os.kill(back.pid, signal.SIGKILL)
            assert any("error" in line for line in lines)
        until(lambda: client.get("/health").status_code == 503)
        assert "sglang:lora_leases" in client.get("/metrics").text
        assert all(a["num_holders"] == 0 for a in listing(client))
        reply = load(client, "b", say(lora_config, tmp_path / "b", 100))
        assert reply.status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 1


def test_astraflows_weight_sync(tiny_model, lora_config, tmp_path):
    """pause, load, flush, continue, a new name every step: what is in flight ends, what comes meanwhile waits."""
    flags = ["--enable-lora", "--max-loaded-loras", "4", "--max-loras-per-batch", "4"]
    with serve(tiny_model, *flags) as (_, client), ThreadPoolExecutor(8) as pool:

        def ask(version: int, tokens: int) -> dict[str, Any]:
            params = {**SHORT, "max_new_tokens": tokens}
            return generate(client, f"lora_v{version}", sampling_params=params, return_logprob=True, image_data=[])

        load(client, "lora_v1", say(lora_config, tmp_path / "lora_1", 101)).raise_for_status()
        for version in range(2, 14):
            running = [pool.submit(ask, version - 1, 90_000) for _ in range(4)]
            until(lambda: client.get("/v1/loads").json()["loads"][0]["num_running_reqs"] == 4)
            client.post("/pause_generation", json={}).raise_for_status()
            for future in running:
                reply = future.result(timeout=5)
                assert reply["meta_info"]["finish_reason"]["type"] == "abort"
                assert len(reply["meta_info"]["output_token_logprobs"]) == len(reply["output_ids"])
            waiting = [pool.submit(ask, version - 1, 3) for _ in range(4)]
            load(client, f"lora_v{version}", say(lora_config, tmp_path / "lora_1", 100 + version)).raise_for_status()
            client.post("/flush_cache", json={}).raise_for_status()
            assert not any(future.done() for future in waiting)
            client.post("/continue_generation", json={}).raise_for_status()
            assert [tokens_of(f.result(timeout=5)) for f in waiting] == [{100 + version - 1}] * 4
            assert tokens_of(ask(version, 3)) == {100 + version}
            assert len(listing(client)) <= 4


def test_engine_loads_and_unloads(tiny_model, lora_config, tmp_path):
    import torch

    with sglang.Engine(model_path=tiny_model, enable_lora=True, max_total_tokens=4096) as engine:
        loaded = engine.load_lora_adapter("a", str(say(lora_config, tmp_path / "a", 100)))
        assert loaded.success
        assert loaded.loaded_adapters == {"a": str(tmp_path / "a")}
        tensors = adapters.telling_adapter(lora_config, 101)
        torch_tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
        assert engine.load_lora_adapter_from_tensors("b", torch_tensors, adapters.adapter_config(tensors)).success
        replies = engine.generate(input_ids=[PROMPT] * 2, sampling_params=SHORT, lora_path=["a", "b"])
        assert [tokens_of(reply) for reply in replies] == [{100}, {101}]
        refused = engine.load_lora_adapter("a", str(tmp_path / "a"))
        assert not refused.success
        assert "already loaded" in refused.error_message
        assert engine.unload_lora_adapter("a").success
        with pytest.raises(AdapterError, match="not loaded any more"):
            engine.generate(input_ids=PROMPT, sampling_params=SHORT, lora_path="a")
        with pytest.raises(RequestError):
            engine.load_lora_adapter("c", "/nowhere", upsert="perhaps")


async def test_f7_engine_in_a_running_loop(tiny_model, lora_config, tmp_path):
    with sglang.Engine(model_path=tiny_model, enable_lora=True, max_total_tokens=4096) as engine:
        assert (await engine.async_load_lora_adapter("a", str(say(lora_config, tmp_path / "a", 100)))).success
        reply = await engine.async_generate(input_ids=PROMPT, sampling_params=SHORT, lora_path="a")
        assert tokens_of(reply) == {100}
        assert (await engine.async_unload_lora_adapter("a")).success
