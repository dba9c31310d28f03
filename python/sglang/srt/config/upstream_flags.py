"""What becomes of each launch flag: the one list, a row per field of `ServerArgs`.

- `Implemented`: the value reaches the server, in the named field of `Config`.
- `Ignored`: it could only have changed speed, memory or logs; the server says so in one line and goes on.
- `Refused`: the user relies on something this server cannot do; it does not start.

Called by `config.resolve`, and by `server_args` for help texts. To serve a flag, change its row and read it in
`resolve`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sglang.srt.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


@dataclasses.dataclass(frozen=True)
class Implemented:
    """Served.

    Attributes:
        owner: the dotted field of `Config` that carries it.
        values: the served values, when not every value of the type is.
    """

    owner: str
    values: tuple[Any, ...] = ()

    @property
    def help(self) -> str:
        """Text for --help, for fields that bring none of their own."""
        return f"one of {', '.join(map(str, self.values))}" if self.values else ""


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Accepted and not used; `quiet` values ask for what the server does anyway and are not worth a line."""

    reason: str
    quiet: tuple[Any, ...] = ()

    @property
    def help(self) -> str:
        """Text for --help."""
        return f"ignored: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Refused:
    """Not served; `allowed` values ask for what the server does anyway."""

    reason: str
    allowed: tuple[Any, ...] = ()

    @property
    def help(self) -> str:
        """Text for --help."""
        return f"refused: {self.reason}"


Status = Implemented | Ignored | Refused

_SEVERAL = "several GPUs or hosts are not supported yet; start one server per GPU"
_ONE_GPU = "the server runs on one device, nothing is sent between devices"
_ONE_ATTENTION = "prefill and decode have the same back end, --attention-backend"
_DECODE_GRAPHS = "steps of decoding run as CUDA graphs, prompts do not"
_NO_COMPILE = "the server does not use torch.compile"
_DENSE = "the supported models have no experts"
_TEXT_ONLY = "only text models are supported"
_SPECULATIVE = "speculative decoding is not supported"
_SPLIT = "one server does prefill and decode; disaggregation is not supported"
_TLS = "the server speaks plain HTTP/1.1; put a proxy in front of it"
_LOCAL = "models are read from local paths, nothing is downloaded"
_FIXED_METRICS = "metrics have fixed labels and buckets"
_NO_OFFLOAD = "weights and KV cache stay on the device"
_WATCHED = "the front watches the scheduler process, no timer is needed"

