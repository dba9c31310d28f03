"""What the front asks of the back about trainers' groups: join, leave, receive. Part of SchedulerControl.

Every group has a thread of its own, because collectives block; `poll` answers the calls that have ended, between two
steps. Invariants: a call is answered by its deadline, also when its thread is stuck in a library; a group that has
failed is forgotten, all but why, until it is joined anew.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang.srt.managers.io_struct import wire
from sglang.srt.weight_sync.broadcast_group import (
    Backend,
    BroadcastError,
    BroadcastGroup,
    BrokenGroupError,
    CancelledError,
    GroupSpec,
)

logger = logging.getLogger(__name__)

OVERDUE_SECONDS = 2.0
"""After its deadline a call is given this long to say so itself."""
_AGAIN = "make it with /init_weights_update_group"


class Reply(Protocol):
    """Sends an answer, and the rows collected so far before it."""

    def __call__(self, call_id: int, success: bool, message: str = "", code: str = "") -> None:
        """Send it."""


@dataclass(eq=False)
class Membership:
    """A group and the thread that does its calls one after the other; `joined` ends when all members have."""

    name: str
    thread: ThreadPoolExecutor
    joined: Future[BroadcastGroup]

    def close(self) -> None:
        """Leave, without waiting for anybody."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.joined.add_done_callback(_close)


@dataclass
class PendingCall:
    """A call without an answer; `overdue` is a moment of the monotonic clock."""

    membership: Membership
    future: Future[Any]
    overdue: float


class GroupControl:
    """Handles the calls about groups.

    Args:
        device: the model's; bytes land there before they reach the host, if the group is NCCL's.
    """

    def __init__(self, device: torch.device, reply: Reply) -> None:
        self.handlers: dict[type, Callable[[Any], None]] = {
            wire.JoinGroupCall: self._join,
            wire.LeaveGroupCall: self._leave,
            wire.ReceiveCall: self._receive,
        }
        self._device = device
        self._reply = reply
        self._members: dict[str, Membership] = {}
        self._broken: dict[str, str] = {}
        self._pending: dict[int, PendingCall] = {}

    @property
    def pending(self) -> bool:
        """Whether a call waits for its answer."""
        return bool(self._pending)

    def poll(self) -> bool:
        """Answer the calls that have ended, or should have; whether there were any."""
        now = time.monotonic()
        ended = [call_id for call_id, call in self._pending.items() if call.future.done() or now > call.overdue]
        for call_id in ended:
            self._answer(call_id, self._pending.pop(call_id))
        return bool(ended)

    def _answer(self, call_id: int, call: PendingCall) -> None:
        name = call.membership.name
        if call.future.cancelled():
            error: BaseException | None = BrokenGroupError(f"group {name!r} was closed or replaced")
        elif not call.future.done():
            error = BrokenGroupError(f"group {name!r} is broken: torch.distributed has not come back in time")
        else:
            error = call.future.exception()
        if error is None:
            self._reply(call_id, True)
            return
        logger.warning("%s", error, exc_info=None if isinstance(error, BroadcastError) else error)
        code = "broadcast_failed"
        if isinstance(error, CancelledError):
            code = "broadcast_cancelled"
        elif isinstance(error, BrokenGroupError):
            code = "no_group"
        if self._members.get(name) is call.membership and (code == "no_group" or call.future is call.membership.joined):
            self._forget(name, str(error))
        text = str(error) if isinstance(error, BroadcastError) else f"{type(error).__name__}: {error}"
        self._reply(call_id, False, text, code)

    def _join(self, message: wire.JoinGroupCall) -> None:
        backend: Backend = "nccl" if message.backend == "nccl" else "gloo"
        if backend == "nccl" and self._device.type != "cuda":
            text = f"this server runs on {self._device.type}: its backend must be gloo, not nccl"
            self._reply(message.call_id, False, text, "invalid_group")
            return
        self._forget(message.name)
        spec = GroupSpec(message.name, message.address, message.port, message.rank, message.size, backend)
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"group {message.name}")
        joined = thread.submit(BroadcastGroup, spec, self._device, message.seconds)
        self._members[message.name] = Membership(message.name, thread, joined)
        self._wait_for(message.call_id, self._members[message.name], joined, message.seconds)

    def _leave(self, message: wire.LeaveGroupCall) -> None:
        known = message.name in self._members or message.name in self._broken
        self._forget(message.name)
        self._reply(message.call_id, known, "" if known else f"there is no group {message.name!r}")

    def _receive(self, message: wire.ReceiveCall) -> None:
        membership = self._members.get(message.group)
        if membership is None:
            why = self._broken.get(message.group, f"there is no group {message.group!r} on this server")
            self._reply(message.call_id, False, f"{why}; {_AGAIN}", "no_group")
            return
        end = time.monotonic() + message.seconds
        future = membership.thread.submit(_fill, membership.joined, message, end)
        self._wait_for(message.call_id, membership, future, message.seconds)

    def _wait_for(self, call_id: int, membership: Membership, future: Future[Any], seconds: float) -> None:
        self._pending[call_id] = PendingCall(membership, future, time.monotonic() + seconds + OVERDUE_SECONDS)

    def _forget(self, name: str, why: str = "") -> None:
        """Close a group; `why` it broke is what later calls are told."""
        self._broken.pop(name, None)
        if why:
            self._broken[name] = why
        membership = self._members.pop(name, None)
        if membership is not None:
            membership.close()


def _fill(joined: Future[BroadcastGroup], message: wire.ReceiveCall, end: float) -> None:
    """Receive into the front's buffer; in the group's thread."""
    fd = os.open(message.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = torch.frombuffer(mmap.mmap(fd, message.nbytes), dtype=torch.uint8)
    finally:
        os.close(fd)
    joined.result().receive(message.broadcast, memory, end - time.monotonic())


def _close(joined: Future[BroadcastGroup]) -> None:
    if not joined.cancelled() and joined.exception() is None:
        joined.result().close()
