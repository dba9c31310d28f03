"""A tiny policy and a few attempts for it. As a program: updates, on as many ranks as torchrun starts.

torchrun --nproc-per-node 2 trainer_cases.py MODEL OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sglang.rl import distributed
from sglang.rl.batching import MicroBatch, make_minibatches
from sglang.rl.config import Recipe, load_recipe
from sglang.rl.policy import load_policy
from sglang.rl.samples import Sample
from sglang.rl.trainer import Trainer

VOCAB = 64


def make_model(path: Path) -> Path:
    """A random model of two layers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def make_recipe(model: Path, directory: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe with everything small; keyword arguments are sections."""
    tree: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32", "lora": {"rank": 4, "alpha": 8}},
        "task": {"name": "sums"},
        "optim": {"lr": 0.01, "max_tokens": 64},
        "rollout": {"samples": 4, "temperature": 0.8},
    }
    for name, fields in sections.items():
        tree.setdefault(name, {}).update(fields)
    path = directory / "recipe.yaml"
    path.write_bytes(msgspec.yaml.encode(tree))
    return load_recipe(str(path))


def make_samples(count: int, seed: int) -> tuple[list[Sample], list[float]]:
    """Attempts of all lengths, with log-probabilities that a server might have said, and advantages."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(rng.integers(1, 12))
        samples.append(
            Sample(
                prompt_ids=rng.integers(0, VOCAB, int(rng.integers(2, 9))).tolist(),
                output_ids=rng.integers(0, VOCAB, length).tolist(),
                logprobs=(-4 - rng.random(length)).tolist(),
                versions=[0] * length,
            )
        )
    return samples, rng.normal(size=count).tolist()


def make_batches(recipe: Recipe, seed: int, count: int = 11) -> list[list[MicroBatch]]:
    """This rank's micro-batches of a step."""
    samples, advantages = make_samples(count, seed)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    optim = recipe.optim
    return make_minibatches(
        samples, advantages, count=optim.ppo_n_minibatches, max_tokens=optim.max_tokens, seed=seed, **ranks
    )


def run(model: Path, directory: Path, steps: int = 3) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The adapter after some steps, and what each step said."""
    recipe = make_recipe(model, directory, optim={"ppo_n_minibatches": 2}, loss={"kl_coef": 0.1})
    device = distributed.start()
    trainer = Trainer(load_policy(recipe.model, device, seed=0), recipe, device)
    stats = [trainer.update(make_batches(recipe, step), 0) for step in range(steps)]
    adapter = trainer.adapter()
    return adapter, stats


if __name__ == "__main__":
    found = run(Path(sys.argv[1]), Path(sys.argv[2]).parent)
    if distributed.rank() == 0:
        torch.save(found, sys.argv[2])
    distributed.stop()