FLAGS: dict[str, Status] = {
    # Model and tokenizer
    "model_path": Implemented("load.path"),
    "tokenizer_path": Implemented("tokenizer.path"),
    "tokenizer_mode": Ignored("there is one tokenizer, the fast one"),
    "tokenizer_backend": Ignored("there is one tokenizer, the fast one"),
    "tokenizer_worker_num": Ignored("the front process tokenizes"),
    "skip_tokenizer_init": Implemented("tokenizer.path"),
    "load_format": Implemented("load.load_format", values=("auto", "safetensors", "gguf", "dummy")),
    "model_loader_extra_config": Ignored("the loader has no options"),
    "trust_remote_code": Ignored("code that comes with a model is never run"),
    "context_length": Implemented("model.context_length"),
    "is_embedding": Refused("embedding models are not supported"),
    "enable_multimodal": Refused(_TEXT_ONLY),
    "revision": Ignored(_LOCAL),
    "model_impl": Ignored("models have one implementation, this server's", quiet=("sglang",)),
    # HTTP server
    "host": Implemented("server.host"),
    "port": Implemented("server.port"),
    "fastapi_root_path": Refused("routes are served at the root; let the proxy strip its prefix"),
    "grpc_mode": Refused("only HTTP is served"),
    "skip_server_warmup": Implemented("server.skip_warmup"),
    "warmups": Ignored("there are no named warm-ups"),
    "nccl_port": Ignored(_ONE_GPU),
    "ssl_keyfile": Refused(_TLS),
    "ssl_certfile": Refused(_TLS),
    "enable_http2": Refused(_TLS),
    # Data types
    "dtype": Implemented("load.dtype", values=("auto", "float32", "float", "bfloat16", "float16", "half")),
    "quantization": Refused(
        "weights are computed unquantized (GGUF files are dequantized)", allowed=("unquant", "gguf")
    ),
    "kv_cache_dtype": Implemented("memory.kv_cache_dtype", values=("auto", "bfloat16", "bf16")),
    "enable_fp32_lm_head": Implemented("load.fp32_lm_head"),
    # Memory and scheduling
    "mem_fraction_static": Implemented("memory.mem_fraction_static"),
    "max_running_requests": Implemented("schedule.max_running_requests"),
    "max_queued_requests": Implemented("schedule.max_queued_requests"),
    "max_total_tokens": Implemented("memory.max_total_tokens"),
    "chunked_prefill_size": Implemented("schedule.chunked_prefill_size"),
    "max_prefill_tokens": Implemented("schedule.max_prefill_tokens"),
    "prefill_max_requests": Ignored("max-prefill-tokens bounds a step"),
    "schedule_policy": Implemented("schedule.policy", values=("fcfs", "lpm")),
    "enable_priority_scheduling": Implemented("schedule.enable_priority"),
    "schedule_low_priority_values_first": Refused("higher values are served first; negate them"),
    "schedule_conservativeness": Implemented("schedule.conservativeness"),
    "page_size": Implemented("memory.page_size"),
    "radix_eviction_policy": Ignored("the least recently used prefix goes first"),
    # Runtime
    "device": Implemented("device.device", values=("auto", "cpu", "cuda")),
    "tp_size": Refused(_SEVERAL),
    "pp_size": Refused(_SEVERAL),
    "stream_interval": Implemented("schedule.stream_interval"),
    "batch_notify_size": Ignored("every request is told of its tokens at once"),
    "incremental_streaming_output": Implemented("server.incremental_streaming"),
    "random_seed": Implemented("load.random_seed"),
    "watchdog_timeout": Ignored(_WATCHED),
    "soft_watchdog_timeout": Ignored(_WATCHED),
    "dist_timeout": Ignored(_ONE_GPU),
    "download_dir": Ignored(_LOCAL),
    "base_gpu_id": Implemented("device.gpu_id"),
    "gpu_id_step": Ignored(_ONE_GPU),
    "sleep_on_idle": Ignored("an idle scheduler always sleeps"),
    "use_ray": Refused(_SEVERAL),
    # Logging and metrics
    "log_level": Implemented("server.log_level", values=("debug", "info", "warning", "error", "critical")),
    "log_level_http": Implemented("server.log_level_http", values=("debug", "info", "warning", "error", "critical")),
    "log_requests": Implemented("server.log_requests"),
    "log_requests_level": Implemented("server.log_requests_level", values=(0, 1, 2, 3)),
    "log_requests_format": Ignored("requests are logged as text"),
    "log_requests_target": Ignored("requests are logged to standard error", quiet=(["stdout"],)),
    "uvicorn_access_log_exclude_prefixes": Ignored("--log-level-http sets what is logged"),
    "crash_dump_folder": Ignored("a crash is logged, not dumped"),
    "show_time_cost": Ignored("--enable-metrics shows latencies"),
    "enable_metrics": Implemented("server.enable_metrics"),
    "enable_metrics_for_all_schedulers": Ignored("there is one scheduler"),
    "extra_metric_labels": Ignored(_FIXED_METRICS),
    "bucket_time_to_first_token": Ignored(_FIXED_METRICS),
    "bucket_inter_token_latency": Ignored(_FIXED_METRICS),
    "bucket_e2e_request_latency": Ignored(_FIXED_METRICS),
    "decode_log_interval": Implemented("server.decode_log_interval"),
    "enable_request_time_stats_logging": Ignored("--enable-metrics shows latencies"),
    "enable_trace": Ignored("traces are not recorded"),
    "otlp_traces_endpoint": Ignored("traces are not recorded"),
    "kv_events_config": Refused("cache events are not published"),
    # API
    "api_key": Implemented("server.api_key"),
    "admin_api_key": Implemented("server.admin_api_key"),
    "served_model_name": Implemented("server.served_model_name"),
    "weight_version": Implemented("server.weight_version"),
    "chat_template": Implemented("tokenizer.chat_template"),
    "file_storage_path": Ignored("the server stores no files"),
    "enable_cache_report": Implemented("server.enable_cache_report"),
    "reasoning_parser": Refused("reasoning is not separated from the text yet"),
    "tool_call_parser": Refused("tool calls are not separated from the text yet"),
    "tool_server": Refused("the server runs no tools"),
    "sampling_defaults": Implemented("server.sampling_defaults", values=("model", "openai")),
    "preferred_sampling_params": Implemented("server.preferred_sampling_params"),
    "json_model_override_args": Refused("edit config.json of the model instead", allowed=("{}",)),
    # Several processes and hosts
    "dp_size": Refused(_SEVERAL),
    "load_balance_method": Ignored("there is one replica"),
    "attn_cp_size": Refused(_SEVERAL),
    "moe_dp_size": Refused(_SEVERAL),
    "dist_init_addr": Ignored(_ONE_GPU),
    "nnodes": Refused(_SEVERAL),
    "node_rank": Refused(_SEVERAL),
    # LoRA
    "enable_lora": Implemented("lora.enabled"),
    "enable_lora_overlap_loading": Ignored("adapters are always loaded beside running requests"),
    "max_lora_rank": Implemented("lora.max_lora_rank"),
    "lora_target_modules": Implemented("lora.target_modules"),
    "lora_paths": Implemented("lora.preload"),
    "max_loaded_loras": Implemented("lora.max_loaded_loras"),
    "max_loras_per_batch": Implemented("lora.max_loras_per_batch"),
    "lora_eviction_policy": Implemented("lora.eviction_policy"),
    "lora_keep_last": Implemented("lora.keep_last"),
    "lora_root": Implemented("lora.root"),
    "require_adapter": Implemented("lora.require_adapter"),
    "lora_backend": Ignored("adapters run on the server's own operators"),
    "max_lora_chunk_size": Ignored("adapters run on the server's own operators"),
    "lora_strict_loading": Implemented("lora.strict"),
    "lora_drain_wait_threshold": Ignored("the scheduler keeps adapters fair by itself"),
    # Kernels
    "attention_backend": Implemented("device.attention_backend"),
    "decode_attention_backend": Ignored(_ONE_ATTENTION),
    "prefill_attention_backend": Ignored(_ONE_ATTENTION),
    "sampling_backend": Ignored("tokens are drawn by the server's own kernels", quiet=("pytorch",)),
    "grammar_backend": Ignored("constrained decoding is not available yet", quiet=("none",)),
    "mm_attention_backend": Ignored(_TEXT_ONLY),
    "disable_flashinfer_autotune": Ignored("what is used of flashinfer is not tuned"),
    # Speculative decoding
    "speculative_algorithm": Refused(_SPECULATIVE),
    "speculative_draft_model_path": Refused(_SPECULATIVE),
    "speculative_num_steps": Ignored(_SPECULATIVE),
    "speculative_eagle_topk": Ignored(_SPECULATIVE),
    "speculative_num_draft_tokens": Ignored(_SPECULATIVE),
    # Experts
    "ep_size": Refused(_SEVERAL),
    "moe_a2a_backend": Ignored(_DENSE),
    "moe_runner_backend": Ignored(_DENSE),
    "deepep_mode": Ignored(_DENSE),
    "enable_eplb": Ignored(_DENSE),
    "ep_num_redundant_experts": Ignored(_DENSE),
    "moe_dense_tp_size": Ignored(_DENSE),
    # Caches and offloading
    "enable_hierarchical_cache": Ignored(_NO_OFFLOAD),
    "hicache_ratio": Ignored(_NO_OFFLOAD),
    "hicache_size": Ignored(_NO_OFFLOAD),
    "hicache_write_policy": Ignored(_NO_OFFLOAD),
    "hicache_storage_backend": Ignored(_NO_OFFLOAD),
    "cpu_offload_gb": Ignored(_NO_OFFLOAD),
    # Optimisation and debugging
    "disable_radix_cache": Implemented("memory.disable_radix_cache"),
    "cuda_graph_max_bs": Implemented("device.cuda_graph_bs"),
    "cuda_graph_bs": Implemented("device.cuda_graph_bs"),
    "cuda_graph_backend_prefill": Ignored(_DECODE_GRAPHS),
    "disable_cuda_graph": Implemented("device.cuda_graph_bs"),
    "disable_cuda_graph_padding": Ignored("a step is padded to the next graph, which costs less than no graph"),
    "enable_profile_cuda_graph": Ignored("graphs are captured without a profiler"),
    "disable_piecewise_cuda_graph": Ignored(_DECODE_GRAPHS),
    "piecewise_cuda_graph_max_tokens": Ignored(_DECODE_GRAPHS),
    "enable_nccl_nvls": Ignored(_ONE_GPU),
    "enable_symm_mem": Ignored(_ONE_GPU),
    "enable_tokenizer_batch_encode": Ignored("the front process tokenizes"),
    "disable_tokenizer_batch_decode": Ignored("every request has its own decoding stream"),
    "disable_outlines_disk_cache": Ignored("outlines is not used"),
    "disable_custom_all_reduce": Ignored(_ONE_GPU),
    "enable_mscclpp": Ignored(_ONE_GPU),
    "pre_warm_nccl": Ignored(_ONE_GPU),
    "disable_overlap_schedule": Implemented("schedule.overlap"),
    "enable_mixed_chunk": Implemented("schedule.mixed_chunk"),
    "enable_dp_attention": Ignored(_ONE_GPU),
    "enable_dp_lm_head": Ignored(_ONE_GPU),
    "enable_two_batch_overlap": Ignored(_ONE_GPU),
    "enable_flashinfer_allreduce_fusion": Ignored(_ONE_GPU),
    "enable_torch_compile": Ignored(_NO_COMPILE),
    "torch_compile_max_bs": Ignored(_NO_COMPILE),
    "torchao_config": Refused("weights are computed unquantized"),
    "enable_nan_detection": Ignored("a request whose logits are not finite is always ended with an error"),
    "enable_p2p_check": Ignored(_ONE_GPU),
    "triton_attention_reduce_in_fp32": Ignored("attention is always summed in float32"),
    "triton_attention_num_kv_splits": Ignored("the kernel chooses by the batch and the device"),
    "num_continuous_decode_steps": Ignored("new requests are looked for before every step"),
    "delete_ckpt_after_loading": Ignored("the server never deletes a checkpoint"),
    "enable_memory_saver": Ignored("device memory is held until the server ends"),
    "enable_weights_cpu_backup": Ignored("device memory is held until the server ends"),
    "enable_draft_weights_cpu_backup": Ignored("there is no draft model"),
    "allow_auto_truncate": Implemented("server.allow_auto_truncate"),
    "enable_custom_logit_processor": Refused("the server runs no code that comes with a request"),
    "flashinfer_mla_disable_ragged": Ignored("there is no MLA"),
    "disable_shared_experts_fusion": Ignored(_DENSE),
    "disable_chunked_prefix_cache": Ignored("chunks of a prompt always see what is before them"),
    "disable_fast_image_processor": Ignored(_TEXT_ONLY),
    "keep_mm_feature_on_device": Ignored(_TEXT_ONLY),
    "enable_return_hidden_states": Refused("hidden states are not returned"),
    "enable_return_routed_experts": Refused(_DENSE),
    "scheduler_recv_interval": Ignored("new requests are looked for before every step"),
    "numa_node": Ignored("start the server under numactl"),
    "gc_threshold": Ignored("the server sets the garbage collector itself"),
    "enable_deterministic_inference": Refused("kernels that do not depend on the batch are not available yet"),
    "rl_on_policy_target": Refused("kernels that match a trainer bit by bit are not available yet"),
    "enable_fused_qk_norm_rope": Ignored("norms of heads, rotation and KV write are always one kernel"),
    # Disaggregation
    "disaggregation_mode": Refused(_SPLIT),
    "disaggregation_transfer_backend": Ignored(_SPLIT),
    "disaggregation_bootstrap_port": Ignored(_SPLIT),
    "disaggregation_ib_device": Ignored(_SPLIT),
    "encoder_only": Refused(_SPLIT),
    "language_only": Refused(_SPLIT),
    # Weight loading
    "custom_weight_loader": Ignored("weights are loaded by the server's own code only"),
    "weight_loader_disable_mmap": Ignored("files are always mapped"),
}


def flag_name(field: str) -> str:
    """The option string users know a field by."""
    return "--" + field.replace("_", "-")


def review(args: ServerArgs) -> list[str]:
    """Hold the user's values against the list.

    Returns:
        One line per flag that was set and is ignored.

    Raises:
        ConfigError: names every flag that was set and is refused, its value and the reason.
    """
    warnings, refusals = [], []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if not _is_set(value, field):
            continue
        flag = flag_name(field.name) if value is True else f"{flag_name(field.name)} {value}"
        match FLAGS[field.name]:
            case Implemented(values=values) if values and value not in values:
                refusals.append(f"{flag} is refused: use one of {', '.join(map(str, values))}")
            case Refused(reason, allowed) if value not in allowed:
                refusals.append(f"{flag} is refused: {reason}")
            case Ignored(reason, quiet) if value not in quiet:
                warnings.append(f"{flag} is ignored: {reason}")
    if refusals:
        raise ConfigError("\n".join(refusals))
    return warnings


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default value; `dataclasses.MISSING` when it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_set(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a value asks for something: not the default, and not another way to say "off" (None, "", [], 0)."""
    default = default_of(field)
    return bool(value != default and (value or default))
