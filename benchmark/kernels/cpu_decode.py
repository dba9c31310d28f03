"""Time of a model step on the CPU, beside transformers on the same weights; prints one JSON line.

    python benchmark/kernels/cpu_decode.py [--model smollm2] [--threads 2] [--context 128] [--batch 1 16] [--reference]

Decode is one token for every sequence of the batch, from `--context` tokens on: plan, forward and logits here,
`generate` with a static batch there; either way the clock is read once a step, after the token is chosen. Systems take
turns, and the quickest step of `--rounds` counts: other load on the machine only ever adds time. With `--threads 1` the
clock is CPU time, which a busy machine disturbs least. `--reference` runs every op's torch reference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import hf_model
import machine

from sglang.srt.config.model_config import load_model_config
from sglang.srt.config.model_path import resolve_model_path
from sglang.srt.config.sections import LoadSection
from sglang.srt.layers.attention.factory import create_attention_backend
from sglang.srt.mem_cache.kv_pool import KVPool
from sglang.srt.mem_cache.req_table import ReqTable
from sglang.srt.model_executor.forward_context import ForwardContext, StepShape
from sglang.srt.model_loader.loader import load_model
from sglang.srt.ops.linear import dense_linear

CPU = torch.device("cpu")
DECODE_STEPS = 8


def now() -> float:
    """Seconds; CPU time when torch runs on one thread."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def quickest(stamps: list[float]) -> float:
    """The shortest time between two readings of the clock."""
    return min(later - earlier for earlier, later in itertools.pairwise(stamps))


class Ours:
    """Our model and a KV pool for one batch; its sequences alternate in the pool, as decoding leaves them."""

    def __init__(self, path: str, max_tokens: int) -> None:
        config = load_model_config(path)
        self.model = load_model(config, LoadSection(path=path, dtype="float32"), CPU)
        shape = (config.num_hidden_layers, max_tokens, config.num_key_value_heads, config.head_dim)
        self.pool = KVPool(*shape, torch.float32, CPU)
        self.table = ReqTable(64, max_tokens, 1, CPU)
        self.attention = create_attention_backend(
            "torch_native", self.pool, self.table, config.num_attention_heads, CPU, config.sliding_window
        )

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """Append ids [B, n] to sequences of `past` tokens; logits of the last token of each, [B, V]."""
        batch, new = ids.shape
        total = past + new
        for slot in range(batch):
            self.table.host[slot, past:total] = np.arange(past, total) * batch + slot
        lens = np.full(batch, new, dtype=np.int32)
        positions = torch.arange(past, total).repeat(batch)
        slots = torch.arange(batch)
        locs = self.table.pages[:batch, past:total].reshape(-1).long()
        self.attention.plan(StepShape(lens, np.full(batch, total, dtype=np.int32)), slots)
        rows = torch.arange(1, batch + 1) * new - 1
        hidden = self.model.forward(ForwardContext(ids.reshape(-1), positions, locs, self.pool, self.attention))
        return self.model.compute_logits(hidden if new == 1 else hidden[rows])

    def decode(self, batch: int, context: int) -> float:
        """Seconds of the quickest decode step."""
        ids = self.step(torch.full((batch, context), 7), 0).argmax(-1, keepdim=True)
        stamps = [now()]
        for i in range(DECODE_STEPS):
            ids = self.step(ids, context + i).argmax(-1, keepdim=True)
            stamps.append(now())
        return quickest(stamps)

    def prefill(self, tokens: int) -> float:
        """Seconds for one prompt."""
        ids = torch.arange(tokens)[None] + 3
        started = now()
        self.step(ids, 0)
        return now() - started


class Theirs:
    """transformers on the same weights."""

    def __init__(self, path: str) -> None:
        self.model = hf_model.load_hf_model(path)

    @torch.inference_mode()
    def decode(self, batch: int, context: int) -> float:
        """Seconds of the quickest decode step of `generate`."""
        ids = torch.full((batch, context), 7)
        stamps: list[float] = []

        def stamp(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            stamps.append(now())
            return logits

        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=DECODE_STEPS + 1, logits_processor=[stamp]
        )
        return quickest(stamps)

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """Seconds for one prompt."""
        ids = torch.arange(tokens)[None] + 3
        started = now()
        self.model(ids, logits_to_keep=1)
        return now() - started


def best_of(rounds: int, systems: dict[str, Any], run: Callable[[Any], float]) -> dict[str, float]:
    """Least seconds of every system; they take turns."""
    best = dict.fromkeys(systems, float("inf"))
    for _ in range(rounds):
        for name, system in systems.items():
            best[name] = min(best[name], run(system))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="no CPU kernels")
    parser.add_argument("--no-transformers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.reference:
        dense_linear.kernels.clear()
    path = resolve_model_path(options.model)
    # A pool with room to spare, as a server has it.
    most = 8 * max(max(options.batch) * (options.context + DECODE_STEPS), options.prefill)
    systems: dict[str, Any] = {"ours": Ours(path, most)}
    if not options.no_transformers:
        systems["transformers"] = Theirs(path)
    report: dict[str, Any] = {
        "benchmark": "cpu_decode",
        "commit": machine.commit(),
        "device": machine.device(),
        "threads": options.threads,
        "clock": "cpu" if options.threads == 1 else "wall",
        "versions": {"torch": torch.__version__, "transformers": hf_model.transformers.__version__},
        "kernels": "reference" if options.reference else "cpu",
        "load_average": machine.load_average(),
    }
    for batch in options.batch:
        seconds = best_of(options.rounds, systems, lambda system, batch=batch: system.decode(batch, options.context))
        report[f"decode_ms_b{batch}_ctx{options.context}"] = _summary(seconds)
    seconds = best_of(options.rounds, systems, lambda system: system.prefill(options.prefill))
    report[f"prefill_ms_{options.prefill}"] = _summary(seconds)
    print(json.dumps(report))


def _summary(seconds: dict[str, float]) -> dict[str, float]:
    summary = {name: round(value * 1e3, 2) for name, value in seconds.items()}
    if "transformers" in seconds:
        summary["ratio"] = round(seconds["transformers"] / seconds["ours"], 2)
    return summary


if __name__ == "__main__":
    main()
