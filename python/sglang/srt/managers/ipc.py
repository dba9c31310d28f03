"""The sockets between front and back: the only module that imports zmq.

A `Channel` carries `wire` messages both ways over two unix sockets in a private directory. The front binds, the back
connects; the front ends asynchronously (asyncio), the back by polling between steps.
Invariants: messages of one direction arrive in order and none is dropped (no high-water mark); a message that does not
decode is a programming error and raises.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sglang.srt.managers.io_struct import wire


class Endpoint(msgspec.Struct, frozen=True):
    """Addresses of one channel, handed to the back process."""

    to_back: str
    to_front: str


def _socket(context: zmq.Context[Any], kind: int) -> Any:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    return socket


class FrontChannel:
    """The front's end: `send` never blocks, `messages` yields what the back says until `close`."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="sglang-")
        self.endpoint = Endpoint(
            to_back=f"ipc://{os.path.join(self._directory, 'to_back')}",
            to_front=f"ipc://{os.path.join(self._directory, 'to_front')}",
        )
        self._context = zmq.asyncio.Context()
        self._push = _socket(zmq.Context(self._context), zmq.PUSH)
        self._push.bind(self.endpoint.to_back)
        self._pull = _socket(self._context, zmq.PULL)
        self._pull.bind(self.endpoint.to_front)

    def send(self, message: wire.ToBack) -> None:
        """Queue one message for the back; returns at once."""
        self._push.send(wire.encoder.encode(message), copy=False)

    async def messages(self) -> AsyncIterator[wire.ToFront]:
        """Every message of the back, in order."""
        while True:
            yield wire.to_front_decoder.decode(await self._pull.recv())

    def close(self) -> None:
        """Close both sockets and remove the directory."""
        self._push.close()
        self._pull.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


class BackChannel:
    """The back's end: `receive` drains what has arrived, waiting up to a timeout for the first message."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._context = zmq.Context()
        self._pull = _socket(self._context, zmq.PULL)
        self._pull.connect(endpoint.to_back)
        self._push = _socket(self._context, zmq.PUSH)
        self._push.setsockopt(zmq.LINGER, 1000)
        self._push.connect(endpoint.to_front)

    def receive(self, timeout_ms: int = 0) -> list[wire.ToBack]:
        """All messages waiting now; when there is none, wait up to `timeout_ms` for one."""
        messages: list[wire.ToBack] = []
        if timeout_ms and not self._pull.poll(timeout_ms):
            return messages
        while True:
            try:
                messages.append(wire.to_back_decoder.decode(self._pull.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, message: wire.ToFront) -> None:
        """Queue one message for the front; returns at once."""
        self._push.send(wire.encoder.encode(message), copy=False)

    def close(self) -> None:
        """Flush (for up to a second) and close."""
        self._pull.close()
        self._push.close()
        self._context.term()
