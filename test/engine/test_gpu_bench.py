"""`benchmark/serving/gpu.py`: its load generator against a fake server, its statistics, its model, and one real run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors import safe_open
from server_process import PACKAGE_ROOT, child_environment

from sglang.srt.config.model_config import load_model_config

SERVING = PACKAGE_ROOT.parent / "benchmark" / "serving"
sys.path.insert(0, str(SERVING))

import gpu_cases  # noqa: E402
import gpu_client  # noqa: E402
import gpu_load  # noqa: E402
import gpu_model  # noqa: E402
import gpu_tables  # noqa: E402
import plot_gpu  # noqa: E402
from gpu_load import Job, Load, LoadFailed, Outcome, Record, run_job  # noqa: E402

TOKENS = 6


class FakeServer:
    """Answers `/generate` as the adapter named in the request says: well, in odd packets, with an abort, not at all."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.connections = 0
        self.url = ""

    async def serve(self) -> AsyncIterator[FakeServer]:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(size))
                self.bodies.append(body)
                await self._answer(body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, body: dict, writer: asyncio.StreamWriter) -> None:
        kind, tokens = body.get("lora_path"), body["sampling_params"]["max_new_tokens"]
        if kind == "drop":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            raise ConnectionError
        if kind == "refuse":
            writer.write(_whole(400, b'{"error": {"message": "no such thing"}}'))
        elif not body["stream"]:
            await asyncio.sleep(0.05)
            writer.write(_whole(200, _reply(tokens, "abort" if kind == "abort" else "length")))
        else:
            await self._stream(kind, tokens, writer)

    async def _stream(self, kind: str | None, tokens: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        last = tokens // 2 if kind == "abort" else tokens
        for n in range(1, last + 1):
            event = b"data: " + _reply(n, None if n < last else "abort" if kind == "abort" else "length") + b"\n\n"
            cut = 11 if kind == "odd" else 0
            for piece in filter(None, (event[:cut], event[cut:])):
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _reply(tokens: int, finish: str | None) -> bytes:
    reason = {"type": finish} if finish else None
    meta = {"completion_tokens": tokens, "finish_reason": reason, "lora_version": 3}
    return json.dumps({"output_ids": [0] * tokens, "meta_info": meta}).encode()


def _whole(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeServer]:
    async for server in FakeServer().serve():
        yield server


def job_for(fake: FakeServer, requests: int, concurrency: int, *loras: str, stream: bool = False) -> Job:
    return Job(fake.url, "s", requests, concurrency, 5, TOKENS, (10, 500), loras=loras, stream=stream, timeout=10)


# ---- The client ------------------------------------------------------------------------------------------------------


async def test_whole_replies_are_counted_over_kept_connections(fake: FakeServer):
    outcome = await run_job(job_for(fake, 7, 3))
    figures = outcome.figures()
    assert (figures["requests"], figures["failed"], figures["aborted"]) == (7, 0, 0)
    assert [r.tokens for r in outcome.records] == [TOKENS] * 7
    assert fake.connections == 3
    assert 50 / TOKENS <= figures["ms_per_token"] < 1000
    assert figures["tokens_per_s"] == pytest.approx(7 * TOKENS / outcome.wall, abs=0.1)
    assert len({tuple(body["input_ids"]) for body in fake.bodies}) == 7
    params = fake.bodies[0]["sampling_params"]
    assert params == {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True}


@pytest.mark.parametrize("kind", ["good", "odd"])
async def test_streams_have_an_arrival_per_event_however_packets_are_cut(fake: FakeServer, kind: str):
    outcome = await run_job(job_for(fake, 4, 2, kind, stream=True))
    assert [len(r.arrivals) for r in outcome.records] == [TOKENS] * 4
    assert [(r.tokens, r.finish, r.version) for r in outcome.records] == [(TOKENS, "length", 3)] * 4
    figures = outcome.stream_figures()
    assert figures["events_per_token"] == 1.0
    assert 5 < figures["gap_p50_ms"] <= figures["gap_p99_ms"] <= figures["largest_gap_p99_ms"] < 1000


@pytest.mark.parametrize("stream", [False, True])
async def test_aborts_failures_and_lost_connections_are_told_apart(fake: FakeServer, stream: bool):
    outcome = await run_job(job_for(fake, 4, 4, "good", "abort", "refuse", "drop", stream=stream))
    good, abort, refused, dropped = outcome.records
    assert not good.error and good.tokens == TOKENS
    assert abort.aborted and not abort.failed
    assert refused.failed and refused.status == 400 and "no such thing" in refused.error
    assert dropped.failed
    figures = outcome.figures()
    assert (figures["aborted"], figures["failed"]) == (1, 2)
    assert figures["error"] == refused.error
    assert len(outcome.complete) == 1


async def test_a_server_that_is_not_there_is_a_failure_of_every_request(fake: FakeServer):
    outcome = await run_job(Job("http://127.0.0.1:1", "s", 3, 2, 5, TOKENS, (10, 500)))
    assert [r.failed for r in outcome.records] == [True] * 3
    assert "ms_per_token" not in outcome.figures()


async def test_a_load_says_when_all_its_streams_run(fake: FakeServer):
    async with Load(job_for(fake, 3, 3, stream=True)) as load:
        assert fake.bodies == []
        load.go()
        await load.streaming()
        assert len(fake.bodies) == 3
        assert len((await load.finish()).complete) == 3
    async with Load(job_for(fake, 1, 1, "refuse", stream=True)) as load:
        load.go()
        with pytest.raises(LoadFailed, match="no such thing"):
            await load.streaming()


def test_a_job_is_split_without_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_load.os, "cpu_count", lambda: 16)
    parts = Job("http://h:1", "s", 300, 256, 5, TOKENS, (10, 500), loras=("a", "b")).split()
    assert [part["lanes"] for part in parts] == [64] * 4
    requests = sorted((request for part in parts for request in part["requests"]), key=lambda r: r["id"])
    assert [request["id"] for request in requests] == list(range(300))
    assert [request["lora"] for request in requests[:4]] == ["a", "b", "a", "b"]
    prompts = [gpu_client.generate_body(request)["input_ids"] for request in requests]
    assert len({tuple(prompt[:2]) for prompt in prompts}) > 290
    assert all(10 <= token < 500 for prompt in prompts for token in prompt)


