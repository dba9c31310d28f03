"""What every test shares: one thread per process, no network, and the small real model."""

from __future__ import annotations

import os

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
