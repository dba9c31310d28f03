"""Round trips to the scheduler that are not requests: pause, continue, flush, statistics.

Owned by TokenizerManager. A call is sent when it is made, not when it is awaited, so calls reach the scheduler in the
order of the program.
Invariant: a call ends with its reply, the back's death, or the cancellation of its caller, and is then forgotten.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from sglang.srt.lora.adapter import Adapter
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import CallReply, PauseMode


class ControlClient:
    """Sends calls and hands each reply to the future that waits for it.

    Args:
        send: puts a message on the wire, after everything that was queued before it.
    """

    def __init__(self, send: Callable[[wire.ToBack], None]) -> None:
        self._send = send
        self._call_ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[CallReply]] = {}
        self._on_success: dict[int, Callable[[], None]] = {}
        self._error: Exception | None = None

    @property
    def num_pending(self) -> int:
        """Calls without a reply."""
        return len(self._pending)

    def pause(self, mode: PauseMode) -> asyncio.Future[CallReply]:
        """Freeze the scheduler (IN_PLACE), or send its running requests back to the queue (RETRACT)."""
        return self._call(lambda call_id: wire.PauseCall(call_id, mode))

    def resume(self) -> asyncio.Future[CallReply]:
        """Undo `pause`."""
        return self._call(wire.ContinueCall)

    def flush_cache(self) -> asyncio.Future[CallReply]:
        """Empty the prefix cache; `success` is False while a request owns KV pages."""
        return self._call(wire.FlushCacheCall)

    def stats(self) -> asyncio.Future[CallReply]:
        """Ask for the scheduler's state."""
        return self._call(wire.StatsCall)

    def stage_adapter(self, version_id: int, adapter: Adapter) -> asyncio.Future[CallReply]:
        """Copy an adapter to the back; `success` is False, with the reason, when it could not be taken."""
        return self._call(lambda call_id: wire.StageAdapterCall(call_id, version_id, adapter))

    def free_adapter(self, version_id: int) -> asyncio.Future[CallReply]:
        """Forget a version that no live request names."""
        return self._call(lambda call_id: wire.FreeAdapterCall(call_id, version_id))

    def switch_version(self, old: int, new: int, on_success: Callable[[], None]) -> asyncio.Future[CallReply]:
        """Move the live requests of one version to another at the next step.

        Args:
            on_success: called while the answer is read, before the rows behind it, which are the new version's.
        """
        return self._call(lambda call_id: wire.SwitchVersionCall(call_id, old, new), on_success)

    def join_group(
        self, name: str, address: str, port: int, rank: int, size: int, backend: str, seconds: float
    ) -> asyncio.Future[CallReply]:
        """Have the back join a trainer's group."""
        return self._call(
            lambda call_id: wire.JoinGroupCall(call_id, name, address, port, rank, size, backend, seconds)
        )

    def leave_group(self, name: str) -> asyncio.Future[CallReply]:
        """Have it leave; `success` is False when it knows no such group."""
        return self._call(lambda call_id: wire.LeaveGroupCall(call_id, name))

    def receive(self, group: str, broadcast: str, path: str, nbytes: int, seconds: float) -> asyncio.Future[CallReply]:
        """Have it fill a buffer with what a group's trainer sends; a failure's `code` is that of an AdapterError."""
        return self._call(lambda call_id: wire.ReceiveCall(call_id, group, broadcast, path, nbytes, seconds))

    def resolve(self, reply: CallReply) -> None:
        """A reply has come; one that nobody waits for any more is dropped."""
        future = self._pending.get(reply.call_id)
        if future is None or future.done():
            return
        on_success = self._on_success.get(reply.call_id)
        if reply.success and on_success is not None:
            on_success()
        future.set_result(reply)

    def fail_all(self, error: Exception) -> None:
        """The back is gone: every pending and every later call fails with `error`."""
        self._error = error
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)

    def _call(
        self, make: Callable[[int], wire.Call], on_success: Callable[[], None] | None = None
    ) -> asyncio.Future[CallReply]:
        if self._error is not None:
            raise self._error
        call_id = next(self._call_ids)
        self._send(make(call_id))
        future: asyncio.Future[CallReply] = asyncio.get_running_loop().create_future()
        self._pending[call_id] = future
        if on_success is not None:
            self._on_success[call_id] = on_success
        future.add_done_callback(lambda _: self._forget(call_id))
        return future

    def _forget(self, call_id: int) -> None:
        del self._pending[call_id]
        self._on_success.pop(call_id, None)
