"""Real servers for real clients: SmolLM2 for what should make sense, a tiny random model for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import httpx
import openai
import pytest
from compat.lora_client import listing, value_of
from compat.waiting import until
from server_process import ServerProcess
from tiny_model import make_tiny_model

LONG_CONTEXT = 100_000
"""Context of the tiny model: a request may run for as long as a test wants to look at it."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a 2-layer random Llama with a byte-level tokenizer."""
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny"), context_length=LONG_CONTEXT, weight_scale=3.0))


@pytest.fixture(scope="session")
def tiny_server(tiny_model: str) -> Iterator[ServerProcess]:
    """The tiny model, two requests at a time."""
    flags = ["--max-running-requests", "2", "--max-total-tokens", str(3 * LONG_CONTEXT), "--enable-metrics"]
    with ServerProcess("--model-path", tiny_model, *flags) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_server() -> Iterator[ServerProcess]:
    """SmolLM2 as `make serve` starts it."""
    with ServerProcess("--model-path", "smollm2", "--max-total-tokens", "16384", "--enable-cache-report") as server:
        yield server


@pytest.fixture
def tiny(tiny_server: ServerProcess) -> Iterator[httpx.Client]:
    """Client of the tiny server; the test must leave the server idle."""
    with httpx.Client(base_url=tiny_server.url, timeout=60) as client:
        yield client
        assert client.get("/health").status_code == 200
        client.post("/abort_request", json={"abort_all": True})


@pytest.fixture
def smollm2(smollm2_server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI client of the SmolLM2 server."""
    with openai.OpenAI(base_url=f"{smollm2_server.url}/v1", api_key="None", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def lora_config(tiny_model: str) -> dict[str, Any]:
    return adapters.read_shape(Path(tiny_model))


@pytest.fixture(scope="session")
def lora_server(tiny_model: str) -> Iterator[ServerProcess]:
    flags = ["--enable-lora", "--max-loras-per-batch", "3", "--max-lora-rank", "8", "--enable-metrics"]
    flags += ["--max-total-tokens", "300000", "--served-model-name", "tiny:base"]
    with ServerProcess("--model-path", tiny_model, *flags) as process:
        yield process


@pytest.fixture
def lora(lora_server: ServerProcess) -> Iterator[httpx.Client]:
    """A client; afterwards nothing may be held, and every adapter goes."""
    with httpx.Client(base_url=lora_server.url, timeout=60) as http:
        yield http
        http.post("/continue_generation", json={})
        http.post("/abort_request", json={"abort_all": True})
        for adapter in listing(http):
            http.post("/unload_lora_adapter", json={"lora_name": adapter["lora_name"]})
        until(lambda: not listing(http))
        metrics = http.get("/metrics").text
        for name in ("lora_leases", "lora_double_releases_total", "lora_free_failures_total"):
            assert value_of(metrics, name) == 0, name
        assert value_of(metrics, "invariant_violations_total") == 0
