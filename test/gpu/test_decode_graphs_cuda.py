"""Decode steps as graphs: the same as without them, with and without adapters, whatever is published in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.lora_parity_bench import prompt
from engine.parity_bench import VOCAB, RealBench, Result, make_checkpoint
from engine.peft_models import PeftModels

from sglang.srt.model_executor import cuda_graph, setup

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ADAPTERS: list[dict[str, Any]] = [{}, {"r": 16}, {"target_modules": ["q_proj", "down_proj"]}, {"r": 3}]
BF16 = {"device": "cuda", "dtype": "bfloat16", "mem_fraction_static": 0.1, "max_total_tokens": 8192}


class Served:
    """A checkpoint with a few adapters, served in bfloat16."""

    def __init__(self, family: str, path: Path) -> None:
        self.path = path
        self.model = make_checkpoint(family, path).cuda()
        self.peft = PeftModels(self.model, path)
        self.adapters = [self.peft.add(**options) for options in ADAPTERS]

    def bench(self, slots: int = len(ADAPTERS), **flags: Any) -> RealBench:
        bench = RealBench(self.path, depth=1, lora_slots=slots, max_running_requests=24, **{**BF16, **flags})
        for version, (_, adapter) in enumerate(self.adapters if slots else [], start=1):
            bench.stage(version, adapter)
        return bench


@pytest.fixture(scope="module", params=["qwen3_wide_heads", "qwen3", "llama"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param))


def run(bench: RealBench, count: int, versions: int, top: int = VOCAB, **params: Any) -> dict[int, Result]:
    """`count` requests of growing lengths, joining one after the other."""
    for req_id in range(count):
        ids = prompt(3 + 5 * req_id % 37, req_id)
        bench.submit(req_id, ids, 8 + req_id, score_prompt=False, version_id=req_id % (versions + 1), top=top, **params)
        bench.step(req_id % 2)
    bench.run()
    return bench.results


def close(ours: dict[int, Result], others: dict[int, Result], least: float = 0.97) -> None:
    """Nearly all tokens are the same, and log-probabilities up to the first that differs."""
    same = total = 0
    for req_id, result in ours.items():
        pairs = list(zip(result.tokens, others[req_id].tokens, strict=True))
        length = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        got, want = np.array(result.logprobs[:length]), np.array(others[req_id].logprobs[:length])
        assert np.abs(got - want).mean(initial=0.0) <= 0.02 if length == 0 else np.abs(got - want).mean() <= 0.02
        same, total = same + length, total + len(pairs)
    assert same >= least * total, (same, total)


@pytest.mark.parametrize("versions", [0, len(ADAPTERS)])
@pytest.mark.parametrize("count", [1, 5, 24])
def test_graphs_equal_operation_by_operation(served: Served, count: int, versions: int) -> None:
    graphs = run(served.bench(), count, versions, temperature=0.0)
    eager = run(served.bench(disable_cuda_graph=True), count, versions, temperature=0.0)
    close(graphs, eager, 0.9)


def test_adapters_equal_peft(served: Served) -> None:
    """Mean |dlogp| over every token of the vocabulary stays within bfloat16's noise."""
    assert_equal_to_peft(served, run(served.bench(), 20, len(ADAPTERS), temperature=0.0))


@pytest.mark.parametrize("tails", [2, len(ADAPTERS) + 1])
def test_adapters_behind_the_weights_equal_peft(served: Served, monkeypatch: pytest.MonkeyPatch, tails: int) -> None:
    monkeypatch.setattr(setup, "tail_slots", lambda *_: tails)
    monkeypatch.setattr(cuda_graph, "FEW_TAILS", 2)
    bench = served.bench()
    assert bench.engine.lora is not None and bench.engine.lora.num_tails == tails
    assert_equal_to_peft(served, run(bench, 24, len(ADAPTERS), temperature=0.0))


def assert_equal_to_peft(served: Served, results: dict[int, Result]) -> None:
    for req_id, result in results.items():
        version = req_id % (len(ADAPTERS) + 1)
        name = served.adapters[version - 1][0] if version else None
        ids = prompt(3 + 5 * req_id % 37, req_id)
        want = served.peft.logprobs(ids + result.tokens, name)[len(ids) - 1 : -1]
        got = np.stack(result.output_table)
        likely = want > -8.0
        assert np.abs(got - want)[likely].mean() < 0.06, (req_id, version)


def test_the_graphs_own_draw_is_the_samplers(served: Served) -> None:
    with_top = run(served.bench(), 12, len(ADAPTERS), temperature=0.8)
    close(run(served.bench(), 12, len(ADAPTERS), top=0, temperature=0.8), with_top, 0.95)


def test_base_traffic_has_the_bits_of_a_server_without_adapters(served: Served) -> None:
    results = [run(served.bench(slots), 16, 0, top=0, temperature=1.0) for slots in (0, len(ADAPTERS))]
    for req_id, result in results[0].items():
        assert result.tokens == results[1][req_id].tokens and result.logprobs == results[1][req_id].logprobs


def test_publish_between_replays(served: Served) -> None:
    """A slot that gets another adapter: what runs afterwards has the new one's numbers, the graph is the same."""
    bench = served.bench(slots=2, disable_radix_cache=True)
    for req_id, version in enumerate([1, 2, 3, 4, 2, 1]):
        bench.submit(req_id, prompt(9, 1), 6, score_prompt=False, version_id=version, temperature=0.0)
        bench.run()
    assert bench.planner.lora_slots.num_evictions >= 3
    first = {version: bench.results[req_id] for req_id, version in enumerate([1, 2, 3, 4])}
    assert bench.results[4].logprobs == first[2].logprobs and bench.results[5].logprobs == first[1].logprobs
    assert len({tuple(result.logprobs) for result in first.values()}) == 4
