"""Captured decode steps without a GPU: every replay runs the step's operations again, on the same addresses.

What a graph would keep (buffers, page table, words of adapters) is real; attention and sampling are the reference's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.lora_parity_bench import prompt
from engine.parity_bench import RealBench, Result, make_checkpoint
from engine.peft_models import PeftModels
from kernels.triton_interpreter import interpret_library, repair, without
from torch import Tensor

from sglang.srt.layers.attention.torch_native import TorchNativeAttention
from sglang.srt.lora import lora_manager
from sglang.srt.model_executor import cuda_graph, setup
from sglang.srt.model_executor.forward_context import StepShape
from sglang.srt.model_executor.input_buffers import HOST_COPIES, PackedColumns
from sglang.srt.ops import rope
from sglang.srt.sampling.rows import sample_rows_reference

CPU = torch.device("cpu")
ADAPTERS: list[dict[str, Any]] = [{}, {"r": 16}, {"target_modules": ["q_proj", "down_proj"]}, {"r": 3}]


class Attention(TorchNativeAttention):
    """Reads its tensors when the step runs, as kernels do."""

    def plan_decode(self, slots: Tensor, kv_lens: Tensor) -> None:
        lens = kv_lens.numpy().astype(np.int32)
        self.plan(StepShape(np.ones_like(lens), lens), slots)


class Replay:
    """Stands in for a CUDAGraph."""

    count = 0

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        run()

    def replay(self) -> None:
        Replay.count += 1
        self.run()

    def pool(self) -> int:
        return 1


def begin_decode(
    slots: Tensor, positions: Tensor, locs: Tensor, last_tokens: Tensor, pages: Tensor, page_size: int, ids: Tensor
) -> None:
    pages[slots, positions // page_size] = (locs // page_size).int()
    ids.copy_(last_tokens[slots])


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    decode_step = importlib.import_module("sglang.srt.ops.triton.decode_step")
    monkeypatch.setattr(decode_step, "begin_decode", begin_decode)
    monkeypatch.setattr(cuda_graph, "capture_graph", lambda run, _: Replay(run))
    monkeypatch.setattr(lora_manager, "takes_slabs", lambda *_: True)
    monkeypatch.setattr(Replay, "count", 0)


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> PeftModels:
    path = tmp_path_factory.mktemp("qwen3")
    peft = PeftModels(make_checkpoint("qwen3", path), path)
    peft.checkpoint = path  # type: ignore[attr-defined]
    return peft


def make_bench(peft: PeftModels, graphs: tuple[int, ...], adapters: list[Any], slots: int, **flags: Any) -> RealBench:
    path: Path = peft.checkpoint  # type: ignore[attr-defined]
    options = {"max_running_requests": 12, "max_total_tokens": 2048, "page_size": 4, **flags}
    bench = RealBench(path, depth=1, lora_slots=slots, **options)
    runner = bench.engine.runner
    runner.attention = Attention(bench.engine.pool, bench.engine.kv.table, CPU)
    if graphs:
        runner.sampler.draw_rows = sample_rows_reference
        runner.capture(runner.attention, graphs, torch.float32)
    for version, (_, adapter) in enumerate(adapters, start=1):
        bench.stage(version, adapter)
    return bench


def load(bench: RealBench, versions: int, req_ids: Sequence[int] = range(11), **params: Any) -> dict[int, Result]:
    """Requests that join one after the other; the results of all so far."""
    for req_id in req_ids:
        ids = prompt(3 + 5 * req_id % 37, req_id)
        version = req_id % (versions + 1)
        bench.submit(req_id, ids, 8 + req_id, score_prompt=req_id % 5 == 4, version_id=version, **params)
        bench.step(req_id % 2)
    bench.run()
    return bench.results


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("versions", [0, len(ADAPTERS)])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.7}])
def test_graphs_equal_operation_by_operation(
    peft: PeftModels, versions: int, page_size: int, params: dict[str, Any]
) -> None:
    adapters = [peft.add(**options) for options in ADAPTERS[:versions]]
    results = []
    for graphs in ((1, 3, 12), ()):
        bench = make_bench(peft, graphs, adapters, versions, page_size=page_size)
        results.append(load(bench, versions, **params))
    assert Replay.count > 10
    for req_id, result in results[0].items():
        other = results[1][req_id]
        assert result.tokens == other.tokens and result.finish == other.finish
        np.testing.assert_allclose(result.logprobs, other.logprobs, atol=2e-5, rtol=0)
        np.testing.assert_allclose(np.stack(result.output_table), np.stack(other.output_table), atol=2e-5, rtol=0)


def test_adapters_in_slabs_equal_peft(peft: PeftModels) -> None:
    adapters = [peft.add(**options) for options in ADAPTERS]
    results = load(make_bench(peft, (2, 12), adapters, len(adapters)), len(adapters), temperature=0.0)
    assert_equal_to_peft(peft, adapters, results)


def assert_equal_to_peft(peft: PeftModels, adapters: list[Any], results: dict[int, Result]) -> None:
    for req_id, result in results.items():
        version = req_id % (len(adapters) + 1)
        ids = prompt(3 + 5 * req_id % 37, req_id)
        want = peft.logprobs(ids + result.tokens, adapters[version - 1][0] if version else None)[len(ids) - 1 : -1]
        np.testing.assert_allclose(np.stack(result.output_table), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("tails", [2, len(ADAPTERS) + 1])
def test_adapters_behind_the_weights_equal_peft(peft: PeftModels, monkeypatch: pytest.MonkeyPatch, tails: int) -> None:
    """Steps of the first slots alone take the extended weights, as much as they need; others find A in the slabs."""
    monkeypatch.setattr(setup, "takes_slabs", lambda *_: True)
    monkeypatch.setattr(setup, "tail_slots", lambda *_: tails)
    monkeypatch.setattr(cuda_graph, "SKINNY_ROWS", 2)
    monkeypatch.setattr(cuda_graph, "FEW_TAILS", 2)
    adapters = [peft.add(**options) for options in ADAPTERS]
    bench = make_bench(peft, (2, 4, 12), adapters, len(adapters))
    assert bench.engine.lora is not None and bench.engine.lora.num_tails == tails
    graphs = bench.engine.runner._graphs
    assert graphs is not None
    kinds: list[cuda_graph.Kind] = []
    kind_of = graphs._kind
    monkeypatch.setattr(graphs, "_kind", lambda *args: kinds.append(kind_of(*args)) or kinds[-1])
    load(bench, len(adapters), temperature=0.0)
    results = load(bench, len(adapters), [16, 21, 26], temperature=0.0)  # all of the first version
    assert_equal_to_peft(peft, adapters, results)
    kind = cuda_graph.Kind
    assert {kind.ANY_SLOTS, kind.FEW_TAILS} <= set(kinds)
    assert (kind.ALL_TAILS in kinds) == (tails > len(ADAPTERS))


def test_heads_of_the_compiled_kernels_width_equal_peft(peft: PeftModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one operation for bias, norms, rotation and KV write, as its reference computes it."""
    adapters = [peft.add(**options) for options in ADAPTERS]
    bench = make_bench(peft, (2, 12), adapters, len(adapters))
    rotary = bench.engine.runner.model.rotary  # type: ignore[attr-defined]
    rotary._table = rotary._all_angles(256)
    calls = []
    monkeypatch.setattr(rope.fused, "qk_norm_rope", _counted(rope.fused.qk_norm_rope, calls))
    results = load(bench, len(adapters), temperature=0.0)
    assert len(calls) > 20
    for req_id, result in results.items():
        version = req_id % (len(adapters) + 1)
        ids = prompt(3 + 5 * req_id % 37, req_id)
        want = peft.logprobs(ids + result.tokens, adapters[version - 1][0] if version else None)[len(ids) - 1 : -1]
        np.testing.assert_allclose(np.stack(result.output_table), want, atol=2e-4, rtol=0)


