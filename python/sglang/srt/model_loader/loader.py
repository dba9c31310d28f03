"""Makes a model and fills it: from safetensors, GGUF, or seeded random numbers. Called once by model_executor.setup."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoadSection
from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.forward_context import resolve_dtype
from sglang.srt.model_loader.checkpoints import gguf_weights, safetensors_weights
from sglang.srt.models.decoder import DecoderForCausalLM
from sglang.srt.models.registry import model_class
from sglang.srt.models.weight_map import Parameter
from sglang.srt.ops.packed import can_pack

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0
"""Time between two lines of progress while weights load."""
DUMMY_STD = 0.02


def load_model(
    config: ModelConfig, load: LoadSection, device: torch.device, spare_rows: Mapping[str, int] | None = None
) -> DecoderForCausalLM:
    """The model of a checkpoint, on the device, in `load.dtype`.

    Args:
        spare_rows: see DecoderForCausalLM.

    Raises:
        ConfigError: unknown architecture or load format.
        WeightError: tensors are missing, unknown or misshapen; the message lists them all.
    """
    started = time.perf_counter()
    model = model_class(config)(config, resolve_dtype(load.dtype), device, spare_rows)
    if load.fp32_lm_head:
        model.logits_dtype = torch.float32
    if load.load_format == "dummy":
        _fill_randomly(model, load.random_seed)
    else:
        pack = device.type == "cpu" and load.dtype == "float32" and can_pack()
        tensors = _with_progress(_read(config, load, pack), len(model.weights.targets))
        model.weights.load(model.parameters, tensors, load.path)
        model.bind()
    size = sum(p.nbytes for p in model.parameters.values()) / (1 << 30)
    logger.info("loaded %s: %.2f GiB in %.1f s", load.path, size, time.perf_counter() - started)
    return model


def _read(config: ModelConfig, load: LoadSection, pack: bool) -> Iterator[tuple[str, Parameter]]:
    is_gguf = load.path.endswith(".gguf")
    if load.load_format not in ("auto", "gguf" if is_gguf else "safetensors"):
        raise ConfigError(f"--load-format {load.load_format} does not fit {load.path}; use auto")
    return gguf_weights(load.path, config, pack) if is_gguf else safetensors_weights(load.path, pack)


def _with_progress(tensors: Iterator[tuple[str, Parameter]], total: int) -> Iterator[tuple[str, Parameter]]:
    reported = time.perf_counter()
    for count, item in enumerate(tensors):
        yield item
        if time.perf_counter() - reported > PROGRESS_SECONDS:
            reported = time.perf_counter()
            logger.info("loading weights: %d of %d tensors", count + 1, total)


def _fill_randomly(model: DecoderForCausalLM, seed: int) -> None:
    """Normal weights around 0, norms at 1; the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.parameters.items():
        assert isinstance(parameter, Tensor)
        if name.endswith("norm"):
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * DUMMY_STD)
