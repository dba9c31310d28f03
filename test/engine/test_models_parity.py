"""Every family's logits equal transformers', at every position, however the scheduler cuts the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family_models import (
    FAMILIES,
    SCHEDULES,
    VOCAB,
    load_ours,
    prompts,
    reference_logits,
    run_schedule,
    save_family,
)

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each family's directory and transformers' model, made once."""
    root = tmp_path_factory.mktemp("families")
    return {name: (root / name, save_family(name, root / name)) for name in FAMILIES}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(saved: dict, family: str, schedule: str, page_size: int) -> None:
    path, reference = saved[family]
    ids = prompts()
    for ours, tokens in zip(run_schedule(load_ours(path, page_size), schedule, ids), ids, strict=True):
        torch.testing.assert_close(ours, reference_logits(reference, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_batched_decode_equals_transformers(saved: dict, batch: int) -> None:
    """Row counts on both sides of every branch of the CPU's linear kernel."""
    path, reference = saved["llama"]
    ids = prompts(tuple(range(4, 4 + batch)))
    for ours, tokens in zip(run_schedule(load_ours(path), "uneven", ids), ids, strict=True):
        torch.testing.assert_close(ours, reference_logits(reference, tokens), rtol=0, atol=TOLERANCE)


def test_sharded_checkpoint_loads_the_same(saved: dict, tmp_path: Path) -> None:
    _, reference = saved["qwen2"]
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = prompts((19,))
    ours = run_schedule(load_ours(tmp_path), "one-shot", ids)[0]
    torch.testing.assert_close(ours, reference_logits(reference, ids[0]), rtol=0, atol=TOLERANCE)


def test_a_neighbour_that_is_nan_stays_alone(saved: dict) -> None:
    """One sequence's KV turns NaN: the others' logits do not change by a bit."""
    path, _ = saved["llama"]
    ids = prompts((30, 12, 18, 6))

    def last_logits(poison: bool) -> list[torch.Tensor]:
        harness = load_ours(path, page_size=4)
        sequences = [harness.open() for _ in ids]
        harness.step(*[(s, t[:-1]) for s, t in zip(sequences, ids, strict=True)])
        if poison:
            rows = harness.table.locations(0, 0, len(ids[0]) - 1)
            harness.pool.data[:, :, rows] = float("nan")
        return harness.step(*[(s, t[-1:]) for s, t in zip(sequences, ids, strict=True)])

    clean, poisoned = last_logits(False), last_logits(True)
    assert poisoned[0].isnan().all()
    for a, b in zip(clean[1:], poisoned[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_is_close(saved: dict, family: str) -> None:
    path, reference = saved[family]
    ids = prompts()
    expected = [reference_logits(reference, tokens) for tokens in ids]
    actual = run_schedule(load_ours(path, dtype=torch.bfloat16), "mixed", ids)
    for ours, truth in zip(actual, expected, strict=True):
        assert (ours - truth).abs().mean() < 0.03 * truth.std()


@pytest.mark.slow
def test_smollm2_gguf_equals_transformers(smollm2_path: str, smollm2_reference: torch.nn.Module) -> None:
    """The embedded model, read by transformers' own GGUF loader."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 49000, (40,), generator=generator).tolist()
    harness = load_ours(Path(smollm2_path))
    sequence = harness.open()
    ours = torch.cat([harness.step((sequence, ids[:33]))[0], *(harness.step((sequence, [i]))[0] for i in ids[33:])])
    torch.testing.assert_close(ours, reference_logits(smollm2_reference, ids), rtol=0, atol=TOLERANCE)


def test_vocabulary_of_the_families_fills_whole_blocks() -> None:
    """Otherwise the parity tests would not reach the cut product at all."""
    assert VOCAB % 32 == 0
