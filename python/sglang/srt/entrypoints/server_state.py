"""What a server says about itself: model, launch flags, scheduler state, load. Plain dicts; no HTTP.

Used by the info routes and by `Engine.get_server_info`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import msgspec

from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct.wire import Ready, SchedulerStats
from sglang.version import __version__

SECRET_FIELDS = ("api_key", "admin_api_key")
LOAD_SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
"""What `/v1/loads?include=` may name; spec and disagg are stock's and always empty here."""

_METRICS: dict[str, tuple[str, dict[str, str]]] = {
    "": (
        "sglang",
        {
            "num_running_reqs": "Number of running requests",
            "num_waiting_reqs": "Number of waiting requests",
            "num_used_tokens": "KV tokens owned by live requests",
            "num_total_tokens": "KV tokens in use plus prompt tokens still waiting",
            "max_total_num_tokens": "KV token capacity",
            "token_usage": "Share of the KV capacity in use",
            "gen_throughput": "Output tokens per second",
            "cache_hit_rate": "Share of prompt tokens found in the prefix cache",
            "utilization": "Share of the request slots in use",
            "max_running_requests": "Most requests that run together",
        },
    ),
    "memory": (
        "sglang_memory",
        {
            "weight_gb": "Weights, GB",
            "kv_cache_gb": "KV cache, GB",
            "graph_gb": "CUDA graphs, GB",
            "token_capacity": "Tokens the KV cache holds",
        },
    ),
    "queues": (
        "sglang_queues",
        {
            "waiting": "Requests in the waiting queue",
            "grammar": "Requests waiting for their grammar",
            "paused": "Requests held back by a pause",
            "retracted": "Requests sent back to the queue",
        },
    ),
}
"""Section of a load -> (metric prefix, field -> description); "" is the load itself."""


def model_info(runtime: Runtime) -> dict[str, Any]:
    """Reply of `/model_info`."""
    args, model = runtime.server_args, runtime.config.model
    return {
        "model_path": args.model_path,
        "tokenizer_path": args.tokenizer_path or args.model_path,
        "is_generation": True,
        "preferred_sampling_params": args.preferred_sampling_params,
        "weight_version": runtime.manager.weight_version,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": model.model_type,
        "architectures": [model.architecture],
    }


async def server_info(runtime: Runtime) -> dict[str, Any]:
    """Reply of `/server_info`: launch flags (keys masked), what the back reported, live state, version.

    Raises:
        ServiceUnavailableError: the back does not answer.
    """
    ready = _ready(runtime)
    stats = await runtime.manager.scheduler_stats()
    flags = _launch_flags(runtime)
    state = {
        **flags,
        "last_gen_throughput": stats.gen_throughput,
        "memory_usage": {
            "weight": ready.memory_usage.get("weight", 0.0),
            "kvcache": ready.memory_usage.get("kvcache", 0.0),
            "token_capacity": ready.max_total_num_tokens,
            "graph": ready.memory_usage.get("graph", 0.0),
        },
        "effective_max_running_requests_per_dp": ready.max_running_requests,
        "paused": runtime.manager.paused,
        "num_live_requests": len(runtime.manager.records),
        "scheduler": msgspec.structs.asdict(stats),
    }
    scheduler = {"status": "ready", **msgspec.structs.asdict(ready), "max_req_len": ready.context_length}
    known = {name: value for name, value in flags.items() if value is not None}
    return {**flags, **scheduler, **known, "internal_states": [state], "version": __version__}


def _launch_flags(runtime: Runtime) -> dict[str, Any]:
    flags = dataclasses.asdict(runtime.server_args)
    for name in SECRET_FIELDS:
        if flags.get(name) is not None:
            flags[name] = "***"
    return flags


def _ready(runtime: Runtime) -> Ready:
    ready = runtime.manager.ready
    if ready is None:
        raise ServiceUnavailableError("The server is starting: the model is still being loaded. Try again soon.")
    return ready


