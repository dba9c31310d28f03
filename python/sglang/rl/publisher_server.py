"""One server as the publisher sees it: its calls, retried where that is safe, and what it says about itself.

Called by `publisher`, for each server from one thread at a time. There are two kinds. A `versioned` server stages an
adapter under a name that goes on to mean what it means, and commits it. A `stock` one knows names alone: a version is
loaded under a name of its own, which nobody asks for until the trainer says so, and there is nothing to commit.
Invariants: what is repeated can be repeated (a stage and a commit by their digest, a load by its fresh name); every
error names the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, TypeVar

from sglang.rl.publisher_package import Package
from sglang.rl.transport import BYTES_TYPE, JSON_TYPE, Deadline, HttpClient, Reply, TransportError, is_local
from sglang.srt.errors import SglangError

T = TypeVar("T")

Transport = Literal["auto", "shm", "bytes", "broadcast"]
Mode = Literal["finish_old", "switch"]

ATTEMPTS = 3
"""Of a call that may be repeated, where nothing has been committed yet and giving up is safe."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_POLL_SECONDS = 0.02
_NO_FILE = ("adapter_not_found", "path_unreadable")
_NOT_THERE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
_LEAK = (
    "its unload of {} has not returned: stock servers lose count of an adapter's users (aborts, disconnects, n > 1), "
    "and then every later load waits as well; restart it, or install the fix for stock servers there"
)


_FULL = (
    "it has not loaded {}. A stock server that has as many adapters as --max-loaded-loras first unloads the one used "
    "least recently (of {}), and waits for the users that it counts there; it loses count (aborts, disconnects, "
    "n > 1), and then waits for ever: restart it, or install the fix for stock servers there"
)


