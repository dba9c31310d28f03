"""Adapters in the real engine equal PEFT: log-probabilities of prompt and output, whatever is batched together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.lora_parity_bench import ATOL, MODES, assert_equals_peft, check_mixed, prompt
from engine.parity_bench import RealBench, make_checkpoint
from engine.peft_models import ALL, PeftModels

from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import PauseMode

FEATURES: dict[str, dict[str, Any]] = {
    "all": {},
    "q_only": {"target_modules": ["q_proj"]},
    "k": {"target_modules": ["k_proj"]},
    "v_and_up": {"target_modules": ["v_proj", "up_proj"]},
    "o_and_gate": {"target_modules": ["o_proj", "gate_proj"]},
    "down": {"target_modules": ["down_proj"]},
    "one_layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding_and_head": {"target_modules": [*ALL, "embed_tokens", "lm_head"]},
    "rslora": {"use_rslora": True, "r": 16},
    "patterns": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 12}, "alpha_pattern": {"k_proj": 40}},
}
MODELS = ["llama", "qwen2", "qwen3", "llama3_rope"]
"""llama3_rope is the one with tied weights."""


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, make_checkpoint(request.param, path)


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_equals_peft(family: tuple[Path, Any], feature: str, tmp_path: Path) -> None:
    """Output and prompt (E18), the prompt computed or found in the cache, base requests in the same steps."""
    path, model = family
    peft = PeftModels(copy.deepcopy(model), tmp_path)
    name, adapter = peft.add(**FEATURES[feature])
    bench = RealBench(path, lora_slots=1, chunked_prefill_size=16, max_total_tokens=1024)
    bench.stage(1, adapter)
    ids = prompt(37, 1)
    for req_id, (version, scored) in enumerate([(1, True), (0, True), (1, False), (0, False)]):
        bench.submit(req_id, ids, 8, score_prompt=scored, version_id=version, temperature=0.0)
        if req_id == 1:
            bench.run()
    bench.run()
    for req_id, peft_name in enumerate([name, None, name, None]):
        assert_equals_peft(peft, peft_name, ids, bench.results[req_id])
    assert bench.results[2].cached == 36
    difference = np.stack(bench.results[0].input_table[1:]) - np.stack(bench.results[1].input_table[1:])
    assert np.abs(difference).max() > 0.01, "the adapter does nothing"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_eight_adapters_and_the_base_in_one_batch(name: str, mode: str, tmp_path: Path) -> None:
    """E15, D1: any mix of versions in the same steps, each request as if alone."""
    check_mixed(name, mode, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama3_rope"])
def test_e15_base_rows_keep_every_bit(name: str, tmp_path: Path) -> None:
    """The same base requests in steps of the same shape, beside the base and beside adapters."""
    peft = PeftModels(make_checkpoint(name, tmp_path), tmp_path)
    adapters = [peft.add(target_modules=[*ALL, "embed_tokens", "lm_head"])[1] for _ in range(3)]

    def base_tables(others: list[int]) -> list[np.ndarray]:
        bench = RealBench(tmp_path, lora_slots=3, chunked_prefill_size=32, enable_mixed_chunk=True)
        for version, adapter in enumerate(adapters, start=1):
            bench.stage(version, adapter)
        for req_id in range(8):
            version = others[req_id // 2] if req_id % 2 else 0
            bench.submit(req_id, prompt(12 + req_id, req_id), 6, score_prompt=True, version_id=version, temperature=0.7)
        bench.run()
        return [row for i in range(0, 8, 2) for row in bench.results[i].input_table + bench.results[i].output_table]

    alone, beside = base_tables([0, 0, 0, 0]), base_tables([1, 2, 3, 1])
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(alone, beside, strict=True))


def test_d1_a_slot_keeps_nothing_of_its_last_version(tmp_path: Path) -> None:
    """One slot: an adapter of everything, then one of q only, then the first again (C16: not scaled twice)."""
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=1)
    names = []
    for version, modules in enumerate([[*ALL, "embed_tokens", "lm_head"], ["q_proj"]], start=1):
        name, adapter = peft.add(target_modules=modules)
        names.append(name)
        bench.stage(version, adapter)
    for req_id, version in enumerate([1, 2, 1, 2]):
        ids = prompt(20, req_id)
        bench.submit(req_id, ids, 6, score_prompt=True, version_id=version, temperature=0.0)
        bench.run()
        assert_equals_peft(peft, names[version - 1], ids, bench.results[req_id])
    assert bench.planner.lora_slots.num_evictions == 3


@pytest.mark.parametrize("depth", [0, 1])
def test_e7_versions_that_join_and_leave_a_running_batch(depth: int, tmp_path: Path) -> None:
    """Which row has which adapter changes from step to step while the others go on."""
    peft = PeftModels(make_checkpoint("qwen3", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=2, depth=depth)
    names: list[str | None] = [None]
    for version in (1, 2, 3):
        name, adapter = peft.add()
        names.append(name)
        bench.stage(version, adapter)
    bench.submit(0, prompt(9, 0), 40, score_prompt=False, version_id=1, temperature=0.0)
    for req_id in range(1, 9):
        bench.step(3)
        bench.submit(req_id, prompt(9, req_id), 2 + req_id, score_prompt=False, version_id=req_id % 4, temperature=0.0)
    bench.run()
    for req_id in range(9):
        version = 1 if req_id == 0 else req_id % 4
        assert_equals_peft(peft, names[version], prompt(9, req_id), bench.results[req_id])


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("retract", [False, True])
def test_b13_a_switch_changes_the_policy_between_two_tokens(depth: int, retract: bool, tmp_path: Path) -> None:
    """Before the reply the old version's logits; after it the new one's, on kept KV or on KV computed again."""
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=2, depth=depth)
    names = []
    for version in (1, 2):
        name, adapter = peft.add()
        names.append(name)
        bench.stage(version, adapter)
    ids = prompt(15, 0)
    bench.submit(0, ids, 16, score_prompt=False, version_id=1, temperature=0.0)
    bench.step(6)
    if retract:
        bench.call(wire.PauseCall(1, PauseMode.RETRACT))
    else:
        bench.call(wire.PauseCall(1, PauseMode.IN_PLACE))
    assert bench.call(wire.SwitchVersionCall(2, 1, 2)).success
    result = bench.results[0]
    count = len(result.tokens)
    bench.call(wire.ContinueCall(3))
    bench.run()
    old = peft.logprobs(ids + result.tokens, names[0])
    table = np.stack(result.output_table)
    first = len(ids) - 1
    np.testing.assert_allclose(table[:count], old[first : first + count], atol=ATOL, rtol=0)
    after = table[count:]
    if retract:
        new = peft.logprobs(ids + result.tokens, names[1])
    else:
        new = peft.mixed_logprobs(ids + result.tokens, names[0], names[1], first + count)
    np.testing.assert_allclose(after, new[first + count : first + len(result.tokens)], atol=ATOL, rtol=0)
    assert np.abs(after - old[first + count : first + len(result.tokens)]).max() > 0.01


def test_a_prompt_is_scored_by_one_version(tmp_path: Path) -> None:
    """Switched when half of it has been read: it is read again."""
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=2, chunked_prefill_size=16)
    names = []
    for version in (1, 2):
        name, adapter = peft.add()
        names.append(name)
        bench.stage(version, adapter)
    ids = prompt(40, 0)
    bench.submit(0, ids, 4, score_prompt=True, version_id=1, temperature=0.0)
    bench.step(2)
    assert bench.planner.partial is not None
    assert bench.call(wire.SwitchVersionCall(1, 1, 2)).success
    bench.run()
    assert_equals_peft(peft, names[1], ids, bench.results[0])


def test_e1_a_publish_over_a_shared_prefix_equals_a_cold_server(tmp_path: Path) -> None:
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=2)
    ids = prompt(60, 0)
    for version in (1, 2):
        name, adapter = peft.add()
        bench.stage(version, adapter)
        bench.submit(version, ids, 6, score_prompt=False, version_id=version, temperature=0.0)
        bench.run()
        assert bench.results[version].cached == 0
        assert_equals_peft(peft, name, ids, bench.results[version])


def test_bfloat16_is_close_to_peft(tmp_path: Path) -> None:
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=1, dtype="bfloat16")
    name, adapter = peft.add(target_modules=[*ALL, "embed_tokens", "lm_head"])
    bench.stage(1, adapter)
    ids = prompt(30, 0)
    bench.submit(0, ids, 4, score_prompt=True, version_id=1, temperature=0.0)
    bench.run()
    want = peft.logprobs(ids, name)[:-1]
    got = np.stack(bench.results[0].input_table[1:])
    base = peft.logprobs(ids, None)[:-1]
    assert np.abs(got - want).mean() < 0.1 * np.abs(base - want).mean()


def test_no_adapter_in_a_step_means_no_lora_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path)
    bench = RealBench(tmp_path, lora_slots=2)
    assert bench.engine.lora is not None
    seen: list[Any] = []
    forward = bench.engine.runner.model.forward

    def spy(ctx: Any) -> torch.Tensor:
        seen.append(ctx.lora)
        return forward(ctx)

    monkeypatch.setattr(bench.engine.runner.model, "forward", spy)
    monkeypatch.setattr(bench.engine.lora, "batch", None)
    bench.submit(0, prompt(20, 0), 4, score_prompt=True, temperature=0.0)
    bench.run()
    assert seen and not any(seen)
