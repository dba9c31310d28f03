"""Adapters through a real server: every endpoint that takes or names one, upstream's reply shapes, errors with codes.

Adapters say a token of their own (`adapters.telling_adapter`), so every reply proves who made it. Tests are named by
the rows of the failure list they hold against.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from typing import Any

import adapters
import httpx
import openai
import pytest
from compat.lora_client import ENDLESS, PROMPT, SHORT, generate, listing, load, say, tokens_of, value_of
from compat.waiting import until
from safetensors.numpy import save

pytestmark = pytest.mark.slow


def test_load_generate_unload(lora, lora_config, tmp_path):
    base = generate(lora)
    reply = load(lora, "a", say(lora_config, tmp_path / "a", 100))
    assert reply.status_code == 200
    body = reply.json()
    assert {name: body[name] for name in ("rid", "http_worker_ipc", "success", "error_message")} == {
        "rid": None, "http_worker_ipc": None, "success": True, "error_message": "",
    }  # fmt: skip
    assert body["loaded_adapters"] == {"a": str(tmp_path / "a")}
    made = generate(lora, "a")
    assert tokens_of(made) == {100}
    assert made["meta_info"]["lora_name"] == "a"
    assert made["meta_info"]["lora_version"] == body["lora_version"]
    again = generate(lora)
    assert again["output_ids"] == base["output_ids"]
    assert "lora_name" not in again["meta_info"]
    reply = lora.post("/unload_lora_adapter", json={"lora_name": "a"})
    assert reply.status_code == 200
    assert reply.json()["success"] is True
    assert reply.json()["loaded_adapters"] == {}
    assert listing(lora) == []


def test_b14_the_directory_is_never_read_again(lora, lora_config, tmp_path):
    load(lora, "gone", say(lora_config, tmp_path / "x", 100)).raise_for_status()
    shutil.rmtree(tmp_path / "x")
    load(lora, "other", say(lora_config, tmp_path / "x", 200)).raise_for_status()
    say(lora_config, tmp_path / "x", 300)
    assert tokens_of(generate(lora, "gone")) == {100}
    assert tokens_of(generate(lora, "other")) == {200}


def test_a_batch_mixes_adapters_and_base(lora, lora_config, tmp_path):
    base = generate(lora)["output_ids"]
    for i in range(3):
        load(lora, f"m{i}", say(lora_config, tmp_path / f"m{i}", 100 + i)).raise_for_status()
    replies = generate(lora, ["m0", None, "m2", "m1"], input_ids=[PROMPT] * 4)
    assert [tokens_of(r) for r in replies] == [{100}, set(base), {102}, {101}]
    assert replies[1]["output_ids"] == base
    samples = generate(lora, "m1", sampling_params={**SHORT, "n": 3})
    assert [tokens_of(r) for r in samples] == [{101}] * 3


def test_c1_an_unknown_adapter_is_an_error(lora, lora_config, tmp_path):
    load(lora, "known", say(lora_config, tmp_path / "k", 100)).raise_for_status()
    for body in ({"lora_path": "nobody"}, {"lora_path": ["known", "nobody"], "input_ids": [PROMPT] * 2}):
        reply = lora.post("/generate", json={"input_ids": PROMPT, "sampling_params": SHORT, **body})
        assert reply.status_code == 400
        assert "nobody" in reply.json()["error"]["message"]
        assert "known" in reply.json()["error"]["message"]
        assert reply.json()["error"]["code"] == "adapter_not_found"
    for model in ("tiny:base:nobody", "nobody"):
        reply = lora.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})
        assert reply.status_code == 400
        assert reply.json()["type"] == "adapter_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["tiny:base:told", "told", "default:told"])
def test_e19_every_openai_route_applies_the_adapter(lora_server, lora, lora_config, tmp_path, model, stream):
    version = load(lora, "told", say(lora_config, tmp_path / "t", 104)).json()["lora_version"]
    with openai.OpenAI(base_url=f"{lora_server.url}/v1", api_key="None", max_retries=0) as api:
        want = api.completions.create(model="tiny:base", prompt="x", max_tokens=3, extra_body={"lora_path": "told"})
        text = want.choices[0].text
        assert want.to_dict()["metadata"]["lora_version"] == str(version)
        plain = api.completions.create(model=model, prompt="x", max_tokens=3, temperature=0, stream=stream)
        chat = api.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=3, temperature=0, stream=stream
        )
        if stream:
            chunks = [list(plain), list(chat)]
            assert "".join(c.choices[0].text for c in chunks[0]) == text
            assert "".join(c.choices[0].delta.content or "" for c in chunks[1]) == text
            metadata = [items[-1].to_dict()["metadata"] for items in chunks]
        else:
            assert plain.choices[0].text == text
            assert chat.choices[0].message.content == text
            metadata = [plain.to_dict()["metadata"], chat.to_dict()["metadata"]]
        assert [m["lora_name"] for m in metadata] == ["told", "told"]
        assert [m["lora_version"] for m in metadata] == [str(version)] * 2


def test_e19_the_native_stream_applies_the_adapter(lora, lora_config, tmp_path):
    load(lora, "told", say(lora_config, tmp_path / "t", 104)).raise_for_status()
    body = {"input_ids": PROMPT, "sampling_params": SHORT, "lora_path": "told", "stream": True}
    with lora.stream("POST", "/generate", json=body) as reply:
        events = [json.loads(line[5:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert tokens_of(events[-1]) == {104}
    assert events[-1]["meta_info"]["lora_name"] == "told"


def test_f1_names_with_a_colon(lora, lora_config, tmp_path):
    load(lora, "base", say(lora_config, tmp_path / "b", 105)).raise_for_status()
    for model, adapter in (("tiny:base", None), ("tiny:base:base", "base"), ("base", "base")):
        reply = lora.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2}).json()
        assert reply["metadata"].get("lora_name") == adapter, model


def test_f2_adapters_are_listed(lora, lora_config, tmp_path):
    version = load(lora, "listed", say(lora_config, tmp_path / "l", 100), pinned=True).json()
    (entry,) = listing(lora)
    assert entry["lora_name"] == "listed"
    assert entry["state"] == "serving"
    assert entry["pinned"] is True
    assert (entry["num_leases"], entry["num_holders"]) == (0, 0)
    assert {name: entry[name] for name in ("lora_version", "digest", "nbytes", "rank", "num_tensors")} == {
        name: version[name] for name in ("lora_version", "digest", "nbytes", "rank", "num_tensors")
    }
    models = lora.get("/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["tiny:base", "listed"]
    assert models[1]["parent"] == "tiny:base"
    assert models[1]["root"] == str(tmp_path / "l")
    assert models[1]["max_model_len"] is None
    assert lora.get("/v1/models/listed").json()["id"] == "listed"
    assert lora.get("/v1/models/nobody").status_code == 404


def test_f3_load_errors_have_codes(lora, lora_config, tmp_path):
    def code(reply: httpx.Response) -> tuple[int, str]:
        assert reply.json()["success"] is False
        assert reply.json()["error_message"]
        return reply.status_code, reply.json()["error_code"]

    assert code(load(lora, "a", tmp_path / "nowhere")) == (400, "adapter_not_found")
    good = say(lora_config, tmp_path / "good", 100)
    load(lora, "good", good).raise_for_status()
    assert code(load(lora, "good", good)) == (400, "already_loaded")
    assert "already loaded" in load(lora, "good", good).json()["error_message"]
    (good / "adapter_model.safetensors").write_bytes(b"no")
    status, found = code(load(lora, "broken", good))
    assert (status, found) in {(400, "invalid_adapter"), (409, "path_unreadable")}
    assert code(load(lora, "bad name!", good)) == (400, "invalid_adapter")
    assert code(lora.post("/unload_lora_adapter", json={"lora_name": "nobody"})) == (400, "adapter_not_found")
    for i in range(2):
        pinned = say(lora_config, tmp_path / f"p{i}", 100)
        reply = load(lora, f"p{i}", pinned, pinned=True)
        assert reply.status_code == 200, reply.text
    assert code(load(lora, "p2", say(lora_config, tmp_path / "p2", 100), pinned=True)) == (400, "capacity")
    assert listing(lora)[0]["lora_name"] == "good"


def test_c4_a_rank_above_the_limit_is_refused(lora, lora_config, tmp_path):
    path = adapters.write_adapter(tmp_path / "r", adapters.random_adapter(lora_config, 16, 0))
    reply = load(lora, "r", path)
    assert reply.status_code == 400
    assert "--max-lora-rank" in reply.json()["error_message"]
    assert "incompatible" in reply.json()["error_message"]
    generate(lora)


def test_c3_an_adapter_of_another_base_is_refused(lora, lora_config, tmp_path):
    other = {**lora_config, "hidden_size": 96}
    reply = load(lora, "o", adapters.write_adapter(tmp_path / "o", adapters.random_adapter(other, 4, 0)))
    assert reply.status_code == 400
    assert "q_proj" in reply.json()["error_message"]


def test_f11_the_exact_path_names_the_adapter(lora, lora_config, tmp_path):
    path = say(lora_config, tmp_path / "by-path", 106)
    load(lora, "named", path).raise_for_status()
    assert tokens_of(generate(lora, str(path))) == {106}


@pytest.mark.parametrize("field", ["serialized_tensors", "serialized_named_tensors"])
def test_f6_both_names_of_the_tensor_field(lora, lora_config, field):
    tensors = adapters.telling_adapter(lora_config, 107)
    payload: Any = base64.b64encode(save(tensors)).decode()
    body = {"lora_name": "wire", "config_dict": adapters.adapter_config(tensors)}
    reply = lora.post(
        "/load_lora_adapter_from_tensors",
        json={**body, field: [payload] if field == "serialized_named_tensors" else payload},
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["num_tensors"] == len(tensors)
    assert tokens_of(generate(lora, "wire")) == {107}


def test_d5_an_adapter_from_the_wire_outlives_its_slot(lora, lora_config):
    """Three slots, five adapters: whoever lost a slot gets it back from the host's copy."""
    for i in range(5):
        tensors = adapters.telling_adapter(lora_config, 110 + i)
        payload = base64.b64encode(save(tensors)).decode()
        body = {"lora_name": f"w{i}", "config_dict": adapters.adapter_config(tensors), "serialized_tensors": payload}
        lora.post("/load_lora_adapter_from_tensors", json=body).raise_for_status()
    for _ in range(2):
        assert [tokens_of(generate(lora, f"w{i}")) for i in range(5)] == [{110 + i} for i in range(5)]


