"""Real servers for real clients: SmolLM2 for what should make sense, a tiny random model for everything else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
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
