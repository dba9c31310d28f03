"""Minutes of training traffic against one server: clients of one policy, publishes, aborts and disconnects.

    python benchmark/serving/gpu_model.py --cache DIR --model qwen3-1.7b
    python -m sglang.launch_server --model-path MODEL --skip-tokenizer-init --enable-lora --max-lora-rank 16 \\
        --port 30000 --enable-metrics
    python benchmark/weight_sync/soak.py --url http://127.0.0.1:30000 --model MODEL --seconds 600 --clients 256

The publisher takes turns with a few adapters whose greedy answers to a few prompts were noted before, version by
version, so a reply shows which adapter made it: it must agree longest with the adapter of the version that it names.
Batches round differently, so a reply may take another way where two tokens are nearly even; where they are not, its
first token must be the noted one. A request sent after a publish has returned must be answered by that version or a
later one. Every request and every publish has to end in time. Afterwards (`aftermath`) no lease may be left and the
server's memory, host and GPU, must be what it was after the first publishes. Prints one JSON line; exits 1 when
anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapters
from aftermath import left_behind, server_rss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))

import machine

from sglang.benchmark.http_client import Exchange, HttpProtocolError, fetch
from sglang.rl.publisher import Publisher, PublishError

POLICY = "policy"
FINGERPRINTS, PROMPTS, TOLD = 6, 16, 24
"""Adapters, prompts, and noted tokens of each answer."""
FIRST_TOKEN = 64
LONGEST_PROMPT, LONGEST_ANSWER = 120, 256
REQUEST_SECONDS, PUBLISH_SECONDS = 60.0, 10.0
"""What takes longer counts as hung."""
WARM_UP_SHARE = 0.1
RSS_GROWTH, GPU_GROWTH = 0.05, 0.01
CLEAR = 0.125
"""Log-probability by which a first token leads that no batch changes: rounding to bfloat16 moves it by about 0.02."""


@dataclass(slots=True)
class Answer:
    """A reply, and what was published last when it was asked for."""

    prompt: int
    tokens: list[int]
    version_id: int
    newest: int


@dataclass
class Soak:
    """One run.

    Args:
        url: of the server; model: directory of the model it serves.
        seconds: of load; clients: requests in flight; every: seconds from one publish to the next.
        scale: standard deviation of the adapters' factors.
    """

    url: str
    model: Path
    seconds: float
    clients: int
    every: float
    scale: float
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = adapters.read_shape(self.model)
        self.endless = min(4 * LONGEST_ANSWER, self.config["max_position_embeddings"] - LONGEST_PROMPT)
        rng = random.Random(self.seed)
        vocab = range(FIRST_TOKEN, self.config["vocab_size"])
        self.prompts = [rng.choices(vocab, k=rng.randrange(4, LONGEST_PROMPT)) for _ in range(PROMPTS)]
        self.tensors = [adapters.random_adapter(self.config, 16, seed, self.scale) for seed in range(FINGERPRINTS)]
        self.peft = {"r": 16, "lora_alpha": 16, "target_modules": list(adapters.PROJECTIONS), "peft_type": "LORA"}
        self.told: list[list[list[int]]] = []  # by adapter and prompt
        self.clear: list[list[bool]] = []  # whether its first token leads clearly
        self.versions: dict[int, int] = {}  # version as the server says -> publish of that number
        self.newest = 0
        self.publish_s: list[float] = []
        self.memory: list[tuple[int, int]] = []  # host, GPU
        self._answers: list[Answer] = []
        self._stopping = False

    async def run(self) -> dict[str, Any]:
        """Everything; the report."""
        started = time.perf_counter()
        with Publisher(self.url, POLICY, timeout=PUBLISH_SECONDS) as publisher:
            await self._take_fingerprints(publisher)
            clients = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
            await self._publish_until(publisher, time.perf_counter() + self.seconds)
            self._stopping = True
            await asyncio.gather(*clients)
        self._check_answers()
        self._check_memory()
        self.violations += await left_behind(self.url, 1)
        ordered = sorted(self.publish_s)
        return {
            "benchmark": "publish_soak",
            "commit": machine.commit(),
            "device": machine.device(),
            "wall_s": round(time.perf_counter() - started, 1),
            "seconds": self.seconds,
            "clients": self.clients,
            "publishes": self.newest,
            "publish_ms": {
                "p50": _ms(statistics.median(ordered)),
                "p99": _ms(ordered[int(0.99 * (len(ordered) - 1))]),
                "max": _ms(ordered[-1]),
            },
            "host_mib": [host >> 20 for host, _ in _spread(self.memory)],
            "gpu_mib": [gpu >> 20 for _, gpu in _spread(self.memory)],
            "counts": dict(sorted(self.counts.items())),
            "violations": len(self.violations),
            "first_violations": self.violations[:20],
        }

    async def _take_fingerprints(self, publisher: Publisher) -> None:
        for _ in range(FINGERPRINTS):
            await self._publish(publisher)
            replies = await asyncio.gather(*(self._ask(i, TOLD) for i in range(PROMPTS)))
            self.told.append([reply["output_ids"] for reply in replies])
            self.clear.append([_lead(reply) >= CLEAR for reply in replies])
        for prompt in range(PROMPTS):
            answers = {tuple(told[prompt]) for told in self.told}
            if len(answers) < FINGERPRINTS:
                raise SystemExit(f"adapters give the same answer to prompt {prompt}: use a larger --scale")

    async def _ask(self, prompt: int, tokens: int) -> Any:
        body = self._body(prompt, tokens, return_logprob=True, top_logprobs_num=2)
        reply = await fetch(self.url, "POST", "/generate", body)
        if reply.status != 200:
            raise SystemExit(f"status {reply.status}: {reply.body[:300]!r}")
        return reply.json()

    async def _publish_until(self, publisher: Publisher, end: float) -> None:
        due = time.perf_counter()
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await self._publish(publisher)
            self.memory.append((await asyncio.to_thread(server_rss, self.url), await asyncio.to_thread(_gpu_bytes)))
            due += self.every

    async def _publish(self, publisher: Publisher) -> None:
        number = self.newest + 1
        started = time.perf_counter()
        try:
            version = await publisher.publish_async(self.tensors[number % FINGERPRINTS], self.peft)
        except PublishError as error:
            self.violations.append(f"publish {number}: {error}")
            return
        self.publish_s.append(time.perf_counter() - started)
        for report in version.servers.values():
            assert report.version_id is not None, "the server has no versions: is it one of ours?"
            self.versions[report.version_id] = number
        self.newest = number

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        acts: list[Callable[[random.Random], Awaitable[None]]] = [self._read, self._drop, self._abort, self._samples]
        while not self._stopping:
            act = rng.choices([*acts, self._too_long], weights=[60, 15, 15, 8, 2])[0]
            try:
                await asyncio.wait_for(act(rng), REQUEST_SECONDS)
            except asyncio.TimeoutError:
                self.violations.append(f"{act.__name__.lstrip('_')} had no end after {REQUEST_SECONDS:.0f} s")
            except (OSError, HttpProtocolError, ValueError, KeyError) as error:
                self.violations.append(f"{act.__name__.lstrip('_')}: {type(error).__name__}: {error}")

    def _body(self, prompt: int, tokens: int, **fields: Any) -> dict[str, Any]:
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        return {"input_ids": self.prompts[prompt], "sampling_params": params, "lora_path": POLICY, **fields}

    async def _read(self, rng: random.Random) -> None:
        prompt, newest = rng.randrange(PROMPTS), self.newest
        stream = rng.random() < 0.5
        body = self._body(prompt, rng.randrange(1, LONGEST_ANSWER), stream=stream)
        async with Exchange(self.url, "POST", "/generate", body) as exchange:
            if exchange.status != 200:
                self.violations.append(f"status {exchange.status}: {(await exchange.body())[:200]!r}")
                return
            last = b"" if stream else await exchange.body()
            if stream:
                async for event in exchange.events():
                    last = last if event == b"[DONE]" else event
        self._note(prompt, newest, json.loads(last), body)

    async def _drop(self, rng: random.Random) -> None:
        body = self._body(rng.randrange(PROMPTS), self.endless, stream=rng.random() < 0.7)
        exchange = Exchange(self.url, "POST", "/generate", body)
        await exchange.send(upto=rng.choice((0.5, 1.0, 1.0, 1.0)))
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        exchange.drop(reset=rng.random() < 0.5)
        self.counts["disconnects"] += 1

    async def _abort(self, rng: random.Random) -> None:
        prompt, newest, rid = rng.randrange(PROMPTS), self.newest, f"soak-{rng.getrandbits(64):x}"
        body = self._body(prompt, self.endless, rid=rid)
        request = asyncio.create_task(fetch(self.url, "POST", "/generate", body))
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        while not request.done():  # an abort that comes before its request finds nothing
            await fetch(self.url, "POST", "/abort_request", {"rid": rid})
            await asyncio.wait([request], timeout=0.5)
        if request.result().status != 200:
            self.violations.append(f"aborted: status {request.result().status}: {request.result().body[:200]!r}")
            return
        self._note(prompt, newest, request.result().json(), body)

    async def _samples(self, rng: random.Random) -> None:
        prompt, newest = rng.randrange(PROMPTS), self.newest
        body = self._body(prompt, rng.randrange(1, LONGEST_ANSWER // 4))
        body["sampling_params"]["n"] = 8
        reply = await fetch(self.url, "POST", "/generate", body)
        if reply.status != 200:
            self.violations.append(f"n=8: status {reply.status}: {reply.body[:200]!r}")
            return
        for item in reply.json():
            self._note(prompt, newest, item, body)

    async def _too_long(self, rng: random.Random) -> None:
        body = self._body(rng.randrange(PROMPTS), 1)
        body["input_ids"] = [FIRST_TOKEN] * (self.config["max_position_embeddings"] + 1)
        reply = await fetch(self.url, "POST", "/generate", body)
        self.counts["over_long"] += 1
        if reply.status != 400:
            self.violations.append(f"an over-long prompt got {reply.status}")

    def _note(self, prompt: int, newest: int, reply: Any, body: dict[str, Any]) -> None:
        meta, tokens = reply["meta_info"], reply["output_ids"]
        kind = meta["finish_reason"]["type"]
        self.counts[f"finish_{kind}"] += 1
        self.counts["output_tokens"] += len(tokens)
        if kind == "abort" and "rid" not in body:
            self.violations.append(f"aborted though nobody asked: {meta['finish_reason']}")
        if meta["lora_name"] != POLICY:
            self.violations.append(f"asked for {POLICY}, the reply names {meta['lora_name']}")
        if len(meta.get("lora_version_spans") or [()]) > 1:
            self.violations.append(f"several versions made one reply: {meta['lora_version_spans']}")
        self._answers.append(Answer(prompt, tokens[:TOLD], meta["lora_version"], newest))

    def _check_answers(self) -> None:
        """Late, because a reply may come before the publisher has heard what version it has made."""
        for answer in self._answers:
            number = self.versions.get(answer.version_id)
            if number is None:
                self.violations.append(f"version {answer.version_id} was never published")
                continue
            if number < answer.newest:
                self.violations.append(f"publish {number} answered after publish {answer.newest} had returned")
            if not answer.tokens:
                continue
            agreed = [_common(answer.tokens, told[answer.prompt]) for told in self.told]
            adapter = (number - 1) % FINGERPRINTS  # the first fingerprint is that of publish 1
            own = agreed[adapter]
            other = max(count for i, count in enumerate(agreed) if i != adapter)
            clear = self.clear[adapter][answer.prompt]
            proven = own == len(answer.tokens) or own > other
            self.counts["answers_clear"] += clear
            self.counts["answers_proven" if proven else "answers_drifted"] += 1
            if other > own and other > 1:
                self.violations.append(f"publish {number} gave another adapter's answer: {other} tokens, {own} its own")
            elif clear and not own:
                self.violations.append(f"publish {number} gave an answer of no adapter, to prompt {answer.prompt}")

    def _check_memory(self) -> None:
        settled = self.memory[int(len(self.memory) * WARM_UP_SHARE)]
        for what, before, after, growth in zip(
            ("host", "GPU"), settled, self.memory[-1], (RSS_GROWTH, GPU_GROWTH), strict=True
        ):
            if after > before * (1 + growth):
                self.violations.append(f"{what} memory grew from {before >> 20} to {after >> 20} MiB")


def _common(tokens: list[int], others: list[int]) -> int:
    """Tokens at the beginning that both have."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))


def _lead(reply: Any) -> float:
    """By how much the first token was more likely than the second best."""
    (best, *_), (second, *_) = reply["meta_info"]["output_top_logprobs"][0]
    return float(best - second)


def _spread(samples: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Eleven of them, from the first to the last."""
    return [samples[round(i * (len(samples) - 1) / 10)] for i in range(11)]


def _gpu_bytes() -> int:
    """Memory in use on the first NVIDIA GPU; 0 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) << 20
    return 0


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory of the served model")
    parser.add_argument("--seconds", type=float, default=600.0, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between publishes (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.05, help="of the adapters' factors (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    report = asyncio.run(Soak(**vars(parser.parse_args())).run())
    print(json.dumps(report))
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