def test_e1_upsert_never_reads_the_old_prefix(lora, lora_config, tmp_path):
    prompt = list(range(64, 200))
    first = load(lora, "p", say(lora_config, tmp_path / "p", 120)).json()["lora_version"]
    assert tokens_of(generate(lora, "p", input_ids=prompt)) == {120}
    assert generate(lora, "p", input_ids=prompt)["meta_info"]["cached_tokens"] > 0
    second = load(lora, "p", say(lora_config, tmp_path / "p", 121), upsert=True).json()["lora_version"]
    assert second > first
    made = generate(lora, "p", input_ids=prompt)
    assert tokens_of(made) == {121}
    assert made["meta_info"]["cached_tokens"] == 0
    assert made["meta_info"]["lora_version"] == second
    assert [a["lora_version"] for a in listing(lora)] == [second]


@pytest.mark.parametrize("mode", ["finish_old", "switch"])
def test_b13_upsert_under_a_running_stream(lora, lora_config, tmp_path, mode):
    first = load(lora, "s", say(lora_config, tmp_path / "s", 130)).json()["lora_version"]
    body = {
        "input_ids": PROMPT,
        "sampling_params": {**ENDLESS, "max_new_tokens": 400},
        "lora_path": "s",
        "stream": True,
    }
    with lora.stream("POST", "/generate", json=body) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
        next(lines)
        second = load(lora, "s", say(lora_config, tmp_path / "s", 131), upsert=True, mode=mode).json()["lora_version"]
        *_, last = lines
    final = json.loads(last[5:])
    meta, ids = final["meta_info"], final["output_ids"]
    assert len(ids) == 400
    if mode == "finish_old":
        assert set(ids) == {130}
        assert meta["lora_version"] == first
        assert "lora_version_spans" not in meta
    else:
        (zero, old), (start, new) = meta["lora_version_spans"]
        assert (zero, old, new) == (0, first, second)
        assert meta["lora_version"] == second
        assert set(ids[:start]) == {130}
        assert set(ids[start:]) == {131}
    until(lambda: [a["lora_version"] for a in listing(lora)] == [second])


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_b6_a_paused_server_unloads_and_loads(lora, lora_config, tmp_path, mode):
    load(lora, "s", say(lora_config, tmp_path / "s", 140)).raise_for_status()
    body = {"input_ids": PROMPT, "sampling_params": {**ENDLESS, "max_new_tokens": 60}, "lora_path": "s", "stream": True}
    with lora.stream("POST", "/generate", json=body) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
        next(lines)
        lora.post("/pause_generation", json={"mode": mode}).raise_for_status()
        assert lora.get("/health").status_code == 200
        lora.post("/unload_lora_adapter", json={"lora_name": "s"}, timeout=5).raise_for_status()
        load(lora, "s", say(lora_config, tmp_path / "s", 141)).raise_for_status()
        lora.post("/continue_generation", json={}).raise_for_status()
        *_, last = lines
    final = json.loads(last[5:])
    assert tokens_of(final) == {140}
    assert final["meta_info"]["finish_reason"]["type"] == ("abort" if mode == "abort" else "length")
    assert tokens_of(generate(lora, "s")) == {141}


