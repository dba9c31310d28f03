"""`resolve`: what the server makes of its launch flags on this machine. Called once, by whoever starts a server.

Nothing else reads `ServerArgs` to decide how to run; both processes read the `Config` made here. The user's values are
never changed. No torch: the front decides, the back obeys.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import logging
import os
import random
from importlib import metadata
from operator import attrgetter
from typing import Any, cast

import msgspec

from sglang.srt.config.lora_section import lora_section
from sglang.srt.config.model_config import ModelConfig, load_model_config
from sglang.srt.config.model_path import resolve_model_path
from sglang.srt.config.sections import (
    Config,
    Device,
    DeviceSection,
    LoadSection,
    MemorySection,
    ScheduleSection,
    ServerSection,
    TokenizerSection,
)
from sglang.srt.config.upstream_flags import FLAGS, Implemented, flag_name, review
from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class _DeviceDefaults(msgspec.Struct, frozen=True):
    """What a flag left to the server becomes on one kind of device."""

    mem_fraction_static: float
    max_running_requests: int
    chunked_prefill_size: int
    page_size: int


_DEFAULTS: dict[Device, _DeviceDefaults] = {
    "cpu": _DeviceDefaults(mem_fraction_static=0.3, max_running_requests=64, chunked_prefill_size=512, page_size=1),
    "cuda": _DeviceDefaults(
        mem_fraction_static=0.85, max_running_requests=256, chunked_prefill_size=8192, page_size=16
    ),
}
_DTYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}
_LOW_PRECISION = ("bfloat16", "float16")
_FLASHINFER_HEAD_DIMS = (64, 128, 256)

_AT_LEAST_ONE = (
    "max_running_requests",
    "max_queued_requests",
    "max_total_tokens",
    "chunked_prefill_size",
    "max_prefill_tokens",
    "page_size",
    "stream_interval",
    "decode_log_interval",
)


def resolve(args: ServerArgs) -> Config:
    """Turn launch flags into the configuration of both processes; logs one line per flag that is ignored.

    Raises:
        ConfigError: a refused flag, a value out of range, or a model that cannot be found or is not supported.
    """
    for line in review(args):
        logger.warning(line)
    device = _device(args.device or "auto")
    path = resolve_model_path(args.model_path)
    model = load_model_config(path, args.context_length)
    dtype = _dtype(args.dtype, model, device)
    seed = random.randrange(2**30) if args.random_seed is None else args.random_seed
    config = Config(
        model=model,
        load=LoadSection(
            path=path,
            dtype=dtype,
            load_format=args.load_format,
            random_seed=seed,
            fp32_lm_head=args.enable_fp32_lm_head,
        ),
        tokenizer=_tokenizer(args, path),
        memory=_memory(args, device, dtype),
        schedule=_schedule(args, device),
        device=_device_section(args, device, model.head_dim, dtype),
        server=_server(args, model),
        lora=lora_section(args),
    )
    return _checked(config)


def _device(wanted: str) -> Device:
    if wanted != "auto":
        return cast(Device, wanted)
    if not _gpu_present():
        return "cpu"
    if metadata.version("torch").endswith("+cpu"):
        logger.warning("this machine has a GPU, but the installed torch is a CPU build; the model runs on the CPU")
        return "cpu"
    return "cuda"


def _gpu_present() -> bool:
    """Whether a GPU can be used, told from device nodes: the front must not import torch to ask it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/kfd") or os.path.exists("/dev/dxg")


def _device_section(args: ServerArgs, device: Device, head_dim: int, dtype: str) -> DeviceSection:
    attention = _attention_backend(args.attention_backend, device, head_dim, dtype)
    graphs: tuple[int, ...] = ()
    if attention != "torch_native" and not args.disable_cuda_graph:
        running = args.max_running_requests
        graphs = _graph_rows(args, _DEFAULTS[device].max_running_requests if running is None else running)
    return DeviceSection(device=device, gpu_id=args.base_gpu_id, attention_backend=attention, cuda_graph_bs=graphs)


def _attention_backend(wanted: str | None, device: Device, head_dim: int, dtype: str) -> str:
    if device == "cpu":
        if wanted not in (None, "torch_native"):
            logger.warning("--attention-backend %s: on a CPU there is torch_native", wanted)
        return "torch_native"
    if wanted in (None, "triton", "torch_native"):
        return wanted or "triton"
    reason = _why_no_flashinfer(head_dim, dtype) if wanted == "flashinfer" else "there is no such one here"
    if not reason:
        return "flashinfer"
    logger.warning("--attention-backend %s: %s; attention runs on this server's own Triton kernels", wanted, reason)
    return "triton"


def _why_no_flashinfer(head_dim: int, dtype: str) -> str:
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed (pip install flashinfer-python)"
    if head_dim not in _FLASHINFER_HEAD_DIMS or dtype not in _LOW_PRECISION:
        return f"it has no kernels for heads of {head_dim} values in {dtype}"
    return ""


