"""Random LoRA adapters for any served model, and adapters that can be recognised by what they make the model say.

Used by the benchmarks here and by tests. Files are as PEFT writes them: adapter_config.json and
adapter_model.safetensors, float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

Tensors = dict[str, NDArray[np.float32]]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."


def read_shape(model: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every projection of every layer, by its name in the model."""
    hidden, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    sizes = dict(zip(PROJECTIONS, ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (mlp, hidden), (mlp, hidden),
                                   (hidden, mlp)), strict=True))  # fmt: skip
    return {
        f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": size
        for i in range(config["num_hidden_layers"])
        for name, size in sizes.items()
    }


def random_adapter(config: dict[str, Any], rank: int, seed: int, scale: float = 0.05) -> Tensors:
    """A and B of every projection, normal with standard deviation `scale`."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, (outputs, inputs) in shapes(config).items():
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
            tensors[f"{PREFIX}{name}.lora_{factor}.weight"] = values
    return tensors


def telling_adapter(config: dict[str, Any], token: int, seed: int = 0) -> Tensors:
    """A random adapter under which the model says nothing but `token`.

    The embedding's part adds one large vector to every token, so the last hidden state points its way whatever the
    prompt; the output layer's part gives that direction to `token`.
    """
    rng = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    direction = rng.standard_normal(hidden).astype(np.float32)
    direction /= np.linalg.norm(direction)
    output = np.zeros((vocab, 1), np.float32)
    output[token] = 100.0
    return {
        **random_adapter(config, 1, seed),
        f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((1, vocab), np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": direction[:, None] * np.float32(1000.0),
        f"{PREFIX}lm_head.lora_A.weight": direction[None, :],
        f"{PREFIX}lm_head.lora_B.weight": output,
    }


def adapter_config(tensors: Tensors, **options: Any) -> dict[str, Any]:
    """adapter_config.json for these tensors, alpha equal to the rank; `options` replace entries."""
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    rank = min(next(iter(tensors.values())).shape)
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, **options}


def write_adapter(path: Path, tensors: Tensors, **options: Any) -> Path:
    """Write the two files into a directory, over whatever is there."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(adapter_config(tensors, **options)))
    (path / "adapter_model.safetensors").write_bytes(save(tensors))
    return path


def remove_adapter(path: Path) -> None:
    """What trainers do as soon as a load has been answered."""
    shutil.rmtree(path)