def test_unload_says_who_holds_on(lora, lora_config, tmp_path):
    load(lora, "held", say(lora_config, tmp_path / "h", 150)).raise_for_status()
    body = {"input_ids": PROMPT, "sampling_params": ENDLESS, "lora_path": "held", "stream": True}
    with lora.stream("POST", "/generate", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        refused = lora.post("/unload_lora_adapter", json={"lora_name": "held", "timeout": 0.1})
        assert refused.status_code == 409
        assert refused.json()["error_code"] == "busy"
        assert "1 running" in refused.json()["error_message"]
        assert lora.post("/generate", json={"input_ids": PROMPT, "lora_path": "held"}).status_code == 400
        load(lora, "next", say(lora_config, tmp_path / "n", 151)).raise_for_status()
        done = lora.post("/unload_lora_adapter", json={"lora_name": "held", "abort": True}, timeout=5)
        assert done.status_code == 200, done.text
        assert [*(line for line in lines if line)][-2].count('"type":"abort"') == 1


def test_abort_and_pause_of_one_adapter(lora, lora_config, tmp_path):
    for i in range(2):
        load(lora, f"s{i}", say(lora_config, tmp_path / f"s{i}", 160 + i)).raise_for_status()
    body = {"input_ids": PROMPT, "sampling_params": ENDLESS, "stream": True}
    with (
        lora.stream("POST", "/generate", json={**body, "lora_path": "s0"}) as first,
        lora.stream("POST", "/generate", json={**body, "lora_path": "s1"}) as second,
    ):
        aborted, lines = first.iter_lines(), second.iter_lines()
        next(aborted)
        next(lines)
        lora.post("/pause_generation", json={"lora_name": "s0"}).raise_for_status()
        assert [a["num_holders"] for a in listing(lora)] == [0, 1]
        with pytest.raises(httpx.ReadTimeout):
            lora.post("/generate", json={"input_ids": PROMPT, "sampling_params": SHORT, "lora_path": "s0"}, timeout=0.5)
        next(lines)
        lora.post("/continue_generation", json={"lora_name": "s0"}).raise_for_status()
        assert tokens_of(generate(lora, "s0")) == {160}
        lora.post("/abort_request", json={"lora_name": "s1"}).raise_for_status()
        until(lambda: [a["num_holders"] for a in listing(lora)] == [0, 0])


def test_b12_a_pause_ends_by_itself(lora):
    lora.post("/pause_generation", json={"timeout": 0.3, "owner": "trainer"}).raise_for_status()
    refused = lora.post("/continue_generation", json={"owner": "somebody"})
    assert refused.status_code == 409
    assert "trainer" in refused.json()["error"]["message"]
    assert generate(lora)["meta_info"]["completion_tokens"] == 4


def test_metrics_count_versions_and_publishes(lora, lora_config, tmp_path):
    before = value_of(lora.get("/metrics").text, "lora_publish_seconds_count")
    load(lora, "m", say(lora_config, tmp_path / "m", 100)).raise_for_status()
    generate(lora, "m")
    until(lambda: 1 <= value_of(lora.get("/metrics").text, "lora_pool_slots_used") <= 3)
    metrics = lora.get("/metrics").text
    assert value_of(metrics, "lora_publish_seconds_count") == before + 1
    assert value_of(metrics, "lora_pool_slots_total") == 3
    assert value_of(metrics, "lora_host_bytes") > 0
    assert re.search(r'^sglang:lora_versions{[^}]*state="serving"[^}]*} 1.0$', metrics, re.MULTILINE)
    load_section = lora.get("/v1/loads?include=lora").json()["loads"][0]["lora"]
    assert load_section["slots_total"] == 3
