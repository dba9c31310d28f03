"""What must be true of a server after the soak: idle, no request, record or page left, clean books, same answers."""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import Any

from soak_cases import Case
from soak_control import Controls

from sglang.benchmark.http_client import fetch

IDLE_TIMEOUT = 20.0
MAX_OTHER_SHARE = 0.1
"""Share of repeated requests that may end up with other tokens."""
MAX_REPLAYS = 20


class Audit:
    """The checks after a run.

    Args:
        controls: the server, and where violations go.
        timeout: seconds until a missing reply counts as a hang.
    """

    def __init__(self, controls: Controls, timeout: float) -> None:
        self.url, self.outcome, self._controls, self._timeout = controls.url, controls.outcome, controls, timeout
        self._others: list[str] = []

    async def run(self, repeatable: list[tuple[Case, Any]], seed: int) -> None:
        """Everything.

        Args:
            repeatable: deterministic cases with their results under load; a sample of them is sent again.
        """
        if left := await self._wait_idle():
            self.outcome.blame("afterwards", [f"not idle after {IDLE_TIMEOUT:.0f} s: {left}"])
        await self._controls.expect("afterwards", "POST", "/flush_cache", 200)
        state = await self._server_state()
        scheduler = state["scheduler"]
        if "num_live_requests" not in state:
            self.outcome.counts["records_not_reported"] = 1
        if scheduler["num_used_tokens"] or scheduler["num_cached_tokens"]:
            self.outcome.blame("afterwards", [f"pages not free after a flush: {scheduler}"])
        if scheduler["invariant_violations_total"]:
            self.outcome.blame("afterwards", [f"invariant_violations_total {scheduler['invariant_violations_total']}"])
        self.outcome.counts["retractions"] = scheduler["retractions_total"]
        await self._audit_metrics()
        for case, before in random.Random(seed).sample(repeatable, min(MAX_REPLAYS, len(repeatable))):
            await self._replay(case, before)
        self._audit_replays()
        await self._controls.expect("afterwards", "GET", "/health", 200)

    async def _wait_idle(self) -> dict[str, Any]:
        deadline = time.perf_counter() + IDLE_TIMEOUT
        while True:
            loads = (await fetch(self.url, "GET", "/v1/loads?include=all")).json()["loads"]
            state = await self._server_state()
            left = {
                "requests": sum(load["num_total_reqs"] for load in loads),
                "used_tokens": sum(load["num_used_tokens"] for load in loads),
                "records": state.get("num_live_requests", 0),
            }
            if not any(left.values()) or time.perf_counter() > deadline:
                return {name: value for name, value in left.items() if value}
            await asyncio.sleep(0.1)

    async def _server_state(self) -> dict[str, Any]:
        state: dict[str, Any] = (await fetch(self.url, "GET", "/server_info")).json()["internal_states"][0]
        return state

    async def _audit_metrics(self) -> None:
        reply = await fetch(self.url, "GET", "/metrics")
        if reply.status == 404:
            return
        for name in ("num_running_reqs", "num_queue_reqs", "num_used_tokens", "num_paused_reqs"):
            values = re.findall(rf"^sglang:{name}(?:{{[^}}]*}})? (\S+)$", reply.body.decode(), re.MULTILINE)
            if [float(v) for v in values] != [0.0]:
                self.outcome.blame("metrics", [f"sglang:{name} is {values}, expected one 0"])

    async def _replay(self, case: Case, before: Any) -> None:
        body = {name: value for name, value in case.body.items() if name not in ("stream", "rid")}
        reply = await asyncio.wait_for(fetch(self.url, "POST", case.target, body), self._timeout)
        if reply.status != 200:
            self.outcome.blame(f"case {case.index} repeated", [f"status {reply.status}: {reply.body[:200]!r}"])
            return
        now = reply.json()
        self.outcome.counts["replays"] += 1
        if now["output_ids"] != before["output_ids"] or now["text"] != before["text"]:
            self.outcome.counts["replays_other"] += 1
            self._others.append(f"case {case.index}: {before['output_ids']} then {now['output_ids']}")

    def _audit_replays(self) -> None:
        """Seeded requests repeat, except where the last bits decide.

        Sums are added in another order in another batch, so a drawn number that falls on the border of two tokens may
        fall on the other side.
        """
        if len(self._others) > MAX_OTHER_SHARE * self.outcome.counts["replays"]:
            self.outcome.blame("repeated", self._others)
