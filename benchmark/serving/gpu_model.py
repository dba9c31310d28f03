"""Makes what `gpu.py` serves: a model of a published model's exact shape with random weights, and adapters for it.

    python benchmark/serving/gpu_model.py --cache DIR --model qwen3-1.7b

`gpu.py` runs it as a process of its own, so that the GPU memory it takes is free again before a server starts. Weights
are drawn on a GPU when there is one (seconds instead of a minute). Prints one JSON line: {"model": …, "adapters": […]}.
What exists already is left alone: a directory is made under another name and gets its own when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weight_sync"))

import adapters

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    # For trying the benchmark out where there is no GPU.
    "tiny": QWEN3
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 4096,
    },
}
WEIGHT_STD = 0.02
ADAPTERS, RANK, ALPHA, ADAPTER_STD = 8, 16, 32, 0.01
MODEL_SEED = 0


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint; one-dimensional ones are norms."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    table = (config["vocab_size"], hidden)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = table
    found |= {f"{name}.weight": shape for name, shape in adapters.shapes(config).items()}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    for layer in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}.weight": (size,) for name, size in norms.items()}
    return found


def make_model(path: Path, config: dict[str, Any]) -> Path:
    """config.json and model.safetensors (bfloat16) in `path`, unless they are there; no tokenizer."""
    text = json.dumps(config, indent=1)
    existing = path / "config.json"
    if existing.exists() and existing.read_text() == text:
        return path
    draft = _draft(path)
    _save(_random_weights(config), draft / "model.safetensors")
    (draft / "config.json").write_text(text)
    return _publish(draft, path)


def make_adapters(directory: Path, config: dict[str, Any], count: int = ADAPTERS, rank: int = RANK) -> list[Path]:
    """`count` adapters of all seven projections, as PEFT writes them, bfloat16; those that exist are kept."""
    return [_make_adapter(directory / f"rank{rank}-{seed}", config, rank, seed) for seed in range(count)]


def _make_adapter(path: Path, config: dict[str, Any], rank: int, seed: int) -> Path:
    if path.exists():
        return path
    import torch

    draft = _draft(path)
    # Both factors are random: with B = 0, as training starts, a server could skip the adapter unnoticed.
    tensors = adapters.random_adapter(config, rank, seed, scale=ADAPTER_STD)
    _save({name: torch.from_numpy(value).bfloat16() for name, value in tensors.items()},
          draft / "adapter_model.safetensors")  # fmt: skip
    options = {"lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM"}
    (draft / "adapter_config.json").write_text(json.dumps(adapters.adapter_config(tensors, **options)))
    return _publish(draft, path)


def _random_weights(config: dict[str, Any]) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(MODEL_SEED)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(std=WEIGHT_STD, generator=generator).cpu()

    return {name: tensor(shape) for name, shape in weight_shapes(config).items()}


def _save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _draft(path: Path) -> Path:
    draft = path.with_name(path.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _publish(draft: Path, path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return draft.rename(path)


def make(cache: Path, model: str) -> dict[str, Any]:
    """The model named by a shape, or the directory `model` itself, and its adapters below `cache`."""
    path = make_model(cache / model, SHAPES[model]) if model in SHAPES else Path(model).resolve()
    config = adapters.read_shape(path)
    made = make_adapters(cache / f"{path.name}-adapters", config)
    return {"model": str(path), "vocab_size": config["vocab_size"], "adapters": [str(p) for p in made]}


def main() -> None:
    """Make and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps what is made")
    parser.add_argument("--model", default="qwen3-1.7b", help=f"{', '.join(SHAPES)}, or the directory of a model")
    arguments = parser.parse_args()
    print(json.dumps(make(arguments.cache.resolve(), arguments.model)))


if __name__ == "__main__":
    main()
