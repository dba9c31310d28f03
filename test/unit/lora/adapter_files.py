"""Adapters for tests: tensors as numpy arrays, safetensors images written by the official library, and directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoRASection
from sglang.srt.lora.adapter import Span
from sglang.srt.lora.adapter_reader import AdapterReader, ReadAdapter
from sglang.srt.lora.target_modules import module_shapes

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    context_length=64,
)
SHAPES = module_shapes(MODEL)
Q0, K0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
RANK = 4


def minimal_config(*targets: str, **changes: object) -> dict:
    """What AstraFlow writes: four keys."""
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": list(targets or ["q_proj"]), **changes}


def random(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def factors(*modules: str, rank: int = RANK, dtype: str = "float32") -> dict[str, np.ndarray]:
    """PEFT's tensors of the model's modules."""
    tensors = {}
    for seed, module in enumerate(modules or (Q0,)):
        outputs, inputs = SHAPES[module]
        embedding = module == "model.embed_tokens"
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"lora_embedding_{factor}" if embedding else f"lora_{factor}.weight"
            tensors[f"base_model.model.{module}.{name}"] = random(shape, seed, dtype)
    return tensors


def every(*kinds: str) -> list[str]:
    """Names of all modules whose name ends so."""
    return [name for name in SHAPES if name.rpartition(".")[2] in kinds]


def write_adapter(directory: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config or minimal_config()))
    (directory / "adapter_model.safetensors").write_bytes(save(tensors))
    return str(directory)


def reader(max_bytes: int | None = None, model: ModelConfig = MODEL, **lora: object) -> AdapterReader:
    return AdapterReader(model, LoRASection(enabled=True, **lora), "/models/tiny", max_bytes)


def value_of(read: ReadAdapter, span: Span) -> np.ndarray:
    """A float32 or float16 span as an array; bfloat16 as uint16."""
    dtype = np.dtype({"bfloat16": "uint16"}.get(span.dtype, span.dtype))
    count = span.shape[0] * span.shape[1]
    return np.fromfile(read.adapter.path, dtype, count, offset=span.offset).reshape(span.shape)


def by_module(read: ReadAdapter) -> dict[str, tuple[float, np.ndarray, np.ndarray]]:
    """Module name -> (scale, a, b), and closes."""
    found = {m.name: (m.scale, value_of(read, m.a), value_of(read, m.b)) for m in read.adapter.modules}
    read.close()
    return found
