"""Serving speed of one or more systems, interleaved in one run: `python benchmark/serving/bench.py --help`.

Every round measures every system on the same prompts, one system awake at a time; a round's ratios therefore compare
figures taken minutes apart on the same machine. Prints progress to stderr and one JSON line to stdout.

    python benchmark/serving/bench.py --model smollm2 \\
        --system ours=sglang@http://127.0.0.1:30000 \\
        --start ours="python -m sglang.launch_server --model-path smollm2 --port 30000" \\
        --system hf=transformers --baseline hf

A system without --start must already be running. `openai` is the kind of any server with /v1/completions (vLLM).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from prompts import PromptSet
from systems import HttpSystem, System, SystemFailed, TransformersSystem, spread

from sglang.benchmark.load import Prompt

Figures = dict[str, float]
LOG_DIR = Path(tempfile.gettempdir()) / "sglang-bench"
HTTP_KINDS = ("sglang", "openai")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--system", action="append", default=[], metavar="NAME=KIND[@URL]", help="sglang@URL, openai@URL, transformers")
    add("--start", action="append", default=[], metavar="NAME=COMMAND", help="start this system with a command")
    add("--baseline", help="the system others are divided by (default: the transformers one, or the last)")
    add("--model", default="smollm2", help="model of the prompts' tokenizer and of transformers (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--concurrency", type=int, nargs="+", default=[1, 16], help="closed-loop concurrencies (default: 1 16)")
    add("--output-len", type=int, default=64, help="tokens per request (default: %(default)s)")
    add("--requests-per-slot", type=int, default=2, help="requests per unit of concurrency (default: %(default)s)")
    add("--prefill-len", type=int, default=512, help="tokens of a prefill prompt (default: %(default)s)")
    add("--prefill-requests", type=int, default=4, help="(default: %(default)s)")
    add("--no-stream", action="store_true", help="ask servers for whole replies; no time to first token then")
    add("--wait-quiet", type=float, default=0, metavar="SECONDS", help="before each system, wait for an idle machine")
    add("--seed", type=int, default=0, help="order of the prompts (default: %(default)s)")
    add("--log-dir", type=Path, default=LOG_DIR, help="output of started systems (default: %(default)s)")
    add("--output-file", type=Path, help="append the JSON line to this file too")
    add("--plot", type=Path, help="write a bar chart (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if not arguments.system:
        parser.error("name at least one --system")
    return arguments


def build_systems(arguments: argparse.Namespace) -> list[System]:
    """Systems in the order given; raises SystemFailed on a description that makes no sense."""
    commands = dict(item.split("=", 1) for item in arguments.start)
    arguments.log_dir.mkdir(parents=True, exist_ok=True)
    systems: list[System] = []
    for item in arguments.system:
        name, _, description = item.partition("=")
        kind, _, url = description.partition("@")
        log, command = arguments.log_dir / f"{name}.log", commands.pop(name, None)
        if kind in HTTP_KINDS and url:
            stream = not arguments.no_stream
            systems.append(HttpSystem(name, command, log, kind=kind, url=url, stream=stream))
        elif kind == "transformers":
            systems.append(TransformersSystem(name, command, log, model=arguments.model))
        else:
            raise SystemFailed(f"--system {item}: write NAME=sglang@URL, NAME=openai@URL or NAME=transformers")
    if commands:
        raise SystemFailed(f"--start names no --system: {', '.join(commands)}")
    return systems


class Round:
    """One round's work, the same for every system: warm-up, closed loops, prefill."""

    def __init__(self, prompts: PromptSet, arguments: argparse.Namespace) -> None:
        self.warm_up = prompts.questions(2, 8)
        self.loops: dict[int, list[Prompt]] = {
            c: prompts.questions(c * arguments.requests_per_slot, arguments.output_len) for c in arguments.concurrency
        }
        self.prefill = prompts.passages(arguments.prefill_requests, arguments.prefill_len)

    async def measure(self, system: System) -> dict[str, Figures]:
        """Figures by phase: c<concurrency>, prefill."""
        phases: dict[str, Figures] = {}
        async with system.awake():
            await system.throughput(self.warm_up, len(self.warm_up))
        for concurrency, prompts in self.loops.items():
            phases[f"c{concurrency}"] = await self._phase(system, prompts, concurrency)
        phases["prefill"] = await self._phase(system, self.prefill, None)
        return phases

    async def _phase(self, system: System, prompts: list[Prompt], concurrency: int | None) -> Figures:
        async with system.awake() as meter:
            before = await system.counters()
            meter.start()
            if concurrency is None:
                figures = await system.prefill(prompts)
            else:
                figures = await system.throughput(prompts, concurrency)
            cores = meter.stop()
            after = await system.counters()
        if before and after["step"] > before["step"]:
            figures["host_share"] = (after["host"] - before["host"]) / (after["step"] - before["step"])
        return figures | {"cores_used": cores["own"], "cores_others": cores["others"]}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start, measure in rounds, stop; the report."""
    systems = build_systems(arguments)
    prompts = PromptSet(arguments.model, arguments.seed)
    rounds: list[dict[str, dict[str, Figures]]] = []
    load_before = machine.load_average()
    try:
        for system in systems:
            note(f"starting {system.name}")
            await system.start()
            async with system.awake():
                pass
        for number in range(arguments.rounds):
            work = Round(prompts, arguments)
            rounds.append({})
            for system in systems:
                if not await machine.wait_until_quiet(arguments.wait_quiet):
                    note("the machine is busy with other things; measuring all the same")
                rounds[-1][system.name] = phases = await work.measure(system)
                speeds = ", ".join(f"{phase} {f['tokens_per_s']:.1f} tok/s" for phase, f in phases.items())
                note(f"round {number + 1}/{arguments.rounds} {system.name}: {speeds}; load {machine.load_average()[0]}")
    finally:
        await asyncio.gather(*(system.stop() for system in systems))
    return report(arguments, systems, rounds, [load_before, machine.load_average()])


def spread_each(rounds: list[Figures]) -> dict[str, Any]:
    """Every figure of these rounds. Some rounds may lack one: streams that came in one piece have no gaps to time."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: spread([figures[name] for figures in rounds if name in figures]) for name in names}


