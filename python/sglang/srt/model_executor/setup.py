"""Builds the back's engine from the configuration: device, weights, KV pool, attention, sampler.

Called once, by the scheduler's main; the order matters: the KV pool takes its share of what the weights and the slots
of adapters leave.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import torch

from sglang.srt import environ
from sglang.srt.config.sections import Config
from sglang.srt.errors import ConfigError
from sglang.srt.layers.attention.factory import create_attention_backend
from sglang.srt.lora.device_slots import num_rows
from sglang.srt.lora.lora_manager import BaseTensor, LoRAManager, matrices, parameter_sites, takes_slabs
from sglang.srt.lora.weight_tails import tail_slots
from sglang.srt.managers.io_struct.wire import Ready
from sglang.srt.mem_cache.kv_manager import KVManager
from sglang.srt.mem_cache.kv_pool import KVPool, kv_bytes_per_token
from sglang.srt.model_executor.forward_context import CapturableAttention, resolve_dtype
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.decoder import DecoderForCausalLM
from sglang.srt.models.registry import model_class
from sglang.srt.models.weight_map import WeightMap
from sglang.srt.ops.slabs import ModelSlabs
from sglang.srt.platforms.platform import Platform, get_platform
from sglang.srt.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Engine:
    """Everything that lives on the device, ready to run steps."""

    config: Config
    runner: ModelRunner
    kv: KVManager
    pool: KVPool
    lora: LoRAManager | None
    weight_bytes: int
    load_seconds: float

    def ready(self) -> Ready:
        """What the front needs to know."""
        context = self.config.model.context_length
        return Ready(
            pid=os.getpid(),
            max_total_num_tokens=self.kv.capacity,
            max_req_input_len=min(context, self.kv.capacity) - 1,
            max_running_requests=self.config.schedule.max_running_requests,
            context_length=context,
            device=str(self.runner.device),
            dtype=self.config.load.dtype,
            memory_usage={
                "weight": round(self.weight_bytes / GIB, 3),
                "kvcache": round(self.pool.nbytes / GIB, 3),
            },
            load_seconds=self.load_seconds,
            slab_layout=None if self.lora is None else self.lora.layout.describe(),
        )


def build_engine(config: Config) -> Engine:
    """Load the weights and size the KV cache.

    Raises:
        ConfigError: not enough memory for the KV cache or the adapter slots asked for, or slots cannot hold adapters of
            this model.
        WeightError: the checkpoint does not fit the model.
    """
    platform = get_platform(config.device)
    started = time.perf_counter()
    before = platform.available_memory()
    slabs = _slabs(config) if config.lora.enabled else None
    spare_rows = {} if slabs is None else _spare_rows(config, slabs, platform.device)
    model = load_model(config.model, config.load, platform.device, spare_rows)
    load_seconds = time.perf_counter() - started
    weight_bytes = max(before - platform.available_memory(), 0)
    lora = None if slabs is None else _create_lora(config, model, slabs, platform)
    num_pages = _num_pages(config, platform)
    memory, schedule = config.memory, config.schedule
    # One page more than is handed out, for the padding of captured steps.
    pool = _create_pool(config, num_pages + 1, platform.device)
    kv = KVManager(
        num_pages=num_pages,
        page_size=memory.page_size,
        max_slots=schedule.max_running_requests,
        max_tokens=config.model.context_length,
        device=platform.device,
        enable_cache=not memory.disable_radix_cache,
    )
    window = config.model.sliding_window
    name, num_heads = config.device.attention_backend, config.model.num_attention_heads
    attention = create_attention_backend(name, pool, kv.table, num_heads, platform.device, window)
    original = environ.SGLANG_RETURN_ORIGINAL_LOGPROB.get()
    sampler = Sampler(config.model.vocab_size, platform.device, original, max_rows=schedule.max_running_requests)
    runner = ModelRunner(
        model, attention, pool, sampler, kv.table, schedule.max_running_requests, platform.device, lora
    )
    if config.device.cuda_graph_bs and isinstance(attention, CapturableAttention):
        runner.capture(attention, config.device.cuda_graph_bs, model.logits_dtype)
    logger.info(
        "%s on %s, %s: weights loaded in %.1f s, KV cache %d tokens (%.2f GiB)",
        *(config.model.architecture, platform.device, config.load.dtype, load_seconds, kv.capacity, pool.nbytes / GIB),
    )
    return Engine(config, runner, kv, pool, lora, weight_bytes, load_seconds)


def lora_tensors(weights: WeightMap) -> dict[str, BaseTensor]:
    """Where adapters find the base model's tensors, by checkpoint name."""
    targets = weights.targets.items()
    return {name: BaseTensor(target.parameter, target.start, target.shape) for name, target in targets}