class Refused(SglangError):
    """A server's reply that is not a success.

    Attributes:
        status: of HTTP; code: the server's own, "" when it gives none.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{message} (HTTP {status})")
        self.status, self.code = status, code

    @property
    def may_pass(self) -> bool:
        """Whether the same call may succeed later."""
        return self.status >= 500 or self.status == HTTPStatus.CONFLICT


@dataclass(frozen=True, slots=True)
class Staged:
    """An adapter that a server has in memory.

    Fields:
        version_id, digest: the server's; None where it has no such thing.
        transport: how it got there: shm, path, bytes or broadcast.
    """

    version_id: int | None
    digest: str | None
    transport: str


@dataclass
class Server:
    """See the module.

    Fields:
        url, key, info_key: where, and the keys for calls that change it and for those that only ask.
        transport: what the publisher was told; shared: whether its directory is in this machine's memory.
        kind, slab_layout: as of the last probe; the layout of the slabs that it takes, None for none.
        loaded: names that were loaded here, oldest first (kind stock, and fleets that have one).
        stuck: the name whose unload has not returned.
    """

    url: str
    key: str | None = None
    info_key: str | None = None
    transport: Transport = "auto"
    shared: bool = True
    kind: Literal["versioned", "stock"] = "versioned"
    slab_layout: dict[str, Any] | None = None
    loaded: list[str] = field(default_factory=list)
    stuck: str | None = None
    _reads_files: bool | None = None
    _unanswered: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.http = HttpClient(self.url)

    # ---- what there is -------------------------------------------------------------------------------------------

    def probe(self, deadline: Deadline) -> set[str]:
        """Learn the kind; returns the names that it has adapters under. One that is still starting is waited for."""
        reply = persistently(lambda: self._get("/lora_adapters", deadline), deadline, starting=True)
        self.kind, self.slab_layout = "stock" if reply.status in _NOT_THERE else "versioned", None
        if self.kind == "versioned":
            listing = reply.json()
            layout = listing.get("slab_layout")
            self.slab_layout = layout if isinstance(layout, dict) else None
            return {str(adapter.get("lora_name")) for adapter in listing.get("adapters", [])}
        models = self._get("/v1/models", deadline).json().get("data")
        return {str(model.get("id")) for model in models or [] if isinstance(model, dict)}

    def reads_files(self) -> bool:
        """Whether it is to be given a path."""
        if self.transport != "auto":
            return self.transport == "shm"
        if self._reads_files is None:
            self._reads_files = not self.shared or is_local(self.http.host)
        return self._reads_files

    def serving(self, name: str, deadline: Deadline) -> tuple[int, str] | None:
        """Version and digest that a name means on a versioned server; None when nothing."""
        adapters = self._get("/lora_adapters", deadline).json().get("adapters", [])
        found = [a for a in adapters if a.get("lora_name") == name and a.get("state") == "serving"]
        return (found[0]["lora_version"], found[0]["digest"]) if found else None

    # ---- versions ------------------------------------------------------------------------------------------------

    def stage(self, package: Package, name: str, path: str | None, hold: float, deadline: Deadline) -> Staged:
        """Bring a version into memory.

        Args:
            path: of the adapter's directory, if it was written to one.
            hold: seconds for which an uncommitted version is kept.
        """
        if self.kind == "stock":
            return self._load(package, name, path, deadline)
        if path is not None and self.reads_files():
            body = {"lora_name": name, "lora_path": path, "timeout": hold}
            try:
                reply = self._post("/stage_lora_adapter", body, deadline)
                return _staged(reply, "shm" if self.shared else "path")
            except Refused as error:
                # The same name of a host, but another machine, container, user, or --lora-root.
                if error.code not in _NO_FILE or self.transport != "auto":
                    raise
                self._reads_files = False
        head = {"lora_name": name, "config_dict": json.loads(package.config), "timeout": hold}
        text = json.dumps(head).encode()
        pieces = [len(text).to_bytes(8, "little"), text, *package.image()]
        return _staged(self._send("/stage_lora_adapter", pieces, deadline, BYTES_TYPE), "bytes")

    def stage_broadcast(
        self, package: Package, name: str, group: str, broadcast: str, hold: float, deadline: Deadline
    ) -> Staged:
        """Have the server take part in a broadcast and stage what comes. Asked once: it can be received once."""
        head = {"lora_name": name, "config_dict": json.loads(package.config), "timeout": hold}
        head |= {"group_name": group, "broadcast": broadcast, "nbytes": package.nbytes}
        return _staged(self._post("/stage_lora_adapter", head, deadline, attempts=1), "broadcast")

    def join_group(
        self, name: str, address: str, port: int, rank: int, size: int, backend: str, deadline: Deadline
    ) -> None:
        """Have it join a group; asked once, since a second member of its rank would take the place of the first."""
        place = {"master_address": address, "master_port": port, "rank_offset": rank, "world_size": size}
        body = {"group_name": name, "backend": backend, "timeout": deadline.left(), **place}
        self._post("/init_weights_update_group", body, deadline, attempts=1)

    def leave_group(self, group: str, deadline: Deadline) -> None:
        """Have it leave."""
        self._post("/destroy_weights_update_group", {"group_name": group}, deadline, attempts=1)

    def commit(self, name: str, staged: Staged, mode: Mode, deadline: Deadline) -> None:
        """Make the name mean it; tried until the deadline, because other servers may have done so."""
        if staged.version_id is None:
            return
        body = {"lora_name": name, "lora_version": staged.version_id, "digest": staged.digest, "mode": mode}
        self._post("/commit_lora_adapter", body, deadline, attempts=None)

    def undo(self, name: str, staged: Staged | None, deadline: Deadline) -> None:
        """Undo `stage`, or one that has failed; what cannot be named goes by itself when its time is over."""
        if staged is not None and staged.version_id is not None:
            body = {"lora_name": name, "lora_version": staged.version_id}
            self._post("/drop_lora_adapter", body, deadline)
        elif name in self.loaded or name in self._unanswered:
            self.unload(name, deadline)

    def unload(self, name: str, deadline: Deadline) -> None:
        """Take a name away. A versioned server does not make anybody wait for those that still hold it.

        Raises:
            TransportError: a stock one has not answered in time: it waits for its count of the name's users.
        """
        limit = {"timeout": 0.0} if self.kind == "versioned" else {}
        self._unanswered.discard(name)
        if name in self.loaded:
            self.loaded.remove(name)
        try:
            self._post("/unload_lora_adapter", {"lora_name": name, **limit}, deadline, attempts=1)
        except TransportError as error:
            if self.kind == "stock" and deadline.passed:
                self.stuck = name
                raise TransportError(f"{error}; {_LEAK.format(name)}") from error
            raise
        except Refused as error:
            # Still held, and freed by the last holder; or gone already.
            if error.code != "busy" and "does not exist" not in str(error):
                raise

    def _load(self, package: Package, name: str, path: str | None, deadline: Deadline) -> Staged:
        body: dict[str, Any] = {"lora_name": name}
        if path is not None and self.reads_files():
            how, target, body["lora_path"] = "shm" if self.shared else "path", "/load_lora_adapter", path
        else:
            how, target = "bytes", "/load_lora_adapter_from_tensors"
            body |= {"config_dict": json.loads(package.config), "serialized_tensors": package.make_pickle()}

        def attempt() -> None:
            try:
                self._post(target, body, deadline, attempts=1)
            except TransportError:
                self._unanswered.add(name)
                raise
            except Refused as error:
                # Names are fresh: if it is loaded, an attempt whose reply was lost has done it.
                if "already loaded" not in str(error) or name not in self._unanswered:
                    raise

        try:
            persistently(attempt, deadline)
        except TransportError as error:
            if self.stuck is not None:
                raise TransportError(f"{error}; {_LEAK.format(self.stuck)}") from error
            if self.loaded and deadline.passed:
                raise TransportError(f"{error}; {_FULL.format(name, ', '.join(self.loaded))}") from error
            raise
        self.stuck = None
        self._unanswered.discard(name)
        if name not in self.loaded:
            self.loaded.append(name)
        return Staged(None, None, how)

    # ---- pausing -------------------------------------------------------------------------------------------------

    def pause(self, hold: float, deadline: Deadline) -> None:
        """Abort what runs, and make what comes wait.

        Args:
            hold: seconds after which a versioned server goes on by itself.
        """
        limit = {"timeout": hold} if self.kind == "versioned" else {}
        self._post("/pause_generation", {"mode": "abort", **limit}, deadline)

    def drain(self, grace: float, deadline: Deadline) -> bool:
        """Wait until nothing runs, for `grace` seconds; then abort what does and wait once more.

        Returns:
            Whether nothing runs. True for a server that does not say: its pause has waited.
        """
        if self._idle_within(grace, deadline):
            return True
        self._post("/abort_request", {"abort_all": True}, deadline)
        return self._idle_within(grace, deadline)

    def flush(self, deadline: Deadline) -> str:
        """Empty the prefix cache; returns what went wrong, which is only memory: caches tell versions apart."""
        reply = self._call("POST", "/flush_cache", [b"{}"], deadline)
        if reply.status == HTTPStatus.OK:
            return ""
        return reply.body.decode(errors="replace").strip() or f"HTTP {reply.status}"

    def resume(self, deadline: Deadline) -> None:
        """Undo `pause`; harmless where nothing is paused."""
        self._post("/continue_generation", {}, deadline, attempts=None)

    def _idle_within(self, seconds: float, deadline: Deadline) -> bool:
        end = Deadline(seconds)
        while True:
            reply = self._get("/get_load", deadline)
            loads = reply.json().get("value") if reply.status == HTTPStatus.OK else None
            if not isinstance(loads, list):
                return True
            if sum(load.get("num_reqs", 0) - load.get("num_waiting_reqs", 0) for load in loads) <= 0:
                return True
            if end.passed:
                return False
            end.sleep(_POLL_SECONDS)

    # ---- calls ---------------------------------------------------------------------------------------------------

    def _post(
        self, path: str, body: dict[str, Any], deadline: Deadline, attempts: int | None = ATTEMPTS
    ) -> dict[str, Any]:
        return self._send(path, [json.dumps(body).encode()], deadline, attempts=attempts)

    def _send(
        self,
        path: str,
        body: list[bytes | memoryview],
        deadline: Deadline,
        content_type: str = JSON_TYPE,
        attempts: int | None = ATTEMPTS,
    ) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            reply = self._call("POST", path, body, deadline, content_type)
            if reply.status != HTTPStatus.OK:
                raise _refusal(reply)
            return reply.json()

        return persistently(attempt, deadline, attempts)

    def _get(self, path: str, deadline: Deadline) -> Reply:
        reply = self.http.call("GET", path, deadline=deadline, key=self.info_key)
        if reply.status != HTTPStatus.OK and reply.status not in _NOT_THERE:
            raise _refusal(reply)
        return reply

    def _call(
        self,
        method: str,
        path: str,
        body: list[bytes | memoryview],
        deadline: Deadline,
        content_type: str = JSON_TYPE,
    ) -> Reply:
        reply = self.http.call(method, path, body, deadline=deadline, key=self.key, content_type=content_type)
        if reply.status == HTTPStatus.UNAUTHORIZED and self.info_key != self.key:
            # Servers differ in which calls they count as administration: stock ones leave out tensors in a request.
            reply = self.http.call(method, path, body, deadline=deadline, key=self.info_key, content_type=content_type)
        return reply


def persistently(
    attempt: Callable[[], T], deadline: Deadline, attempts: int | None = ATTEMPTS, *, starting: bool = False
) -> T:
    """Try again after what may pass, with growing pauses.

    Args:
        attempts: at most so many; None for as many as the deadline allows.
        starting: do not count replies that say 503: the server is loading its model.

    Raises:
        TransportError, Refused: the last attempt's.
    """
    pause, made = _FIRST_PAUSE, 0
    while True:
        try:
            return attempt()
        except (TransportError, Refused) as error:
            status = error.status if isinstance(error, Refused) else None
            made += not (starting and status == HTTPStatus.SERVICE_UNAVAILABLE)
            if made == attempts or (isinstance(error, Refused) and not error.may_pass):
                raise
            deadline.sleep(pause)
            if deadline.passed:
                raise
        pause = min(2 * pause, _LONGEST_PAUSE)


def _refusal(reply: Reply) -> Refused:
    """Its error in whichever form servers give it: of adapter calls, of native ones, of OpenAI's."""
    body = reply.json()
    error = body.get("error")
    inner = error if isinstance(error, dict) else {}
    text = body.get("error_message") or inner.get("message") or body.get("message") or error
    message = str(text or reply.body[:300].decode(errors="replace") or "no reason given")
    if reply.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        message += ": give the server's admin_api_key, or its api_key if it has no other"
    return Refused(reply.status, str(body.get("error_code") or inner.get("code") or ""), message)


def _staged(reply: dict[str, Any], transport: str) -> Staged:
    return Staged(int(reply["lora_version"]), str(reply["digest"]), transport)
