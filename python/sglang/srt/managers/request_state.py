"""One sequence of a client's request, and the call it belongs to.

Owned by `request_lifecycle` (which opens, completes and closes records); `step_output` adds tokens; the coroutine that
serves the client reads. Everything runs on the event-loop thread.

A record is NEW until its SubmitRequest has been sent, DISPATCHED until the scheduler's terminal row has come (or the
back has died), then CLOSED. Whether the client still waits is a different matter: `listening` turns False when the
reply is complete (`finish_reason` set) or nobody is left to read it; neither of the two closes a DISPATCHED record.
Invariants: `req_id` is never reused; `finish_reason` is set at most once; `len(logprobs) == len(output_ids)` when
log-probabilities were asked for.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from sglang.srt.lora.lease import AdapterVersion, Lease
from sglang.srt.managers.detokenizer import Detokenizer
from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling.sampling_params import SamplingParams

Alternatives = list[tuple[float, int]]
"""(log-probability, token id) pairs at one position; empty where not available."""


class RecordState(enum.Enum):
    """Where a record is in its life."""

    NEW = "new"
    DISPATCHED = "dispatched"
    CLOSED = "closed"


class LogprobOptions(msgspec.Struct, frozen=True):
    """What `return_logprob` asks for.

    Fields:
        start: first prompt position, or -1 for output positions only.
        top_num: alternatives per position; token_ids: ids to report at each position.
        with_text: entries carry the token's text.
    """

    start: int = -1
    top_num: int = 0
    token_ids: tuple[int, ...] = ()
    with_text: bool = False


class RequestMetrics(Protocol):
    """What an observer of requests implements. Called on the event loop, per record; seconds are durations."""

    def first_token(self, record: RequestRecord, seconds: float) -> None:
        """The first output token came `seconds` after the request."""

    def inter_token(self, record: RequestRecord, seconds: float, num_tokens: int) -> None:
        """`num_tokens` further tokens came `seconds` after the ones before."""

    def finished(self, record: RequestRecord, seconds: float) -> None:
        """The request ended, `finish_reason` says how, `seconds` after it came."""


@dataclass(slots=True)
class FrontCounters:
    """Counters since start. The last two are bug traps: late rows are harmless but rare, double closes never happen."""

    requests_total: int = 0
    aborted_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    late_rows: int = 0
    double_closes: int = 0

    def count(self, record: RequestRecord, *, aborted: bool) -> None:
        """Add a sequence that has ended."""
        self.requests_total += 1
        self.aborted_total += aborted
        self.prompt_tokens_total += record.prompt_tokens
        self.cached_tokens_total += record.cached_tokens


@dataclass(slots=True)
class LogprobExtras:
    """Log-probabilities beyond those of the sampled tokens: prompt positions, and alternatives per position."""

    input_logprobs: list[float | None] = field(default_factory=list)
    input_top: list[Alternatives] = field(default_factory=list)
    input_ids: list[Alternatives] = field(default_factory=list)
    output_top: list[Alternatives] = field(default_factory=list)
    output_ids: list[Alternatives] = field(default_factory=list)

    def extend(self, row: wire.RowLogprobs) -> None:
        """Append what one message says."""
        if row.input_logprobs is not None:
            values = wire.unpack(row.input_logprobs, "<f4").tolist()
            self.input_logprobs += [None if v != v else v for v in values]
        for mine, column in (
            (self.input_top, row.input_top),
            (self.input_ids, row.input_ids),
            (self.output_top, row.output_top),
            (self.output_ids, row.output_ids),
        ):
            if column is not None:
                mine += unpack_positions(column)

    def truncate_output(self, keep: int) -> None:
        """Forget output positions from `keep` on."""
        del self.output_top[keep:]
        del self.output_ids[keep:]


def unpack_positions(column: wire.Positions) -> list[Alternatives]:
    """One list of alternatives per position."""
    pairs = list(
        zip(wire.unpack(column.logprobs, "<f4").tolist(), wire.unpack(column.ids, "<i4").tolist(), strict=True)
    )
    positions, start = [], 0
    for count in wire.unpack(column.counts, "<i4").tolist():
        positions.append(pairs[start : start + count])
        start += count
    return positions


@dataclass(slots=True, eq=False)
class Prompt:
    """One prompt of a call, shared by its n samples.

    Fields:
        text: to be tokenised, or None when `token_ids` were given.
        max_new_given: whether the client set max_new_tokens itself (the default is lowered to fit, a given one is not).
        adapter: the adapter's name, None for the base model.
    """

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    max_new_given: bool
    logprobs: LogprobOptions | None
    adapter: str | None = None
    extra_key: str = ""
    priority: int = 0
    log_metrics: bool = True
    records: list[RequestRecord] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt length; 0 until the text has been tokenised."""
        return len(self.token_ids)


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One sequence, from the client's request to the scheduler's terminal row.

    Fields:
        rid: the client's name for it, unique among requests in flight; aliases: further names that abort it.
        index: place in the reply (input-major).
        submit: the message to send; set when the whole call has been validated.
        lease: the hold on an adapter version, from admission to the record's end; shared by the prompt's samples.
        versions: (first output token, adapter version) of each stretch of the output; one entry unless it was switched.
        check_stops: stop strings are matched as tokens come; otherwise text is decoded when it is wanted.
        hidden: 1 when the last token is a matched stop id that must not show in the text.
        sent_tokens: tokens the client has been given; queued: waits in the group's list of updates.
    """

    req_id: int
    rid: str
    group: RequestGroup
    index: int
    prompt: Prompt
    aliases: tuple[str, ...] = ()
    state: RecordState = RecordState.NEW
    submit: wire.SubmitRequest | None = None
    lease: Lease | None = None
    versions: list[tuple[int, AdapterVersion]] = field(default_factory=list)
    listening: bool = True
    abort_sent: bool = False
    finish_reason: dict[str, Any] | None = None
    weight_version: str = "default"
    detokenizer: Detokenizer | None = None
    check_stops: bool = False
    stream_interval: int = 1
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    extras: LogprobExtras = field(default_factory=LogprobExtras)
    cached_tokens: int = 0
    num_retractions: int = 0
    hidden: int = 0
    sent_tokens: int = 0
    queued: bool = False
    created_at: float = field(default_factory=time.perf_counter)
    last_token_at: float = 0.0
    finished_at: float = 0.0
    _text: list[str] = field(default_factory=list)
    _num_decoded: int = 0
    _text_ended: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Prompt length; 0 until the text has been tokenised."""
        return self.prompt.num_tokens

    @property
    def completion_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.output_ids)

    @property
    def log_metrics(self) -> bool:
        """Whether the request counts in the metrics (health probes do not)."""
        return self.prompt.log_metrics

    @property
    def update_due(self) -> bool:
        """Whether a streaming client should hear of the tokens that have accrued."""
        return self.sent_tokens == 0 or len(self.output_ids) - self.sent_tokens >= self.stream_interval

    def take_lease(self, lease: Lease) -> None:
        """Run on the lease's version from here on."""
        assert self.submit is not None
        self.lease = lease
        self.submit = msgspec.structs.replace(self.submit, version_id=lease.version.version_id)
        self.versions = [(0, lease.version)]

    def switched(self, version: AdapterVersion) -> None:
        """Output tokens that have not come yet are made by another version."""
        start = len(self.output_ids)
        if self.versions[-1][0] == start:
            self.versions.pop()
        self.versions.append((start, version))

    def accrue(self, tokens: list[int], logprobs: list[float], extras: wire.RowLogprobs | None) -> None:
        """Append the tokens of one row; `logprobs` is as long as `tokens`, or empty when nobody asked."""
        self.output_ids += tokens
        if self.prompt.logprobs is not None:
            assert len(logprobs) == len(tokens), "a row without the log-probabilities it was to carry"
            self.logprobs += logprobs
            if extras is not None:
                self.extras.extend(extras)

    def decode(self) -> str | None:
        """Turn tokens that came since the last call into text.

        Returns:
            The stop string that matched, or None. On a match, tokens after it are dropped from the output.
        """
        limit = len(self.output_ids) - self.hidden
        fresh = self.output_ids[self._num_decoded : limit]
        if self.detokenizer is None or not fresh:
            return None
        piece = self.detokenizer.push(fresh)
        self._text.append(piece.text)
        if piece.matched is not None:
            limit = self._num_decoded + piece.num_tokens
            self._text_ended = True
            self.hidden = 0
            del self.output_ids[limit:], self.logprobs[limit:]
            self.extras.truncate_output(limit)
        self._num_decoded = limit
        return piece.matched

    def take_text(self) -> str:
        """Text since the last call; once the reply is complete, with whatever the detokenizer still held back."""
        if self.detokenizer is None:
            return ""
        self.decode()
        if self.finish_reason is not None and not self._text_ended:
            self._text.append(self.detokenizer.finish())
            self._text_ended = True
        text = "".join(self._text)
        self._text.clear()
        return text

    def meta_info(self) -> dict[str, Any]:
        """`meta_info` of the native reply, without log-probabilities."""
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": self.finish_reason,
            "prompt_tokens": len(self.prompt.token_ids),
            "weight_version": self.weight_version,
            "num_retractions": self.num_retractions,
            "completion_tokens": len(self.output_ids),
            "cached_tokens": self.cached_tokens,
            "reasoning_tokens": 0,
        }
        if self.versions:
            meta.update(self.adapter_info())
        if self.finish_reason is not None:
            meta["e2e_latency"] = self.finished_at - self.created_at
        return meta

    def adapter_info(self) -> dict[str, Any]:
        """Which adapter version made the output; with spans when it was switched on the way. {} for the base model."""
        if not self.versions:
            return {}
        latest = self.versions[-1][1]
        info: dict[str, Any] = {"lora_name": latest.name, "lora_version": latest.version_id}
        if len(self.versions) > 1:
            info["lora_version_spans"] = [[start, version.version_id] for start, version in self.versions]
        return info


