"""The transport `broadcast`: the trainer sends an adapter's image once, to all servers of a fleet at the same time.

One group of the trainer (rank 0) and the servers (1, 2, … as they were given), made when it is first needed and again
when servers were added, removed or started anew, or when a broadcast has failed. It is NCCL's when the tensors are on a
GPU, and then every member needs a GPU of its own; gloo's otherwise. Which of a host's interfaces to use is said as
ever, by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME. The network must be trusted: torch.distributed knows no keys.

A broadcast is two things at once: every server is asked over HTTP to take part and to stage what comes, by a thread
each, and rank 0 sends, by a thread of this module. Invariants: when one of them fails the others are called off at
once; no thread is waited for beyond the deadline; what has failed leaves servers with what they serve.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch

from sglang.rl.publisher_package import Package
from sglang.rl.publisher_server import ATTEMPTS, Refused, Server, Staged
from sglang.rl.transport import Deadline, Outcome, TransportError, fan_out, local_address
from sglang.srt.errors import SglangError
from sglang.srt.weight_sync.broadcast_group import (
    Backend,
    BroadcastGroup,
    BrokenGroupError,
    CancelledError,
    GroupSpec,
    open_store,
)

T = TypeVar("T")

LEAVE_SECONDS = 2.0
"""Most that telling servers to leave may take."""
_PAUSE_SECONDS = 0.1
"""Before the next attempt."""
_SLACK_SECONDS = 1.0
"""How long the sending thread is waited for when the servers are done: it should notice its deadline by itself."""
_OWN_PART = 0.8
"""Of the time there is: then servers that were kept waiting by another one hear of it and can say so."""
_CANCELLED = "broadcast_cancelled"
_MAY_PASS = (_CANCELLED, "broadcast_failed", "no_group")


class Each(Protocol):
    """`Publication._each`: do something on all servers at once, within some seconds."""

    def __call__(
        self, phase: str, action: Callable[[Server, Deadline], T], seconds: float | None = None
    ) -> dict[str, Outcome[T]]:
        """Do it."""


class Part(Generic[T]):
    """Rank 0's part in something that servers are asked for at the same time.

    Args:
        work: the part; given a function that says why it is called off, "" as long as it is not.
    """

    def __init__(self, work: Callable[[Callable[[], str]], T]) -> None:
        self.outcome: Outcome[T] = Outcome()
        self._reason = ""
        args = (lambda: work(lambda: self._reason),)
        threading.Thread(target=self.outcome.run, args=args, name="publish broadcast", daemon=True).start()

    def call_off(self, reason: str) -> None:
        """It makes no sense any more; the first reason counts."""
        self._reason = self._reason or reason

    def end(self) -> tuple[T | None, SglangError | None]:
        """Its value, or what went wrong: BrokenGroupError, too, when it does not end."""
        if not self.outcome.wait(_SLACK_SECONDS):
            return None, BrokenGroupError("torch.distributed has not come back in time")
        error = self.outcome.error
        if error is not None and not isinstance(error, SglangError):
            raise error
        return self.outcome.value, error


class Broadcaster:
    """Owns the trainer's end of the group.

    Args:
        name: of the group, on all servers; another trainer's group of this name is replaced.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._group: BroadcastGroup | None = None
        self._store: Any = None
        self._members: dict[str, Server] = {}

    def stage(
        self, each: Each, servers: Mapping[str, Server], package: Package, name: str, hold: float, seconds: float
    ) -> dict[str, Outcome[Staged]]:
        """Bring a version into the memory of all servers.

        Args:
            name: of the adapter.
            hold: seconds for which an uncommitted version is kept.

        Returns:
            What became of it on each server. Where one has failed, others that were called off because of it have
            neither a version nor an error.
        """
        deadline, image = Deadline(seconds), package.tensor()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                outcomes = self._attempt(each, servers, package, image, name, hold, deadline)
            except TransportError as error:  # joining has left no time for more
                outcomes = _all_failed(servers, str(error))
            if attempt == ATTEMPTS or not _may_pass(outcomes):
                break
            deadline.sleep(_PAUSE_SECONDS)
            if deadline.passed:
                break
        return _blamed(outcomes)

    def close(self) -> None:
        """Leave the group, and tell the servers to."""
        members = self._members
        if self._group is None:
            return
        self._drop()
        deadline = Deadline(LEAVE_SECONDS)

        def leave(server: Server) -> Callable[[], None]:
            return lambda: server.leave_group(self.name, deadline)

        works = {url: leave(server) for url, server in members.items()}
        fan_out(works, LEAVE_SECONDS, lambda url: members[url].http.interrupt())

    def _attempt(
        self,
        each: Each,
        servers: Mapping[str, Server],
        package: Package,
        image: torch.Tensor,
        name: str,
        hold: float,
        deadline: Deadline,
    ) -> dict[str, Outcome[Staged]]:
        backend: Backend = "nccl" if image.is_cuda else "gloo"
        group = self._group
        if group is None or group.spec.backend != backend or self._members != servers:
            failed = self._join(each, servers, backend, image.device, deadline)
            if failed:
                return failed
        group, broadcast, seconds = self._group, uuid.uuid4().hex, deadline.left()
        assert group is not None

        def stage(server: Server, left: Deadline) -> Staged:
            return server.stage_broadcast(package, name, self.name, broadcast, hold, left)

        part = Part(lambda refused: group.send(broadcast, image, _OWN_PART * seconds, refused))
        outcomes = _together(each, "stage", part, stage, seconds)
        _, error = part.end()
        # After one that was called off the group is as good as before, unless a server has lost it. One that was late
        # may be in another group of this name.
        called_off = isinstance(error, CancelledError)
        if (error is not None and not called_off) or any(_code(o) == "no_group" for o in outcomes.values()):
            self._drop()
        return outcomes

    def _join(
        self, each: Each, servers: Mapping[str, Server], backend: Backend, device: torch.device, deadline: Deadline
    ) -> dict[str, Outcome[Staged]]:
        """Make the group anew; what failed, if it was not made."""
        self._drop()
        try:
            address = local_address(server.http.host for server in servers.values())
        except OSError as problem:
            return _all_failed(servers, f"no address of this host that it could reach: {problem}")
        self._store, self._members = open_store(), dict(servers)
        spec = GroupSpec(self.name, address, int(self._store.port), 0, len(servers) + 1, backend)
        ranks = {url: rank for rank, url in enumerate(servers, 1)}

        def join(server: Server, left: Deadline) -> None:
            server.join_group(spec.name, address, spec.port, ranks[server.url], spec.size, backend, left)

        seconds = deadline.left()
        part = Part(lambda refused: BroadcastGroup(spec, device, _OWN_PART * seconds, refused))
        outcomes = _together(each, "join", part, join, seconds)
        self._group, error = part.end()
        if error is None and all(outcome.error is None for outcome in outcomes.values()):
            return {}
        self._drop()
        if all(outcome.error is None for outcome in outcomes.values()):
            return _all_failed(servers, f"the trainer could not join the group itself: {error}")
        return outcomes  # type: ignore[return-value]  # those that have joined have no version either

    def _drop(self) -> None:
        """Leave the group as it is; its store goes, too, and with it whoever waits there."""
        if self._group is not None:
            self._group.close()
        self._group, self._store, self._members = None, None, {}


