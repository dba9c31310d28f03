"""What adapter tests ask of a server: loads, generations, listings, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import httpx

PROMPT = [70, 80, 90]
SHORT = {"max_new_tokens": 4, "ignore_eos": True, "temperature": 0.0}
ENDLESS = {"max_new_tokens": 90_000, "ignore_eos": True, "temperature": 0.0}


def value_of(metrics: str, name: str) -> float:
    (line,) = (line for line in metrics.splitlines() if line.startswith(f"sglang:{name}{{"))
    return float(line.rsplit(" ", 1)[1])


def listing(client: httpx.Client) -> list[dict[str, Any]]:
    return client.get("/lora_adapters").json()["adapters"]


def say(config: dict[str, Any], path: Path, token: int) -> Path:
    return adapters.write_adapter(path, adapters.telling_adapter(config, token))


def load(client: httpx.Client, name: str, path: Path, **fields: Any) -> httpx.Response:
    return client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def generate(client: httpx.Client, lora: Any = None, **fields: Any) -> Any:
    body = {"input_ids": PROMPT, "sampling_params": SHORT, "lora_path": lora, **fields}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def tokens_of(reply: dict[str, Any]) -> set[int]:
    return set(reply["output_ids"])
