"""The one owner of live records: opens them, sends them, ends them, and closes each exactly once.

Used by TokenizerManager only, on the event-loop thread; apart from `closed`, nothing here waits, so every transition is
one uninterruptible step. What a client does (abort, disconnect, pause) only ever marks a record and sends a message.
Invariants: a DISPATCHED record closes when its terminal row comes or the back dies, and in no other way; a NEW record
closes as soon as it is not wanted; `_close` is the only place where a record's resources are given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from sglang.srt.errors import AdapterError, ServiceUnavailableError
from sglang.srt.lora.lease import AdapterVersion
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish
from sglang.srt.managers.outbox import Outbox
from sglang.srt.managers.request_state import FrontCounters, RecordState, RequestGroup, RequestMetrics, RequestRecord
from sglang.srt.managers.response import WAITING_ABORT, abort_error, finish_reason
from sglang.srt.managers.rid_index import RidIndex
from sglang.srt.managers.step_output import apply_step

logger = logging.getLogger(__name__)


class RequestLifecycle:
    """Records in flight, the gate that an abort-mode pause closes, and the way to the scheduler.

    Args:
        send: hands one message to the channel.
        weight_version: names the weights that serve now; a reply carries the name at its end.
        registry: where records take the leases of their adapters, when they are sent.
    """

    def __init__(
        self,
        send: Callable[[wire.ToBack], None],
        weight_version: Callable[[], str],
        registry: LoRARegistry,
        metrics: RequestMetrics | None = None,
    ) -> None:
        self.records: dict[int, RequestRecord] = {}
        self.rids = RidIndex()
        self.counters = FrontCounters()
        self.outbox = Outbox(send, self._undeliverable)
        self._weight_version = weight_version
        self._registry = registry
        self._metrics = metrics
        self._gate_open = True
        self._closed_adapters: set[str] = set()
        self._held: dict[RequestGroup, None] = {}
        self._drains: list[tuple[set[int], asyncio.Future[None]]] = []

    def open(self, group: RequestGroup) -> None:
        """Take a call's records: from here on they can be aborted and must be closed.

        Raises:
            RequestError: a rid is in flight already; no record has been taken.
        """
        self.rids.add(group.records)
        self.records.update((record.req_id, record) for record in group.records)

    def admit(self, group: RequestGroup) -> None:
        """Send a validated call's records, or hold them while a gate is closed.

        Adapter names are looked up now: what a name means is settled when a request can run, not when it came.
        """
        if not self._gate_open or (self._closed_adapters and not self._closed_adapters.isdisjoint(self._names(group))):
            self._held[group] = None
            return
        try:
            self._take_leases(group)
        except AdapterError as error:
            self.fail(group, error)
            return
        for record in group.records:
            if record.state is RecordState.NEW:
                record.weight_version = self._weight_version()
                self.outbox.submit(record)

    def _take_leases(self, group: RequestGroup) -> None:
        """One lease for every prompt with an adapter, for its samples that are still wanted: all of them, or none."""
        wanted = []
        for prompt in group.prompts:
            records = [record for record in prompt.records if record.state is RecordState.NEW]
            if prompt.adapter is not None and records:
                wanted.append((prompt.adapter, records))
        leases = self._registry.lease([(name, [record.req_id for record in records]) for name, records in wanted])
        for lease, (_, records) in zip(leases, wanted, strict=True):
            for record in records:
                record.take_lease(lease)

    def _names(self, group: RequestGroup) -> set[str]:
        """The adapters of a call, whether it gave their names or their paths."""
        return {self._registry.name_of(prompt.adapter) for prompt in group.prompts if prompt.adapter is not None}

    def open_gates(self) -> None:
        """Open every gate and send what they held, in order."""
        self._closed_adapters.clear()
        self.set_gate(is_open=True)

    def set_gate(self, *, is_open: bool, adapter: str | None = None) -> None:
        """Close a gate, the one for all requests or that of one adapter; or open it and send what it held, in order."""
        if adapter is None:
            self._gate_open = is_open
        elif is_open:
            self._closed_adapters.discard(adapter)
        else:
            self._closed_adapters.add(adapter)
        if is_open:
            held, self._held = self._held, {}
            for group in held:
                self.admit(group)

    def switch(self, old: AdapterVersion, new: AdapterVersion) -> None:
        """The scheduler has moved the requests of one version to another."""
        for record in self.records.values():
            if record.lease is not None and record.lease.version is old and record.finish_reason is None:
                record.switched(new)
        self._registry.switch(old, new)

    def with_adapter(self, name: str) -> list[RequestRecord]:
        """Records of an adapter, those that wait at a gate included."""
        return [record for record in self.records.values() if self._adapter_of(record) == name]

    def _adapter_of(self, record: RequestRecord) -> str | None:
        if record.lease is not None:
            return record.lease.version.name
        wanted = record.prompt.adapter
        return None if wanted is None else self._registry.name_of(wanted)

    def holding(self, version: AdapterVersion) -> list[RequestRecord]:
        """Records that hold a version."""
        return [r for r in self.records.values() if r.lease is not None and r.lease.version is version]

    @property
    def num_held(self) -> int:
        """Sequences that wait at the gate."""
        return sum(len(group.records) for group in self._held)

    def in_flight(self, adapter: str | None = None) -> list[RequestRecord]:
        """Records, of one adapter or of all, that the scheduler owes a terminal row."""
        self.outbox.flush()
        records = self.records.values() if adapter is None else self.with_adapter(adapter)
        return [record for record in records if record.state is RecordState.DISPATCHED]

    def abort(self, record: RequestRecord) -> bool:
        """End a record at its client's wish; its reply is an abort, with what has been generated.

        Returns:
            False when there was nothing to abort: the reply is complete.
        """
        if record.finish_reason is not None or record.state is RecordState.CLOSED:
            return False
        if record.state is RecordState.NEW:
            self._complete(record, Finish.ABORT, finish_reason(Finish.ABORT, WAITING_ABORT, 0))
            self._close(record)
        elif not record.abort_sent:
            record.abort_sent = True
            self.outbox.abort(record.req_id)
        return True

    def abandon(self, group: RequestGroup) -> None:
        """Nobody reads this call any more: abort what still runs, close what was never sent. Idempotent."""
        self._held.pop(group, None)
        for record in group.records:
            record.listening = False
            if record.state is RecordState.NEW:
                self._close(record)
            else:
                self.abort(record)

    def fail(self, group: RequestGroup, error: Exception) -> None:
        """The call's client gets `error`, and its records end."""
        group.fail(error)
        self.abandon(group)

    def fail_held(self, error: Exception) -> None:
        """Give up on the calls that wait at the gate."""
        for group in list(self._held):
            self.fail(group, error)

    def fail_all(self, error: Exception) -> None:
        """The back is gone: every record closes, every client that still waits gets `error`."""
        self._held.clear()
        self.outbox.clear()
        for record in list(self.records.values()):
            if record.listening:
                record.group.fail(error)
            self._close(record)

    def apply(self, output: wire.StepOutput) -> None:
        """Act on one step of the scheduler."""
        result = apply_step(output, self.records, time.perf_counter(), self._metrics)
        self.counters.late_rows += result.late_rows
        self.counters.generation_tokens_total += result.num_tokens
        for record, error in result.broken:
            logger.error("output of request %s could not be processed", record.rid, exc_info=error)
            self.fail(record.group, error)
        for record, matched in result.stopped:
            self._complete(record, Finish.STOP, {"type": "stop", "matched": matched})
        for record, finish, info in result.terminal:
            record.num_retractions = info.num_retractions
            if record.finish_reason is None:
                self._complete(record, finish, finish_reason(finish, info, record.completion_tokens))
            self._close(record)
        for record, _ in result.stopped:
            if record.state is RecordState.DISPATCHED:
                self.outbox.stop(record.req_id)

    async def closed(self, records: Iterable[RequestRecord], timeout: float | None = None) -> bool:
        """Wait until all of these records are closed; False when `timeout` seconds were not enough."""
        waiting = {record.req_id for record in records if record.state is not RecordState.CLOSED}
        if not waiting:
            return True
        drain = (waiting, asyncio.get_running_loop().create_future())
        self._drains.append(drain)
        try:
            await asyncio.wait([drain[1]], timeout=timeout)
        finally:
            self._drains.remove(drain)
        return not waiting

    def _complete(self, record: RequestRecord, finish: Finish, reason: dict[str, object]) -> None:
        """The reply is settled; its names are free again."""
        record.finish_reason = reason
        record.listening = False
        record.finished_at = time.perf_counter()
        record.weight_version = self._weight_version()
        self.rids.discard(record)
        if record.log_metrics:
            self.counters.count(record, aborted=finish is Finish.ABORT)
            if self._metrics is not None:
                self._metrics.finished(record, record.finished_at - record.created_at)
        error = None if record.group.stream else abort_error(reason)
        if error is not None:
            record.group.fail(error)
        record.group.completed(record)

    def _close(self, record: RequestRecord) -> None:
        """The end of a record: the one place that gives back what it holds."""
        if record.state is RecordState.CLOSED:
            self.counters.double_closes += 1
            return
        record.state, record.submit, record.listening = RecordState.CLOSED, None, False
        del self.records[record.req_id]
        self.rids.discard(record)
        if record.lease is not None:
            record.lease.release(record.req_id)
        for waiting, future in self._drains:
            waiting.discard(record.req_id)
            if not waiting and not future.done():
                future.set_result(None)

    def _undeliverable(self, records: list[RequestRecord], error: Exception) -> None:
        logger.error("requests could not be sent to the scheduler", exc_info=error)
        for record in records:
            self.fail(record.group, ServiceUnavailableError(f"The request could not be sent to the scheduler: {error}"))
