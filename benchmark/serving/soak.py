"""A seeded client that abuses a server and then audits it: `python benchmark/serving/soak.py --url URL`.

Sends `--requests` cases of `soak_cases` with `--concurrency` clients at once while `soak_control` pauses, continues,
flushes and aborts. Every reply is checked (`soak_checks`); afterwards (`soak_audit`) requests, records and used pages
must be zero, the scheduler's books clean, and deterministic requests must give the tokens they gave under load.
Prints one JSON line; exits 1 when anything was wrong. The full run, on a small model and on a real one:

    python -m sglang.launch_server --model-path DIR --port 30000 --enable-metrics --max-total-tokens 4096
    python benchmark/serving/soak.py --url http://127.0.0.1:30000 --requests 2000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import soak_checks as checks
from soak_audit import Audit
from soak_cases import Case, CaseMaker, Fate, Kind
from soak_control import Controls, Outcome

from sglang.benchmark.http_client import Exchange, HttpProtocolError, Reply, fetch

REPLY_TIMEOUT = 120.0
MAX_EVENT_WAIT = 2.0
FULL_QUEUE_PAUSE = 0.05


class Soak:
    """One run against one server.

    Args:
        url: ``http://host:port`` of the server.
        requests: cases to send.
        concurrency: clients at once.
        control_every: cases between two control operations.
        allow_full_queue: 503 is a proper answer (the server limits its queue).
        timeout: seconds until a missing reply counts as a hang.
    """

    def __init__(
        self,
        url: str,
        *,
        requests: int,
        seed: int = 0,
        concurrency: int = 24,
        control_every: int = 20,
        allow_full_queue: bool = False,
        max_new_tokens: int = 96,
        timeout: float = REPLY_TIMEOUT,
    ) -> None:
        self.url, self.requests, self.concurrency = url, requests, concurrency
        self.allow_full_queue = allow_full_queue
        self.seed, self.max_new_tokens, self.timeout = seed, max_new_tokens, timeout
        self.outcome = Outcome()
        self._controls = Controls(url, self.outcome, seed=seed + 1, every=control_every)
        self._repeatable: list[tuple[Case, Any]] = []

    async def run(self) -> Outcome:
        """The whole run: load and control together, then the audit."""
        model = (await fetch(self.url, "GET", "/v1/models")).json()["data"][0]
        maker = CaseMaker(self.seed, model["id"], model["max_model_len"], max_new_tokens=self.max_new_tokens)
        cases = iter([maker.make(i) for i in range(self.requests)])
        control = asyncio.create_task(self._controls.run())

        async def client() -> None:
            for case in cases:
                self._controls.case_sent()
                await self._run_case(case)

        try:
            await asyncio.gather(*(client() for _ in range(self.concurrency)))
        finally:
            control.cancel()
            await asyncio.gather(control, return_exceptions=True)
            await self._controls.post("/continue_generation", {})
        if not control.cancelled() and control.exception() is not None:
            self.outcome.blame("control", [repr(control.exception())])
        try:
            await Audit(self._controls, self.timeout).run(self._repeatable, self.seed)
        except (OSError, HttpProtocolError, ValueError, KeyError) as error:
            self.outcome.blame(
                "afterwards", [f"the audit failed, is the server alive? {type(error).__name__}: {error}"]
            )
        return self.outcome

    async def _run_case(self, case: Case) -> None:
        started = time.perf_counter()
        where = f"case {case.index} {case.kind.value} {case.fate.value}{' stream' if case.stream else ''}"
        try:
            problems = await asyncio.wait_for(self._exchange(case, started), self.timeout)
        except asyncio.TimeoutError:
            problems = [f"no complete reply in {self.timeout:.0f} s"]
        except (OSError, HttpProtocolError, ValueError, KeyError, TypeError) as error:
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            problems = [f"{p} | {str(case.body)[:300]}" for p in problems]
        self.outcome.counts[f"{case.kind.value}_{case.fate.value}"] += 1
        self.outcome.blame(where, problems)

    async def _exchange(self, case: Case, started: float) -> list[str]:
        if case.fate in (Fate.DROP, Fate.CUT):
            await self._send_and_drop(case)
            return []
        if case.twin:
            pair = await asyncio.gather(self._ask(case, started), self._ask(case, started))
            return [problem for problems in pair for problem in problems]
        abort = asyncio.create_task(self._abort_later(case)) if case.fate is not Fate.READ else None
        try:
            return await self._ask(case, started)
        finally:
            if abort is not None:
                await abort

    async def _ask(self, case: Case, started: float) -> list[str]:
        async with Exchange(self.url, "POST", case.target, case.body) as exchange:
            self.outcome.counts[f"status_{exchange.status}"] += 1
            if case.stream and exchange.status == 200:
                events = [event async for event in exchange.events()]
                return self._check_events(case, events, self._abort_allowed(case, started))
            reply = Reply(exchange.status, exchange.headers, await exchange.body())
        if reply.status == 503 and self.allow_full_queue:
            await asyncio.sleep(FULL_QUEUE_PAUSE)
            return []
        return self._check_reply(case, reply, self._abort_allowed(case, started))

    async def _send_and_drop(self, case: Case) -> None:
        exchange = Exchange(self.url, "POST", case.target, case.body)

        async def read_some() -> None:
            await exchange.read_head()
            if case.stream and exchange.status == 200:
                seen = 0
                async for _ in exchange.events():
                    seen += 1
                    if seen >= case.drop_events:
                        return

        await exchange.send(upto=0.5 if case.fate is Fate.CUT else 1.0)
        try:
            await asyncio.wait_for(read_some(), case.delay + (MAX_EVENT_WAIT if case.stream else 0.001))
        except asyncio.TimeoutError:
            pass
        finally:
            exchange.drop(reset=case.reset)

    async def _abort_later(self, case: Case) -> None:
        await asyncio.sleep(case.delay)
        rid: str = case.body["rid"]
        body = {"rid": rid} if case.fate is Fate.ABORT else {"rid": rid[:-1], "prefix": True}
        if case.fate is Fate.ABORT_PREFIX:
            await self._controls.aborting_everything(self._controls.post("/abort_request", body))
        else:
            await self._controls.post("/abort_request", body)

    def _abort_allowed(self, case: Case, started: float) -> bool:
        return case.fate is not Fate.READ or self._controls.aborted_since(started)

    def _check_reply(self, case: Case, reply: Reply, abort_allowed: bool) -> list[str]:
        if case.kind is Kind.INVALID:
            return checks.refusal(case, reply)
        if case.twin and reply.status == 400 and b"Duplicate request ID" in reply.body:
            self.outcome.counts["duplicate_rids"] += 1
            return []
        if reply.status != 200:
            return [f"status {reply.status}: {reply.body[:300]!r}"]
        if case.kind is not Kind.NATIVE:
            return checks.openai_reply(case, reply.json(), abort_allowed)
        result = reply.json()
        problems = checks.native_results(case, result, abort_allowed)
        if not problems:
            self._remember(case, result)
        return problems

    def _check_events(self, case: Case, events: list[bytes], abort_allowed: bool) -> list[str]:
        if case.kind is Kind.INVALID:
            return [f"a bad request was answered with a stream: {events[:1]}"]
        if case.kind is not Kind.NATIVE:
            return checks.openai_stream(case, events, abort_allowed)
        problems = checks.native_stream(case, events, abort_allowed)
        if not problems and case.results == 1:
            self._remember(case, json.loads(events[-2]))
        return problems

    def _remember(self, case: Case, result: Any) -> None:
        for item in result if isinstance(result, list) else [result]:
            self.outcome.counts[f"finish_{item['meta_info']['finish_reason']['type']}"] += 1
            self.outcome.counts["output_tokens"] += len(item["output_ids"])
        if case.repeatable and isinstance(result, dict) and result["meta_info"]["finish_reason"]["type"] != "abort":
            self._repeatable.append((case, result))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=24, help="clients at once (default: %(default)s)")
    parser.add_argument("--control-every", type=int, default=20, help="cases between operations (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest output (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=REPLY_TIMEOUT, help="seconds to a whole reply (default: 120)")
    parser.add_argument("--allow-full-queue", action="store_true", help="503 is a proper answer")
    arguments = vars(parser.parse_args())
    started = time.perf_counter()
    url = arguments["url"]
    try:
        outcome = asyncio.run(_run(arguments))
    except OSError as error:
        print(f"error: no server at {url}: {error}", file=sys.stderr)
        return 2
    line = {"benchmark": "soak", "wall_s": round(time.perf_counter() - started, 1), "seed": arguments["seed"]}
    print(json.dumps(line | {"counts": dict(sorted(outcome.counts.items())), "violations": outcome.violations[:50]}))
    return 1 if outcome.violations else 0


async def _run(arguments: dict[str, Any]) -> Outcome:
    return await Soak(arguments.pop("url"), **arguments).run()


if __name__ == "__main__":
    sys.exit(main())
