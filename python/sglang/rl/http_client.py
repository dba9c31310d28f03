"""A small asyncio client of HTTP/1.1 that keeps its connections: what hundreds of long `/generate` calls need.

Used by `generation`, on one event loop. Owns the idle connections to one server.
Invariants: a connection carries one call at a time and is idle again only after a complete reply; a call that is
cancelled, late or broken closes its connection, so the server sees that nobody waits any more; a call is sent a second
time only when a kept connection turns out to have been closed before a single byte of the reply.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

CONNECT_SECONDS = 10.0
_READ_BYTES = 1 << 16
_MAX_IDLE = 512
# A host that has vanished sends no reset: after half a minute of silence it is asked, and given up ten seconds later.
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2))


class HttpError(Exception):
    """The reply is not HTTP, or was cut short."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    status: int
    body: bytes


class HttpClient:
    """Calls to one server.

    Args:
        url: ``http://host:port`` or https, perhaps with a path in front of the server's own.
        api_key: sent as a bearer token.

    Raises:
        ValueError: it is not such a URL.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the address of a server; give http://host:port")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Content-Type: application/json"]
        if api_key is not None:
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(lines)
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes) -> Reply:
        """Send JSON and read the reply, however long it takes: the caller sets the time.

        Raises:
            OSError, HttpError: there was no complete reply. The server may have begun with the call.
        """
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._headers}\r\nContent-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        while self._idle:
            # Kept connections may have been closed by the server meanwhile, which shows only now.
            connection = self._idle.pop()
            try:
                return await self._exchange(connection, request)
            except (OSError, HttpError):
                if connection.answered:
                    raise
        return await self._exchange(await self._connect(), request)

    def close(self) -> None:
        """Close the idle connections; calls that run keep theirs."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        opening = asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
        try:
            reader, writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from None
        _watch(writer.get_extra_info("socket"))
        return _Connection(reader, writer)

    async def _exchange(self, connection: _Connection, request: bytes) -> Reply:
        reusable = False
        try:
            reply, reusable = await connection.exchange(request)
        finally:
            if reusable and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
        return reply


class _Connection:
    """One socket; `answered` says whether a byte of the last call's reply has come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.answered = False

    async def exchange(self, request: bytes) -> tuple[Reply, bool]:
        """A call; also says whether the connection can carry another one."""
        self.answered = False
        self._writer.write(request)
        await self._writer.drain()
        response = _Response()
        while not response.complete:
            data = await self._reader.read(_READ_BYTES)
            if not data:
                return response.ended(), False
            self.answered = True
            response.feed(data)
        return response.reply(), response.reusable

    def close(self) -> None:
        """Without waiting for the peer."""
        self._writer.transport.abort()


class _Response:
    """Collects one reply; its public methods below `reply` are the parser's callbacks."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._framed = False
        self._has_head = False
        self.complete = False
        self.reusable = False

    def feed(self, data: bytes) -> None:
        """Take bytes off the wire."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise HttpError(f"not a reply of HTTP/1.1: {error}") from error

    def ended(self) -> Reply:
        """The peer has closed: right only for a body that says no length."""
        if not self._has_head or self._framed:
            raise HttpError("the connection was closed " + ("inside" if self._has_head else "before") + " the reply")
        return self.reply()

    def reply(self) -> Reply:
        """What has come."""
        return Reply(self._parser.get_status_code(), b"".join(self._body))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of the parser."""
        self._framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Of the parser."""
        self._has_head = True

    def on_body(self, data: bytes) -> None:
        """Of the parser, without any chunks' framing."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Of the parser."""
        self.complete = True
        self.reusable = self._parser.should_keep_alive()


def _watch(connection: socket.socket) -> None:
    """Have the kernel ask a silent peer whether it is there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
