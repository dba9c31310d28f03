"""A server of `/generate` that does what the test says, when it says so: in this process, on a port of its own.

    with FakeServer() as fake:
        call = fake.next_call()             # waits for a request
        call.reply([5, 6], version=1)       # or .abort(...), .status(...), .drop()

With `fake.answer = f`, a function from the body to a `Reply` or None, calls are answered at once, and only those for
which it returns None wait for the test.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WAIT_SECONDS = 20.0


@dataclass
class Reply:
    """A status and a JSON body; None for the body drops the connection."""

    status: int
    body: Any


def generated(
    tokens: list[int],
    finish: str = "stop",
    *,
    name: str | None = "policy",
    version: int | None = 1,
    spans: list[list[int]] | None = None,
) -> Reply:
    """A reply as servers give it; the log-probability of a token is -token / 100."""
    meta: dict[str, Any] = {
        "id": "x",
        "finish_reason": {"type": finish, "message": "Aborted"} if finish == "abort" else {"type": finish},
        "output_token_logprobs": [[-token / 100, token, None] for token in tokens],
    }
    if version is not None:
        meta |= {"lora_name": name, "lora_version": version}
    if spans is not None:
        meta["lora_version_spans"] = spans
    return Reply(200, {"text": "", "output_ids": tokens, "meta_info": meta})


class Call:
    """One request that waits for its reply."""

    def __init__(self, body: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self.body = body
        self.left = threading.Event()
        """Set when the client has gone away before the reply."""
        self._loop, self._reply = loop, loop.create_future()

    @property
    def ids(self) -> list[int]:
        return self.body["input_ids"]

    def send(self, reply: Reply) -> None:
        self._loop.call_soon_threadsafe(lambda: self._reply.done() or self._reply.set_result(reply))

    def reply(self, tokens: list[int], finish: str = "stop", **fields: Any) -> None:
        self.send(generated(tokens, finish, **fields))

    def abort(self, tokens: list[int], **fields: Any) -> None:
        self.send(generated(tokens, "abort", **fields))

    def status(self, status: int, message: str = "no", **fields: Any) -> None:
        self.send(Reply(status, {"error": {"message": message, **fields}}))

    def drop(self) -> None:
        self.send(Reply(0, None))

    async def wait(self) -> Reply:
        return await self._reply


class FakeServer:
    """See the module. Attributes: `calls` counts requests, `connections` connections."""

    def __init__(self, *, chunked: bool = False) -> None:
        self.answer: Callable[[dict[str, Any]], Reply | None] = lambda body: None
        self.calls = self.connections = 0
        self.chunked = chunked
        self.headers: list[str] = []
        self._pending: queue.Queue[Call] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._do(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._do(self._listen())

    def stop(self) -> None:
        """As if killed: every connection is gone, none is accepted."""
        self._do(self._kill())

    def next_call(self) -> Call:
        """The oldest request that waits."""
        return self._pending.get(timeout=WAIT_SECONDS)

    def next_calls(self, count: int) -> list[Call]:
        return [self.next_call() for _ in range(count)]

    def is_idle(self) -> bool:
        """Nothing waits for the test."""
        return self._pending.empty()

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _kill(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers = head.split("\r\n")
        size = next(int(line.split(":")[1]) for line in self.headers if line.lower().startswith("content-length"))
        call = Call(json.loads(await reader.readexactly(size)), self._loop)
        self.calls += 1
        reply = self.answer(call.body)
        if reply is None:
            self._pending.put(call)
            reply = await self._reply_or_leave(call, reader)
        if reply is None or reply.body is None:
            return False
        body = json.dumps(reply.body).encode()
        framing, pieces = f"Content-Length: {len(body)}", [body]
        if self.chunked:
            framing = "Transfer-Encoding: chunked"
            parts = [body[i : i + 7] for i in range(0, len(body), 7)] + [b""]
            pieces = [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts]
        writer.write(f"HTTP/1.1 {reply.status} X\r\nContent-Type: application/json\r\n{framing}\r\n\r\n".encode())
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return True

    async def _reply_or_leave(self, call: Call, reader: asyncio.StreamReader) -> Reply | None:
        waiting, leaving = asyncio.ensure_future(call.wait()), asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            call.left.set()
            return None
        finally:
            if not leaving.done():
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
