"""Info routes, health, metrics and access rules over a scripted TokenizerManager."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route
from unit.stub_runtime import READY, STATS, StubRuntime, native_reply

from sglang.srt.entrypoints import health
from sglang.srt.entrypoints.access import ROUTES, Access
from sglang.srt.entrypoints.http_server import create_app
from sglang.srt.errors import ServiceUnavailableError
from sglang.srt.managers.io_struct.wire import PauseMode
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__

LOAD = {
    "dp_rank": 0,
    "num_running_reqs": 3,
    "num_waiting_reqs": 2,
    "num_used_tokens": 25,
    "num_total_tokens": 25,
    "max_total_num_tokens": 100,
    "token_usage": 0.25,
    "gen_throughput": 12.5,
    "cache_hit_rate": 0.5,
    "utilization": 0.75,
    "max_running_requests": 4,
    "num_total_reqs": 5,
}
MEMORY = {"weight_gb": 0.5, "kv_cache_gb": 0.25, "graph_gb": 0.0, "token_capacity": 100}
QUEUES = {"waiting": 1, "grammar": 0, "paused": 0, "retracted": 1}


@pytest.fixture
def runtime() -> StubRuntime:
    return StubRuntime()


async def get(runtime: StubRuntime, path: str, **kwargs):
    async with runtime.client() as client:
        return await client.get(path, **kwargs)


async def test_model_info(runtime):
    expected = {
        "model_path": "tiny",
        "tokenizer_path": "tiny",
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }
    for path in ("/model_info", "/get_model_info"):
        assert (await get(runtime, path)).json() == expected


async def test_server_info_holds_flags_scheduler_and_state():
    runtime = StubRuntime(api_key="hush")
    for path in ("/server_info", "/get_server_info"):
        info = (await get(runtime, path, headers={"Authorization": "Bearer hush"})).json()
        assert {field.name for field in dataclasses.fields(ServerArgs)} <= info.keys()
        assert (info["tp_size"], info["disaggregation_mode"], info["version"]) == (1, "null", __version__)
        assert info["max_total_num_tokens"] == READY.max_total_num_tokens
        assert info["max_req_input_len"] == READY.max_req_input_len
        assert info["status"] == "ready"
        [state] = info["internal_states"]
        assert state["last_gen_throughput"] == 12.5
        assert state["memory_usage"] == {"weight": 0.5, "kvcache": 0.25, "token_capacity": 100, "graph": 0.0}
        assert state["effective_max_running_requests_per_dp"] == 4
        assert "hush" not in json.dumps(info)


async def test_server_info_of_a_dead_back_is_503(runtime):
    runtime.manager.stats_error = ServiceUnavailableError("the back process exited with code 1")
    assert (await get(runtime, "/server_info")).status_code == 503


async def test_weight_version(runtime):
    for path in ("/weight_version", "/get_weight_version"):
        assert (await get(runtime, path)).json() == {"weight_version": "default"}


async def test_get_load(runtime):
    [load] = (await get(runtime, "/get_load")).json()
    assert load.pop("ts_tic") > 0
    assert load == {"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 25, "num_pending_tokens": 0}


@pytest.mark.parametrize(
    ("include", "sections"),
    [
        (None, {"memory": MEMORY, "queues": QUEUES}),
        ("all", {"memory": MEMORY, "queues": QUEUES}),
        ("core", {}),
        ("core,memory", {"memory": MEMORY}),
        (" queues ,lora", {"queues": QUEUES}),
    ],
)
async def test_loads(runtime, include, sections):
    reply = (await get(runtime, "/v1/loads", params={} if include is None else {"include": include})).json()
    assert reply.pop("timestamp")
    assert reply == {
        "version": __version__,
        "dp_rank_count": 1,
        "loads": [{**LOAD, **sections}],
        "aggregate": {
            "total_running_reqs": 3,
            "total_waiting_reqs": 2,
            "total_reqs": 5,
            "total_used_tokens": 25,
            "total_tokens": 25,
            "avg_token_usage": 0.25,
            "avg_throughput": 12.5,
            "avg_utilization": 0.75,
        },
    }


@pytest.mark.parametrize("query", ["include=everything", "dp_rank=1", "dp_rank=x", "format=xml"])
async def test_loads_refuses_what_it_does_not_know(runtime, query):
    response = await get(runtime, f"/v1/loads?{query}")
    assert (response.status_code, response.json()["object"]) == (400, "error")


async def test_loads_as_prometheus(runtime):
    response = await get(runtime, "/v1/loads", params={"format": "prometheus", "include": "core,memory"})
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {s.name: s.value for f in text_string_to_metric_families(response.text) for s in f.samples}
    assert samples["sglang_num_running_reqs"] == 3
    assert samples["sglang_memory_token_capacity"] == 100
    assert not any(name.startswith("sglang_queues") for name in samples)


# ---- health --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_of_a_server_that_is_up(runtime, method):
    async with runtime.client() as client:
        response = await client.request(method, "/health", content=b"{}")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("status", [ServerStatus.DRAINING, ServerStatus.DOWN])
async def test_health_is_503_when_leaving_or_down(runtime, status):
    runtime.manager.status = status
    assert (await get(runtime, "/health")).status_code == 503
    assert (await get(runtime, "/health_generate")).status_code == 503


async def test_health_is_200_while_paused(runtime):
    runtime.manager.paused = PauseMode.IN_PLACE
    runtime.manager.stats_error = ServiceUnavailableError("not asked")
    assert (await get(runtime, "/health")).status_code == 200
    assert (await get(runtime, "/health_generate")).status_code == 200
    assert runtime.manager.requests == []


async def test_health_is_503_when_the_scheduler_does_not_answer(runtime):
    runtime.manager.stats_error = ServiceUnavailableError("gone")
    assert (await get(runtime, "/health")).status_code == 503

    async def never():
        await asyncio.Event().wait()

    runtime.manager.scheduler_stats = never
    assert await health.is_alive(runtime, timeout=0.01) is False


async def test_health_generate_runs_one_token(runtime):
    runtime.manager.replies = [native_reply()]
    assert (await get(runtime, "/health_generate")).status_code == 200
    [probe] = runtime.manager.requests
    assert probe.sampling_params == {"max_new_tokens": 1, "temperature": 0.0}
    assert not probe.log_metrics


async def test_health_generate_behind_a_full_queue_asks_for_progress(runtime):
    runtime.manager.error = ServiceUnavailableError("The request queue is full.")
    assert await health.can_generate(runtime, timeout=0.05) is False  # no step was made meanwhile
    steps = iter(range(100, 200))

    async def advancing():
        runtime.manager.stats = type(STATS)(steps_total=next(steps))
        return runtime.manager.stats

    runtime.manager.scheduler_stats = advancing
    assert await health.can_generate(runtime, timeout=0.05) is True


# ---- metrics -------------------------------------------------------------------------------------------------------


async def test_metrics_exist_before_the_first_request():
    runtime = StubRuntime(enable_metrics=True)
    response = await get(runtime, "/metrics")
    assert response.status_code == 200
    assert response.history == []
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    for name, value in {
        "num_running_reqs": 3,
        "num_queue_reqs": 2,
        "token_usage": 0.25,
        "num_used_tokens": 25,
        "gen_throughput": 12.5,
        "cache_hit_rate": 0.5,
        "num_paused_reqs": 0,
        "num_retracted_reqs": 1,
        "lora_pool_slots_used": 0,
        "lora_pool_slots_total": 0,
        "lora_pool_utilization": 0,
    }.items():
        [sample] = families[f"sglang:{name}"].samples
        assert sample.value == value
        assert sample.labels == {"model_name": "tiny", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}
    for name in ("prompt_tokens", "generation_tokens", "num_requests", "num_aborted_requests", "cached_tokens"):
        assert f"sglang:{name}_total" in {s.name for s in families[f"sglang:{name}"].samples}
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds"):
        assert f"sglang:{name}_count" in {s.name for s in families[f"sglang:{name}"].samples}


async def test_no_metrics_route_without_the_flag(runtime):
    assert (await get(runtime, "/metrics")).status_code == 404


# ---- access --------------------------------------------------------------------------------------------------------


def test_every_route_is_in_the_access_table():
    app = create_app(StubRuntime(enable_metrics=True))
    paths = {route.path for route in walk(app.routes)}
    assert paths == set(ROUTES)


def walk(routes):
    for route in routes:
        if isinstance(route, Route):
            yield route
        else:
            yield from walk(getattr(route, "routes", None) or route.original_router.routes)


def probe_path(path: str) -> str:
    return path.replace("{model:path}", "a/b")


async def statuses(runtime: StubRuntime, token: str | None) -> dict[str, int]:
    """Status of every route, asked with a method it does not have: past the gate that is a 405 (or 404)."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with runtime.client(**headers) as client:
        return {path: (await client.patch(probe_path(path))).status_code for path in ROUTES}


