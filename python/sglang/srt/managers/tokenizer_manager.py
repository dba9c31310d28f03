"""The front's core: takes requests, speaks with the scheduler, answers clients. Every entry point goes through here.

Created by `entrypoints`, one per server, used on one event loop only. It translates between clients and the two owners
behind it: `RequestLifecycle` has the records, `ControlClient` the round trips.
Invariants: every request gets exactly one terminal result, an error included; a call that ends for whatever reason
(reply, error, disconnect, cancellation) leaves nothing behind once the scheduler has acked; no pause, abort or drain
waits for anything but those acks.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from sglang.srt.config.sections import Config
from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.lora.lease import AdapterVersion
from sglang.srt.managers.adapter_calls import AdapterCalls, Reader
from sglang.srt.managers.adapter_service import AdapterService
from sglang.srt.managers.control_client import ControlClient
from sglang.srt.managers.group_calls import GroupCalls
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.requests import (
    ContinueGenerationReqInput,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    PauseGenerationReqInput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.io_struct.wire import CallReply, PauseMode, Ready, SchedulerStats
from sglang.srt.managers.pause_control import PauseControl
from sglang.srt.managers.request_builder import RequestBuilder
from sglang.srt.managers.request_lifecycle import RequestLifecycle
from sglang.srt.managers.request_state import RequestGroup, RequestMetrics
from sglang.srt.managers.response import NativeReply, OutputChunk, take_chunk
from sglang.srt.parser.tokenizer import Tokenizer
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

DRAIN_ACK_SECONDS = 10.0
"""How long `drain` waits for the acks of what it had to abort: a wedged scheduler must not keep the server alive."""
FLUSH_RETRY_SECONDS = 0.05
CLIENT_CLOSED_REQUEST = 499


class ServerStatus(enum.Enum):
    """What the server can do now; only UP takes requests."""

    STARTING = "starting"
    UP = "up"
    DRAINING = "draining"
    DOWN = "down"


class Channel(Protocol):
    """The front's end of the wire (`ipc.FrontChannel`)."""

    def send(self, message: wire.ToBack) -> None:
        """Queue one message; never blocks."""

    def messages(self) -> AsyncIterator[wire.ToFront]:
        """What the back says."""


class Client(Protocol):
    """The other end of a request."""

    async def wait_disconnected(self) -> None:
        """Return when the client has gone."""


