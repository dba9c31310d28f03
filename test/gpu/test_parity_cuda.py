"""The parity tests of test/engine/test_parity.py on a CUDA device: float32 without TF32, and bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from engine.parity_bench import FAMILIES, MODES, check_mode, make_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp(request.param)
    return path, make_checkpoint(request.param, path).cuda()


@pytest.mark.parametrize("mode", sorted(MODES))
def test_float32_equals_transformers(checkpoint: tuple[Path, torch.nn.Module], mode: str) -> None:
    path, model = checkpoint
    check_mode(path, model, mode, atol=2e-4, device="cuda", dtype="float32", mem_fraction_static=0.2)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_bfloat16_is_close_to_transformers(checkpoint: tuple[Path, torch.nn.Module], mode: str) -> None:
    path, model = checkpoint
    flags = {"device": "cuda", "dtype": "bfloat16", "mem_fraction_static": 0.2}
    check_mode(path, model, mode, atol=0.05, rounded=copy.deepcopy(model).bfloat16(), **flags)
