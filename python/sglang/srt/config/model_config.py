"""The model's architecture as one frozen struct, read from config.json or GGUF metadata (no torch, no transformers).

`load_model_config` is called once, by `config.resolve`; the struct travels to the back. Both styles of config.json are
read: transformers 4 (`rope_theta` and `rope_scaling` at top level, `torch_dtype`) and 5 (`rope_parameters`, `dtype`).
Invariant: what a `ModelConfig` cannot express is refused here with a `ConfigError`, never dropped.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from sglang.srt.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.utils.gguf_file import GGUFFile


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a decoder-only transformer.

    Fields:
        architecture: HF class name, e.g. LlamaForCausalLM; key into the model registry.
        context_length: positions the server allows (config's max_position_embeddings, or --context-length).
        rope_scaling: HF's rope parameters dict (rope_type, factor, …) or None.
        sliding_window: tokens each position attends to, or None.
        eos_token_ids: every id that ends a sequence (config.json, generation_config.json, tokenizer).
        generation_defaults: temperature, top_p, … from generation_config.json, {} when absent.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    context_length: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    torch_dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    generation_defaults: dict[str, Any] = {}


class _Family(msgspec.Struct, frozen=True):
    """What a class of models fixes beyond its config.json.

    Fields:
        attention_bias: bias of the q, k and v projections; None reads the key `attention_bias`.
        attention_out_bias: bias of the output projection; None follows `attention_bias`.
        head_dim: default when config.json has none; None for hidden_size / num_attention_heads.
    """

    model_type: str
    attention_bias: bool | None
    attention_out_bias: bool | None
    qk_norm: bool = False
    head_dim: int | None = None


FAMILIES = {
    "LlamaForCausalLM": _Family("llama", None, None),
    "MistralForCausalLM": _Family("mistral", False, False),
    "Qwen2ForCausalLM": _Family("qwen2", True, False),
    "Qwen3ForCausalLM": _Family("qwen3", None, None, qk_norm=True, head_dim=128),
}
"""HF class names this server runs."""

_GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GGUF_FILE_DTYPES = {0: "float32", 1: "float16"}
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_model_config(path: str, context_length: int | None = None) -> ModelConfig:
    """Read the config of a model directory (config.json, generation_config.json) or of a .gguf file.

    Args:
        path: result of `resolve_model_path`.
        context_length: positions to allow, at most what the model was made for; None for all of them.

    Raises:
        ConfigError: unreadable file, missing key, or a model this server does not support; names the file and the key.
    """
    if path.endswith(".gguf"):
        from sglang.srt.utils.gguf_file import open_gguf

        config = _from_gguf(open_gguf(path))
    else:
        config = _from_directory(path)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"{path}: {config.num_attention_heads} attention heads cannot share {config.num_key_value_heads} KV heads"
        )
    if context_length is None:
        return config
    if not 0 < context_length <= config.context_length:
        raise ConfigError(
            f"--context-length {context_length} must be between 1 and the model's {config.context_length} positions "
            f"({path}); to go beyond them add a rope scaling to the model's config.json"
        )
    return msgspec.structs.replace(config, context_length=context_length)


# ---- model directories ---------------------------------------------------------------------------------------------


class _JsonConfig:
    """One JSON file of a model directory; every error names the file and the key."""

    def __init__(self, path: str, *, optional: bool = False) -> None:
        self.path = path
        try:
            with open(path, encoding="utf-8") as file:
                self.data: Any = json.load(file)
        except FileNotFoundError:
            if not optional:
                raise ConfigError(f"{path} does not exist; pass a directory made by save_pretrained") from None
            self.data = {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(self.data, dict):
            raise ConfigError(f"{path} must hold a JSON object")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value, or `default` when the key is absent or null."""
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.error(key, f"is {value!r}, which has the wrong type")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; without a default the key is required."""
        value = self.get(key, int, default)
        if value is None:
            raise self.error(key, "is missing")
        if value < 1:
            raise self.error(key, f"is {value}, must be positive")
        return int(value)

    def error(self, key: str, problem: str) -> ConfigError:
        """The error that blames `key`."""
        return ConfigError(f"{self.path}: key {key!r} {problem}")


def _from_directory(path: str) -> ModelConfig:
    raw = _JsonConfig(os.path.join(path, "config.json"))
    generation = _JsonConfig(os.path.join(path, "generation_config.json"), optional=True)
    architecture, family = _family(raw)
    _refuse_unsupported(raw)
    hidden, heads = raw.size("hidden_size"), raw.size("num_attention_heads")
    attention_bias = raw.get("attention_bias", bool, False) if family.attention_bias is None else family.attention_bias
    rope_theta, rope_scaling = _rope(raw)
    return ModelConfig(
        architecture=architecture,
        model_type=family.model_type,
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.size("intermediate_size"),
        num_hidden_layers=raw.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=raw.size("num_key_value_heads", heads),
        head_dim=raw.size("head_dim", family.head_dim or hidden // heads),
        rms_norm_eps=float(raw.get("rms_norm_eps", (int, float), 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        context_length=_context_length(raw, rope_scaling),
        tie_word_embeddings=raw.get("tie_word_embeddings", bool, False),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias if family.attention_out_bias is None else family.attention_out_bias,
        mlp_bias=raw.get("mlp_bias", bool, False) if family.model_type == "llama" else False,
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(raw, family),
        torch_dtype=_dtype(raw),
        bos_token_id=_first_id(raw, generation, "bos_token_id"),
        eos_token_ids=tuple(sorted({*_ids(raw, "eos_token_id"), *_ids(generation, "eos_token_id")})),
        pad_token_id=_first_id(raw, generation, "pad_token_id"),
        generation_defaults={k: v for k in _SAMPLING_KEYS if (v := generation.get(k, (int, float))) is not None},
    )


def _family(raw: _JsonConfig) -> tuple[str, _Family]:
    names = raw.get("architectures", list, [])
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    raise raw.error("architectures", f"is {names}; this server runs {', '.join(FAMILIES)}")


def _refuse_unsupported(raw: _JsonConfig) -> None:
    method = raw.get("quantization_config", dict)
    if method is not None:
        name = method.get("quant_method", "quantised")
        raise raw.error(
            "quantization_config", f"says {name}: quantised checkpoints are not supported, use bf16 weights"
        )
    activation = raw.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise raw.error("hidden_act", f"is {activation!r}; only 'silu' is supported")
    if raw.get("partial_rotary_factor", (int, float), 1) != 1:
        raise raw.error("partial_rotary_factor", "is not 1; partial rotary embeddings are not supported")


def _rope(raw: _JsonConfig) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling parameters; the latter always with `rope_type`, None for plain rotary embeddings."""
    parameters: dict[str, Any] = dict(raw.get("rope_parameters", dict) or raw.get("rope_scaling", dict) or {})
    theta = parameters.pop("rope_theta", None)
    if theta is None:
        theta = raw.get("rope_theta", (int, float), 10000.0)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", "default")
    parameters.pop("type", None)
    if rope_type == "default":
        return float(theta), None
    return float(theta), {"rope_type": rope_type, **parameters}


