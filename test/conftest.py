"""What every test shares: one thread per process, no network, and the small real model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Set before numpy, tokenizers or torch are imported: a suite that shares its cores must not spin in OpenMP barriers.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """GGUF file of SmolLM2-135M-Instruct, installed by `make venv`."""
    from sglang.srt.config.model_path import resolve_model_path

    return resolve_model_path("smollm2")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path: str) -> Any:
    """transformers' SmolLM2 in float32, by its own GGUF loader: half a minute, so once a session."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(smollm2_path)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
