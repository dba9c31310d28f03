"""What a decode step costs the host, without a device: plan, columns, results, the message to the front.

    python benchmark/serving/host_loop.py --rows 1 16 64 256 [--profile]

The scheduler, its planner, KV manager and output processor are the server's own; the runner draws random tokens and
takes no time. A step must take well under the device's to hide beneath it. Adapters: rows are spread over `--adapters`
versions.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sglang.srt.config.sections import ScheduleSection
from sglang.srt.lora.slots import SlotPool
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.kv_manager import KVManager
from sglang.srt.model_executor.model_runner import StepInput
from sglang.srt.sampling.plan import SamplingPlan
from sglang.srt.sampling.sampler import HostSample, Sampler, row_uniforms
from sglang.srt.sampling.sampling_params import SamplingParams

VOCAB, PROMPT, PAGE = 151936, 256, 16
CPU = torch.device("cpu")


@dataclass
class Drawn:
    """A step that was never run."""

    tokens: np.ndarray

    def read(self) -> tuple[HostSample, list[list[object]]]:
        """Its results."""
        rows = len(self.tokens)
        bad = np.zeros(rows, bool)
        return HostSample(self.tokens, np.zeros(rows, np.float32), bad, {}, {}), []


class IdleRunner:
    """Takes steps as ModelRunner does, as far as the host is concerned, and runs nothing."""

    device = CPU

    def __init__(self, table: object) -> None:
        self.table = table
        self.sampler = Sampler(VOCAB, CPU)
        self.rng = np.random.default_rng(0)

    def launch(self, step: StepInput) -> Drawn:
        """The columns that a replay needs, and random tokens."""
        plan: SamplingPlan = self.sampler.plan(step.sampling)
        row_uniforms(plan, step.sampling)
        return Drawn(self.rng.integers(0, VOCAB, len(step.sample_rows)))


class Front:
    """The front's end of the channel: encodes what it would send, and counts."""

    def __init__(self) -> None:
        self.inbox: list[wire.ToBack] = []
        self.bytes = 0

    def receive(self, timeout_ms: int = 0) -> list[wire.ToBack]:
        """Messages waiting now."""
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: wire.ToFront) -> None:
        """One message."""
        self.bytes += len(wire.encoder.encode(message))


def make_scheduler(rows: int, adapters: int, steps: int) -> Scheduler:
    """A scheduler with `rows` requests, all of them past their prompt."""
    schedule = ScheduleSection(
        policy="fcfs",
        conservativeness=1.0,
        max_running_requests=rows,
        max_queued_requests=None,
        chunked_prefill_size=None,
        max_prefill_tokens=1 << 30,
        mixed_chunk=False,
        overlap=True,
        stream_interval=1,
    )
    context = PROMPT + steps + 64
    kv = KVManager(-(-rows * (context + PAGE) // PAGE), PAGE, rows, context, CPU, enable_cache=True)
    planner = Planner(schedule, kv, SlotPool(adapters) if adapters else None)
    front = Front()
    scheduler = Scheduler(front, IdleRunner(kv.table), planner, VOCAB, depth=1)  # type: ignore[arg-type]
    scheduler.control.lora.knows = lambda _: True  # type: ignore[method-assign]
    rng = np.random.default_rng(1)
    for req_id in range(rows):
        params = SamplingParams.from_dict({"max_new_tokens": steps + 32, "ignore_eos": True})
        spec = params.resolve(vocab_size=VOCAB, eos_ids=(), max_new_tokens=steps + 32, seed=req_id)
        version = 1 + req_id % adapters if adapters else 0
        ids = wire.pack(rng.integers(0, VOCAB, PROMPT).tolist(), "<i4")
        front.inbox.append(wire.SubmitBatch([wire.SubmitRequest(req_id, ids, spec, version_id=version)]))
    for _ in range(4):
        scheduler.step()
    assert len(planner.running) == rows, (len(planner.running), rows)
    return scheduler


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for rows in args.rows:
        scheduler = make_scheduler(rows, args.adapters, args.steps)
        profile = cProfile.Profile()
        if args.profile:
            profile.enable()
        times = []
        for _ in range(args.steps):
            start = time.perf_counter()
            scheduler.step()
            times.append(time.perf_counter() - start)
        profile.disable()
        row = {"rows": rows, "adapters": args.adapters, "step_us": round(float(np.median(times)) * 1e6, 1)}
        row["p99_us"] = round(float(np.quantile(times, 0.99)) * 1e6, 1)
        print(json.dumps(row), flush=True)
        if args.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(22)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