def _context_length(raw: _JsonConfig, rope_scaling: dict[str, Any] | None) -> int:
    """Positions of the model: `max_position_embeddings`, stretched where the scaling is not already counted in it."""
    positions = raw.size("max_position_embeddings")
    if not rope_scaling or "original_max_position_embeddings" in rope_scaling:
        return positions
    if rope_scaling["rope_type"] in ("llama3", "longrope"):
        return positions
    return int(positions * rope_scaling.get("factor", 1.0))


def _sliding_window(raw: _JsonConfig, family: _Family) -> int | None:
    """Window of every layer, or None; a model that mixes windowed and full layers is refused."""
    window = raw.get("sliding_window", int)
    qwen = family.model_type.startswith("qwen")
    if window is None or family.model_type == "llama" or (qwen and not raw.get("use_sliding_window", bool, False)):
        return None
    layers = raw.size("num_hidden_layers")
    kinds = raw.get("layer_types", list)
    if kinds is not None:
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    else:
        # Qwen: the layers from max_window_layers on have the window.
        windowed = layers - min(layers, raw.get("max_window_layers", int, layers)) if qwen else layers
    if windowed not in (0, layers):
        raise raw.error("sliding_window", f"applies to {windowed} of {layers} layers; it must be all or none of them")
    return int(window) if windowed else None


def _dtype(raw: _JsonConfig) -> str:
    name: str = raw.get("dtype", str) or raw.get("torch_dtype", str, "float32")
    name = name.removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise raw.error("dtype", f"is {name!r}; weights must be float32, bfloat16 or float16")
    return name


