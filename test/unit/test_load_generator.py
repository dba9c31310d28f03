"""The load generator and its HTTP client, against servers that behave and servers that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from sglang import bench_serving
from sglang.benchmark.http_client import Exchange, HttpProtocolError, fetch
from sglang.benchmark.load import (
    CompletionsBackend,
    LoadResult,
    NativeBackend,
    Prompt,
    RequestResult,
    random_prompts,
    run_load,
    summarise,
)

Handler = Callable[[str, bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(x.split(":")[1]) for x in head.split("\r\n") if x.lower().startswith("content-length"))
            await handler(head.split(" ")[1], await reader.readexactly(length), writer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def raw(reply: bytes) -> Handler:
    async def handler(target: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    return handler


def chunked(*pieces: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


async def test_fetch_reads_a_sized_body():
    async with serving(raw(b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello")) as url:
        reply = await fetch(url, "GET", "/")
    assert (reply.status, reply.body, reply.headers["x-a"]) == (404, b"hello", "b")


async def test_fetch_joins_chunks():
    async with serving(raw(chunked(b"ab", b"c" * 70000))) as url:
        assert (await fetch(url, "GET", "/")).body == b"ab" + b"c" * 70000


async def test_body_arrives_as_sent():
    async def echo(target: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with serving(echo) as url:
        assert (await fetch(url, "POST", "/x", {"a": [1]})).json() == {"a": [1]}
        assert (await fetch(url, "POST", "/x", b"{not json")).body == b"{not json"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"", "before the reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "4 bytes early"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok and more", "9 bytes after the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "broke off"),
        (chunked(b"ok") + b"HTTP/1.1 200 OK\r\n\r\n", "after the end"),
        (b"SSH-2.0\r\n\r\n", "status line"),
    ],
)
async def test_broken_replies_are_errors(reply: bytes, says: str):
    async with serving(raw(reply)) as url:
        with pytest.raises(HttpProtocolError, match=says):
            await fetch(url, "GET", "/")


async def test_events_are_split_wherever_chunks_break():
    async with (
        serving(raw(chunked(b'data: {"a"', b': 1}\n\ndata: {"b": 2}\n', b"\ndata: [DONE]\n\n"))) as url,
        Exchange(url, "GET", "/") as exchange,
    ):
        assert [event async for event in exchange.events()] == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


async def test_an_unfinished_event_is_an_error():
    async with serving(raw(chunked(b"data: 1\n\ndata: 2"))) as url, Exchange(url, "GET", "/") as exchange:
        with pytest.raises(HttpProtocolError, match="inside an event"):
            [event async for event in exchange.events()]


@pytest.mark.parametrize("reset", [False, True])
async def test_drop_is_seen_by_the_server(reset: bool):
    gone = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            assert await reader.read() == b""
        except ConnectionError:
            assert reset
        gone.set()
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        exchange = Exchange(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "GET", "/")
        await exchange.send()
        exchange.drop(reset=reset)
        await asyncio.wait_for(gone.wait(), 5)


def native_stream(total: int, step: int) -> bytes:
    counts = [*range(step, total, step), total]
    events = [json.dumps({"text": "x" * n, "meta_info": {"completion_tokens": n}}) for n in counts]
    return chunked(*(f"data: {event}\n\n".encode() for event in [*events, "[DONE]"]))


async def test_native_backend_counts_streamed_tokens():
    async with serving(raw(native_stream(6, 2))) as url:
        result = await NativeBackend(url).send(Prompt(ids=[1, 2], output_len=6))
    assert result.error is None
    assert (result.prompt_tokens, result.output_tokens, result.text) == (2, 6, "xxxxxx")
    assert [tokens for _, tokens in result.arrivals] == [2, 4, 6]
    assert len(result.token_gaps()) == 4


async def test_completions_backend_adds_deltas_and_reads_usage():
    events = [
        {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}},
        {"choices": [{"text": "b"}], "usage": {"completion_tokens": 2}},
        {"choices": [], "usage": {"completion_tokens": 2}},
    ]
    seen: list[dict] = []

    async def handler(target: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(json.loads(body))
        writer.write(chunked(*(b"data: %s\n\n" % json.dumps(e).encode() for e in events), b"data: [DONE]\n\n"))

    async with serving(handler) as url:
        result = await CompletionsBackend(url, "m", extra={"lora_path": "a1"}).send(Prompt(ids=[5], output_len=2))
    assert (result.text, result.output_tokens, result.error) == ("ab", 2, None)
    assert seen[0]["prompt"] == [5]
    assert seen[0]["model"] == "m"
    assert seen[0]["lora_path"] == "a1"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad", "HTTP 400: bad"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "{}"),
        (chunked(b'data: {"error": {"message": "late"}}\n\n', b"data: [DONE]\n\n"), "late"),
        (chunked(b"data: [DONE]\n\n"), "no generated token"),
        (b"", "HttpProtocolError"),
    ],
)
async def test_failures_are_results(reply: bytes, says: str):
    async with serving(raw(reply)) as url:
        result = await NativeBackend(url, stream=reply.startswith(b"HTTP/1.1 200 OK\r\nTransfer")).send(Prompt([1], 4))
    assert result.error is not None
    assert says in result.error


class CountingBackend:
    """Holds every request until as many are waiting as the test expects."""

    def __init__(self, width: int) -> None:
        self.width, self.running, self.most = width, 0, 0
        self.full = asyncio.Event()

    async def send(self, prompt: Prompt) -> RequestResult:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self.width:
            self.full.set()
        await self.full.wait()
        self.running -= 1
        return RequestResult(prompt_tokens=len(prompt.ids), output_tokens=prompt.output_len)


async def test_closed_loop_keeps_to_its_concurrency():
    backend = CountingBackend(3)
    load = await run_load(backend, [Prompt([1], 2)] * 9, concurrency=3)
    assert backend.most == 3
    assert len(load.results) == 9


def test_summary_adds_up():
    good = RequestResult(prompt_tokens=10, output_tokens=3, started=0.0, ended=4.0, arrivals=[(1.0, 1), (3.0, 3)])
    bad = RequestResult(prompt_tokens=10, error="HTTP 500")
    figures = summarise(LoadResult(wall=2.0, results=[good, bad]))
    assert (figures["completed"], figures["failed"]) == (1, 1)
    assert (figures["output_throughput"], figures["input_throughput"]) == (1.5, 5.0)
    assert (figures["ttft_p50_ms"], figures["itl_p50_ms"], figures["e2e_p99_ms"]) == (1000.0, 1000.0, 4000.0)


def test_random_prompts_repeat_for_a_seed_and_keep_their_bounds():
    options = {"input_len": 8, "output_len": 4, "range_ratio": 0.5, "vocab_size": 10}
    prompts = random_prompts(50, **options, seed=1)
    assert prompts == random_prompts(50, **options, seed=1)
    assert prompts != random_prompts(50, **options, seed=2)
    assert {len(p.ids) for p in prompts} == {4, 5, 6, 7, 8}
    assert {p.output_len for p in prompts} == {2, 3, 4}
    assert {i for p in prompts for i in p.ids} == set(range(10))


async def test_bench_serving_runs_and_reports(tmp_path):
    targets: list[str] = []

    async def handler(target: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        targets.append(target)
        reply = native_stream(3, 1) if target == "/generate" else b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        writer.write(reply)

    async with serving(handler) as url:
        flags = ["--base-url", url, "--num-prompts", "4", "--random-input-len", "4", "--random-output-len", "3"]
        arguments = bench_serving.parse_arguments([*flags, "--flush-cache", "--tag", "t"])
        figures = await bench_serving.run(arguments)
    assert (figures["completed"], figures["failed"], figures["output_tokens"], figures["tag"]) == (4, 0, 12, "t")
    assert targets == ["/health", "/generate", "/flush_cache?timeout=10", *["/generate"] * 4]


def test_bench_serving_says_when_no_server_is_there(capsys):
    flags = ["--base-url", "http://127.0.0.1:9", "--num-prompts", "1", "--ready-check-timeout-sec", "0"]
    assert bench_serving.main(flags) == 1
    assert "is the server running?" in capsys.readouterr().err
