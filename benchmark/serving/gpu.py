"""Every published table for our server on one GPU, in one command: decode, prefill, streaming, publishing, start-up.

    python benchmark/serving/gpu.py --out results [--model qwen3-1.7b|DIR] [--only decode,sync] [--cache DIR]
    python benchmark/serving/gpu.py --out results --cache DIR --url http://127.0.0.1:30000   # one that runs, e.g. stock

Makes a random model of Qwen3-1.7B's shape and rank-16 adapters (`gpu_model`), starts our server with and without
adapters (`gpu_server`), and runs the cases (`gpu_cases`) with a load generator of several processes (`gpu_load`,
`gpu_client`). Each finished case is one JSON line, on standard output and in OUT/results.jsonl; at the end tables
(`gpu_tables`) go to OUT/tables.md and charts (`plot_gpu`) beside it, next to stock's figures (`reference_numbers`).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import Bench, Settings
from gpu_load import LoadFailed
from gpu_model import SHAPES
from gpu_server import COMMON_FLAGS, LORA_FLAGS, Server, ServerFailed, environment, import_seconds
from gpu_tables import tables

from sglang.benchmark.http_client import HttpProtocolError

CASES = ("startup", "decode", "adapters", "prefill", "streaming", "sync", "plain")
NEED_ADAPTERS = ("adapters", "sync")
MODEL_MAKER = Path(__file__).with_name("gpu_model.py")
FAILURES = (LoadFailed, ServerFailed, HttpProtocolError, OSError, RuntimeError, subprocess.SubprocessError)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Settings()
    add(
        "--out",
        type=Path,
        default=Path("gpu-results"),
        help="directory for results, logs, charts (default: %(default)s)",
    )
    add("--cache", type=Path, help="directory that keeps the model and adapters (default: a temporary one)")
    add("--model", default="qwen3-1.7b", help=f"{', '.join(SHAPES)}, or a model's directory (default: %(default)s)")
    add("--make-only", action="store_true", help="make model and adapters in --cache, say where they are, stop")
    add("--only", type=_names, default=CASES, metavar="CASE,…", help=f"of {','.join(CASES)} (default: all)")
    add("--url", help="measure a server that runs already; it must serve the model of --model and --cache")
    add("--name", help="of the server in the records (default: lora and plain, or given for --url)")
    add("--server-args", default="", help="more launch flags as one string; with --url, those it was started with")
    add("--concurrency", type=int, nargs="+", default=default.concurrencies, help="(default: 1 16 64 256)")
    add("--requests", type=int, default=default.requests,
        help="requests per unit of concurrency, below 256 (default: %(default)s)")  # fmt: skip
    for name in ("prompt_tokens", "output_tokens", "prefill_tokens", "sync_tokens"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name), help="(default: %(default)s)")
    add("--prefill-requests", type=int, default=default.prefill_requests, help="(default: %(default)s)")
    add("--stream-concurrency", type=int, default=default.stream_concurrency, help="(default: %(default)s)")
    add("--sync-rounds", type=int, default=default.sync_rounds, help="publishes of each kind (default: %(default)s)")
    add("--sync-streams", type=int, default=default.sync_streams, help="(default: %(default)s)")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no case after so long")
    return parser.parse_args(argv)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{','.join(unknown)}: choose of {','.join(CASES)}")
    return names


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Sizes of the cases."""
    concurrencies = tuple(arguments.concurrency)
    mixed = tuple(c for c in Settings().mixed_concurrencies if c in concurrencies)
    given = {field.name for field in dataclasses.fields(Settings)} & vars(arguments).keys()
    return Settings(concurrencies, mixed, **{name: getattr(arguments, name) for name in given})


