"""Microseconds per row of `Sampler.sample`, by kind of sampling and batch size; prints a JSON line.

    python benchmark/kernels/sampler.py [--device cpu] [--threads 1] [--vocab-size 49152] [--batch 1 16]
    python benchmark/kernels/sampler.py --device cuda --vocab-size 151936 --batch 1 16 64 256

On a GPU a second line has `RowSampler`, the two kernels of captured decode steps: microseconds of a batch of
`--row-batch` rows inside a CUDA graph, logits bfloat16, beside the same batch by the operations of `Sampler` on float32
logits, host included.

The logits look like a language model's: log-probability falls with the logarithm of the rank, in a random order of ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import machine

from sglang.srt.sampling.sampler import PenaltyState, Sampler, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams

Batch = tuple[torch.Tensor, ...]
ROW_CASES = {"greedy_logprob": 0.0, "temperature_1_logprob": 1.0}
"""Temperature of the rows, by the case of `Sampler` that gives the same results."""
CALLS = 50
"""Of the kernels in one graph, which share the time that its launch takes."""
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0}, {}),
    "greedy_logprob": ({"temperature": 0}, {"return_logprob": True}),
    "temperature": ({"temperature": 0.8}, {}),
    "temperature_1_logprob": ({"temperature": 1.0}, {"return_logprob": True}),
    "top_p_0.95": ({"temperature": 0.8, "top_p": 0.95}, {}),
    "top_k_50": ({"temperature": 0.8, "top_k": 50}, {}),
    "min_p_0.05": ({"temperature": 0.8, "min_p": 0.05}, {}),
    "repetition_1.1": ({"temperature": 0.8, "repetition_penalty": 1.1}, {}),
    "top_logprobs_5": ({"temperature": 0.8}, {"return_logprob": True, "top_logprobs_num": 5}),
}


def typical_logits(size: int, vocab_size: int) -> torch.Tensor:
    """float32 [size, vocab_size]; the likeliest token has a probability of about 0.4 at temperature 1."""
    generator = np.random.default_rng(0)
    by_rank = 18.0 - 1.5 * np.log(np.arange(1, vocab_size + 1)) + generator.normal(0.0, 0.3, (size, vocab_size))
    return torch.from_numpy(generator.permuted(by_rank, axis=1).astype(np.float32))


def make_rows(size: int, vocab_size: int, device: torch.device, case: str) -> list[SamplingRow]:
    """A batch of one kind, each request with 256 tokens of output so far."""
    parameters, extras = CASES[case]
    parsed = SamplingParams.from_dict(parameters)
    rows = []
    for seed in range(size):
        spec = parsed.resolve(vocab_size=vocab_size, eos_ids=(2,), max_new_tokens=4096, seed=seed)
        output = np.random.default_rng(seed).integers(vocab_size, size=256)
        penalties = PenaltyState.create(spec, output, vocab_size, device)
        rows.append(SamplingRow(spec, len(output), penalties, **extras))
    return rows


def median_seconds(step: Callable[[], object], budget: float) -> float:
    """Median duration of `step`, called for about `budget` seconds after a warm-up."""
    for _ in range(5):
        step()
    durations: list[float] = []
    while sum(durations) < budget or len(durations) < 10:
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def measure(sampler: Sampler, size: int, case: str, budget: float) -> float:
    """Microseconds per row, results on the host included."""
    logits = typical_logits(size, sampler.vocab_size).to(sampler.device)
    rows = make_rows(size, sampler.vocab_size, sampler.device, case)

    def step() -> None:
        for row in rows:
            row.position += 1
        sampler.sample(logits, rows).to_host()

    return median_seconds(step, budget) / size * 1e6


def row_batch(size: int, vocab_size: int, temperature: float) -> Batch:
    """Arguments of `RowSampler.sample` on the GPU."""
    device = torch.device("cuda")
    logits = typical_logits(size, vocab_size).to(device, torch.bfloat16)
    heat = torch.full((size,), temperature, device=device)
    uniforms = torch.rand(size, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(0))
    tokens = torch.zeros(size, dtype=torch.int64, device=device)
    return logits, heat, uniforms, tokens, torch.zeros(size, device=device), tokens > 0


def graph_seconds(step: Callable[[], object], budget: float) -> float:
    """Median duration of `step` on the GPU, as one of `CALLS` in a graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            step()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return median_seconds(replay, budget) / CALLS


def measure_rows(vocab_size: int, sizes: list[int], budget: float) -> dict[str, dict[str, Any]]:
    """Figures of the second line: microseconds of a batch, and how fast the kernels read the logits."""
    from sglang.srt.ops.triton.sampling import RowSampler

    rows = RowSampler(max(sizes), vocab_size, torch.device("cuda"))
    mixed = Sampler(vocab_size, torch.device("cuda"))
    figures: dict[str, dict[str, Any]] = {}
    for case, temperature in ROW_CASES.items():
        for size in sizes:
            batch = row_batch(size, vocab_size, temperature)
            seconds = graph_seconds(lambda batch=batch: rows.sample(*batch), budget)  # type: ignore[misc]
            figures.setdefault(case, {})[str(size)] = {
                "row_sampler": round(seconds * 1e6, 2),
                "sampler": round(measure(mixed, size, case, budget) * size, 1),
                "gb_per_s": round(batch[0].nbytes / seconds / 1e9),
            }
    return figures


def main() -> None:
    """Parse the command line, measure every case, print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--row-batch", type=int, nargs="+", default=[1, 16, 64, 256], help="of the second line")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sampler = Sampler(arguments.vocab_size, torch.device(arguments.device))
    figures = {
        case: {str(size): round(measure(sampler, size, case, arguments.seconds), 1) for size in arguments.batch}
        for case in CASES
    }
    common = {
        "vocab_size": arguments.vocab_size,
        "threads": arguments.threads,
        "torch_device": arguments.device,
        "commit": machine.commit(),
        "device": machine.device(),
        "load_average": machine.load_average(),
        "torch": torch.__version__,
    }
    if arguments.device.startswith("cuda"):
        common["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({"benchmark": "sampler", "unit": "us/row by batch size", "figures": figures} | common))
    if arguments.device.startswith("cuda"):
        figures = measure_rows(arguments.vocab_size, arguments.row_batch, arguments.seconds)
        print(json.dumps({"benchmark": "row_sampler", "unit": "us/batch by batch size", "figures": figures} | common))


if __name__ == "__main__":
    main()
