"""Rows of the failure list that need a whole server and running requests; the others stand in `test_lora_api`."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import adapters
import httpx
import numpy as np
import pytest
import torch
from compat.lora_client import ENDLESS, PROMPT, SHORT, generate, listing, load, say, tokens_of
from safetensors.numpy import load_file, save, save_file
from server_process import ServerProcess
from tiny_model import VOCAB_SIZE

from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

pytestmark = pytest.mark.slow


@contextmanager
def streaming(client: httpx.Client, name: str, tokens: int = 90_000) -> Iterator[Iterator[dict[str, Any]]]:
    """A running stream of an adapter, its first event read; yields the events that follow."""
    params = {**ENDLESS, "max_new_tokens": tokens}
    body = {"input_ids": PROMPT, "sampling_params": params, "lora_path": name, "stream": True}
    with client.stream("POST", "/generate", json=body) as reply:
        events = (json.loads(line[5:]) for line in reply.iter_lines() if line.startswith("data: {"))
        next(events)
        yield events


def post_tensors(client: httpx.Client, name: str, payload: bytes, config_dict: dict[str, Any]) -> httpx.Response:
    body = {"lora_name": name, "config_dict": config_dict, "serialized_tensors": base64.b64encode(payload).decode()}
    return client.post("/load_lora_adapter_from_tensors", json=body)


def test_b9_c6_publishing_one_adapter_leaves_the_other_streams_alone(lora, lora_config, tmp_path):
    load(lora, "a", say(lora_config, tmp_path / "a", 100)).raise_for_status()
    load(lora, "b", say(lora_config, tmp_path / "b", 101)).raise_for_status()
    with streaming(lora, "b", tokens=600) as events:
        for turn in range(20):
            load(lora, "a", say(lora_config, tmp_path / "a", 110 + turn), upsert=True).raise_for_status()
            assert tokens_of(generate(lora, "a")) == {110 + turn}
            next(events)
        *_, last = events
    assert len(last["output_ids"]) == 600
    assert tokens_of(last) == {101}
    assert last["meta_info"]["finish_reason"]["type"] == "length"
    assert last["meta_info"]["num_retractions"] == 0


def test_b15_a_half_written_directory_may_be_tried_again(lora, lora_config, tmp_path):
    path = say(lora_config, tmp_path / "half", 100)
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    reply = load(lora, "half", path)
    assert reply.status_code == 409
    assert reply.json()["error_code"] == "path_unreadable"
    weights.write_bytes(whole)
    load(lora, "half", path).raise_for_status()
    assert tokens_of(generate(lora, "half")) == {100}


def test_c20_values_that_are_not_finite_never_reach_the_model(lora, lora_config, tmp_path):
    path = say(lora_config, tmp_path / "nan", 100)
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = np.nan
    save_file(tensors, path / "adapter_model.safetensors")
    reply = load(lora, "nan", path)
    assert reply.status_code == 400
    assert name in reply.json()["error_message"]
    assert listing(lora) == []


def test_c23_publishing_never_touches_the_base(lora, lora_config, tmp_path):
    scored = {"return_logprob": True, "logprob_start_len": 0}
    before = generate(lora, **scored)["meta_info"]
    for turn in range(10):
        load(lora, "p", say(lora_config, tmp_path / "p", 100 + turn), upsert=True).raise_for_status()
        generate(lora, "p")
    lora.post("/flush_cache").raise_for_status()
    after = generate(lora, **scored)["meta_info"]
    for kind in ("input_token_logprobs", "output_token_logprobs"):
        assert after[kind] == before[kind]


def test_c26_a_load_that_failed_says_so_in_its_status(lora, lora_config):
    tensors = adapters.telling_adapter(lora_config, 100)
    for payload, config_dict in (
        (b"nothing", adapters.adapter_config(tensors)),
        (save({}), adapters.adapter_config(tensors)),
        (save(tensors), {"peft_type": "IA3"}),
        (save(tensors), {**adapters.adapter_config(tensors), "use_dora": True}),
    ):
        reply = post_tensors(lora, "bad", payload, config_dict)
        assert reply.status_code == 400
        assert reply.json()["success"] is False
        assert reply.json()["error_code"] == "invalid_adapter"
    assert listing(lora) == []


def test_e5_e18_scores_of_prompts_come_from_one_version_each(lora, lora_config, tmp_path):
    """The same prompt under two versions and the base, in one batch: each row is its own version's."""
    for i in range(2):
        load(lora, f"v{i}", say(lora_config, tmp_path / f"v{i}", 130 + i)).raise_for_status()
    prompt = [70, 130, 131, 130, 131, 90]
    fields = {"return_logprob": True, "logprob_start_len": 0, "input_ids": [prompt] * 3}
    replies = generate(lora, ["v0", "v1", None], **fields)
    for version, token in ((0, 130), (1, 131)):
        scores = {t: p for p, t, _ in replies[version]["meta_info"]["input_token_logprobs"][1:]}
        assert scores[token] > -1e-3
        assert scores[261 - token] < -100
    base = generate(lora, **{**fields, "input_ids": prompt})["meta_info"]["input_token_logprobs"]
    together = replies[2]["meta_info"]["input_token_logprobs"]
    assert np.allclose([p for p, _, _ in base[1:]], [p for p, _, _ in together[1:]], atol=1e-4)


