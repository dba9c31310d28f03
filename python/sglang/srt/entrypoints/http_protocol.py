"""uvicorn, adapted: JSON for what is not HTTP/1.1, h2c upgrades ignored as HTTP allows, signals left to us."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from http import HTTPStatus

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sglang.srt.entrypoints.replies import encode, flat_error

_H2C_UPGRADE = re.compile(rb"\r\nupgrade:[ \t]*h2c[^\r\n]*", re.IGNORECASE)


class JsonErrorProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose parse errors (a TLS hello, an HTTP/2 preface, garbage) get the documented error body."""

    def data_received(self, data: bytes) -> None:
        """Feed the parser, without a request's offer to switch to HTTP/2: with it the parser would skip the body."""
        if self.cycle is None or self.cycle.response_complete:
            head, end, rest = data.partition(b"\r\n\r\n")
            if b"h2c" in head:
                data = _H2C_UPGRADE.sub(b"", head) + end + rest
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP/1.1 request, and close."""
        status = HTTPStatus.BAD_REQUEST
        body = encode(flat_error(f"{msg} This server speaks HTTP/1.1.", status, status.phrase))
        head = (
            f"HTTP/1.1 {int(status)} {status.phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class QuietServer(uvicorn.Server):
    """uvicorn's server without its signal handlers: `http_server` decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield
