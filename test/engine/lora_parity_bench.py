"""A load of eight adapters and the base through the real engine, every request compared with PEFT.

Used on a CPU by test_lora_parity, on a GPU by test/gpu.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from engine.parity_bench import VOCAB, RealBench, Result, make_checkpoint
from engine.peft_models import ATTENTION, PeftModels

from sglang.srt.managers.io_struct.wire import Finish

ATOL = 1e-4
MIXED: list[dict[str, Any]] = [
    {},
    {"r": 4, "lora_alpha": 3},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["embed_tokens", "down_proj"]},
    {"target_modules": ["lm_head", "v_proj"]},
    {"use_rslora": True, "r": 16},
    {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}},
    {"layers_to_transform": [0]},
]
MODES: dict[str, dict[str, Any]] = {
    "chunked": {"chunked_prefill_size": 16, "max_total_tokens": 2048, "page_size": 4},
    "mixed": {"chunked_prefill_size": 16, "max_total_tokens": 2048, "enable_mixed_chunk": True, "depth": 1},
    "retracting": {
        "chunked_prefill_size": 16,
        "max_total_tokens": 160,
        "page_size": 1,
        "schedule_conservativeness": 0.02,
        "depth": 1,
    },
    "retracting_mixed": {
        "chunked_prefill_size": 16,
        "max_total_tokens": 160,
        "page_size": 1,
        "schedule_conservativeness": 0.02,
        "enable_mixed_chunk": True,
    },
    "few_slots": {"chunked_prefill_size": 24, "max_total_tokens": 2048, "lora_slots": 3},
}


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, size=length).tolist()


def assert_equals_peft(peft: PeftModels, name: str | None, ids: list[int], result: Result, atol: float = ATOL) -> None:
    """Every position of a greedy request whose prompt was scored or not."""
    assert result.finish is Finish.LENGTH, result.info
    want = peft.logprobs(ids + result.tokens, name)
    first, last = len(ids) - 1, len(ids) - 1 + len(result.tokens)
    np.testing.assert_allclose(np.stack(result.output_table), want[first:last], atol=atol, rtol=0)
    assert result.tokens == want[first:last].argmax(-1).tolist()
    if result.input_table:
        np.testing.assert_allclose(np.stack(result.input_table[1:]), want[:first], atol=atol, rtol=0)


def check_mixed(name: str, mode: str, path: Path, atol: float = ATOL, **flags: Any) -> None:
    """Serve 18 requests of nine versions in one mode and compare all of them."""
    model = make_checkpoint(name, path)
    peft = PeftModels(model.to(flags.get("device", "cpu")), path)
    names: list[str | None] = [None]
    bench = RealBench(path, max_running_requests=12, **{"lora_slots": 8, **MODES[mode], **flags})
    for version, options in enumerate(MIXED, start=1):
        peft_name, adapter = peft.add(**options)
        names.append(peft_name)
        bench.stage(version, adapter)
    jobs = {i: (prompt(5 + 7 * i % 40, i % 5), i % 9) for i in range(18)}
    together = 0
    for req_id, (ids, version) in jobs.items():
        bench.submit(req_id, ids, 10 + req_id, score_prompt=req_id % 3 == 0, version_id=version, temperature=0.0)
        bench.step(req_id % 2)
    while bench.scheduler.busy:
        bench.step()
        together = max(together, len({request.version_id for request in bench.planner.live}))
    for req_id, (ids, version) in jobs.items():
        assert_equals_peft(peft, names[version], ids, bench.results[req_id], atol)
    assert together >= 4
    assert (bench.planner.num_retractions > 0) == ("retracting" in mode)
    assert (bench.planner.lora_slots.num_evictions > 0) == (mode == "few_slots")
