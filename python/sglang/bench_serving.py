"""`python -m sglang.bench_serving`: one load run against a running server, with upstream's most used flags.

Prompts are random token ids. Prints a table and, with --output-file, appends one JSON line. Comparing systems fairly is
the work of `benchmark/serving/bench.py`; both share `sglang.benchmark.load`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang.benchmark.http_client import HttpProtocolError, fetch
from sglang.benchmark.load import (
    Backend,
    CompletionsBackend,
    NativeBackend,
    parse_extra,
    random_prompts,
    run_load,
    summarise,
)

DEFAULT_PORTS = {"sglang": 30000, "sglang-oai": 30000, "vllm": 8000}
READY_POLL_SECONDS = 0.5


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sglang.bench_serving", description=__doc__)
    add = parser.add_argument
    add("--backend", choices=sorted(DEFAULT_PORTS), default="sglang", help="API to speak (default: %(default)s)")
    add("--base-url", help="http://host:port; wins over --host and --port")
    add("--host", default="127.0.0.1", help="(default: %(default)s)")
    add("--port", type=int, help="(default: 30000 for sglang, 8000 for vllm)")
    add("--ready-check-timeout-sec", type=int, default=60, help="wait this long for the server (default: %(default)s)")
    add("--dataset-name", choices=["random", "random-ids"], default="random", help="both are random ids")
    add("--model", help="id for the OpenAI API (default: the server's first)")
    add("--num-prompts", type=int, default=1000, help="(default: %(default)s)")
    add("--random-input-len", type=int, default=1024, help="tokens (default: %(default)s)")
    add("--random-output-len", type=int, default=1024, help="tokens (default: %(default)s)")
    add("--random-range-ratio", type=float, default=0.0, help="shortest length as a share of the longest")
    add("--vocab-size", type=int, default=10000, help="random ids are below this (default: %(default)s)")
    add("--request-rate", type=float, default=float("inf"), help="requests per second, Poisson (default: all at once)")
    add("--max-concurrency", type=int, help="requests in flight at most")
    add("--warmup-requests", type=int, default=1, help="(default: %(default)s)")
    add("--flush-cache", action="store_true", help="empty the prefix cache after the warm-up")
    add("--disable-stream", action="store_true", help="ask for whole replies")
    add("--disable-ignore-eos", action="store_true", help="let sequences end by themselves")
    add("--lora-name", help="adapter every request names")
    add("--extra-request-body", help="JSON object merged into every request")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    add("--tag", help="copied into the output")
    add("--output-file", type=Path, help="append one JSON line to this file")
    return parser.parse_args(argv)


async def wait_ready(url: str, timeout: float) -> None:
    """Return when `/health` answers 200; raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            if (await fetch(url, "GET", "/health")).status == 200:
                return
        except (OSError, HttpProtocolError):
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url}/health did not answer 200 within {timeout:.0f} s; is the server running?")
        await asyncio.sleep(READY_POLL_SECONDS)


async def make_backend(arguments: argparse.Namespace, url: str) -> Backend:
    """The backend the flags ask for."""
    extra = parse_extra(arguments.extra_request_body)
    if arguments.lora_name:
        extra["lora_path"] = arguments.lora_name
    options: dict[str, Any] = {
        "stream": not arguments.disable_stream,
        "ignore_eos": not arguments.disable_ignore_eos,
        "extra": extra,
    }
    if arguments.backend == "sglang":
        return NativeBackend(url, **options)
    model = arguments.model or (await fetch(url, "GET", "/v1/models")).json()["data"][0]["id"]
    return CompletionsBackend(url, model, **options)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up, load, figures.

    Raises:
        TimeoutError: the server does not come up.
        ValueError: --extra-request-body is not a JSON object.
    """
    url = arguments.base_url or f"http://{arguments.host}:{arguments.port or DEFAULT_PORTS[arguments.backend]}"
    await wait_ready(url, arguments.ready_check_timeout_sec)
    backend = await make_backend(arguments, url)
    lengths = {"input_len": arguments.random_input_len, "output_len": arguments.random_output_len}
    shape = {"range_ratio": arguments.random_range_ratio, "vocab_size": arguments.vocab_size}
    prompts = random_prompts(arguments.num_prompts, **lengths, **shape, seed=arguments.seed)
    await run_load(backend, prompts[: arguments.warmup_requests])
    if arguments.flush_cache:
        await fetch(url, "POST", "/flush_cache?timeout=10")
    load = await run_load(
        backend,
        prompts,
        concurrency=arguments.max_concurrency,
        request_rate=arguments.request_rate,
        seed=arguments.seed,
    )
    figures: dict[str, Any] = {"tag": arguments.tag, "backend": arguments.backend} | summarise(load)
    if load.errors:
        figures["first_error"] = load.errors[0]
    return figures


def main(argv: Sequence[str]) -> int:
    """Run and report; 1 when a request failed."""
    arguments = parse_arguments(argv)
    try:
        figures = asyncio.run(run(arguments))
    except (TimeoutError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    width = max(len(name) for name in figures)
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in figures.items() if value is not None)
    if arguments.output_file:
        with arguments.output_file.open("a") as file:
            file.write(json.dumps(figures) + "\n")
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