class TokenizerManager:
    """See the module.

    Attributes: `records` holds every sequence that is not closed, by req_id. `rid_to_state` maps the rids in flight to
    records; outside code may pop from it. `stats` is the latest the scheduler has said, `ready` its first message.

    Args:
        server_args: the flat launch flags, kept for code that looks at them.
        tokenizer: None with --skip-tokenizer-init.
        metrics: hears of every request.
        reader: makes adapters of what clients send; None without --enable-lora.
        on_publish: told how many seconds the load of an adapter took.

    Raises:
        ConfigError: --preferred-sampling-params does not hold valid sampling parameters.
    """

    def __init__(
        self,
        config: Config,
        server_args: ServerArgs,
        channel: Channel,
        tokenizer: Tokenizer | None,
        metrics: RequestMetrics | None = None,
        reader: Reader | None = None,
        on_publish: Callable[[float], None] | None = None,
    ) -> None:
        self.config = config
        self.server_args = server_args
        self.tokenizer = tokenizer
        self.status = ServerStatus.STARTING
        self.weight_version = config.server.weight_version
        self.ready: Ready | None = None
        self.stats = SchedulerStats()
        self._channel = channel
        self._builder = RequestBuilder(config, tokenizer)
        self._control = ControlClient(lambda message: self._lifecycle.outbox.send(message))
        self.adapters = AdapterService(
            config.lora, self._control, self._abort_holders, self._holders, self._on_switch, on_publish=on_publish
        )
        self.lora_registry = self.adapters.registry
        self._lifecycle = RequestLifecycle(channel.send, lambda: self.weight_version, self.lora_registry, metrics)
        self._pause = PauseControl(self._lifecycle, self._control)
        self.group_calls = GroupCalls(self._control)
        self.adapter_calls = AdapterCalls(self.adapters, reader, self.group_calls, self._pause.frozen)
        self._flushing = False
        self._down_reason = ""
        self._settled = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._preloading: asyncio.Task[None] | None = None
        self.records = self._lifecycle.records
        self.rid_to_state = self._lifecycle.rids.by_rid
        self.counters = self._lifecycle.counters

    @property
    def num_held(self) -> int:
        """Sequences that wait in the front for an abort-mode pause to end."""
        return self._lifecycle.num_held

    @property
    def paused(self) -> PauseMode | None:
        """Mode of the pause that is on."""
        return self._pause.mode

    async def start(self) -> None:
        """Start to read what the back says."""
        self._reader = asyncio.create_task(self._read())

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return when the back has loaded the model.

        Raises:
            ServiceUnavailableError: the back died, or `timeout` seconds were not enough.
        """
        try:
            await asyncio.wait_for(self._settled.wait(), timeout)
        except asyncio.TimeoutError:
            raise ServiceUnavailableError(f"The model was not loaded within {timeout} s.") from None
        if self.status is ServerStatus.DOWN:
            raise ServiceUnavailableError(self._down_reason)

    def back_died(self, reason: str) -> None:
        """The back process is gone: every live request and control call fails with 503. The first reason counts."""
        if self.status is ServerStatus.DOWN:
            return
        self.status = ServerStatus.DOWN
        self._down_reason = f"The server cannot serve any more: {reason}."
        error = ServiceUnavailableError(self._down_reason)
        self._pause.close()
        self._control.fail_all(error)
        self._lifecycle.fail_all(error)
        self._settled.set()

    async def close(self) -> None:
        """End everything that still runs and stop reading. Idempotent; the channel stays open."""
        self.back_died("it has been shut down")
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def generate_request(self, obj: GenerateReqInput, request: Client | None = None) -> AsyncIterator[Any]:
        """Serve a request with native replies.

        Yields:
            Not streaming: once, a dict, or a list of dicts (a batch, or n > 1; input-major). Streaming: cumulative
            dicts, each with its sequence's `index` when there are several.

        Raises:
            RequestError: the client's mistake. ServiceUnavailableError: full, not ready, draining or dead.
        """
        if not obj.stream:
            async with self._session(obj, request, stream=False) as group:
                await group.finished()
                bodies = [NativeReply(record, self.tokenizer).render() for record in group.records]
            # Outside of the session: a caller that takes the one item and forgets us leaves nothing open.
            yield bodies if group.is_list else bodies[0]
            return
        async with self._session(obj, request, stream=True) as group:
            incremental = self.config.server.incremental_streaming
            replies = [NativeReply(record, self.tokenizer, incremental=incremental) for record in group.records]
            while (record := await group.next_update()) is not None:
                yield replies[record.index].render()

    async def stream_chunks(self, obj: GenerateReqInput, request: Client | None = None) -> AsyncIterator[OutputChunk]:
        """Serve a request as deltas, one chunk per sequence and event-loop tick. Raises like `generate_request`."""
        async with self._session(obj, request, stream=True) as group:
            while (record := await group.next_update()) is not None:
                yield take_chunk(record)

    async def pause_generation(self, obj: PauseGenerationReqInput | None = None) -> None:
        """Pause. ABORT ends all that is in flight, makes new requests wait, and returns when the last record is gone;
        RETRACT and IN_PLACE freeze the scheduler, where new requests queue. Adapters load and unload meanwhile.

        Raises:
            RequestError: unknown mode. ServiceUnavailableError: the back is dead.
        """
        if self.status is ServerStatus.DOWN:
            raise ServiceUnavailableError(self._down_reason)
        await self._pause.pause(obj or PauseGenerationReqInput())

    async def continue_generation(self, obj: ContinueGenerationReqInput | None = None) -> None:
        """Undo every pause, one that is still draining included (it then ends when its own records are gone).

        Raises:
            AdapterError: busy; the pause belongs to another owner than the one named.
        """
        await self._pause.continue_(obj or ContinueGenerationReqInput())

    async def load_lora_adapter(self, obj: LoadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Load an adapter from a directory, which is never read again."""
        return await self.adapter_calls.load(obj)

    async def load_lora_adapter_from_tensors(self, obj: LoadLoRAAdapterFromTensorsReqInput) -> LoRAUpdateOutput:
        """Load an adapter from tensors in the request."""
        return await self.adapter_calls.load_from_tensors(obj)

    async def unload_lora_adapter(self, obj: UnloadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Unload an adapter."""
        return await self.adapter_calls.unload(obj)

    def abort_request(
        self, rid: str | None = None, abort_all: bool = False, prefix: bool = False, lora_name: str | None = None
    ) -> int:
        """Abort requests wherever they are: being tokenised, waiting for continue, or with the scheduler.

        Args:
            rid: one request, or the own rid of a call with several sequences.
            prefix: every rid in flight that starts with `rid`.
            lora_name: every request of this adapter.

        Returns:
            How many sequences this matched.
        """
        if abort_all:
            records = list(self.records.values())
        elif lora_name is not None:
            records = self._lifecycle.with_adapter(lora_name)
        else:
            records = self._lifecycle.rids.find(rid, prefix=prefix) if rid else []
        return sum(self._lifecycle.abort(record) for record in records)

    async def flush_cache(self, timeout: float = 0.0) -> tuple[bool, str]:
        """Empty the prefix cache; while requests own KV pages, try again for up to `timeout` seconds.

        Returns:
            Success, and a sentence for the client.
        """
        if self._flushing:
            return False, "Another flush_cache is already in progress."
        self._flushing = True
        now = asyncio.get_running_loop().time
        deadline = now() + timeout
        try:
            while not (reply := await self._control.flush_cache()).success:
                remaining = deadline - now()
                if remaining <= 0:
                    return False, f"Flush cache failed. {reply.message}".strip()
                in_flight = self._lifecycle.in_flight()
                if in_flight:
                    await self._lifecycle.closed(in_flight, remaining)
                else:
                    await asyncio.sleep(min(FLUSH_RETRY_SECONDS, remaining))
        finally:
            self._flushing = False
        return True, "Cache flushed."

    async def scheduler_stats(self) -> SchedulerStats:
        """The scheduler's state, asked for now; also kept as `stats`."""
        reply = await self._control.stats()
        return reply.stats or self.stats

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, let live ones run for `timeout` seconds, then abort them and wait for the acks.

        Returns:
            Whether nothing is left; False only when the scheduler did not ack in time.
        """
        if self.status is ServerStatus.DOWN:
            return True
        self.status = ServerStatus.DRAINING
        self._lifecycle.fail_held(ServiceUnavailableError("The server is shutting down."))
        if await self._lifecycle.closed(list(self.records.values()), timeout):
            return True
        self.abort_request(abort_all=True)
        return await self._lifecycle.closed(list(self.records.values()), DRAIN_ACK_SECONDS)

    def _abort_holders(self, version: AdapterVersion) -> None:
        for record in self._lifecycle.holding(version):
            self._lifecycle.abort(record)

    def _holders(self, version: AdapterVersion) -> list[str]:
        return [record.rid for record in self._lifecycle.holding(version)]

    def _on_switch(self, old: AdapterVersion, new: AdapterVersion) -> None:
        self._lifecycle.switch(old, new)

    @contextlib.asynccontextmanager
    async def _session(
        self, obj: GenerateReqInput, client: Client | None, *, stream: bool
    ) -> AsyncIterator[RequestGroup]:
        """One call, from validation to the moment nobody is left to read its result, however that comes about."""
        _require_up(self.status, self._down_reason)
        group = self._builder.open(obj, stream=stream)
        _require_room(self.config, self.ready, len(self.records) + len(group.records))
        self._lifecycle.open(group)
        watch: asyncio.Task[None] | None = None
        try:
            if client is not None:
                gone = RequestError("The client has disconnected.", CLIENT_CLOSED_REQUEST, "ClientDisconnected")
                watch = asyncio.create_task(_call_when_gone(client, lambda: self._lifecycle.fail(group, gone)))
            await self._builder.fill(group, None if self.ready is None else self.ready.max_req_input_len)
            self._lifecycle.admit(group)
            yield group
        finally:
            if watch is not None:
                watch.cancel()
            self._lifecycle.abandon(group)
            group.release()

    def _up(self) -> None:
        if self.status is ServerStatus.STARTING:
            self.status = ServerStatus.UP
        self._settled.set()

    async def _preload(self) -> None:
        """Load --lora-paths; the server does not start without one of them."""
        for name, path, pinned in self.config.lora.preload:
            try:
                reply = await self.adapter_calls.load(
                    LoadLoRAAdapterReqInput(lora_name=name, lora_path=path, pinned=pinned)
                )
            except ServiceUnavailableError:
                return
            except Exception as error:  # whatever it is, nobody may wait for this server for ever
                logger.exception("--lora-paths %s=%s", name, path)
                self.back_died(f"--lora-paths {name}={path}: {type(error).__name__}: {error}")
                return
            if not reply.success:
                self.back_died(f"--lora-paths {name}={path}: {reply.error_message}")
                return
        self._up()

    async def _read(self) -> None:
        """Act on what the back says, until `close`; an error in here is a bug, and ends the server's service."""
        try:
            async for message in self._channel.messages():
                if isinstance(message, wire.StepOutput):
                    self._lifecycle.apply(message)
                elif isinstance(message, wire.StatsPush):
                    self.stats = message.stats
                elif isinstance(message, CallReply):
                    self.stats = message.stats or self.stats
                    self._control.resolve(message)
                elif isinstance(message, Ready):
                    self.ready = message
                    self.adapter_calls.back_is_ready(message)
                    if self.config.lora.preload:
                        self._preloading = asyncio.create_task(self._preload())
                    else:
                        self._up()
                else:
                    self.back_died(message.message)
        except Exception as error:
            logger.exception("the front cannot read the scheduler's messages any more")
            self.back_died(f"reading the scheduler's messages failed with {type(error).__name__}: {error}")


def _require_up(status: ServerStatus, down_reason: str) -> None:
    if status is ServerStatus.UP:
        return
    reasons = {
        ServerStatus.STARTING: "The server is still loading the model.",
        ServerStatus.DRAINING: "The server is shutting down.",
        ServerStatus.DOWN: down_reason,
    }
    raise ServiceUnavailableError(reasons[status])


def _require_room(config: Config, ready: Ready | None, num_records: int) -> None:
    if config.schedule.max_queued_requests is None:
        return
    running = config.schedule.max_running_requests if ready is None else ready.max_running_requests
    if num_records > running + config.schedule.max_queued_requests:
        raise ServiceUnavailableError("The request queue is full.")


async def _call_when_gone(client: Client, callback: Callable[[], None]) -> None:
    """Wait for the client to go; a watch that fails cannot vouch for the client any more, so it counts as gone."""
    try:
        await client.wait_disconnected()
    except Exception:
        logger.exception("watching a client's connection failed")
    callback()
