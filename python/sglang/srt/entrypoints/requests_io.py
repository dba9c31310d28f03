"""What routes read and write beyond plain replies: decoded bodies, a client's disconnect, and event streams.

Native clients send JSON under any Content-Type, also with GET, so bodies are decoded here from raw bytes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar, cast

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.entrypoints.replies import BodyError, encode
from sglang.srt.errors import RequestError, ServiceUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

INTERNAL_ERROR = "Internal server error; the server's log has the details."


def runtime_of(request: Request) -> Runtime:
    """The runtime behind the application."""
    return cast(Runtime, request.app.state.runtime)


async def read_body(request: Request, decoder: msgspec.json.Decoder[T], *, empty_ok: bool = False) -> T:
    """The body decoded to the decoder's type; with `empty_ok` no body at all means `{}`.

    Raises:
        BodyError: no body, not JSON, or a value of the wrong type; names the field.
    """
    raw = await request.body()
    if not raw.strip():
        if not empty_ok:
            raise BodyError("The request body is empty; send a JSON object.")
        raw = b"{}"
    try:
        return decoder.decode(raw)
    except (ValueError, RecursionError) as error:
        raise BodyError(f"The request body is not valid: {error}") from error


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON, as the OpenAI endpoints do.

    Raises:
        BodyError: another Content-Type, or none.
    """
    media_type = request.headers.get("content-type", "").split(";", maxsplit=1)[0].strip().lower()
    if media_type != "application/json":
        raise BodyError(f"Unsupported Media Type {media_type!r}: only 'application/json' is allowed.")


class DisconnectWatcher:
    """Tells when the client has gone. Use only after the whole body has been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def wait_disconnected(self) -> None:
        """Return once the client has closed the connection (or has got its whole response)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class EventStream(Response):
    """A `text/event-stream` response; closes the event source however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        async with contextlib.aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for event in self._rest:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def event_stream(
    payloads: AsyncGenerator[Any, None], render_error: Callable[[RequestError | ServiceUnavailableError], Any]
) -> EventStream:
    """Stream JSON payloads as events that end with `[DONE]`.

    The first payload is awaited before the response starts, so a request that is refused gets a proper status.

    Args:
        render_error: payload for an error that comes after the start.

    Raises:
        Whatever `payloads` raises before its first item.
    """
    events = _events(payloads, render_error)
    return EventStream(await anext(events), events)


async def _events(
    payloads: AsyncGenerator[Any, None], render_error: Callable[[RequestError | ServiceUnavailableError], Any]
) -> AsyncGenerator[bytes, None]:
    started = False
    try:
        async with contextlib.aclosing(payloads):
            async for payload in payloads:
                started = True
                yield b"data: " + encode(payload) + b"\n\n"
    except (RequestError, ServiceUnavailableError) as error:
        if not started:
            raise
        yield b"data: " + encode(render_error(error)) + b"\n\n"
    except Exception:
        if not started:
            raise
        logger.exception("a stream failed")
        yield b"data: " + encode(render_error(ServiceUnavailableError(INTERNAL_ERROR))) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def only_item(items: AsyncGenerator[T, None]) -> T:
    """The single item of a generator that yields once, which is run to its end so that its clean-up is done.

    Raises:
        ClientDisconnect: the generator ended without an item, as it does when nobody waits for it any more.
    """
    async with contextlib.aclosing(items):
        result = [item async for item in items]
    if not result:
        raise ClientDisconnect()
    return result[0]