class RequestGroup:
    """One client call: its records, and the place where its coroutine waits for them.

    Args:
        stream: the client wants updates, not only the end.
        is_list: the reply is a list (a batch, or n > 1), and events carry an index.
    """

    def __init__(self, *, stream: bool, is_list: bool) -> None:
        self.stream = stream
        self.is_list = is_list
        self.prompts: list[Prompt] = []
        self.records: list[RequestRecord] = []
        self.error: Exception | None = None
        self._incomplete = 0
        self._undelivered = 0
        self._updates: deque[RequestRecord] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def add(self, record: RequestRecord) -> None:
        """Take another record; only before the call is opened."""
        self.records.append(record)
        record.prompt.records.append(record)
        self._incomplete += 1
        self._undelivered += 1

    def notify(self, record: RequestRecord) -> None:
        """The record has something new for a streaming client."""
        if not record.queued:
            record.queued = True
            self._updates.append(record)
            self._wake()

    def completed(self, record: RequestRecord) -> None:
        """The record's reply is complete; called once a record."""
        self._incomplete -= 1
        if self.stream:
            self.notify(record)
        elif not self._incomplete:
            self._wake()

    def fail(self, error: Exception) -> None:
        """The client gets `error` instead of the rest of its reply; the first error wins."""
        if self.error is None:
            self.error = error
        self._wake()

    async def finished(self) -> None:
        """Wait until every record is complete; raises the call's error."""
        while self.error is None and self._incomplete:
            await self._wait()
        if self.error is not None:
            raise self.error

    async def next_update(self) -> RequestRecord | None:
        """Wait for a record with news; None when the last record's end has been handed out. Raises the call's error.

        What the record has accrued must be taken before the caller waits for anything else.
        """
        while not self._updates:
            if self.error is not None:
                raise self.error
            if not self._undelivered:
                return None
            await self._wait()
        record = self._updates.popleft()
        record.queued = False
        if record.finish_reason is not None:
            self._undelivered -= 1
        return record

    def release(self) -> None:
        """Drop the records, which point back here: reference counts then free both, without the cycle collector."""
        for prompt in self.prompts:
            prompt.records.clear()
        self.records, self.prompts = [], []

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
