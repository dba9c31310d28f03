"""The model-level parity schedules of test/engine/test_models_parity.py on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family_models import FAMILIES, SCHEDULES, load_ours, prompts, reference_logits, run_schedule, save_family

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, save_family(request.param, path)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_logits_equal_transformers(saved: tuple[Path, Any], schedule: str, page_size: int) -> None:
    path, reference = saved
    ids = prompts()
    for ours, tokens in zip(run_schedule(load_ours(path, page_size, "cuda"), schedule, ids), ids, strict=True):
        torch.testing.assert_close(ours, reference_logits(reference, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bfloat16_is_close(saved: tuple[Path, Any], schedule: str) -> None:
    path, reference = saved
    ids = prompts()
    actual = run_schedule(load_ours(path, 16, "cuda", torch.bfloat16), schedule, ids)
    for ours, tokens in zip(actual, ids, strict=True):
        truth = reference_logits(reference, tokens)
        assert (ours - truth).abs().mean() < 0.03 * truth.std()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_never_waits_for_the_device(saved: tuple[Path, Any]) -> None:
    """`model.forward` queues a mixed step without one synchronisation."""
    path, _ = saved
    harness = load_ours(path, 16, "cuda")
    model = harness.model
    forward = model.forward

    def guarded(ctx: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(ctx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model.forward = guarded  # type: ignore[method-assign]
    run_schedule(harness, "mixed", prompts())
