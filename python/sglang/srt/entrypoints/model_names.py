"""What the `model` of a request means: the served model, or one of its adapters. One place for every endpoint."""

from __future__ import annotations

import os

from sglang.srt.config.sections import Config
from sglang.srt.errors import AdapterError
from sglang.srt.managers.io_struct import GenerateReqInput

LoraPath = str | list[str | None] | None

ANY_MODEL = "default"
"""What clients send that do not care which model they talk to."""


def base_names(config: Config) -> tuple[str, ...]:
    """Names of the served model."""
    path = config.load.path.rstrip("/")
    return config.server.served_model_name, path, os.path.basename(path), ANY_MODEL


def adapter_of(model: str | None, lora_path: LoraPath, config: Config) -> LoraPath:
    """The adapter, or adapters, a request asks for.

    `model` is the base model's name, `base:adapter`, or an adapter's bare name, and wins over `lora_path`. A name that
    is none of these is taken for an adapter's when the server has adapters, so a mistyped or unloaded one is an error
    and never the base model's answer; without adapters any name means the base model, as in stock.
    """
    names = base_names(config)
    if not model or model in names:
        return lora_path
    base = next((name for name in names if model.startswith(f"{name}:")), None)
    if base is not None:
        return model[len(base) + 1 :].strip() or lora_path
    return model if config.lora.enabled else lora_path


def settle_adapter(obj: GenerateReqInput, config: Config) -> None:
    """Put the adapter that the request's `model` names into its `lora_path`.

    Raises:
        AdapterError: none is named, and the server runs with --require-adapter.
    """
    obj.lora_path = adapter_of(obj.model, obj.lora_path, config)
    named = obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]
    if config.lora.require_adapter and not all(named):
        raise AdapterError(
            "adapter_not_found",
            "The request names no adapter, and the server runs with --require-adapter: name one in lora_path, or as "
            "model (OpenAI endpoints).",
        )
