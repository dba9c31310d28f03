"""A small HTTP/1.1 client for load and failure tests: one connection per request, nothing pooled, nothing hidden.

Used by the load generator (`load`) and the soak. Unlike a general client it lets the caller drop the connection at any
moment, and it reads every reply to the end of the connection, so a server that says too much or too little is caught.
Invariant: `Exchange` holds one socket and closes it on every way out of its `async with` block.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_READ_LIMIT = 1 << 20
_CHUNK = 1 << 16


class HttpProtocolError(Exception):
    """The peer broke HTTP: cut a reply short, sent bytes after it, or framed it wrongly."""


class Exchange:
    """One request and its reply.

    Args:
        base_url: ``http://host:port``.
        target: path and query.
        body: bytes sent as they are, or anything else as JSON; None for no body.

    Usage: ``async with Exchange(url, "POST", "/generate", body) as exchange: ...``; entering sends the request and
    reads the status line and headers.
    """

    def __init__(
        self, base_url: str, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        fields = {"Host": f"{self._host}:{self._port}", "Connection": "close", "Content-Length": str(len(payload))}
        if body is not None:
            fields["Content-Type"] = "application/json"
        fields |= headers or {}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._request = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + payload
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Exchange:
        await self.send()
        try:
            await self.read_head()
        except BaseException:
            self.drop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()

    async def send(self, *, upto: float = 1.0) -> None:
        """Connect and send the request, or only its first `upto` part, without waiting for a reply."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=_READ_LIMIT)
        self._writer.write(self._request[: int(len(self._request) * upto)])
        await self._writer.drain()

    def drop(self, *, reset: bool = False) -> None:
        """Close the connection now; `reset` makes the peer see a reset instead of an orderly end."""
        if self._writer is None:
            return
        if reset:
            raw = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        else:
            self._writer.close()
        self._writer = None

    async def read_head(self) -> None:
        """Read status and headers (names lower case).

        Raises:
            HttpProtocolError: the connection ended first, or the status line is not HTTP/1.x.
        """
        reader = self._open_reader()
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise HttpProtocolError(f"connection closed after {len(error.partial)} bytes, before the reply") from error
        status_line, *lines = head[:-4].decode("latin-1").split("\r\n")
        version, _, rest = status_line.partition(" ")
        if not version.startswith("HTTP/1."):
            raise HttpProtocolError(f"not an HTTP/1 status line: {status_line!r}")
        self.status = int(rest.split(" ", 1)[0])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; ends only when the peer has ended both the reply and the connection.

        Raises:
            HttpProtocolError: body cut short, bad framing, or bytes after the end.
        """
        reader = self._open_reader()
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    yield (await reader.readexactly(size + 2))[:-2]
                await reader.readuntil(b"\r\n")
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left:
                    piece = await reader.read(min(left, _CHUNK))
                    if not piece:
                        raise HttpProtocolError(f"body ended {left} bytes early")
                    left -= len(piece)
                    yield piece
            else:
                while piece := await reader.read(_CHUNK):
                    yield piece
        except (asyncio.IncompleteReadError, ValueError) as error:
            raise HttpProtocolError(f"chunked body broke off: {error}") from error
        if surplus := await reader.read(_CHUNK):
            raise HttpProtocolError(f"{len(surplus)} bytes after the end of the reply: {surplus[:80]!r}")

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.chunks()])

    async def events(self) -> AsyncIterator[bytes]:
        """Payloads of a `text/event-stream` body: what follows ``data:`` of each event, ``[DONE]`` included.

        Raises:
            HttpProtocolError: an event without ``data:``, or an unfinished last event.
        """
        pending = b""
        async for piece in self.chunks():
            *events, pending = (pending + piece).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data:"):
                    raise HttpProtocolError(f"not a data event: {event[:80]!r}")
                yield event[5:].lstrip()
        if pending:
            raise HttpProtocolError(f"the stream ended inside an event: {pending[:80]!r}")

    def _open_reader(self) -> asyncio.StreamReader:
        assert self._reader is not None, "send() first"
        return self._reader


class Reply:
    """A complete reply: `status`, `headers` (names lower case), `body`."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        """The body parsed; raises ValueError when it is not JSON."""
        return json.loads(self.body)


async def fetch(
    base_url: str, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
) -> Reply:
    """Send one request and read the whole reply (see `Exchange` for arguments and errors)."""
    async with Exchange(base_url, method, target, body, headers) as exchange:
        return Reply(exchange.status, exchange.headers, await exchange.body())