def test_c13_tokens_of_the_base_are_no_added_ones(lora, lora_config):
    tensors = adapters.telling_adapter(lora_config, 109)
    body = {
        "lora_name": "tokens",
        "config_dict": adapters.adapter_config(tensors),
        "serialized_tensors": base64.b64encode(save(tensors)).decode(),
    }
    new = {"<s>": 0, "<new>": VOCAB_SIZE}
    reply = lora.post("/load_lora_adapter_from_tensors", json={**body, "added_tokens_config": new})
    assert reply.status_code == 400
    assert "<new>" in reply.json()["error_message"]
    lora.post("/load_lora_adapter_from_tensors", json={**body, "added_tokens_config": {"<s>": 0}}).raise_for_status()
    assert tokens_of(generate(lora, "tokens")) == {109}


@pytest.mark.parametrize("form", ["dict", "pairs", "flattened_bucket"])
def test_clients_serialize_tensors_with_upstreams_names(lora, lora_config, form):
    """What RL clients do with the package that this server comes in; bfloat16, and a view of something larger."""
    numbers = adapters.telling_adapter(lora_config, 108)
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in numbers.items()}
    first = next(iter(tensors))
    tensors[first] = torch.cat([tensors[first], tensors[first]])[: len(tensors[first])]
    load_format, obj = None, tensors
    if form == "pairs":
        obj = list(tensors.items())
    elif form == "flattened_bucket":
        bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
        assert all(torch.equal(t, tensors[name]) for name, t in bucket.reconstruct_tensors())
        load_format = form
        obj = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    body = {
        "lora_name": "verl_actor_lora_name",
        "config_dict": adapters.adapter_config(numbers),
        "serialized_named_tensors": [MultiprocessingSerializer.serialize(obj, output_str=True)],
        "load_format": load_format,
    }
    reply = lora.post("/load_lora_adapter_from_tensors", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["num_tensors"] == len(tensors)
    assert tokens_of(generate(lora, "verl_actor_lora_name")) == {108}


def test_f8_tokenizing_takes_adapter_names(lora, lora_config, tmp_path):
    load(lora, "named", say(lora_config, tmp_path / "n", 100)).raise_for_status()
    ids = lora.post("/tokenize", json={"model": "named", "prompt": "the of"}).json()["tokens"]
    assert lora.post("/detokenize", json={"model": "tiny:base:named", "tokens": ids}).json()["text"] == "the of"


def test_h1_h4_hostile_payloads_leave_everything_running(lora, lora_config, tmp_path):
    load(lora, "good", say(lora_config, tmp_path / "g", 100)).raise_for_status()
    marker = tmp_path / "owned"

    class Exploit:
        def __reduce__(self):
            return Path.write_text, (marker, "x")

    with streaming(lora, "good", tokens=400) as events:
        for payload in (
            pickle.dumps(Exploit()),
            pickle.dumps({"a": Exploit()}),
            b"\x80\x04.",
            b"cos\nsystem\n(S'x'\ntR.",
        ):
            reply = post_tensors(lora, "evil", payload, {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]})
            assert reply.status_code == 400
            assert reply.json()["error_code"] == "invalid_adapter"
        *_, last = events
    assert len(last["output_ids"]) == 400
    assert not marker.exists()
    assert [a["lora_name"] for a in listing(lora)] == ["good"]


def test_h7_ids_and_values_out_of_range_are_refused(lora, lora_config, tmp_path):
    load(lora, "ok", say(lora_config, tmp_path / "o", 100)).raise_for_status()
    for body in (
        {"input_ids": [VOCAB_SIZE]},
        {"input_ids": [-1]},
        {"input_ids": PROMPT, "sampling_params": {**SHORT, "temperature": -1}},
        {"input_ids": PROMPT, "return_logprob": True, "token_ids_logprob": [VOCAB_SIZE]},
    ):
        assert lora.post("/generate", json={"lora_path": "ok", **body}).status_code == 400
    assert tokens_of(generate(lora, "ok")) == {100}


def test_h8_every_row_of_a_full_batch_is_its_own_tenants(lora, lora_config, tmp_path):
    names = [f"t{i}" for i in range(6)]
    for i, name in enumerate(names):
        load(lora, name, say(lora_config, tmp_path / name, 140 + i)).raise_for_status()
    wanted = [names[i * 5 % 6] for i in range(36)]
    replies = generate(lora, wanted, input_ids=[PROMPT] * 36, sampling_params={**SHORT, "max_new_tokens": 12})
    for name, reply in zip(wanted, replies, strict=True):
        assert reply["meta_info"]["lora_name"] == name
        assert tokens_of(reply) == {140 + int(name[1:])}


def test_h2_adapters_need_the_admin_key(tiny_model, lora_config, tmp_path):
    path = say(lora_config, tmp_path / "a", 100)
    keys = ["--api-key", "user", "--admin-api-key", "admin"]
    with ServerProcess("--model-path", tiny_model, "--enable-lora", *keys) as server:
        calls = {
            "/load_lora_adapter": {"lora_name": "a", "lora_path": str(path)},
            "/load_lora_adapter_from_tensors": {"lora_name": "b", "config_dict": {}, "serialized_tensors": ""},
            "/unload_lora_adapter": {"lora_name": "a"},
        }
        for target, body in calls.items():
            for key, allowed in ((None, False), ("user", False), ("admin", True)):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                reply = httpx.post(server.url + target, json=body, headers=headers)
                assert (reply.status_code != 401) is allowed, (target, key)
