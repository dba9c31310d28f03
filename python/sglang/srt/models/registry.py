"""Models by architecture name; a module is imported when its model is first asked for."""

from __future__ import annotations

import importlib

import torch

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.errors import ConfigError
from sglang.srt.models.decoder import DecoderForCausalLM

SUPPORTED_MODELS = {
    "LlamaForCausalLM": "sglang.srt.models.llama",
    "MistralForCausalLM": "sglang.srt.models.mistral",
    "Qwen2ForCausalLM": "sglang.srt.models.qwen2",
    "Qwen3ForCausalLM": "sglang.srt.models.qwen3",
}


def create_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DecoderForCausalLM:
    """A model with memory for its weights and nothing in it yet.

    Raises:
        ConfigError: the architecture is not supported, or asks for something that is not.
    """
    module = SUPPORTED_MODELS.get(config.architecture)
    if module is None:
        known = ", ".join(SUPPORTED_MODELS)
        raise ConfigError(f"architecture {config.architecture!r} is not supported; supported are {known}")
    model_class = getattr(importlib.import_module(module), config.architecture)
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config.hidden_act!r} is not supported; the models here use silu")
    model: DecoderForCausalLM = model_class(config, dtype, device)
    return model
