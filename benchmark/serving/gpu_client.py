"""One process of the load generator: sends prepared requests over raw HTTP/1.1 and notes when bytes came back.

`gpu_load` starts a few of these, so that the client is not the limit at 256 streams: while requests run nothing is
parsed but HTTP framing (httptools, in C); JSON is read after the last reply. Imports neither torch nor sglang.

Standard input: one line with the job, then a line that says go. Standard output, a JSON line each: ``{"ready": true}``,
``{"streaming": true}`` once every lane has a token (streamed jobs), and ``{"results": [...], "cpu": share of a core}``.
Times are `time.perf_counter` seconds, which the processes of one Linux machine share; arrivals count from `started`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

Request = dict[str, Any]
DONE = b"data: [DONE]"


class Call:
    """One request while it runs, and what is known of it afterwards."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.status, self.error = 0, ""
        self.started = self.ended = 0.0
        self.arrivals: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last, self._pending = b"", b""
        self._parts: list[bytes] = []

    def receive(self, data: bytes, now: float) -> bool:
        """Take a piece of the body; whether it brought the first event of a stream."""
        if not self.request["stream"] or self.status != 200:
            self._parts.append(data)
            return False
        begun = bool(self.arrivals)
        *events, self._pending = (self._pending + data).split(b"\n\n")
        for event in events:
            if event != DONE:
                self._last = event
                self.arrivals.append(now)
        return not begun and bool(self.arrivals)

    def finish(self, error: str = "") -> None:
        """End it, once."""
        if not self.done.done():
            self.ended = time.perf_counter()
            self.error = error
            self.done.set_result(None)

    def outcome(self) -> dict[str, Any]:
        """What `gpu_load.Record` reads."""
        body = self._last.removeprefix(b"data:") if self.arrivals else b"".join(self._parts)
        found: dict[str, Any] = {
            "id": self.request["id"],
            "status": self.status,
            "started": self.started,
            "ended": self.ended,
            "arrivals": [round(moment - self.started, 6) for moment in self.arrivals],
            "error": self.error,
        }
        return found | _read_reply(body, self.error)


def _read_reply(body: bytes, error: str) -> dict[str, Any]:
    """Tokens, finish reason and adapter version of a reply; `error` when it is none."""
    try:
        meta = json.loads(body)["meta_info"]
        finish = (meta.get("finish_reason") or {}).get("type") or ""
        return {"tokens": meta["completion_tokens"], "finish": finish, "version": meta.get("lora_version")}
    except (ValueError, KeyError, TypeError):
        return {"tokens": 0, "error": error or body[:300].decode(errors="replace") or "empty reply"}


class Connection(asyncio.Protocol):
    """A kept-alive connection with one call at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._parser: Any = None
        self._call: Call | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None

    def send(self, call: Call, payload: bytes) -> None:
        """Send; `call` is finished by what comes back."""
        assert self._transport is not None
        self._call = call
        call.started = time.perf_counter()
        self._transport.write(payload)

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error!r}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        self._fail(f"the connection ended: {error}")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self._call is not None:
            self._call.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self._call is not None and self._call.receive(data, time.perf_counter()):
            self._client.first_token()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._parser.should_keep_alive():
            self.close()
        if self._call is not None:
            self._call.finish()

    def _fail(self, reason: str) -> None:
        if self._call is not None:
            self._call.finish(reason)


class Client:
    """Runs a job: `lanes` connections that take the next request as soon as they have a reply."""

    def __init__(self, job: dict[str, Any]) -> None:
        parts = urlsplit(job["url"])
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._lanes, self._timeout = job["lanes"], job["timeout"]
        self._requests: deque[Request] = deque(job["requests"])
        self._payloads = {request["id"]: self._payload(request) for request in self._requests}
        self._first_tokens, self._streams = 0, min(self._lanes, len(self._requests))

    async def run(self) -> list[dict[str, Any]]:
        """Send everything; outcomes in the order of the ends."""
        calls: list[Call] = []
        await asyncio.gather(*(self._lane(calls) for _ in range(self._streams)))
        return [call.outcome() for call in calls]

    def first_token(self) -> None:
        """A stream has begun; says so when all lanes have."""
        self._first_tokens += 1
        if self._first_tokens == self._streams:
            emit({"streaming": True})

    async def _lane(self, calls: list[Call]) -> None:
        connection = Connection(self)
        while self._requests:
            call = Call(self._requests.popleft())
            try:
                if not connection.open:
                    connection = await self._connect()
                connection.send(call, self._payloads.pop(call.request["id"]))
                await asyncio.wait_for(asyncio.shield(call.done), self._timeout)
            except asyncio.TimeoutError:
                call.finish(f"no end after {self._timeout:.0f} s")
                connection.close()
            except OSError as error:
                call.started = call.started or time.perf_counter()
                call.finish(f"{type(error).__name__}: {error}")
            calls.append(call)
        connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self), self._host, self._port)
        return connection

    def _payload(self, request: Request) -> bytes:
        body = json.dumps(generate_body(request)).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def generate_body(request: Request) -> dict[str, Any]:
    """What `/generate` is asked; the prompt follows from the request's seed, so that jobs stay small."""
    rng = random.Random(request["seed"])
    low, high = request["vocab"]
    body: dict[str, Any] = {
        "input_ids": [rng.randrange(low, high) for _ in range(request["prompt_tokens"])],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": request["output_tokens"], "ignore_eos": True},
        "stream": request["stream"],
    }
    return body | ({"lora_path": request["lora"]} if request["lora"] else {})


def emit(message: dict[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def _timed(client: Client) -> dict[str, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    results = await client.run()
    return {"results": results, "cpu": (time.process_time() - cpu) / (time.perf_counter() - wall)}


def main() -> None:
    """Read the job, wait for the word, run."""
    client = Client(json.loads(sys.stdin.readline()))
    emit({"ready": True})
    if not sys.stdin.readline():
        return  # the parent has gone
    emit(uvloop.run(_timed(client)))


if __name__ == "__main__":
    main()
