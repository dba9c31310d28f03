"""Where a step's time goes on a GPU, kernel by kernel, with the server's own scheduler and model in this process.

    python benchmark/serving/profile_step.py --cache DIR --rows 1 16 64 256 --adapters 0 1 4 --out profile.jsonl

`gpu_model` makes the model and its adapters in DIR. `step_us` is the pace of the
scheduler's turns without the profiler, what a client sees beside HTTP; `busy_us` is for how much of a profiled turn the
device has something to do. Kernels come from torch's profiler; those that start early count their wait for the one
before them, so their sum may exceed the step. A prefill is that many prompt tokens of one request, or of each of
--prompts at once, operation by operation, and `step_us` the time until every token is there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_model
import numpy as np
import torch
from gpu_server import TARGETS
from host_loop import Front

from sglang.srt.config.resolve import resolve
from sglang.srt.lora.adapter_reader import AdapterReader
from sglang.srt.lora.slots import SlotPool
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.setup import build_engine
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import prepare_server_args

KINDS = (
    ("attention", r"_decode\b|_prefill\b|attention"),
    ("LoRA A", r"shrink"),
    ("norm", r"rms_?norm"),
    ("q/k norm, rope, KV", r"rope"),
    ("activation", r"silu"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|splitk|cublas"),
    ("sampling", r"sample|argmax|softmax|scatter|_row_|draw"),
    ("step start", r"begin_decode"),
    ("copies", r"memcpy|memset|Memcpy|Memset|copy"),
)
STEPS, WARM_STEPS, PROFILED_STEPS = 60, 10, 20
PROMPT_SEED = 1
CUDA = torch.autograd.DeviceType.CUDA


class Bench:
    """An engine, its scheduler, and adapters 1, 2, …; requests are made here and results thrown away."""

    def __init__(self, made: dict[str, Any], num_adapters: int, flags: list[str], timeline: int) -> None:
        self._timeline = timeline
        args = ["--model-path", made["model"], "--skip-tokenizer-init", *flags]
        if num_adapters:
            args += ["--enable-lora", "--max-lora-rank", "16", "--max-loras-per-batch", "8"]
            args += ["--lora-target-modules", *TARGETS.split()]
        self.config = resolve(prepare_server_args(args))
        self.engine = build_engine(self.config)
        self.front = Front()
        planner = Planner(self.config.schedule, self.engine.kv, SlotPool(8 if num_adapters else 0))
        vocab = self.config.model.vocab_size
        self.scheduler = Scheduler(self.front, self.engine.runner, planner, vocab, 1, self.engine.lora)  # type: ignore[arg-type]
        reader = AdapterReader(self.config.model, self.config.lora, made["model"])
        for version, path in enumerate(made["adapters"][:num_adapters], 1):
            assert self.engine.lora is not None
            self.engine.lora.commit(version, self.engine.lora.stage(reader.read_directory(path).adapter))
        self._rng, self._next_id = np.random.default_rng(PROMPT_SEED), 0

    def submit(self, versions: list[int], prompt: int, outputs: int) -> None:
        """One request for each of these versions."""
        vocab, requests = self.config.model.vocab_size, []
        for version in versions:
            params = SamplingParams.from_dict({"max_new_tokens": outputs, "ignore_eos": True, "temperature": 0.0})
            spec = params.resolve(vocab_size=vocab, eos_ids=(), max_new_tokens=outputs, seed=self._next_id)
            ids = wire.pack(self._rng.integers(0, vocab, prompt).tolist(), "<i4")
            requests.append(wire.SubmitRequest(self._next_id, ids, spec, version_id=version))
            self._next_id += 1
        self.front.inbox.append(wire.SubmitBatch(requests))

    def _profiled(self, run: Callable[[], None], times: int) -> tuple[list[Kernel], float]:
        return profiled(run, times, self._timeline)

    def abort(self) -> None:
        """End what runs."""
        self.front.inbox.append(wire.AbortRequests(list(range(self._next_id))))
        self.scheduler.step()
        while self.scheduler.busy:
            self.scheduler.step()

    def decode(self, rows: int, num_adapters: int, context: int) -> tuple[dict[str, Any], list[Kernel]]:
        """A step of `rows` requests spread over so many adapters, `context` tokens in the middle of the measurement."""
        turns = 2 * WARM_STEPS + STEPS + PROFILED_STEPS
        versions = [1 + i % num_adapters if num_adapters else 0 for i in range(rows)]
        self.submit(versions, context - WARM_STEPS - (STEPS + PROFILED_STEPS) // 2, 4 * turns)
        while len(self.scheduler.planner.running) < rows:
            self.scheduler.step()
        times = [_seconds(self.scheduler.step) for _ in range(WARM_STEPS + STEPS)][WARM_STEPS:]
        kernels, busy_us = self._profiled(self.scheduler.step, PROFILED_STEPS)
        self.abort()
        figures = {"rows": rows, "adapters": num_adapters, "context": context}
        return figures | {"step_us": 1e6 * np.mean(times), "busy_us": busy_us}, kernels

    def prefill(self, tokens: int, num_adapters: int, prompts: int) -> tuple[dict[str, Any], list[Kernel]]:
        """The steps of so many prompts of so many tokens."""

        def turn() -> None:
            self.submit([min(num_adapters, 1)] * prompts, tokens, 1)
            while not self.scheduler.busy:
                self.scheduler.step()
            while self.scheduler.busy:
                self.scheduler.step()

        times = [_seconds(turn) for _ in range(6)][2:]
        kernels, busy_us = self._profiled(turn, 3)
        figures = {"prompt": tokens, "prompts": prompts, "adapters": num_adapters}
        return figures | {"step_us": 1e6 * np.mean(times), "busy_us": busy_us}, kernels


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


Kernel = tuple[str, float, float]
"""Name, launches a step, microseconds a step."""


def profiled(run: Callable[[], None], times: int, shown: int = 0) -> tuple[list[Kernel], float]:
    """What the device does in one `run`, the longest first; microseconds in which it does anything at all.

    Args:
        shown: so many kernels out of the middle are printed in their order, with start and end.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in trace.events():
        if event.device_type == CUDA:
            found[event.name].append(event.device_time)
            spans.append((event.time_range.start, event.time_range.end))
    if shown:
        print_timeline(trace.events(), shown)
    rows = [(name, len(us) / times, sum(us) / times) for name, us in found.items()]
    return sorted(rows, key=lambda row: -row[2]), _covered(spans) / times


