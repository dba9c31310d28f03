"""Fixtures of the engine tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path: str) -> torch.nn.Module:
    """transformers' SmolLM2 in float32, by its own GGUF loader: half a minute, so once a session."""
    from transformers import AutoModelForCausalLM

    path = Path(smollm2_path)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