def report(
    arguments: argparse.Namespace,
    systems: list[System],
    rounds: list[dict[str, dict[str, Figures]]],
    loads: list[list[float]],
) -> dict[str, Any]:
    """Figures of all rounds as min, median, max; ratios paired within each round."""
    baseline = arguments.baseline or next((s.name for s in systems if isinstance(s, TransformersSystem)), None)
    baseline = baseline or systems[-1].name
    figures, ratios = {}, {}
    for system in systems:
        mine = [r[system.name] for r in rounds]
        figures[system.name] = {phase: spread_each([r[phase] for r in mine]) for phase in mine[0]}
        if system.name != baseline:
            ratios[system.name] = {
                phase: spread(
                    [r[system.name][phase]["tokens_per_s"] / r[baseline][phase]["tokens_per_s"] for r in rounds]
                )
                for phase in mine[0]
            }
    settings = ("model", "rounds", "concurrency", "output_len", "requests_per_slot", "prefill_len", "prefill_requests")
    return {
        "benchmark": "serving",
        "commit": machine.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": machine.device(),
        "versions": {"python": platform.python_version()} | {s.name: s.version for s in systems},
        "load_average": {"before": loads[0], "after": loads[1]},
        "settings": {name: getattr(arguments, name) for name in settings} | {"stream": not arguments.no_stream},
        "baseline": baseline,
        "systems": figures,
        "ratios": ratios,
        "rounds": [
            {name: {p: round(f["tokens_per_s"], 1) for p, f in phases.items()} for name, phases in r.items()}
            for r in rounds
        ],
    }


def note(text: str) -> None:
    """Progress, for the person who waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends the run like Ctrl-C, once: systems that are frozen must still be ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run and print; 1 when a system failed."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = asyncio.run(run(arguments))
    except SystemFailed as error:
        note(str(error))
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    line = json.dumps(result)
    print(line)
    if arguments.output_file:
        with arguments.output_file.open("a") as file:
            file.write(line + "\n")
    if arguments.plot:
        from plot import plot

        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