# ---- Statistics ------------------------------------------------------------------------------------------------------


def record(started: float, arrivals: list[float], **more: object) -> Record:
    ended = started + arrivals[-1]
    return Record(0, 200, started, ended, arrivals, **{"tokens": len(arrivals), "finish": "length", **more})


def test_percentiles_and_pace():
    assert gpu_load.spread("x", [n / 1000 for n in range(101)]) == {"x_p50_ms": 50.0, "x_p99_ms": 99.0}
    assert gpu_load.spread("x", []) == {}
    # 2 tokens in 1 s and 4 in 1 s: 500 and 250 ms a token; 6 tokens in the 2 s from the first start to the last end.
    figures = Outcome([record(0.0, [0.5, 1.0]), record(1.0, [0.25, 0.5, 0.75, 1.0])]).figures()
    assert figures["ms_per_token"] == 375.0
    assert figures["tokens_per_s"] == 3.0


def test_a_publish_is_judged_by_the_gaps_around_it():
    steady = record(0.0, [i / 100 for i in range(1, 300)])
    stalled = record(0.0, [i / 100 for i in range(1, 100)] + [1.05 + i / 100 for i in range(100)])
    aborted = record(0.0, [0.5, 0.9], finish="abort")
    probe = record(1.02, [0.03, 0.04], version=2)
    figures = gpu_cases.sync_figures([steady, stalled, aborted], probe, started=1.0)
    assert figures["first_token_ms"] == pytest.approx(50.0)
    assert (figures["streams"], figures["aborted"], figures["running"]) == (3, 1, 2)
    assert figures["gap_before_p99_ms"] == pytest.approx(10.0)
    assert figures["gap_after_p99_ms"] == pytest.approx(60.0, rel=0.02)
    assert figures["gap_growth_ms"] == pytest.approx(50.0, rel=0.02)
    summary = gpu_cases.summarise_rounds([figures | {"load_ms": 1.0}, figures | {"load_ms": 3.0}])
    assert (summary["aborted"], summary["load_ms"], summary["load_ms_max"]) == (2, 2.0, 3.0)