class Run:
    """One call of the command: where records go, what time is left, what has failed.

    Args:
        made: what `gpu_model` says it has made.
    """

    def __init__(self, arguments: argparse.Namespace, made: dict[str, Any]) -> None:
        self.arguments, self.made = arguments, made
        self.settings = settings_of(arguments)
        self.records: list[dict[str, Any]] = []
        self.failed = False
        self._environment = environment()
        self._deadline = time.monotonic() + arguments.budget
        self._file = arguments.out / "results.jsonl"
        self._server: Server | None = None

    async def all(self) -> None:
        """Every server, one after the other."""
        if self.arguments.url:
            flags = shlex.split(self.arguments.server_args)
            server = Server(self.arguments.name or "given", flags, Path(), self.arguments.url)
            await self._on(server, tuple(case for case in self.arguments.only if case != "startup"))
            return
        lora_cases = tuple(case for case in self.arguments.only if case != "plain")
        if lora_cases:
            await self._on(self._own("lora", LORA_FLAGS), lora_cases)
        if "plain" in self.arguments.only:
            await self._on(self._own("plain", []), ("plain",))

    def emit(self, record: dict[str, Any]) -> None:
        """Print and keep one record, with what it was measured on."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        flags = self._server.flags if self._server else []
        line = {"benchmark": "gpu", "time": stamp, "model": self.arguments.model, **record, "server_flags": flags}
        self.failed |= bool(record.get("error"))
        self.records.append(line | self._environment)
        text = json.dumps(self.records[-1])
        print(text, flush=True)
        with self._file.open("a") as file:
            file.write(text + "\n")

    def _own(self, kind: str, more: list[str]) -> Server:
        flags = ["--model-path", self.made["model"], *COMMON_FLAGS, *more, *shlex.split(self.arguments.server_args)]
        name = f"{self.arguments.name}-{kind}" if self.arguments.name else kind
        return Server(name, flags, self.arguments.out / f"server-{kind}.log")

    async def _on(self, server: Server, cases: tuple[str, ...]) -> None:
        self._server = server
        note(f"starting the server ({server.name})" if not self.arguments.url else f"measuring {server.url}")
        try:
            imports = [import_seconds() for _ in range(2)] if "startup" in cases and not self.arguments.url else []
            async with server:
                await self._measure(server, cases, imports)
        except FAILURES as error:
            self._failed(server, "server", error)

    async def _measure(self, server: Server, cases: tuple[str, ...], imports: list[float]) -> None:
        self._environment["server_version"] = await server.version()
        bench = Bench(server, self.settings, self.made["vocab_size"], self.made["adapters"], self.emit)
        if imports and server.ready_s is not None:
            figures = {"import_first_s": imports[0], "import_s": imports[1], "ready_s": server.ready_s}
            bench.record("startup", "none", {name: round(value, 2) for name, value in figures.items()})
        if any(case in NEED_ADAPTERS for case in cases) or {"prefill", "streaming"} & set(cases):
            problem = await bench.load_adapters()
            if problem:
                note(f"no adapters, their cases are left out: {problem}")
        for name, step in steps(bench, cases):
            if time.monotonic() > self._deadline:
                note(f"out of time: no {name}")
                continue
            note(name)
            try:
                await step()
            except FAILURES as error:
                self._failed(server, name, error)
                server.check()

    def _failed(self, server: Server, case: str, error: BaseException) -> None:
        note(f"{case} failed: {type(error).__name__}: {error}")
        self.emit({"case": case, "server": server.name, "error": f"{type(error).__name__}: {error}"})
        if not isinstance(error, ServerFailed):
            note(server.log_tail())


Step = Callable[[], Awaitable[None]]


def steps(bench: Bench, cases: tuple[str, ...]) -> list[tuple[str, Step]]:
    """What to run, in order, as (name, call); cases that need adapters are left out when none is loaded."""
    one, several = tuple(bench.names[:1]), tuple(bench.names)
    s = bench.settings
    found: list[tuple[str, str, Step]] = [
        ("decode", "decode, base", lambda: gpu_cases.decode(bench, (), s.concurrencies)),
        ("adapters", "decode, 1 adapter", lambda: gpu_cases.decode(bench, one, s.concurrencies)),
        ("adapters", "decode, several adapters", lambda: gpu_cases.decode(bench, several, s.mixed_concurrencies)),
        ("prefill", "prefill, base", lambda: gpu_cases.prefill(bench, ())),
        ("prefill", "prefill, 1 adapter", lambda: gpu_cases.prefill(bench, one)),
        ("streaming", "streaming, base", lambda: gpu_cases.streaming(bench, ())),
        ("streaming", "streaming, 1 adapter", lambda: gpu_cases.streaming(bench, one)),
        ("sync", "sync, 1 adapter", lambda: gpu_cases.sync(bench)),
        ("plain", "decode, base", lambda: gpu_cases.decode(bench, (), s.concurrencies)),
        ("plain", "prefill, base", lambda: gpu_cases.prefill(bench, ())),
    ]
    # A server that is given runs the base cases once, whatever flags it has.
    wanted = [case for case in cases if case != "plain" or "decode" not in cases]
    return [(name, step) for case, name, step in found if case in wanted and (one or "adapter" not in name)]


def make(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Run `gpu_model`; raises SystemExit when it fails."""
    started = time.perf_counter()
    command = [sys.executable, str(MODEL_MAKER), "--cache", str(cache), "--model", arguments.model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{MODEL_MAKER.name} ended with code {done.returncode}")
    made: dict[str, Any] = json.loads(done.stdout)
    note(f"model and adapters in {cache} after {time.perf_counter() - started:.1f} s")
    return made


def finish(run: Run) -> None:
    """Tables and charts of what has been measured."""
    text = tables(run.records)
    (run.arguments.out / "tables.md").write_text(text)
    note("\n" + text)
    try:
        from plot_gpu import plot

        plot(run.records, run.arguments.out)
    except ImportError as error:
        note(f"no charts: {error}; on a machine with matplotlib: plot_gpu.py {run.arguments.out}")


def note(text: str) -> None:
    """Progress, for the person who waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends the run like Ctrl-C: the server must still be stopped."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run and report; 1 when a case failed or the run was interrupted."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        made = make(arguments, arguments.cache or Path(scratch))
        if arguments.make_only:
            print(json.dumps(made))
            return 0
        arguments.out.mkdir(parents=True, exist_ok=True)
        run = Run(arguments, made)
        try:
            asyncio.run(run.all())
        except KeyboardInterrupt:
            note("interrupted")
            run.failed = True
        finish(run)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