async def test_without_keys_everything_is_open(runtime):
    for token in (None, "None", "anything"):
        assert 401 not in (await statuses(runtime, token)).values()


@pytest.mark.parametrize(
    ("keys", "key_token", "admin_token"),
    [
        ({"api_key": "k"}, "k", "k"),
        ({"admin_api_key": "a"}, None, "a"),
        ({"api_key": "k", "admin_api_key": "a"}, "k", "a"),
    ],
)
async def test_each_route_asks_for_its_key(keys, key_token, admin_token):
    runtime = StubRuntime(enable_metrics=True, **keys)
    for token in (None, "k", "a", "wrong"):
        for path, status in (await statuses(runtime, token)).items():
            wanted = {Access.OPEN: None, Access.KEY: key_token, Access.ADMIN: admin_token}[ROUTES[path].access]
            allowed = wanted is None or token == wanted
            assert (status != 401) == allowed, (path, token)


async def test_the_401_body_and_odd_headers():
    runtime = StubRuntime(api_key="k")
    for value in ("k", "Basic k", "Bearer", "Bearer k2", "Bearer kk", ""):
        response = await get(runtime, "/v1/models", headers={"Authorization": value})
        assert (response.status_code, response.json()) == (401, {"error": "Unauthorized"})
    assert (await get(runtime, "/v1/models", headers={"Authorization": "bearer k"})).status_code == 200
    assert (await get(runtime, "/unknown")).status_code == 401
    assert (await get(runtime, "/health")).status_code == 200