def _graph_rows(args: ServerArgs, max_running: int) -> tuple[int, ...]:
    """Numbers of rows to capture; left to the server, a step is padded by at most half up to 8 rows, an eighth beyond.

    Raises:
        ConfigError: a number below 1.
    """
    largest = max_running if args.cuda_graph_max_bs is None else min(args.cuda_graph_max_bs, max_running)
    if args.cuda_graph_bs:
        if min(args.cuda_graph_bs) < 1:
            raise ConfigError(f"--cuda-graph-bs {args.cuda_graph_bs} must be numbers of requests, 1 or more")
        return tuple(sorted({rows for rows in args.cuda_graph_bs if rows <= largest}))
    if largest < 1:
        return ()
    steps = (*range(1, 5), *range(6, 17, 2), *range(20, 33, 4), *range(40, 129, 8), *range(144, largest + 1, 16))
    return tuple(sorted({rows for rows in steps if rows < largest} | {largest}))


def _dtype(wanted: str, model: ModelConfig, device: Device) -> str:
    """Torch dtype name to compute in: on a CPU float32 unless the user insists, on a GPU half width."""
    if wanted != "auto":
        dtype = _DTYPES.get(wanted, wanted)
        if device == "cpu" and dtype in _LOW_PRECISION:
            logger.warning("--dtype %s: most CPUs compute in float32 much faster", wanted)
        return dtype
    if device == "cpu":
        return "float32"
    return model.torch_dtype if model.torch_dtype in _LOW_PRECISION else "bfloat16"


def _tokenizer(args: ServerArgs, model_path: str) -> TokenizerSection:
    if args.skip_tokenizer_init:
        return TokenizerSection(path=None)
    path = resolve_model_path(args.tokenizer_path) if args.tokenizer_path else model_path
    return TokenizerSection(path=path, chat_template=args.chat_template or None)


def _memory(args: ServerArgs, device: Device, dtype: str) -> MemorySection:
    fraction = args.mem_fraction_static
    kv_dtype = args.kv_cache_dtype
    return MemorySection(
        max_total_tokens=args.max_total_tokens,
        mem_fraction_static=_DEFAULTS[device].mem_fraction_static if fraction is None else fraction,
        page_size=_DEFAULTS[device].page_size if args.page_size is None else args.page_size,
        kv_cache_dtype=dtype if kv_dtype == "auto" else _DTYPES.get(kv_dtype, kv_dtype),
        disable_radix_cache=args.disable_radix_cache,
    )


def _schedule(args: ServerArgs, device: Device) -> ScheduleSection:
    defaults = _DEFAULTS[device]
    running, chunk = args.max_running_requests, args.chunked_prefill_size
    return ScheduleSection(
        policy=cast(Any, args.schedule_policy),
        conservativeness=args.schedule_conservativeness,
        max_running_requests=defaults.max_running_requests if running is None else running,
        max_queued_requests=args.max_queued_requests,
        chunked_prefill_size=defaults.chunked_prefill_size if chunk is None else None if chunk == -1 else chunk,
        max_prefill_tokens=args.max_prefill_tokens,
        mixed_chunk=args.enable_mixed_chunk,
        overlap=device == "cuda" and not args.disable_overlap_schedule,
        stream_interval=args.stream_interval,
        enable_priority=args.enable_priority_scheduling,
    )


def _server(args: ServerArgs, model: ModelConfig) -> ServerSection:
    return ServerSection(
        host=args.host.strip("[]"),
        port=args.port,
        api_key=args.api_key or None,
        admin_api_key=args.admin_api_key or None,
        served_model_name=args.served_model_name or args.model_path,
        log_level=args.log_level,
        log_level_http=args.log_level_http or args.log_level,
        log_requests=args.log_requests,
        log_requests_level=args.log_requests_level,
        enable_metrics=args.enable_metrics,
        incremental_streaming=args.incremental_streaming_output,
        allow_auto_truncate=args.allow_auto_truncate,
        skip_warmup=args.skip_server_warmup,
        enable_cache_report=args.enable_cache_report,
        decode_log_interval=args.decode_log_interval,
        sampling_defaults=model.generation_defaults if args.sampling_defaults == "model" else {},
        preferred_sampling_params=_preferred(args.preferred_sampling_params),
        weight_version=args.weight_version,
    )


def _preferred(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """--preferred-sampling-params as a dict whose keys and types are those of `sampling_params`."""
    try:
        params = json.loads(value) if isinstance(value, str) and value else value or {}
        if not isinstance(params, dict):
            raise ConfigError(f"--preferred-sampling-params {value} must be a JSON object")
        SamplingParams.from_dict(params)
    except (json.JSONDecodeError, RequestError) as error:
        raise ConfigError(f"--preferred-sampling-params {value} is not valid: {error}") from error
    return params


def _checked(config: Config) -> Config:
    """The config with every value of its declared type, as the back will decode it, and in range."""
    try:
        config = msgspec.convert(msgspec.to_builtins(config), Config, strict=False)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"a launch flag has a value of the wrong type: {error}") from error
    for name in _AT_LEAST_ONE:
        _require(config, name, 1)
    _require(config, "base_gpu_id", 0)
    _require(config, "port", 0, 65535)
    fraction, conservativeness = config.memory.mem_fraction_static, config.schedule.conservativeness
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"--mem-fraction-static {fraction} must be between 0 and 1")
    if not conservativeness > 0.0:
        raise ConfigError(f"--schedule-conservativeness {conservativeness} must be above 0")
    return config


def _require(config: Config, flag: str, low: int, high: int | None = None) -> None:
    status = FLAGS[flag]
    assert isinstance(status, Implemented)
    value = attrgetter(status.owner)(config)
    if value is not None and (value < low or (high is not None and value > high)):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{flag_name(flag)} {value} must be {allowed}")