def _counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return call


def test_embedding_and_head_adapters_are_left_to_eager_steps(peft: PeftModels) -> None:
    adapters = [peft.add(target_modules=["embed_tokens", "lm_head", "v_proj"]), peft.add()]
    bench = make_bench(peft, (1, 12), adapters, 2)
    for version, replays in ((1, False), (2, True), (0, True)):
        before = Replay.count
        bench.submit(version, prompt(9, version), 6, score_prompt=False, version_id=version, temperature=0.0)
        bench.run()
        assert (Replay.count > before) == replays
        name = adapters[version - 1][0] if version else None
        ids, result = prompt(9, version), bench.results[version]
        want = peft.logprobs(ids + result.tokens, name)[len(ids) - 1 : -1]
        np.testing.assert_allclose(np.stack(result.output_table), want, atol=2e-4, rtol=0)


def test_rows_that_report_only_their_token_need_no_sampler(peft: PeftModels, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(peft, (1, 4, 12), [], 0)
    wanted = load(make_bench(peft, (), [], 0), 0, temperature=1.3)
    sampled: list[int] = []
    sampler = bench.engine.runner.sampler
    monkeypatch.setattr(sampler, "sample", _counted(sampler.sample, sampled))
    results = load(bench, 0, temperature=1.3, top=0)
    assert len(sampled) <= 11  # the last chunk of each prompt
    for req_id, result in results.items():
        assert result.tokens == wanted[req_id].tokens
        np.testing.assert_allclose(result.logprobs, wanted[req_id].logprobs, atol=2e-5, rtol=0)


def test_base_rows_run_the_graph_without_adapters(peft: PeftModels) -> None:
    adapters = [peft.add()]
    bench, alone = make_bench(peft, (12,), adapters, 1), make_bench(peft, (12,), [], 0)
    results = load(bench, 0, temperature=1.0, top=0), load(alone, 0, temperature=1.0, top=0)
    for req_id, result in results[0].items():
        assert result.tokens == results[1][req_id].tokens and result.logprobs == results[1][req_id].logprobs


def test_publish_between_replays(peft: PeftModels) -> None:
    adapters = [peft.add() for _ in range(4)]
    bench = make_bench(peft, (1,), adapters, 2, disable_radix_cache=True)
    for req_id, version in enumerate([1, 2, 3, 4, 2, 1]):
        bench.submit(req_id, prompt(9, 1), 6, score_prompt=False, version_id=version, temperature=0.0)
        bench.run()
    assert bench.planner.lora_slots.num_evictions >= 3
    first = [bench.results[req_id].logprobs for req_id in range(4)]
    assert bench.results[4].logprobs == first[1] and bench.results[5].logprobs == first[0]
    assert len({tuple(logprobs) for logprobs in first}) == 4


def test_columns_travel_at_fixed_addresses_and_do_not_overwrite_each_other() -> None:
    columns = PackedColumns({"a": (np.int32, 3), "b": (np.float64, 2), "c": (np.bool_, 5)}, CPU)
    pointers = {name: tensor.data_ptr() for name, tensor in columns.device.items()}
    assert all(pointer % 16 == pointers["a"] % 16 for pointer in pointers.values())
    pending = []
    for step in range(HOST_COPIES - 1):
        columns.device["a"].fill_(step)
        columns.device["b"].fill_(step + 0.5)
        pending.append(columns.download())
    for step, arrived in enumerate(pending):
        found = arrived.wait()
        assert found["a"].tolist() == [step] * 3 and found["b"].tolist() == [step + 0.5] * 2
    host = columns.next()
    host["a"][:], host["c"][:] = 7, True
    columns.upload()
    assert columns.device["a"].tolist() == [7] * 3 and columns.device["c"].all()
    assert {name: tensor.data_ptr() for name, tensor in columns.device.items()} == pointers


@pytest.mark.parametrize(("rows", "page_size"), [(1, 1), (5, 4), (70, 16)])
def test_the_first_kernel_of_a_step(rows: int, page_size: int) -> None:
    name = "sglang.srt.ops.triton.decode_step"
    rng = np.random.default_rng(rows)
    slots = torch.from_numpy(rng.permutation(80)[:rows])
    positions = torch.from_numpy(rng.integers(0, 20 * page_size, rows))
    locs = torch.from_numpy(rng.integers(0, 900, rows))
    last_tokens, pages = torch.arange(80) * 3, torch.full((80, 20), -1, dtype=torch.int32)
    ids, want_ids, want_pages = (
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
        pages.clone(),
    )
    begin_decode(slots, positions, locs, last_tokens, want_pages, page_size, want_ids)
    with pytest.MonkeyPatch.context() as patch:
        interpret_library(patch)
        repair(patch)
        with without(name):
            patch.setenv("TRITON_INTERPRET", "1")
            module = importlib.import_module(name)
            module.begin_decode(slots, positions, locs, last_tokens, pages, page_size, ids)
    assert torch.equal(ids, want_ids) and torch.equal(pages, want_pages)
