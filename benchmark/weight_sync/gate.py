"""The gate that started the project: publish under fire, and nothing may hang, leak or lie.

    python -m sglang.launch_server --model-path DIR --enable-lora --max-loaded-loras 4 --port 30000 --enable-metrics
    python benchmark/weight_sync/gate.py --url http://127.0.0.1:30000 --model DIR [--publishes 200] [--clients 32]

Publishes `lora_v{n}` again and again, overwriting one directory in place or deleting it right after each reply, while
clients stream from the newest versions, abort, disconnect, ask for n=8 samples and send over-long prompts. Adapter n
makes the model say one token of its own, so every reply proves which version made it. Afterwards the server must hold
no lease, at most four adapters, no more memory than before, and its bug-trap counters must be 0.
Prints one JSON line; exits 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import adapters
from aftermath import left_behind, server_rss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import machine

from sglang.benchmark.http_client import Exchange, HttpProtocolError, fetch

FIRST_TOKEN = 64
"""Tokens below it may be special ones."""
MAX_LOADED = 4
LONGEST_PROMPT = 40
PUBLISH_PAUSE = 0.2
"""Seconds between two publishes at most."""
PUBLISH_SECONDS = 10.0
"""A publish that takes longer counts as hung."""
WARM_UP_PUBLISHES = 40
"""Memory is compared with what it was after so many publishes: allocators have their arenas then."""
RSS_GROWTH = 0.05
QUIET_SECONDS = 30.0


class Gate:
    """One run.

    Args:
        url: of the server; model: directory of the model it serves.
        publishes: adapters to publish; clients: requests in flight.
    """

    def __init__(self, url: str, model: Path, publishes: int, clients: int, seed: int) -> None:
        self.url, self.publishes, self.clients = url, publishes, clients
        self.config = adapters.read_shape(model)
        self.endless = min(2000, self.config["max_position_embeddings"] - LONGEST_PROMPT)
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.newest = 0
        self.latencies: list[float] = []
        self.rss: list[int] = []
        self._stopping = False

    async def run(self) -> dict[str, Any]:
        """Publish until done; the report."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="gate-") as directory:
            path = Path(directory) / "lora_1"
            await self._publish(path)
            clients = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
            while self.newest < self.publishes:
                await asyncio.sleep(self.random.uniform(0.0, PUBLISH_PAUSE))
                await self._publish(path)
            self._stopping = True
            await asyncio.wait_for(asyncio.gather(*clients), QUIET_SECONDS)
        await self._audit()
        ordered = sorted(self.latencies)
        return {
            "benchmark": "lora_gate",
            "commit": machine.commit(),
            "device": machine.device(),
            "wall_s": round(time.perf_counter() - started, 1),
            "publishes": self.newest,
            "clients": self.clients,
            "publish_ms": {"p50": _ms(ordered[len(ordered) // 2]), "max": _ms(ordered[-1])},
            "rss_mib": [self.rss[min(WARM_UP_PUBLISHES, len(self.rss) - 1)] >> 20, self.rss[-1] >> 20],
            "counts": dict(sorted(self.counts.items())),
            "violations": self.violations,
        }

    def token_of(self, name: str) -> int:
        """What adapter `lora_v{n}` says."""
        number = int(name.removeprefix("lora_v"))
        return int(FIRST_TOKEN + number % (self.config["vocab_size"] - FIRST_TOKEN))

    async def _publish(self, path: Path) -> None:
        number = self.newest + 1
        name = f"lora_v{number}"
        adapters.write_adapter(path, adapters.telling_adapter(self.config, self.token_of(name), seed=number))
        started = time.perf_counter()
        body = {"lora_name": name, "lora_path": str(path)}
        try:
            reply = await asyncio.wait_for(fetch(self.url, "POST", "/load_lora_adapter", body), PUBLISH_SECONDS)
        except asyncio.TimeoutError:
            raise SystemExit(f"publish {number} hung for {PUBLISH_SECONDS:.0f} s") from None
        self.latencies.append(time.perf_counter() - started)
        if reply.status != 200:
            raise SystemExit(f"publish {number} failed: {reply.body!r}")
        if len(reply.json()["loaded_adapters"]) > MAX_LOADED:
            self.violations.append(f"publish {number}: {len(reply.json()['loaded_adapters'])} adapters have a name")
        if self.random.random() < 0.5:
            adapters.remove_adapter(path)
        self.newest = number
        await self._check_versions()

    async def _check_versions(self) -> None:
        """Never more than the named ones and those that requests still hold."""
        listed = (await fetch(self.url, "GET", "/lora_adapters")).json()["adapters"]
        idle = [a for a in listed if a["state"] != "serving" and not a["num_holders"] and a["state"] != "freeing"]
        serving = sum(a["state"] == "serving" for a in listed)
        if serving > MAX_LOADED or idle:
            self.violations.append(f"{serving} serving, idle but in memory: {idle}")
        self.rss.append(server_rss(self.url))

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{number}")
        while not self._stopping:
            name = f"lora_v{max(1, self.newest - rng.choice((0, 0, 0, 1, 2)))}"
            act = rng.choice((self._read, self._read, self._read, self._drop, self._abort, self._samples, self._long))
            with contextlib.suppress(ConnectionError, HttpProtocolError):
                await act(name, rng)

    def _body(self, name: str, rng: random.Random, tokens: int, **fields: Any) -> dict[str, Any]:
        prompt = [
            rng.randrange(FIRST_TOKEN, self.config["vocab_size"]) for _ in range(rng.randrange(4, LONGEST_PROMPT))
        ]
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": rng.choice((0.0, 0.7))}
        return {"input_ids": prompt, "sampling_params": params, "lora_path": name, **fields}

    async def _read(self, name: str, rng: random.Random) -> None:
        body = self._body(name, rng, rng.randrange(1, 40), stream=True)
        async with Exchange(self.url, "POST", "/generate", body) as exchange:
            if exchange.status != 200:
                self._refused(exchange.status, await exchange.body())
                return
            last: dict[str, Any] = {}
            async for event in exchange.events():
                if event != b"[DONE]":
                    last = json.loads(event)
            self._check(name, last)

    async def _drop(self, name: str, rng: random.Random) -> None:
        body = self._body(name, rng, self.endless, stream=rng.random() < 0.7)
        exchange = Exchange(self.url, "POST", "/generate", body)
        await exchange.send()
        await asyncio.sleep(rng.uniform(0.0, 0.1))
        exchange.drop(reset=rng.random() < 0.5)
        self.counts["disconnect"] += 1

    async def _abort(self, name: str, rng: random.Random) -> None:
        rid = f"{name}-{rng.getrandbits(64):x}"
        request = asyncio.create_task(
            fetch(self.url, "POST", "/generate", self._body(name, rng, self.endless, rid=rid))
        )
        await asyncio.sleep(rng.uniform(0.0, 0.1))
        while not request.done():  # an abort that comes before its request finds nothing
            await fetch(self.url, "POST", "/abort_request", {"rid": rid})
            await asyncio.wait([request], timeout=0.2)
        reply = request.result()
        if reply.status == 200:
            self._check(name, reply.json())
        else:
            self._refused(reply.status, reply.body)

    async def _samples(self, name: str, rng: random.Random) -> None:
        body = self._body(name, rng, rng.randrange(1, 20))
        body["sampling_params"]["n"] = 8
        reply = await fetch(self.url, "POST", "/generate", body)
        if reply.status != 200:
            self._refused(reply.status, reply.body)
            return
        for item in reply.json():
            self._check(name, item)

    async def _long(self, name: str, rng: random.Random) -> None:
        body = self._body(name, rng, 1)
        body["input_ids"] = body["input_ids"] * (self.config["max_position_embeddings"] // 4 + 1)
        reply = await fetch(self.url, "POST", "/generate", body)
        self.counts["over_long"] += 1
        if reply.status != 400:
            self.violations.append(f"an over-long prompt got {reply.status}")

    def _refused(self, status: int, body: bytes) -> None:
        """The only refusal there may be: the version has been evicted meanwhile."""
        self.counts["evicted_name"] += 1
        if status != 400 or b"adapter_not_found" not in body:
            self.violations.append(f"status {status}: {body[:200]!r}")

    def _check(self, name: str, reply: dict[str, Any]) -> None:
        meta = reply["meta_info"]
        self.counts[f"finish_{meta['finish_reason']['type']}"] += 1
        if meta["lora_name"] != name:
            self.violations.append(f"asked for {name}, the reply names {meta['lora_name']}")
        others = set(reply["output_ids"]) - {self.token_of(name)}
        if others:
            self.violations.append(f"{name} says {self.token_of(name)}, the reply has {sorted(others)[:5]}")

    async def _audit(self) -> None:
        self.violations += await left_behind(self.url, MAX_LOADED)
        before, after = self.rss[min(WARM_UP_PUBLISHES, len(self.rss) - 1)], self.rss[-1]
        if after > before * (1 + RSS_GROWTH):
            self.violations.append(f"memory grew from {before >> 20} to {after >> 20} MiB")


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory of the served model")
    parser.add_argument("--publishes", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gate = Gate(options.url, options.model, options.publishes, options.clients, options.seed)
    report = asyncio.run(gate.run())
    print(json.dumps(report))
    sys.exit(1 if report["violations"] else 0)


if __name__ == "__main__":
    main()
