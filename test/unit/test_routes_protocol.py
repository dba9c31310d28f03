"""What is not plain HTTP/1.1, over a real socket: a documented 400, or simply the request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import uvicorn

from sglang.srt.entrypoints.http_protocol import JsonErrorProtocol, QuietServer


async def echo(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(
        echo, port=0, http=JsonErrorProtocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = QuietServer(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


async def exchange(port: int, *parts: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)
    lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines[1:] if line)
    body = await asyncio.wait_for(reader.readexactly(int(headers[b"content-length"])), 10)
    writer.close()
    await writer.wait_closed()
    return int(lines[0].split()[1]), headers, body


@pytest.mark.parametrize(
    "data",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"garbage\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n",
    ],
    ids=["http2", "tls", "garbage", "length"],
)
async def test_other_protocols_get_a_json_400(port, data):
    status, headers, body = await exchange(port, data)
    assert status == 400
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"connection"] == b"close"
    error = json.loads(body)
    assert (error["object"], error["code"], error["type"]) == ("error", 400, "Bad Request")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_an_offer_to_upgrade_to_http2_is_ignored(port, pieces):
    """Java's client sends it with every POST; the body must not be lost."""
    head = (
        b"POST /generate HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: 9\r\n\r\n"
    )
    body = b'{"a": 12}'
    parts = [head + body] if pieces == 1 else [head, body]
    status, _, echoed = await exchange(port, *parts)
    assert (status, echoed) == (200, body)


async def test_a_body_that_talks_about_upgrades_is_untouched(port):
    body = b"\r\nUpgrade: h2c\r\n"
    head = b"POST / HTTP/1.1\r\nHost: h2c\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert (await exchange(port, head + body))[2] == body
