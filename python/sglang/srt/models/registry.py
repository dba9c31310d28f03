"""Models by architecture name; a module is imported when its model is first asked for."""

from __future__ import annotations

import importlib

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.errors import ConfigError
from sglang.srt.models.decoder import DecoderForCausalLM

SUPPORTED_MODELS = {
    "LlamaForCausalLM": "sglang.srt.models.llama",
    "MistralForCausalLM": "sglang.srt.models.mistral",
    "Qwen2ForCausalLM": "sglang.srt.models.qwen2",
    "Qwen3ForCausalLM": "sglang.srt.models.qwen3",
}


def model_class(config: ModelConfig) -> type[DecoderForCausalLM]:
    """The class of a model's architecture.

    Raises:
        ConfigError: the architecture is not supported, or asks for something that is not.
    """
    module = SUPPORTED_MODELS.get(config.architecture)
    if module is None:
        known = ", ".join(SUPPORTED_MODELS)
        raise ConfigError(f"architecture {config.architecture!r} is not supported; supported are {known}")
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config.hidden_act!r} is not supported; the models here use silu")
    found: type[DecoderForCausalLM] = getattr(importlib.import_module(module), config.architecture)
    return found
