"""One attempt at a problem, brought to its end whatever becomes of servers: the client side of `/generate`.

Owned by `rollout`, on its event loop. A `Fleet` knows the servers and which of them answer; `Published` knows which
publish an adapter version of a server is.
Invariants: tokens that a server has reported are kept, with their log-probabilities and versions, and are part of the
next request's prompt; a failing server is left alone for a while that doubles, and asked again as long as the attempt
has time; the time of an attempt is never exceeded.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from sglang.rl.http_client import HttpClient, HttpError
from sglang.rl.publisher_version import Version
from sglang.rl.samples import Sample
from sglang.srt.errors import SglangError

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
"""Seconds for which a server that has failed is left alone: the first time, and at most."""
MAX_CONTINUATIONS = 100
"""Of one attempt. More than a run's publishes means that something aborts without end."""
_RETRIED = (408, 425, 429)
UNKNOWN = -1
"""Version of a token whose server's version has not been announced yet."""


class Rejected(SglangError):
    """A server will not take this request, now or later; `status` is HTTP's."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} refused a request: {message} (HTTP {status})")
        self.status = status


class Source(NamedTuple):
    """Who drew a token: the server, the adapter's name (None is the base model), and its version as the server says."""

    url: str
    name: str | None
    lora_version: int | None


class Published:
    """Which publish an adapter of a server belongs to; any thread may tell it or ask it."""

    def __init__(self) -> None:
        self._numbers: dict[Source, int] = {}
        self._names: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, version: Version, number: int) -> None:
        """All servers serve this version, which is the publish of that number."""
        with self._lock:
            for url, report in version.servers.items():
                if report.version_id is None:
                    self._names[version.name] = number
                else:
                    self._numbers[Source(url.rstrip("/"), version.name, report.version_id)] = number

    def forget(self, url: str) -> None:
        """A server has been started again, and numbers its versions from 1 again."""
        with self._lock:
            self._numbers = {source: n for source, n in self._numbers.items() if source.url != url.rstrip("/")}

    def number(self, source: Source) -> int:
        """Of the publish, 0 for the base model, UNKNOWN for what has not been announced."""
        if source.name is None:
            return 0
        with self._lock:
            if source.lora_version is None:
                return self._names.get(source.name, UNKNOWN)
            return self._numbers.get(source, UNKNOWN)


class _Finish(msgspec.Struct):
    type: str
    message: str = ""


class _Meta(msgspec.Struct):
    finish_reason: _Finish
    output_token_logprobs: list[tuple[float, int, Any]] = []
    lora_name: str | None = None
    lora_version: int | None = None
    lora_version_spans: list[tuple[int, int]] = []


class _Reply(msgspec.Struct):
    meta_info: _Meta


