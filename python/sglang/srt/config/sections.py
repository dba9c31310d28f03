"""The resolved configuration: what `resolve()` makes of the launch flags, frozen, in sections by owner.

Both processes read this and nothing else; the back receives it as JSON. `server_args.ServerArgs` stays flat because
clients introspect and patch it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sglang.srt.config.model_config import ModelConfig

Device = Literal["cpu", "cuda"]


class LoadSection(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights come from.

    Fields:
        path: directory of safetensors + config.json, or a .gguf file (already resolved: exists on this machine).
        dtype: torch dtype name the model computes in: float32, bfloat16, float16.
        load_format: auto | safetensors | gguf | dummy (random weights, seeded).
        fp32_lm_head: logits are float32, whatever the model computes in.
    """

    path: str
    dtype: str
    load_format: str = "auto"
    random_seed: int = 0
    fp32_lm_head: bool = False


class TokenizerSection(msgspec.Struct, frozen=True, kw_only=True):
    """Tokenizer of the front; `path` is None with --skip-tokenizer-init, `chat_template` a file or Jinja source."""

    path: str | None
    chat_template: str | None = None


class MemorySection(msgspec.Struct, frozen=True, kw_only=True):
    """KV cache.

    Fields:
        max_total_tokens: size of the KV pool in tokens; None derives it from `mem_fraction_static` of what is free.
        kv_cache_dtype: torch dtype name.
    """

    max_total_tokens: int | None
    mem_fraction_static: float
    page_size: int
    kv_cache_dtype: str
    disable_radix_cache: bool


class ScheduleSection(msgspec.Struct, frozen=True, kw_only=True):
    """Scheduler policy.

    Fields:
        policy: fcfs | lpm (longest prefix match first).
        conservativeness: scales the estimate of tokens that running requests will still need.
        max_running_requests: sequences decoded together.
        max_queued_requests: the front answers 503 beyond this many waiting; None for no limit.
        chunked_prefill_size: prompt tokens of one chunk, or None for no chunking.
        max_prefill_tokens: prompt tokens of one step over all requests.
        mixed_chunk: decode rows ride along with prefill chunks.
        overlap: prepare step n+1 before the results of step n are read.
        stream_interval: tokens between two messages of a streaming request.
    """

    policy: Literal["fcfs", "lpm"]
    conservativeness: float
    max_running_requests: int
    max_queued_requests: int | None
    chunked_prefill_size: int | None
    max_prefill_tokens: int
    mixed_chunk: bool
    overlap: bool
    stream_interval: int
    enable_priority: bool = False


class DeviceSection(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model runs.

    Fields:
        attention_backend: triton | flashinfer | torch_native.
        cuda_graph_bs: numbers of rows that decode steps are captured for, ascending; empty for no graphs.
        threads: torch's intra-op thread count on CPU, None for torch's own choice.
    """

    device: Device
    gpu_id: int
    attention_backend: str
    cuda_graph_bs: tuple[int, ...] = ()
    threads: int | None = None


class ServerSection(msgspec.Struct, frozen=True, kw_only=True):
    """HTTP front.

    Fields:
        served_model_name: id in /v1/models and in metrics labels.
        incremental_streaming: /generate streams deltas instead of cumulative text.
        sampling_defaults: of the OpenAI endpoints: generation_config.json, or {} with --sampling-defaults openai.
        preferred_sampling_params: defaults of every endpoint, below the request's own.
        allow_auto_truncate: cut over-long prompts instead of refusing them.
    """

    host: str
    port: int
    api_key: str | None
    admin_api_key: str | None
    served_model_name: str
    log_level: str
    log_level_http: str
    log_requests: bool
    log_requests_level: int
    enable_metrics: bool
    incremental_streaming: bool
    allow_auto_truncate: bool
    skip_warmup: bool
    enable_cache_report: bool
    decode_log_interval: int
    sampling_defaults: dict[str, Any]
    preferred_sampling_params: dict[str, Any]
    weight_version: str = "default"


MAX_LORA_RANK = 256
"""The largest rank that the slots of adapters can be made for."""


class LoRASection(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters.

    Fields:
        max_loras_per_batch: adapter versions that run together; the base model needs none of these slots.
        max_loaded_loras: adapters that have a name; the least recently used one beyond it is retired. None: no limit.
        max_lora_rank: largest rank taken; slots have room for it, whatever ranks adapters have.
        target_modules: suffixes of the modules an adapter may have (q_proj, …, embed_tokens, lm_head); None for all.
        keep_last: versions kept of a family of names that differ in a trailing number; None keeps all.
        root: directory that adapter paths must lie in; None for anywhere.
        strict: a base_model_name_or_path that names another model is an error, not a warning.
        require_adapter: requests must name an adapter.
        preload: (name, path, pinned) of the adapters to load before the server is ready.
    """

    enabled: bool = False
    max_loras_per_batch: int = 8
    max_loaded_loras: int | None = None
    max_lora_rank: int = MAX_LORA_RANK
    target_modules: tuple[str, ...] | None = None
    eviction_policy: Literal["lru", "fifo"] = "lru"
    keep_last: int | None = None
    root: str | None = None
    strict: bool = False
    require_adapter: bool = False
    preload: tuple[tuple[str, str, bool], ...] = ()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the two processes know about how they were started."""

    model: ModelConfig
    load: LoadSection
    tokenizer: TokenizerSection
    memory: MemorySection
    schedule: ScheduleSection
    device: DeviceSection
    server: ServerSection
    lora: LoRASection