def _together(
    each: Each, phase: str, part: Part[Any], action: Callable[[Server, Deadline], T], seconds: float
) -> dict[str, Outcome[T]]:
    """Ask all servers while rank 0 does its part, which the first failure calls off."""

    def ask(server: Server, left: Deadline) -> T:
        try:
            return action(server, left)
        except SglangError as error:
            part.call_off(f"{server.url}: {error}")
            raise

    outcomes = each(phase, ask, seconds)
    for url, outcome in outcomes.items():
        if outcome.error is not None:  # also those that have not come back
            part.call_off(f"{url}: {outcome.error}")
    return outcomes


def _all_failed(servers: Mapping[str, Server], text: str) -> dict[str, Outcome[Staged]]:
    outcomes: dict[str, Outcome[Staged]] = {url: Outcome() for url in servers}
    for outcome in outcomes.values():
        outcome.error = TransportError(text)
    return outcomes


def _code(outcome: Outcome[Any]) -> str:
    return outcome.error.code if isinstance(outcome.error, Refused) else ""


def _may_pass(outcomes: Mapping[str, Outcome[Any]]) -> bool:
    """Whether some have failed, and all of these in a way that another attempt may not."""
    failed = [outcome for outcome in outcomes.values() if outcome.error is not None]
    passing = [
        isinstance(o.error, TransportError)
        or (isinstance(o.error, Refused) and (o.error.may_pass or o.error.code in _MAY_PASS))
        for o in failed
    ]
    return bool(failed) and all(passing)


def _blamed(outcomes: dict[str, Outcome[T]]) -> dict[str, Outcome[T]]:
    """The same without the errors of those that only another one's failure has stopped."""
    if any(outcome.error is not None and _code(outcome) != _CANCELLED for outcome in outcomes.values()):
        for outcome in outcomes.values():
            if _code(outcome) == _CANCELLED:
                outcome.error = None
    return outcomes