_reply_decoder = msgspec.json.Decoder(_Reply)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw; `keep_partial`: an attempt that was cut off goes on with the tokens it has."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    keep_partial: bool = True

    def params(self, max_new_tokens: int) -> dict[str, Any]:
        """`sampling_params` of a request for that many tokens."""
        return {
            "max_new_tokens": max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


@dataclass(slots=True)
class Attempt:
    """A sample on its way.

    Fields:
        server: the one it is at.
        unresolved: (first token, end, source) of tokens whose version is UNKNOWN.
        error: why it ran out of time, if it did.
    """

    sample: Sample
    server: _Server
    unresolved: list[tuple[int, int, Source]] = field(default_factory=list)
    error: str = ""

    def extend(self, meta: _Meta, url: str, asked_for: str | None, published: Published) -> None:
        """Append what a reply brought."""
        sample, start = self.sample, len(self.sample.output_ids)
        sample.output_ids += [token for _, token, _ in meta.output_token_logprobs]
        sample.logprobs += [logprob for logprob, _, _ in meta.output_token_logprobs]
        name = meta.lora_name or asked_for
        spans: list[tuple[int, int | None]] = [*meta.lora_version_spans] or [(0, meta.lora_version)]
        ends = [*(first for first, _ in spans[1:]), len(meta.output_token_logprobs)]
        for (first, version), end in zip(spans, ends, strict=True):
            source = Source(url, name, version)
            number = published.number(source)
            sample.versions += [number] * (end - first)
            if number == UNKNOWN and end > first:
                self.unresolved.append((start + first, start + end, source))

    def resolve(self, published: Published) -> None:
        """Fill in the versions that have been announced since the tokens came."""
        left = []
        for first, end, source in self.unresolved:
            number = published.number(source)
            self.sample.versions[first:end] = [number] * (end - first)
            if number == UNKNOWN:
                left.append((first, end, source))
        self.unresolved = left

    def settle(self, version: int) -> int:
        """Count what is still unknown as this version; how many tokens these were."""
        for first, end, _ in self.unresolved:
            self.sample.versions[first:end] = [version] * (end - first)
        missing = sum(end - first for first, end, _ in self.unresolved)
        self.unresolved = []
        return missing

    def move(self, server: _Server) -> None:
        """Be counted at another server."""
        self.server.load -= 1
        server.load += 1
        self.server = server

    def leave(self) -> None:
        """Be counted nowhere any more."""
        self.server.load -= 1

    def start_over(self) -> int:
        """Forget the tokens; how many they were."""
        dropped = len(self.sample.output_ids)
        for values in (self.sample.output_ids, self.sample.logprobs, self.sample.versions, self.unresolved):
            values.clear()
        return dropped


class _Server:
    """One server: its connections, how many attempts are at it, and until when it is left alone."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self.http = HttpClient(self.url, api_key)
        self.load = 0
        self.usable_at = 0.0
        self._pause = FIRST_PAUSE

    def failed(self, began: float, now: float) -> None:
        """Leave it alone. Calls that began before the last failure do not count again."""
        if began >= self.usable_at:
            self.usable_at = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def answered(self) -> None:
        """It works."""
        self._pause = FIRST_PAUSE


class Fleet:
    """The servers.

    Args:
        adapter_name: what to ask for now; None is the base model. Called for every request.
        counts: told of retries, continuations and tokens; see `Rollout.counters`.

    Attributes:
        last_answer: event-loop time of the last reply of any server that was one.
    """

    def __init__(
        self,
        urls: Iterable[str],
        adapter_name: Callable[[], str | None],
        published: Published,
        counts: Counter[str],
        api_key: str | None = None,
    ) -> None:
        self._servers = [_Server(url, api_key) for url in urls]
        self._adapter_name, self._published, self._counts = adapter_name, published, counts
        self.last_answer = 0.0

    def choose(self) -> _Server:
        """The server for a group: of those that work, the one with the least to do; else the first to be tried."""
        now = asyncio.get_running_loop().time()
        return min(self._servers, key=lambda s: (max(0.0, s.usable_at - now), s.load))

    def start(
        self, prompt_ids: Sequence[int], sampling: Sampling, server: _Server, timeout: float
    ) -> asyncio.Task[Attempt]:
        """An attempt, from the prompt to its end; with finish ``abort`` and an error when the time is over.

        Args:
            server: to begin with.
            timeout: seconds, whatever happens meanwhile.

        Raises:
            Rejected: (the task) no server will ever take it.
        """
        attempt = Attempt(Sample(list(prompt_ids)), server)
        server.load += 1
        task = asyncio.create_task(self._run(attempt, sampling, timeout))
        # Also of a task that is cancelled before its first step.
        task.add_done_callback(lambda _: attempt.leave())
        return task

    def close(self) -> None:
        """Close idle connections."""
        for server in self._servers:
            server.http.close()

    async def _run(self, attempt: Attempt, sampling: Sampling, timeout: float) -> Attempt:
        try:
            await asyncio.wait_for(self._finish(attempt, sampling), timeout)
        except asyncio.TimeoutError:
            attempt.sample.finish = "abort"
            attempt.error = f"no end within {timeout:g} s" + (f"; last: {attempt.error}" if attempt.error else "")
        return attempt

    async def _finish(self, attempt: Attempt, sampling: Sampling) -> None:
        sample = attempt.sample
        while True:
            left = sampling.max_new_tokens - len(sample.output_ids)
            if left <= 0:
                sample.finish = "length"
                return
            await self._find_server(attempt)
            finish = await self._ask(attempt, sampling.params(left))
            if finish is not None and finish.type != "abort":
                sample.finish = finish.type
                return
            if finish is not None:
                await self._cut_off(attempt, sampling, finish)
                if sample.continuations >= MAX_CONTINUATIONS:
                    sample.finish, attempt.error = "abort", f"cut off {MAX_CONTINUATIONS} times: {finish.message}"
                    return

    async def _find_server(self, attempt: Attempt) -> None:
        """Stay if the server works, since it has the prompt in its cache; else go to another one, if there is one."""
        loop = asyncio.get_running_loop()
        while attempt.server.usable_at > loop.time():
            attempt.move(self.choose())
            await asyncio.sleep(max(0.0, attempt.server.usable_at - loop.time()))

    async def _cut_off(self, attempt: Attempt, sampling: Sampling, finish: _Finish) -> None:
        sample = attempt.sample
        attempt.error = f"aborted: {finish.message}"
        sample.continuations += 1
        self._counts["continuations"] += 1
        if not sampling.keep_partial:
            self._counts["tokens_discarded"] += attempt.start_over()
        # A paused server makes the next request wait; one that aborts at once must not be asked without a pause.
        await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 1.5**sample.continuations - FIRST_PAUSE))

    async def _ask(self, attempt: Attempt, params: dict[str, Any]) -> _Finish | None:
        """One request; None when there was no reply that counts, and then the server is left alone for a while."""
        loop, server = asyncio.get_running_loop(), attempt.server
        began, name = loop.time(), self._adapter_name()
        body = {
            "input_ids": [*attempt.sample.prompt_ids, *attempt.sample.output_ids],
            "sampling_params": params,
            "return_logprob": True,
            "stream": False,
        }
        if name is not None:
            body["lora_path"] = name
        try:
            reply = await server.http.post("/generate", msgspec.json.encode(body))
            if reply.status == 200:
                meta = _reply_decoder.decode(reply.body).meta_info
                attempt.extend(meta, server.url, name, self._published)
                self.last_answer = loop.time()
                server.answered()
                self._counts["tokens"] += len(meta.output_token_logprobs)
                return meta.finish_reason
            attempt.error = f"{server.url}: {_reason(reply.status, reply.body, server.url)}"
        except (OSError, HttpError, msgspec.MsgspecError) as error:
            attempt.error = f"{server.url}: {type(error).__name__}: {error}"
        self._counts["retries"] += 1
        if began >= server.usable_at:
            logger.warning("%s; trying again", attempt.error)
        server.failed(began, loop.time())
        return None


def _reason(status: int, body: bytes, url: str) -> str:
    """What a reply other than 200 says, when trying again may help.

    Raises:
        Rejected: it will not.
    """
    try:
        tree = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        tree = None
    tree = tree if isinstance(tree, dict) else {}
    inner = tree.get("error")
    inner = inner if isinstance(inner, dict) else {}
    message = str(inner.get("message") or tree.get("message") or body[:300].decode(errors="replace"))
    # A server that was started again does not have the adapter until it is published again.
    missing = inner.get("code") == "adapter_not_found" or "not loaded" in message
    if status < 500 and status not in _RETRIED and not missing:
        raise Rejected(url, status, message)
    return f"{message} (HTTP {status})"
