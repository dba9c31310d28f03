"""How a trainer reaches its servers: HTTP calls and work on many of them that end in time, and files they can read.

Used by `publisher` and its modules. Standard library only. Invariants: no call and no fan-out outlives its deadline,
whatever the other side does (it may accept and say nothing, or trickle); a directory is removed by who made it, or,
when that process was killed, by the next one that makes one there.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from sglang.srt.errors import SglangError

T = TypeVar("T")

JSON_TYPE, BYTES_TYPE = "application/json", "application/octet-stream"
SHARED_MEMORY = "/dev/shm"
_PREFIX = "sglang-publish-"
_ABANDONED_SECONDS = 600.0
"""A directory is not taken for abandoned before this age: its maker may not have locked it yet."""
_SLACK_SECONDS = 0.2
"""How much longer a fan-out waits than its calls do: they should report their own time-outs."""


class TransportError(SglangError):
    """No reply: refused, reset, cut short, or too late. The request may have been carried out all the same."""


class Deadline:
    """A moment some seconds from now, on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._end

    def left(self) -> float:
        """Seconds left, more than 0.

        Raises:
            TransportError: none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TransportError(f"no answer within {self.seconds:g} s")
        return left

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the deadline."""
        time.sleep(max(0.0, min(seconds, self._end - time.monotonic())))


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply of HTTP."""

    status: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """The JSON object in the body; empty when there is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {"value": value}


class HttpClient:
    """Calls to one server, a connection each, at most one at a time.

    Args:
        url: ``http://host:port``, or https, perhaps with a path in front of the server's own.

    Raises:
        ValueError: it is not such a URL.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server; give http://host:port")
        self.host = parts.hostname
        self._kind = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
        self._port = parts.port
        self._base = parts.path.rstrip("/")
        self._socket: socket.socket | None = None

    def call(
        self,
        method: str,
        path: str,
        body: Sequence[bytes | memoryview] = (),
        *,
        deadline: Deadline,
        key: str | None = None,
        content_type: str = JSON_TYPE,
    ) -> Reply:
        """Send a request and read the whole reply.

        Args:
            body: sent piece by piece, never joined.
            key: bearer token.

        Raises:
            TransportError: there was no reply in time.
        """
        headers = {"Connection": "close", "Content-Length": str(sum(map(len, body))), "Content-Type": content_type}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        connection = self._kind(self.host, self._port, timeout=deadline.left())
        try:
            self._send(connection, method, self._base + path, body, headers, deadline)
            return _receive(connection, self._socket, deadline)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or deadline.passed:
                raise TransportError(f"no answer within {deadline.seconds:g} s") from error
            raise TransportError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def interrupt(self) -> None:
        """Make the call that is on, if any, fail now; from another thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Sequence[bytes | memoryview],
        headers: Mapping[str, str],
        deadline: Deadline,
    ) -> None:
        self._socket = None
        connection.connect()
        self._socket = connection.sock
        # Looking up the name may have taken for ever, and nothing may be sent that is not waited for any more.
        connection.sock.settimeout(deadline.left())
        # A server that refuses before it has read everything may close: what it has said is worth more than the error.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, iter(body) if body else None, headers)


def _receive(connection: http.client.HTTPConnection, sock: socket.socket | None, deadline: Deadline) -> Reply:
    assert sock is not None  # kept by ourselves: the connection forgets it once it knows that it will be closed
    sock.settimeout(deadline.left())
    response = connection.getresponse()
    pieces = []
    try:
        # From Python 3.12 on the last byte closes the response, and the socket with it.
        while not response.isclosed():
            sock.settimeout(deadline.left())
            piece = response.read1(1 << 20)
            if not piece:
                break
            pieces.append(piece)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
    finally:
        response.close()
    return Reply(response.status, b"".join(pieces))


class Outcome(Generic[T]):
    """What became of one piece of work: `value`, or `error`; and the seconds it took."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._done = threading.Event()

    def run(self, work: Callable[[], T]) -> None:
        """Do it, in this thread."""
        started = time.perf_counter()
        try:
            self.value = work()
        except BaseException as error:  # it is the caller's, in the other thread
            self.error = error
        self.seconds = time.perf_counter() - started
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        return self._done.wait(max(0.0, seconds))


def fan_out(
    works: Mapping[str, Callable[[], T]], seconds: float, interrupt: Callable[[str], None]
) -> dict[str, Outcome[T]]:
    """Do all of these at once, a thread each.

    Args:
        seconds: how long it may take; what has not ended then is interrupted and counts as failed.
    """
    outcomes: dict[str, Outcome[T]] = {name: Outcome() for name in works}
    for name, work in works.items():
        # Daemons: one that hangs where it cannot be interrupted (a look-up of a name) must not keep the process.
        threading.Thread(target=outcomes[name].run, args=(work,), name=f"publish {name}", daemon=True).start()
    end = time.monotonic() + seconds + _SLACK_SECONDS
    for name, outcome in list(outcomes.items()):
        if not outcome.wait(end - time.monotonic()):
            interrupt(name)
            late: Outcome[T] = Outcome()
            late.error, late.seconds = TransportError(f"no answer within {seconds:g} s"), seconds
            outcomes[name] = late
    return outcomes


def is_local(host: str) -> bool:
    """Whether a host name means this machine: whether one of its addresses can be bound here."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def local_address(hosts: Iterable[str]) -> str:
    """An address of this machine that all of these can reach: the one towards the first that is another machine."""
    address = "127.0.0.1"
    for host in hosts:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            address = str(probe.getsockname()[0])
        if address != str(target[0]):
            break
    return address


class SharedFiles:
    """A directory with files that servers read by its path, until the end of the `with` block.

    Args:
        parent: where; in shared memory unless servers of other hosts are to read it.

    Attributes:
        path: of the directory.
    """

    def __init__(self, parent: str, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
        _remove_abandoned(parent)
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name, pieces in files.items():
                with open(os.path.join(self.path, name), "wb", buffering=0) as file:
                    for piece in pieces:
                        _write_all(file.fileno(), piece)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove everything; what a server has open stays readable for it. Safe to call twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> SharedFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _write_all(fd: int, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _remove_abandoned(parent: str) -> None:
    """Remove what killed processes have left: directories that nobody has locked."""
    for entry in os.scandir(parent):
        with contextlib.suppress(OSError):
            if not entry.name.startswith(_PREFIX) or time.time() - entry.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(fd)
