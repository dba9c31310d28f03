"""SmolLM2 on a CUDA device says what transformers says there, in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from engine.test_smollm2_parity import check_parity

import sglang

pytestmark = pytest.mark.gpu


def test_text_and_logprobs_equal_transformers(smollm2_reference: torch.nn.Module) -> None:
    flags = {"dtype": "float32", "device": "cuda", "max_total_tokens": 16384}
    with sglang.Engine(model_path="smollm2", **flags) as engine:
        check_parity(engine, copy.deepcopy(smollm2_reference).cuda(), atol=1e-4)
