"""Adapters on a CUDA device: copied to it when they get a slot, and equal to PEFT on the same device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine.lora_parity_bench import MODES, check_mixed, prompt
from engine.parity_bench import RealBench, make_checkpoint
from engine.peft_models import ALL, PeftModels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_eight_adapters_and_the_base_in_one_batch(name: str, mode: str, tmp_path: Path) -> None:
    check_mixed(name, mode, tmp_path, atol=2e-4, device="cuda", dtype="float32", mem_fraction_static=0.2)


def test_e15_base_rows_keep_every_bit(tmp_path: Path) -> None:
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    adapters = [peft.add(target_modules=[*ALL, "embed_tokens", "lm_head"])[1] for _ in range(2)]

    def base_tables(others: int) -> list[np.ndarray]:
        bench = RealBench(tmp_path, lora_slots=2, device="cuda", dtype="bfloat16", mem_fraction_static=0.2)
        for version, adapter in enumerate(adapters, start=1):
            bench.stage(version, adapter)
        for req_id in range(6):
            version = (1 + req_id // 2 % 2) * others if req_id % 2 else 0
            bench.submit(req_id, prompt(12 + req_id, req_id), 6, score_prompt=True, version_id=version)
        bench.run()
        return [row for i in range(0, 6, 2) for row in bench.results[i].input_table + bench.results[i].output_table]

    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(base_tables(0), base_tables(1), strict=True))


def test_rows_have_the_bytes_of_the_hosts_slabs(tmp_path: Path) -> None:
    """After versions have taken turns in two slots and three rows; the host's copies are page-locked."""
    peft = PeftModels(make_checkpoint("qwen3", tmp_path), tmp_path)
    bench = RealBench(tmp_path, lora_slots=2, device="cuda", dtype="bfloat16", mem_fraction_static=0.2)
    lora = bench.engine.lora
    assert lora is not None and lora._slots is not None
    for version, options in enumerate([{}, {"r": 4}, {"target_modules": ["q_proj"]}, {"r": 16}], start=1):
        bench.stage(version, peft.add(**options)[1])
        bench.submit(version, prompt(9, version), 3 + version, score_prompt=False, version_id=version)
        bench.step(version % 2)
    bench.run()
    torch.cuda.synchronize()
    held = lora._slots.versions
    assert set(bench.planner.lora_slots.versions) <= set(held) and bench.planner.lora_slots.num_evictions >= 2
    for row, version in enumerate(held):
        slab = lora._host[version].slab
        assert slab.data.is_pinned() and torch.equal(lora._slots.slabs.data[row].cpu(), slab.data)
        assert lora._slots.slabs.ranks[row] == slab.rank


def test_d8_device_memory_stays_flat(tmp_path: Path) -> None:
    peft = PeftModels(make_checkpoint("llama", tmp_path), tmp_path)
    _, adapter = peft.add()
    bench = RealBench(tmp_path, lora_slots=2, device="cuda", dtype="float32", mem_fraction_static=0.2)
    sizes = []
    for version in range(1, 60):
        bench.stage(version, adapter)
        bench.submit(version, prompt(9, version), 3, score_prompt=False, version_id=version, temperature=0.0)
        bench.run()
        sizes.append(torch.cuda.memory_allocated())
        if version > 3:
            assert bench.engine.lora is not None
            bench.engine.lora.free(version - 3)
            bench.planner.forget_version(version - 3)
    assert max(sizes[10:]) <= max(sizes[:10])