async def get_loads(runtime: Runtime, include: Iterable[str] = ("all",), dp_rank: int | None = None) -> dict[str, Any]:
    """Reply of `/v1/loads`.

    Args:
        include: sections of `LOAD_SECTIONS`; the core fields always come.
        dp_rank: 0 or None, the only rank there is.

    Raises:
        RequestError: unknown section or rank.
        ServiceUnavailableError: the back does not answer.
    """
    sections = set(include)
    unknown = sections - set(LOAD_SECTIONS)
    if unknown:
        raise RequestError(f"include has unknown sections {sorted(unknown)}; known are {', '.join(LOAD_SECTIONS)}.")
    if dp_rank not in (None, 0):
        raise RequestError(f"dp_rank {dp_rank} does not exist; this server has rank 0 only.")
    stats = await runtime.manager.scheduler_stats()
    load = _load(stats, _ready(runtime), sections, num_held=runtime.manager.num_held)
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(),
        "version": __version__,
        "dp_rank_count": 1,
        "loads": [load],
        "aggregate": _aggregate([load]),
    }


def _load(stats: SchedulerStats, ready: Ready, sections: set[str], *, num_held: int) -> dict[str, Any]:
    """One rank's load; `num_held` requests wait in the front and count as waiting."""
    num_waiting = stats.num_waiting_reqs + num_held
    capacity = stats.max_total_num_tokens or ready.max_total_num_tokens
    slots = stats.max_running_requests or ready.max_running_requests
    load: dict[str, Any] = {
        "dp_rank": 0,
        "num_running_reqs": stats.num_running_reqs,
        "num_waiting_reqs": num_waiting,
        "num_used_tokens": stats.num_used_tokens,
        "num_total_tokens": stats.num_used_tokens + stats.num_waiting_tokens,
        "max_total_num_tokens": capacity,
        "token_usage": round(stats.num_used_tokens / max(capacity, 1), 4),
        "gen_throughput": round(stats.gen_throughput, 2),
        "cache_hit_rate": round(stats.cache_hit_rate, 4),
        "utilization": round(stats.num_running_reqs / max(slots, 1), 4),
        "max_running_requests": slots,
        "num_total_reqs": stats.num_running_reqs + num_waiting,
    }
    if sections & {"memory", "all"}:
        load["memory"] = {
            "weight_gb": ready.memory_usage.get("weight", 0.0),
            "kv_cache_gb": ready.memory_usage.get("kvcache", 0.0),
            "graph_gb": ready.memory_usage.get("graph", 0.0),
            "token_capacity": capacity,
        }
    if stats.lora_slots and sections & {"lora", "all"}:
        used, total = sum(map(bool, stats.lora_slots)), len(stats.lora_slots)
        load["lora"] = {"slots_used": used, "slots_total": total, "utilization": round(used / total, 4)}
    if sections & {"queues", "all"}:
        paused = stats.num_running_reqs if stats.paused else 0
        queued = num_waiting - stats.num_retracted_reqs
        load["queues"] = {"waiting": queued, "grammar": 0, "paused": paused, "retracted": stats.num_retracted_reqs}
    return load


def _aggregate(loads: list[dict[str, Any]]) -> dict[str, Any]:
    def total(field: str) -> Any:
        return sum(load[field] for load in loads)

    return {
        "total_running_reqs": total("num_running_reqs"),
        "total_waiting_reqs": total("num_waiting_reqs"),
        "total_reqs": total("num_total_reqs"),
        "total_used_tokens": total("num_used_tokens"),
        "total_tokens": total("num_total_tokens"),
        "avg_token_usage": round(total("token_usage") / len(loads), 4),
        "avg_throughput": round(total("gen_throughput") / len(loads), 2),
        "avg_utilization": round(total("utilization") / len(loads), 4),
    }


def loads_as_prometheus(loads: list[dict[str, Any]]) -> str:
    """`/v1/loads?format=prometheus`: the same numbers in the text exposition format."""
    lines = []
    for section, (prefix, fields) in _METRICS.items():
        sources = [(load["dp_rank"], load.get(section) if section else load) for load in loads]
        for field, description in fields.items():
            samples = [f'{prefix}_{field}{{dp_rank="{rank}"}} {source[field]}' for rank, source in sources if source]
            if samples:
                lines += [f"# HELP {prefix}_{field} {description}", f"# TYPE {prefix}_{field} gauge", *samples]
    return "\n".join(lines) + "\n"


def legacy_loads(loads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reply of `/get_load`, which older routers read."""
    now = time.perf_counter()
    return [
        {
            "dp_rank": load["dp_rank"],
            "num_reqs": load["num_total_reqs"],
            "num_waiting_reqs": load["num_waiting_reqs"],
            "num_tokens": load["num_total_tokens"],
            "num_pending_tokens": load["num_total_tokens"] - load["num_used_tokens"],
            "ts_tic": now,
        }
        for load in loads
    ]
