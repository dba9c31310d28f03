"""What publishing an adapter costs: its latency, and what running streams notice of it.

    python -m sglang.launch_server --model-path smollm2 --enable-lora --max-loaded-loras 4 --port 30000
    python benchmark/weight_sync/bench.py --url http://127.0.0.1:30000 --model smollm2 [--plot sync.png]

`--streams` clients stream without end from the newest adapter. For `--seconds` nothing is published; then, for as long,
an adapter every `--interval` seconds, in the same run and against the same streams. Prints one JSON line: publish
latency, the gaps between two tokens of a stream in both phases, and requests that ended as aborts (0). Nothing is
paused, flushed or drained.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import adapters
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import machine

from sglang.benchmark.http_client import Exchange, fetch
from sglang.srt.config.model_config import load_model_config
from sglang.srt.config.model_path import resolve_model_path

TOKENS = 64
PROMPT_TOKENS = 32
SETTLE_SECONDS = 3.0


class SyncBench:
    """One run.

    Args:
        url: of the server; config: shape of its model, as config.json has it.
        rank: of the published adapters.
    """

    def __init__(self, url: str, config: dict[str, Any], rank: int, streams: int) -> None:
        self.url, self.config, self.rank, self.streams = url, config, rank, streams
        self.newest = 0
        self.phase = "warm-up"
        self.gaps: dict[str, list[float]] = {"warm-up": [], "quiet": [], "publishing": []}
        self.latencies: list[float] = []
        self.versions: set[int] = set()
        self.aborted = 0
        self.requests = 0
        self._stopping = False

    async def run(self, seconds: float, interval: float) -> None:
        """Both phases."""
        with tempfile.TemporaryDirectory(prefix="sync-") as directory:
            path = Path(directory) / "policy"
            await self._publish(path)
            clients = [asyncio.create_task(self._client(number)) for number in range(self.streams)]
            await asyncio.sleep(SETTLE_SECONDS)
            self.phase = "quiet"
            await asyncio.sleep(seconds)
            self.phase = "publishing"
            self.latencies.clear()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                await self._publish(path)
                await asyncio.sleep(interval)
            self._stopping = True
            await asyncio.gather(*clients)

    async def _publish(self, path: Path) -> None:
        number = self.newest + 1
        # Made in a thread: the clients' clocks run in this one.
        await asyncio.to_thread(self._write, path, number)
        started = time.perf_counter()
        body = {"lora_name": f"policy-v{number}", "lora_path": str(path)}
        reply = await fetch(self.url, "POST", "/load_lora_adapter", body)
        self.latencies.append(time.perf_counter() - started)
        if reply.status != 200:
            raise SystemExit(f"publish {number} failed: {reply.body!r}")
        self.newest = number

    def _write(self, path: Path, number: int) -> None:
        adapters.write_adapter(path, adapters.random_adapter(self.config, self.rank, number))

    async def _client(self, number: int) -> None:
        for turn in itertools.count():
            if self._stopping:
                return
            prompt = [(64 + 7 * number + 13 * turn + i) % self.config["vocab_size"] for i in range(PROMPT_TOKENS)]
            params = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
            lora = f"policy-v{self.newest}"
            await self._stream({"input_ids": prompt, "sampling_params": params, "stream": True, "lora_path": lora})

    async def _stream(self, body: dict[str, Any]) -> None:
        self.requests += 1
        async with Exchange(self.url, "POST", "/generate", body) as exchange:
            if exchange.status != 200:
                raise SystemExit(f"a stream got {exchange.status}: {await exchange.body()!r}")
            last, phase, reply = 0.0, self.phase, b""
            async for event in exchange.events():
                now = time.perf_counter()
                if event == b"[DONE]":
                    break
                if last and phase == self.phase:
                    self.gaps[phase].append(now - last)
                last, phase, reply = now, self.phase, event
                if self._stopping:
                    return
        meta = json.loads(reply)["meta_info"]
        self.versions.add(meta["lora_version"])
        self.aborted += meta["finish_reason"]["type"] == "abort"


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if not seconds:
        return {}
    values = np.asarray(seconds) * 1e3
    p50, p99 = np.percentile(values, [50, 99])
    return {"count": len(values), "p50": round(p50, 2), "p99": round(p99, 2), "max": round(values.max(), 2)}


def plot(bench: SyncBench, path: Path) -> None:
    """Distribution of the gaps in both phases, and of the publish latencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 3.6))
    for label, seconds in (
        ("gap between tokens, nothing published", bench.gaps["quiet"]),
        ("gap between tokens, while publishing", bench.gaps["publishing"]),
        ("publish", bench.latencies),
    ):
        values = np.sort(np.asarray(seconds)) * 1e3
        panel.plot(values, np.linspace(0, 1, len(values)), label=label)
    panel.set_xscale("log")
    panel.set_xlabel("ms")
    panel.set_ylabel("share below")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def model_shape(model: str) -> dict[str, Any]:
    """The entries of config.json that adapters need, of any model the server can serve."""
    config = load_model_config(resolve_model_path(model))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="the served model")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each phase (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between publishes (default: %(default)s)")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    bench = SyncBench(options.url, model_shape(options.model), options.rank, options.streams)
    asyncio.run(bench.run(options.seconds, options.interval))
    report = {
        "benchmark": "weight_sync",
        "commit": machine.commit(),
        "device": machine.device(),
        "model": options.model,
        "streams": options.streams,
        "rank": options.rank,
        "publish_ms": summary(bench.latencies),
        "gap_ms_quiet": summary(bench.gaps["quiet"]),
        "gap_ms_publishing": summary(bench.gaps["publishing"]),
        "requests": bench.requests,
        "versions_seen": len(bench.versions),
        "aborted": bench.aborted,
        "load_average": machine.load_average(),
    }
    print(json.dumps(report))
    if options.plot:
        plot(bench, options.plot)
    sys.exit(1 if bench.aborted else 0)


if __name__ == "__main__":
    main()