def _tensors(config: Config) -> dict[str, BaseTensor]:
    return lora_tensors(model_class(config.model).weight_map(config.model))


def _slabs(config: Config) -> ModelSlabs:
    shapes = {name: tensor.shape for name, tensor in matrices(_tensors(config)).items()}
    try:
        return ModelSlabs(shapes, config.lora.max_lora_rank, config.load.dtype)
    except ValueError as error:
        raise ConfigError(f"adapters of this model cannot be served: {error}; leave out --enable-lora") from error


def _spare_rows(config: Config, slabs: ModelSlabs, device: torch.device) -> dict[str, int]:
    """Rows for A behind the model's weights, by parameter."""
    if not takes_slabs(device, slabs.dtype):
        return {}
    slots = tail_slots(slabs.layout, num_rows(config.lora.max_loras_per_batch))
    sites = parameter_sites(_tensors(config), slabs) if slots else {}
    return {name: slots * site.u_width for name, site in sites.items()}


def _create_lora(config: Config, model: DecoderForCausalLM, slabs: ModelSlabs, platform: Platform) -> LoRAManager:
    tensors, section = lora_tensors(model.weights), config.lora
    slots = section.max_loras_per_batch
    if platform.device.type != "cpu":
        needed, free = num_rows(slots) * slabs.layout.slab_bytes, platform.available_memory()
        size = f"{slots} adapter slots of rank {section.max_lora_rank} and a spare one need {needed / GIB:.2f} GiB"
        if needed > free:
            raise ConfigError(f"{size}, {free / GIB:.2f} GiB are free; lower --max-lora-rank or --max-loras-per-batch")
        logger.info("%s; --max-lora-rank and --max-loras-per-batch decide that", size)
    return LoRAManager(tensors, model.parameters, slabs, slots, platform.device, model.extended)


def _token_bytes(config: Config) -> int:
    model = config.model
    dtype = resolve_dtype(config.memory.kv_cache_dtype)
    return kv_bytes_per_token(model.num_hidden_layers, model.num_key_value_heads, model.head_dim, dtype)


def _num_pages(config: Config, platform: Platform) -> int:
    """KV pages: what was asked for, else the given share of free memory, never more than every sequence could use."""
    memory = config.memory
    free = platform.available_memory()
    useful = config.schedule.max_running_requests * config.model.context_length
    tokens = memory.max_total_tokens or min(int(free * memory.mem_fraction_static) // _token_bytes(config), useful)
    pages = tokens // memory.page_size
    if pages * _token_bytes(config) * memory.page_size > free or pages < 2:
        needed = tokens * _token_bytes(config) / GIB
        raise ConfigError(
            f"a KV cache of {tokens} tokens needs {needed:.2f} GiB, {free / GIB:.2f} GiB are free; "
            "lower --max-total-tokens or raise --mem-fraction-static"
        )
    return pages


def _create_pool(config: Config, num_pages: int, device: torch.device) -> KVPool:
    model = config.model
    return KVPool(
        num_layers=model.num_hidden_layers,
        num_tokens=num_pages * config.memory.page_size,
        num_kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=resolve_dtype(config.memory.kv_cache_dtype),
        device=device,
    )