def print_timeline(events: Any, shown: int) -> None:
    """Kernels one after the other: start and end in microseconds, counted from the first that is shown."""
    kernels = sorted((e for e in events if e.device_type == CUDA), key=lambda e: e.time_range.start)
    kernels = kernels[len(kernels) // 2 :][:shown]
    for event in kernels:
        start, end = (t - kernels[0].time_range.start for t in (event.time_range.start, event.time_range.end))
        print(f"    {start:9.2f} {end:9.2f} {end - start:8.2f}  {event.name[:90]}")


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kind_of(kernel: str) -> str:
    """The line of the table that a kernel belongs to."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def report(figures: dict[str, Any], kernels: list[Kernel], shown: int) -> dict[str, Any]:
    """Print a case; returns its record."""
    kinds: dict[str, list[float]] = {}
    for name, count, us in kernels:
        kind = kinds.setdefault(kind_of(name), [0.0, 0.0])
        kind[0] += count
        kind[1] += us
    print("\n" + ", ".join(f"{name} {value:.0f}" for name, value in figures.items()))
    for kind, (count, us) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        print(f"  {kind:24s} {count:7.1f} launches {us:9.1f} us  {us / count:7.1f} us each")
    for name, count, us in kernels[:shown]:
        print(f"      {us:9.1f} us {count:7.1f} x {name[:110]}")
    sys.stdout.flush()
    return figures | {"kernels": {kind: {"launches": count, "us": round(us, 1)} for kind, (count, us) in kinds.items()}}


def main() -> None:
    """Profile as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps model and adapters")
    parser.add_argument("--model", default="qwen3-1.7b", help="as in gpu.py")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192])
    parser.add_argument("--prompts", type=int, default=1, help="of each length, sent at once (default: %(default)s)")
    parser.add_argument("--kernels", type=int, default=12, help="single kernels to print of each case")
    parser.add_argument("--timeline", type=int, default=0, help="kernels to print in their order, of each case")
    parser.add_argument("--server-args", default="", help="more launch flags, as one string")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU to profile")
    with torch.inference_mode():
        bench = Bench(
            gpu_model.make(args.cache, args.model), max(args.adapters), args.server_args.split(), args.timeline
        )
        for adapters in args.adapters:
            cases = [bench.decode(rows, adapters, args.context) for rows in args.rows]
            cases += [bench.prefill(tokens, adapters, args.prompts) for tokens in args.prefill]
            for figures, kernels in cases:
                record = report(figures, kernels, args.kernels)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({"model": args.model, **record}) + "\n")


if __name__ == "__main__":
    main()