def _ids(raw: _JsonConfig, key: str) -> list[int]:
    value = raw.get(key, (int, list), [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in ids):
        raise raw.error(key, f"is {value!r}, must be a token id or a list of them")
    return ids


def _first_id(raw: _JsonConfig, generation: _JsonConfig, key: str) -> int | None:
    return next(iter([*_ids(raw, key), *_ids(generation, key)]), None)


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def _from_gguf(file: GGUFFile) -> ModelConfig:
    arch = file.architecture
    if arch not in _GGUF_ARCHITECTURES:
        raise ConfigError(f"{file.path}: architecture {arch!r}; this server runs {', '.join(_GGUF_ARCHITECTURES)}")
    if file.field(f"{arch}.expert_count"):
        raise ConfigError(f"{file.path}: mixture-of-experts models are not supported")
    names = set(file.tensor_names())
    if "token_embd.weight" not in names:
        raise ConfigError(f"{file.path} has no tensor token_embd.weight; split GGUF files must be merged first")
    vocab_size, hidden = file.tensor_shape("token_embd.weight")
    heads = int(file.require(f"{arch}.attention.head_count"))
    head_dim = file.field(f"{arch}.attention.key_length") or file.field(f"{arch}.rope.dimension_count")
    head_dim = int(head_dim or hidden // heads)
    return ModelConfig(
        architecture=_GGUF_ARCHITECTURES[arch],
        model_type=arch,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=int(file.require(f"{arch}.feed_forward_length")),
        num_hidden_layers=int(file.require(f"{arch}.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(file.field(f"{arch}.attention.head_count_kv", heads)),
        head_dim=head_dim,
        rms_norm_eps=_from_float32(file.require(f"{arch}.attention.layer_norm_rms_epsilon")),
        rope_theta=_from_float32(file.field(f"{arch}.rope.freq_base", 10000.0)),
        rope_scaling=_gguf_rope_scaling(file, head_dim),
        context_length=int(file.require(f"{arch}.context_length")),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        attention_out_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        sliding_window=file.field(f"{arch}.attention.sliding_window"),
        # Quantised weights are dequantised exactly; bfloat16 is what such models were trained in.
        torch_dtype=_GGUF_FILE_DTYPES.get(file.field("general.file_type", -1), "bfloat16"),
        bos_token_id=file.field("tokenizer.ggml.bos_token_id"),
        eos_token_ids=gguf_eos_ids(file),
        pad_token_id=file.field("tokenizer.ggml.padding_token_id"),
    )


def gguf_eos_ids(file: GGUFFile) -> tuple[int, ...]:
    """Ids that end a sequence: end of text, of turn and of message, those that the file names."""
    ids = {file.field(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    return tuple(sorted(i for i in ids if i is not None))


def _from_float32(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _gguf_rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    prefix = f"{file.architecture}.rope.scaling"
    rope_type = file.field(f"{prefix}.type", "none")
    if rope_type != "none":
        scaling = {"rope_type": rope_type, "factor": _from_float32(file.field(f"{prefix}.factor", 1.0))}
        original = file.field(f"{prefix}.original_context_length")
        return scaling if original is None else {**scaling, "original_max_position_embeddings": original}
    if "rope_freqs.weight" not in file.tensor_names():
        return None
    return _llama3_scaling(file, head_dim)


def _llama3_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Llama 3.x parameters behind the tensor of frequency divisors that llama.cpp stores instead of them."""
    divisors = [float(d) for d in file.tensor("rope_freqs.weight").reshape(-1)]
    theta = file.field(f"{file.architecture}.rope.freq_base", 10000.0)
    scaling = {
        "rope_type": "llama3",
        "factor": _from_float32(max(divisors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = [_llama3_divisor(theta ** (2 * i / head_dim), scaling) for i in range(head_dim // 2)]
    if len(divisors) != len(expected) or any(abs(d - e) > 1e-3 * e for d, e in zip(divisors, expected, strict=True)):
        raise ConfigError(
            f"{file.path}: tensor rope_freqs.weight is not Llama 3's scaling; use the safetensors version of the model"
        )
    return scaling


def _llama3_divisor(inverse_frequency: float, scaling: dict[str, Any]) -> float:
    """What Llama 3's rule divides a frequency by: 1 for short waves, `factor` for long ones, smooth between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * inverse_frequency)
    if turns > high:
        return 1.0
    if turns < low:
        return float(scaling["factor"])
    smooth = (turns - low) / (high - low)
    return float(1 / ((1 - smooth) / scaling["factor"] + smooth))
