"""Messages on their way to the scheduler, coalesced: one SubmitBatch and one AbortRequests per event-loop turn.

Owned by `request_lifecycle`. An abort is never sent before the submit it belongs to.
Invariant: a record is DISPATCHED exactly when its SubmitRequest has been handed to the channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.request_state import RecordState, RequestRecord


class Outbox:
    """Collects what one turn of the event loop wants to say.

    Args:
        send: hands one message to the channel; never blocks.
        on_failure: told which records could not be sent, and why.
    """

    def __init__(
        self, send: Callable[[wire.ToBack], None], on_failure: Callable[[list[RequestRecord], Exception], None]
    ) -> None:
        self._send = send
        self._on_failure = on_failure
        self._submits: list[RequestRecord] = []
        self._aborts: list[int] = []
        self._stops: list[int] = []
        self._scheduled = False

    def submit(self, record: RequestRecord) -> None:
        """Send the record's SubmitRequest with this turn's batch, unless it is closed before."""
        self._submits.append(record)
        self._schedule()

    def abort(self, req_id: int) -> None:
        """Ask the scheduler to end a dispatched request."""
        self._aborts.append(req_id)
        self._schedule()

    def stop(self, req_id: int) -> None:
        """Tell the scheduler that a dispatched request has reached a stop string."""
        self._stops.append(req_id)
        self._schedule()

    def send(self, message: wire.ToBack) -> None:
        """Send any other message now, behind everything collected before it."""
        self.flush()
        self._send(message)

    def flush(self) -> None:
        """Send what has been collected."""
        self._scheduled = False
        submits, self._submits = self._submits, []
        aborts, self._aborts = self._aborts, []
        stops, self._stops = self._stops, []
        batch = [record for record in submits if record.state is RecordState.NEW]
        if batch:
            self._submit(batch)
        if aborts:
            self._send(wire.AbortRequests(aborts))
        if stops:
            self._send(wire.StopRequests(stops))

    def clear(self) -> None:
        """Forget everything: the back is gone."""
        self._submits, self._aborts, self._stops = [], [], []

    def _submit(self, batch: list[RequestRecord]) -> None:
        try:
            self._send(wire.SubmitBatch([record.submit for record in batch if record.submit is not None]))
        except Exception as error:  # not one of them is on its way, so nobody would ever end them
            self._on_failure(batch, error)
            return
        for record in batch:
            record.state, record.submit = RecordState.DISPATCHED, None

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)
