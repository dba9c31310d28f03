"""Up to 64 adapters in steps of 1 to 256 rows: graphs beside operation by operation, and both beside PEFT.

The model and its adapters have bfloat16's numbers, and PEFT computes with them in float32: what is left between the two
is the noise of bfloat16 sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.lora_parity_bench import prompt
from engine.parity_bench import VOCAB, RealBench, Result
from engine.peft_models import ALL, PeftModels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NUM_ADAPTERS, RANK, ROWS = 64, 16, 256
RANKS = (1, 3, 8, 16)
TARGETS = (ALL, ["q_proj", "v_proj"], ["o_proj", "down_proj"], ["k_proj", "gate_proj", "up_proj"])
NOISE = 0.01
"""Mean |dlogp| that bfloat16 may cause."""
NEW_TOKENS, LEAST_REQUESTS = 6, 40
"""Tokens of a request, and requests over which a mean is taken, however few run together."""


class Crowd:
    """A checkpoint and its adapters 1, 2, ..."""

    def __init__(self, path: Path, device: str = "cuda") -> None:
        import transformers

        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.Qwen3Config(
            **sizes, head_dim=64, num_hidden_layers=3, vocab_size=VOCAB, initializer_range=0.045, bos_token_id=0
        )
        model = transformers.Qwen3ForCausalLM(config).eval().float()
        round_to_bfloat16(model)
        model.save_pretrained(path)
        self.path = path
        self.peft = PeftModels(model.to(device), path)
        options = [
            {"r": RANKS[i % 4], "lora_alpha": max(1, RANKS[i % 4] // 4), "target_modules": TARGETS[i // 4 % 4]}
            for i in range(NUM_ADAPTERS)
        ]
        self.adapters = [self.peft.add(**option) for option in options]
        round_to_bfloat16(model)

    def bench(self, **flags: Any) -> RealBench:
        limits = {"max_running_requests": ROWS, "max_total_tokens": 1 << 15, "max_lora_rank": RANK}
        kind = {"device": "cuda", "dtype": "bfloat16", "mem_fraction_static": 0.1}
        bench = RealBench(self.path, depth=1, lora_slots=NUM_ADAPTERS, **{**kind, **limits, **flags})
        for version, (_, adapter) in enumerate(self.adapters, start=1):
            bench.stage(version, adapter)
        return bench

    def run(self, bench: RealBench, count: int, versions: int, first: int) -> dict[int, Result]:
        """Requests of `versions` adapters and the base, `count` at a time, each under its number."""
        total = max(count, LEAST_REQUESTS)
        for start in range(0, total, count):
            for i in range(start, min(start + count, total)):
                bench.submit(
                    first + i,
                    self.prompt(i),
                    NEW_TOKENS,
                    score_prompt=False,
                    version_id=self.version(i, versions),
                    top=0,
                    temperature=0.0,
                )
            bench.run()
        return {i: bench.results[first + i] for i in range(total)}

    def version(self, i: int, versions: int) -> int:
        return (i + 1) % (versions + 1)

    def prompt(self, i: int) -> list[int]:
        return prompt(3 + 5 * i % 37, i)

    def wanted(self, i: int, versions: int, tokens: list[int]) -> np.ndarray:
        """PEFT's log-probabilities of the tokens of request i."""
        version, ids = self.version(i, versions), self.prompt(i)
        name = self.adapters[version - 1][0] if version else None
        table = self.peft.logprobs(ids + tokens, name)[len(ids) - 1 : -1]
        return table[np.arange(len(tokens)), tokens]


def round_to_bfloat16(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    return Crowd(tmp_path_factory.mktemp("crowd"))


@pytest.fixture(scope="module")
def graphs(crowd: Crowd) -> RealBench:
    return crowd.bench()


@pytest.fixture(scope="module")
def eager(crowd: Crowd) -> RealBench:
    return crowd.bench(disable_cuda_graph=True)


@pytest.mark.parametrize("versions", [1, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 33, 64, 65, 130, 256])
def test_graphs_equal_eager_and_peft(
    crowd: Crowd, graphs: RealBench, eager: RealBench, count: int, versions: int
) -> None:
    first = (count * 100 + versions) * 1000
    ours = crowd.run(graphs, count, versions, first)
    others = crowd.run(eager, count, versions, first)
    noise, gap, changed = [], [], []
    for i, result in ours.items():
        noise.append(np.abs(crowd.wanted(i, versions, result.tokens) - result.logprobs))
        length = next(
            (n for n, (a, b) in enumerate(zip(result.tokens, others[i].tokens, strict=True)) if a != b), NEW_TOKENS
        )
        gap.append(np.abs(np.array(result.logprobs[:length]) - np.array(others[i].logprobs[:length])))
        changed.append(length < NEW_TOKENS)
    assert np.concatenate(noise).mean() <= NOISE
    assert np.concatenate(gap).mean() <= NOISE
    assert np.mean(changed) <= 0.05  # where two tokens are as likely as bfloat16 can tell


def test_adapters_matter(crowd: Crowd) -> None:
    """Or the others would prove nothing: an adapter changes far more than bfloat16 does."""
    tokens = prompt(NEW_TOKENS, 7)
    base = crowd.peft.logprobs(tokens, None)
    gaps = [np.abs(crowd.peft.logprobs(tokens, name) - base).mean() for name, _ in crowd.adapters]
    assert min(gaps) > 2 * NOISE and np.median(gaps) > 10 * NOISE
