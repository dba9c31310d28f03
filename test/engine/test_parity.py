"""Every logit of every family equals transformers' within 1e-4, whatever the scheduler does with the request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.parity_bench import FAMILIES, MODES, check_mode, make_checkpoint


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp(request.param)
    return path, make_checkpoint(request.param, path)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_all_logits_equal_transformers(checkpoint: tuple[Path, torch.nn.Module], mode: str) -> None:
    path, model = checkpoint
    check_mode(path, model, mode, atol=1e-4, device="cpu", dtype="float32")


def test_sharded_checkpoints_load_the_same(tmp_path: Path) -> None:
    model = make_checkpoint("qwen3", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_mode(tmp_path, model, "plain", atol=1e-4, device="cpu", dtype="float32")