# ---- Model, tables, charts -------------------------------------------------------------------------------------------


def test_the_made_model_and_adapters_are_what_the_server_reads(tmp_path: Path):
    made = gpu_model.make(tmp_path, "tiny")
    config = load_model_config(made["model"])
    assert (config.architecture, config.num_hidden_layers, config.qk_norm) == ("Qwen3ForCausalLM", 2, True)
    shape = gpu_model.SHAPES["tiny"]
    with safe_open(Path(made["model"]) / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        weight = file.get_tensor("model.layers.1.mlp.up_proj.weight").float()
    assert found == gpu_model.weight_shapes(shape)
    assert float(weight.std()) == pytest.approx(gpu_model.WEIGHT_STD, rel=0.1)
    assert len(made["adapters"]) == gpu_model.ADAPTERS
    with safe_open(Path(made["adapters"][0]) / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * 2 * 7
        assert float(file.get_tensor(next(iter(file.keys()))).float().abs().max()) > 0
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    assert gpu_model.make(tmp_path, "tiny") == made
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))] == times


def test_the_default_shape_is_the_published_models():
    shapes = gpu_model.weight_shapes(gpu_model.SHAPES["qwen3-1.7b"])
    sizes = [s[0] * (s[1] if len(s) > 1 else 1) for s in shapes.values()]
    assert sum(sizes) == 1_720_574_976
    assert len(shapes) == 2 + 28 * 11


def test_tables_and_charts_put_ours_beside_the_published(tmp_path: Path):
    common = {"server": "lora", "model": "tiny", "commit": "c", "device": {"gpu": "G"}, "versions": {"torch": "t"}}
    decode = {"case": "decode", "traffic": "base", "concurrency": 16, "ms_per_token": 1.23}
    prefill = {"case": "prefill", "traffic": "base", "wall_s": 0.61}
    broken = {"case": "sync", "error": "RuntimeError: x\nmore"}
    records = [common | item for item in (decode, prefill, broken)]
    text = gpu_tables.tables(records)
    assert "| 16 | 1.23 | 2.53 |" in text
    assert "| lora: base | 0.61 |" in text
    assert "- sync (lora): RuntimeError: x\n" in text
    pytest.importorskip("matplotlib")
    assert [path.name for path in plot_gpu.plot(records, tmp_path)] == ["decode.png", "summary.png"]


@pytest.mark.slow
def test_the_command_runs_every_kind_of_case(tmp_path: Path):
    command = [sys.executable, str(SERVING / "gpu.py"), "--out", str(tmp_path), "--model", "tiny"]
    command += "--only adapters,prefill,streaming,sync --concurrency 2 --requests 1 --output-tokens 4".split()
    command += "--prompt-tokens 16 --prefill-requests 2 --prefill-tokens 32 --stream-concurrency 2".split()
    command += "--sync-rounds 1 --sync-streams 2 --sync-tokens 700".split()
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=child_environment())
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert records == gpu_tables.load(tmp_path / "results.jsonl")
    assert {r["case"] for r in records} == {"decode", "prefill", "streaming", "sync", "sync_summary"}
    assert all(r["failed"] == 0 for r in records)
    publish, pause = (r for r in records if r["case"] == "sync")
    assert (publish["aborted"], publish["running"], len(publish["adapter_versions"])) == (0, 2, 2)
    assert pause["aborted"] == 2
    assert (tmp_path / "tables.md").exists()
