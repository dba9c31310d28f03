"""Rollouts against a server that the test plays, event by event, and once against a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import httpx
import pytest
from compat.lora_client import load, say
from compat.waiting import until
from rl.fake_generate import FakeServer, Reply, generated
from server_process import ServerProcess
from tiny_model import make_tiny_model

from sglang.rl import generation
from sglang.rl.config import RolloutSection, TaskSection
from sglang.rl.http_client import HttpClient, HttpError
from sglang.rl.publisher_version import ServerReport, Version
from sglang.rl.rollout import Rollout, RolloutError
from sglang.rl.samples import Problem
from sglang.rl.tasks.base import Task
from sglang.srt.parser.tokenizer import Tokenizer

SOON = 20.0


class Letters:
    """A character is a token."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


class Counting(Task):
    """Problem n asks "n"; the reward is the length of the text."""

    def __init__(self) -> None:
        super().__init__(TaskSection(name="counting"), Letters())

    def problem(self, seed: int, index: int) -> Problem:
        return Problem(prompt=str(index), answer=None, key=f"{seed}/{index}")

    def evals(self) -> dict[str, list[Problem]]:
        return {}

    def score(self, problem: Problem, text: str, finish: str) -> float:
        return float(len(text))


def published(number: int, servers: dict[str, int | None], name: str = "policy") -> Version:
    reports = {u: ServerReport(u, "versioned" if i else "stock", i, None, "bytes", 0.0, {}) for u, i in servers.items()}
    return Version(name, number, "", 0, 0.0, reports)


def prompt_of(body: dict[str, Any]) -> str:
    return "".join(map(chr, body["input_ids"]))


class Bench:
    """A rollout whose blocking calls run aside."""

    def __init__(self, urls: list[str], rollout: Rollout) -> None:
        self.urls, self.rollout = urls, rollout
        self._pool = ThreadPoolExecutor(4)

    def collect(self, count: int, version: int) -> Future[Any]:
        return self._pool.submit(self.rollout.collect, count, version)

    def evaluate(self, *args: Any) -> Future[Any]:
        return self._pool.submit(self.rollout.evaluate, *args)

    def publish(self, number: int, lora_version: int | None = None) -> None:
        self.rollout.published(published(number, dict.fromkeys(self.urls, lora_version or number)))

    def count(self, name: str) -> int:
        return self.rollout.counters().get(name, 0)

    def close(self) -> None:
        self.rollout.close()
        self._pool.shutdown()


Make = Callable[..., Bench]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(generation, "LONGEST_PAUSE", 0.05)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def make(fake: FakeServer) -> Iterator[Make]:
    benches = []

    def build(*servers: FakeServer, keywords: dict[str, Any] | None = None, **fields: Any) -> Bench:
        settings = {"groups": 1, "samples": 1, "max_new_tokens": 10, "max_staleness": 0, "timeout": SOON} | fields
        urls = [server.url for server in servers or (fake,)]
        options: dict[str, Any] = {"adapter_name": lambda: "policy"} | (keywords or {})
        rollout = Rollout(urls, RolloutSection(**settings), Counting(), Letters(), **options)
        benches.append(Bench(urls, rollout))
        return benches[-1]

    yield build
    for bench in benches:
        bench.close()


# ---- one attempt ---------------------------------------------------------------------------------------------------


def test_a_group_is_sent_together_and_comes_back_whole(fake, make):
    bench = make(samples=3, temperature=0.7, top_k=5, keywords={"api_key": "secret", "seed": 4})
    bench.publish(1)
    future = bench.collect(1, 1)
    calls = fake.next_calls(3)
    assert "Authorization: Bearer secret" in fake.headers
    for call in calls:
        assert call.body["input_ids"] == [ord("0")]
        assert call.body["lora_path"] == "policy"
        assert call.body["return_logprob"] is True
        assert call.body["sampling_params"] == {
            "max_new_tokens": 10, "temperature": 0.7, "top_p": 1.0, "top_k": 5,
        }  # fmt: skip
    calls[2].reply([65], "length")
    calls[0].reply([66, 67])
    calls[1].reply([68, 69, 70])
    (group,) = future.result(SOON)
    assert group.problem.key == "4/0"
    assert group.started_at == 1
    found = {sample.text: sample for sample in group.samples}
    assert {text: (s.finish, s.reward) for text, s in found.items()} == {
        "A": ("length", 1.0), "BC": ("stop", 2.0), "DEF": ("stop", 3.0),
    }  # fmt: skip
    sample = found["BC"]
    assert sample.prompt_ids == [ord("0")]
    assert sample.output_ids == [66, 67]
    assert sample.logprobs == [-0.66, -0.67]
    assert sample.versions == [1, 1]
    assert sample.continuations == 0


def test_the_base_model_is_version_0(fake, make):
    bench = make(keywords={"adapter_name": lambda: None})
    future = bench.collect(1, 0)
    call = fake.next_call()
    assert "lora_path" not in call.body
    call.reply([65], version=None)
    assert future.result(SOON)[0].samples[0].versions == [0]
    assert bench.count("tokens_unknown_version") == 0


def test_an_abort_goes_on_with_the_tokens_it_has(fake, make):
    bench = make(max_staleness=2, max_concurrent=1)
    bench.publish(1)
    future = bench.collect(1, 1)
    fake.next_call().abort([65, 66])
    call = fake.next_call()
    assert prompt_of(call.body) == "0AB"
    assert call.body["sampling_params"]["max_new_tokens"] == 8
    call.abort([])
    call = fake.next_call()
    assert prompt_of(call.body) == "0AB"
    bench.publish(2)
    call.abort([67], version=2)
    fake.next_call().reply([68, 69], version=2)
    (group,) = future.result(SOON)
    (sample,) = group.samples
    assert sample.prompt_ids == [ord("0")]
    assert sample.text == "ABCDE"
    assert sample.logprobs == [-0.65, -0.66, -0.67, -0.68, -0.69]
    assert sample.versions == [1, 1, 2, 2, 2]
    assert sample.oldest_version == 1
    assert sample.continuations == 3
    assert bench.count("continuations") == 3
    assert bench.count("tokens") == 5


def test_a_budget_that_is_used_up_by_an_abort_needs_no_further_request(fake, make):
    bench = make(max_new_tokens=2)
    bench.publish(1)
    future = bench.collect(1, 1)
    fake.next_call().abort([65, 66])
    assert future.result(SOON)[0].samples[0].finish == "length"
    assert fake.calls == 1


def test_without_partial_rollouts_an_abort_starts_over(fake, make):
    bench = make(partial_rollouts=False)
    bench.publish(1)
    future = bench.collect(1, 1)
    fake.next_call().abort([65, 66])
    call = fake.next_call()
    assert prompt_of(call.body) == "0"
    assert call.body["sampling_params"]["max_new_tokens"] == 10
    call.reply([67])
    (sample,) = future.result(SOON)[0].samples
    assert (sample.text, sample.versions, sample.logprobs) == ("C", [1], [-0.67])
    assert bench.count("tokens_discarded") == 2


def test_aborts_without_end_end(fake, make, monkeypatch):
    monkeypatch.setattr(generation, "MAX_CONTINUATIONS", 3)
    fake.answer = lambda body: generated([], "abort") if prompt_of(body) == "0" else generated([65])
    bench = make()
    bench.publish(1)
    (group,) = bench.collect(1, 1).result(SOON)
    assert group.problem.key == "0/1"
    assert bench.count("groups_failed") == 1
    assert fake.calls == 4


# ---- versions ------------------------------------------------------------------------------------------------------


def test_versions_of_a_switch_are_told_token_by_token(fake, make):
    bench = make(max_staleness=2, max_concurrent=1)
    bench.publish(1, lora_version=11)
    bench.publish(2, lora_version=15)
    future = bench.collect(1, 2)
    fake.next_call().reply([65, 66, 67], version=15, spans=[[0, 11], [2, 15]])
    assert future.result(SOON)[0].samples[0].versions == [1, 1, 2]


def test_a_version_may_be_announced_after_its_first_tokens(fake, make):
    """A server commits a moment before the trainer hears of it."""
    bench = make(max_staleness=1, samples=2, max_concurrent=2)
    bench.publish(1)
    future = bench.collect(1, 1)
    first, second = fake.next_calls(2)
    first.abort([65], version=9)
    third = fake.next_call()
    assert prompt_of(third.body) == "0A"
    bench.publish(2, lora_version=9)
    third.reply([66], version=9)
    second.reply([67], version=9)
    (group,) = future.result(SOON)
    assert [sample.versions for sample in group.samples] in ([[2, 2], [2]], [[2], [2, 2]])
    assert bench.count("tokens_unknown_version") == 0


def test_a_version_that_is_never_announced_counts_as_the_oldest_possible(fake, make):
    bench = make()
    bench.publish(3)
    future = bench.collect(1, 3)
    fake.next_call().reply([65, 66], version=99)
    (group,) = future.result(SOON)
    assert group.samples[0].versions == [3, 3]
    assert bench.count("tokens_unknown_version") == 2


def test_stock_servers_are_told_apart_by_names(fake, make):
    bench = make(max_staleness=9, max_concurrent=1, keywords={"adapter_name": lambda: "lora_v4"})
    bench.rollout.published(published(4, {fake.url: None}, name="lora_v4"))
    future = bench.collect(1, 4)
    fake.next_call().reply([65], version=None)
    assert future.result(SOON)[0].samples[0].versions == [4]


def test_a_restarted_server_numbers_from_the_start(fake, make):
    bench = make(max_staleness=0)
    bench.publish(1)
    bench.rollout.restarted(fake.url + "/")
    bench.rollout.published(published(9, {fake.url: 1}), number=5)
    future = bench.collect(1, 5)
    fake.next_call().reply([65], version=1)
    assert future.result(SOON)[0].samples[0].versions == [5]


# ---- failures of servers -------------------------------------------------------------------------------------------


def test_broken_connections_and_errors_are_tried_again(fake, make):
    bench = make()
    bench.publish(1)
    future = bench.collect(1, 1)
    fake.next_call().abort([65])
    fake.next_call().drop()
    fake.next_call().status(503, "The request queue is full.")
    fake.next_call().status(500)
    fake.next_call().status(400, "policy is unknown", code="adapter_not_found")
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[None, 66, None]]}
    fake.next_call().send(Reply(200, {"meta_info": meta}))
    call = fake.next_call()
    assert prompt_of(call.body) == "0A"
    call.reply([66])
    (sample,) = future.result(SOON)[0].samples
    assert sample.text == "AB"
    assert bench.count("retries") == 4, "a kept connection that breaks at once is replaced without a word"
    assert sample.continuations == 1


def test_a_server_that_is_killed_and_restarted_loses_nothing(fake, make):
    bench = make(groups=3, samples=2)
    bench.publish(1)
    future = bench.collect(3, 1)
    calls = fake.next_calls(6)
    calls[0].abort([65])
    fake.next_call()
    fake.stop()
    until(lambda: bench.count("retries") >= 6)
    fake.answer = lambda body: generated([90])
    fake.start()
    groups = future.result(SOON)
    assert sorted(group.problem.prompt for group in groups) == ["0", "1", "2"]
    texts = sorted(sample.text for group in groups for sample in group.samples)
    assert texts == ["AZ", "Z", "Z", "Z", "Z", "Z"]


def test_other_servers_take_over(fake, make):
    with FakeServer() as other:
        bench = make(fake, other, groups=4)
        bench.publish(1)
        future = bench.collect(4, 1)
        mine, theirs = fake.next_calls(2), other.next_calls(2)  # least in flight: two each
        mine[0].abort([65])
        assert prompt_of(fake.next_call().body).endswith("A"), "a continuation stays where its prompt is cached"
        fake.stop()
        for call in [*theirs, *other.next_calls(2)]:
            call.reply([66])
        texts = sorted(sample.text for group in future.result(SOON) for sample in group.samples)
        assert texts == ["AB", "B", "B", "B"]


def test_no_server_at_all_is_an_error(fake, make):
    fake.stop()
    bench = make(timeout=0.2)
    with pytest.raises(RolloutError, match=r"no server has answered since 0/0 was begun.*ConnectionRefused"):
        bench.collect(1, 0).result(SOON)
    with pytest.raises(RolloutError, match="no server"):
        bench.evaluate([Problem("x", None, "x")], 1, 0.0).result(SOON)


def test_an_attempt_without_an_end_costs_its_group(fake, make):
    """The one whose client hangs is given up; the server sees that."""
    fake.answer = lambda body: None if prompt_of(body) == "0" else generated([65])
    bench = make(timeout=0.5, max_staleness=1)
    bench.publish(1)
    future = bench.collect(1, 1)
    hanging = fake.next_call()
    (group,) = future.result(SOON)
    assert hanging.left.wait(SOON)
    assert group.problem.prompt != "0"
    until(lambda: bench.count("groups_failed") == 1)


def test_a_refused_problem_is_left_out(fake, make):
    bad = Reply(400, {"error": {"message": "The prompt is too long."}})
    fake.answer = lambda body: bad if prompt_of(body) in "01" else generated([65])
    bench = make()
    bench.publish(1)
    (group,) = bench.collect(1, 1).result(SOON)
    assert group.problem.prompt == "2"
    assert bench.count("groups_rejected") == 2


@pytest.mark.parametrize(("status", "calls"), [(401, 1), (400, 8)])
def test_refusing_everything_is_an_error(fake, make, status, calls):
    fake.answer = lambda body: Reply(status, {"object": "error", "message": "Unauthorized"})
    bench = make()
    with pytest.raises(RolloutError, match=f"refused a request: Unauthorized .HTTP {status}"):
        bench.collect(1, 0).result(SOON)
    assert fake.calls == calls


def test_what_a_task_raises_reaches_the_trainer(fake, make, monkeypatch):
    fake.answer = lambda body: generated([65])
    bench = make()
    monkeypatch.setattr(Counting, "score", lambda *_: 1 / 0)
    with pytest.raises(RolloutError, match="0/0: ZeroDivisionError"):
        bench.collect(1, 0).result(SOON)
    monkeypatch.setattr(Counting, "problem", lambda *_: 1 / 0)
    with pytest.raises(RolloutError, match="no problem 1: ZeroDivisionError"):
        bench.collect(1, 0).result(SOON)


# ---- what is worked on, and when -----------------------------------------------------------------------------------


def test_without_staleness_nothing_is_worked_on_ahead(fake, make):
    bench = make(groups=2)
    future = bench.collect(2, 0)
    for call in fake.next_calls(2):
        call.reply([65], version=None)
    future.result(SOON)
    assert bench.rollout.snapshot() == {"seed": 0, "next": 2, "again": []}
    assert fake.calls == 2


def test_the_next_step_is_worked_on_ahead_and_used_in_time(fake, make):
    bench = make(groups=2, max_staleness=1)
    bench.publish(1)
    future = bench.collect(2, 1)
    calls = fake.next_calls(4)
    assert [prompt_of(call.body) for call in calls] == ["0", "1", "2", "3"]
    calls[3].reply([65])
    calls[1].reply([65])
    assert [g.problem.prompt for g in future.result(SOON)] == ["1", "3"], "those that ended first"
    assert bench.rollout.snapshot() == {"seed": 0, "next": 4, "again": [0, 2]}
    assert fake.is_idle(), "the step in training leaves room for one more step's groups, which these are"
    bench.publish(2)
    future = bench.collect(2, 2)
    new = fake.next_calls(2)
    assert [prompt_of(call.body) for call in new] == ["4", "5"]
    for call in new:
        call.reply([65, 66], version=2)
    until(lambda: bench.count("tokens") == 6)
    assert not future.done(), "groups that only this step can use are waited for"
    calls[0].reply([65], version=1)
    calls[2].reply([65], version=1)
    assert [(g.problem.prompt, g.samples[0].versions) for g in future.result(SOON)] == [("0", [1]), ("2", [1])]
    assert [g.problem.prompt for g in bench.collect(2, 2).result(SOON)] == ["4", "5"]
    assert bench.count("groups_stale") == 0


def test_what_is_too_old_is_dropped_counted_and_begun_again(fake, make):
    bench = make(max_staleness=1)
    bench.publish(1)
    future = bench.collect(1, 1)
    first, second = fake.next_calls(2)
    first.reply([65])
    future.result(SOON)
    for number in (2, 3):
        bench.publish(number)
    assert second.left.wait(SOON), "it could not be used any more"
    future = bench.collect(1, 3)
    again = fake.next_call()
    assert prompt_of(again.body) == "1"
    again.reply([66], version=3)
    (group,) = future.result(SOON)
    assert group.samples[0].versions == [3]
    assert group.started_at == 3
    assert bench.count("groups_stale") == 1


def test_a_server_that_missed_a_publish_is_not_trained_on(fake, make):
    bench = make(max_staleness=1)
    for number in (1, 2, 3):
        bench.publish(number)
    future = bench.collect(1, 3)
    old, fine = fake.next_calls(2)
    old.reply([65], version=1)
    until(lambda: bench.count("groups_stale"))
    fine.reply([66], version=2)
    again = fake.next_call()
    assert prompt_of(again.body) == "0"
    again.reply([67], version=3)
    (group,) = future.result(SOON)
    assert (group.problem.prompt, group.samples[0].versions) == ("1", [2])
    assert bench.count("groups_stale") == 1


def test_attempts_in_flight_are_bounded_and_groups_are_not_split(fake, make):
    bench = make(groups=3, samples=2, max_concurrent=5)
    future = bench.collect(3, 0)
    calls = fake.next_calls(4)
    assert [prompt_of(call.body) for call in calls] == ["0", "0", "1", "1"]
    calls[0].reply([65], version=None)
    calls[2].reply([65], version=None)
    until(lambda: bench.count("tokens") == 2)
    assert fake.is_idle(), "a group holds its room until it is whole"
    calls[3].reply([65], version=None)
    last = fake.next_calls(2)
    assert [prompt_of(call.body) for call in last] == ["2", "2"]
    for call in [calls[1], *last]:
        call.reply([65], version=None)
    assert len(future.result(SOON)) == 3


def test_a_group_larger_than_the_limit_runs_alone(fake, make):
    bench = make(groups=2, samples=3, max_concurrent=2)
    future = bench.collect(2, 0)
    for prompt in "01":
        calls = fake.next_calls(3)
        assert {prompt_of(call.body) for call in calls} == {prompt}
        assert fake.is_idle()
        for call in calls:
            call.reply([65], version=None)
    assert len(future.result(SOON)) == 2


def test_evaluations_go_first_and_keep_their_order(fake, make):
    bench = make(groups=2, max_concurrent=2, max_staleness=1)
    bench.publish(1)
    future = bench.collect(2, 1)
    running = fake.next_calls(2)
    problems = [Problem(f"e{i}", None, f"e{i}") for i in range(3)]
    evaluation = bench.evaluate(problems, 2, 0.0, 7)
    running[0].reply([65])
    until(lambda: bench.count("tokens") == 1)
    running[1].reply([65])
    for i in range(3):
        for call in fake.next_calls(2):
            assert prompt_of(call.body) == f"e{i}"
            assert call.body["sampling_params"]["temperature"] == 0.0
            assert call.body["sampling_params"]["max_new_tokens"] == 7
            call.reply([66] * (i + 1))
    groups = evaluation.result(SOON)
    assert [group.problem.prompt for group in groups] == ["e0", "e1", "e2"]
    assert [[sample.reward for sample in group.samples] for group in groups] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert len(future.result(SOON)) == 2
    assert bench.count("groups_used") == 2


def test_an_evaluation_takes_what_there_is_in_time(fake, make):
    fake.answer = lambda body: generated([65]) if prompt_of(body) == "b" else generated([65], "abort")
    bench = make(timeout=0.4, max_new_tokens=100000)
    groups = bench.evaluate([Problem("a", None, "a"), Problem("b", None, "b")], 1, 0.0).result(SOON)
    assert [group.samples[0].finish for group in groups] == ["abort", "stop"]


def test_a_resumed_run_begins_again_what_was_not_used(fake, make):
    bench = make(groups=2, max_staleness=1)
    future = bench.collect(2, 0)
    calls = fake.next_calls(4)
    for call in (calls[0], calls[3]):
        call.reply([65], version=None)
    assert len(future.result(SOON)) == 2
    state = json.loads(json.dumps(bench.rollout.snapshot()))
    assert state == {"seed": 0, "next": 4, "again": [1, 2]}
    bench.close()
    assert all(call.left.wait(SOON) for call in calls[1:3])
    bench = make(groups=2, max_staleness=1)
    bench.rollout.restore(state)
    bench.collect(2, 0)
    assert [prompt_of(call.body) for call in fake.next_calls(4)] == ["1", "2", "4", "5"]
    with pytest.raises(ValueError, match="seed 1"):
        bench.rollout.restore(state | {"seed": 1})


def test_the_waiting_thread_can_look_after_servers(fake, make, monkeypatch):
    monkeypatch.setattr("sglang.rl.rollout.WATCH_SECONDS", 0.01)
    fake.stop()
    watched = []

    def watch() -> None:
        watched.append(1)
        if len(watched) == 3:
            fake.answer = lambda body: generated([65], version=None)
            fake.start()

    bench = make(keywords={"watch": watch})
    assert len(bench.collect(1, 0).result(SOON)) == 1
    assert len(watched) >= 3


# ---- HTTP ----------------------------------------------------------------------------------------------------------


async def test_connections_are_kept_and_chunks_are_read():
    with FakeServer(chunked=True) as fake:
        fake.answer = lambda body: Reply(200, body)
        client = HttpClient(fake.url)
        for i in range(3):
            reply = await client.post("/generate", json.dumps({"i": i, "text": "ü" * 1000}).encode())
            assert json.loads(reply.body) == {"i": i, "text": "ü" * 1000}
        assert fake.connections == 1
        await asyncio.gather(*(client.post("/generate", b"{}") for _ in range(5)))
        assert fake.connections == 5
        client.close()


async def test_a_kept_connection_that_the_server_has_closed_is_replaced():
    with FakeServer() as fake:
        fake.answer = lambda body: Reply(200, {})
        client = HttpClient(fake.url)
        await client.post("/generate", b"{}")
        fake.stop()
        fake.start()
        assert (await client.post("/generate", b"{}")).status == 200
        assert fake.connections == 2
        client.close()


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (b"", "before the reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "inside the reply"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "inside the reply"),
        (b"SSH-2.0-OpenSSH\r\n", "not a reply of HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nwhole", None),
    ],
)
async def test_replies_that_break_off(raw, want):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(raw)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        if want is None:
            assert (await client.post("/generate", b"{}")).body == b"whole"
        else:
            with pytest.raises(HttpError, match=want):
                await client.post("/generate", b"{}")


@pytest.mark.parametrize("url", ["localhost:3000", "ftp://x", "http://"])
def test_addresses_are_checked(url):
    with pytest.raises(ValueError, match="address of a server"):
        HttpClient(url)


# ---- a real server -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_server_across_publishes_and_a_pause(tmp_path: Path):
    """Adapters say a token each, so the tokens themselves prove which version drew them."""
    model = make_tiny_model(tmp_path / "model", context_length=20_000, weight_scale=3.0)
    config = adapters.read_shape(model)
    tokenizer = Tokenizer.from_path(str(model))
    tokens = {number: 100 + number for number in range(4)}
    flags = ["--model-path", str(model), "--enable-lora", "--max-loras-per-batch", "3", "--max-lora-rank", "8"]
    section = RolloutSection(groups=1, samples=4, max_new_tokens=600, max_staleness=2, timeout=60.0)
    with ServerProcess(*flags, "--max-total-tokens", "60000") as server, httpx.Client(base_url=server.url) as client:

        def publish(number: int, rollout: Rollout, **fields: Any) -> None:
            path = say(config, tmp_path / f"a{number}", tokens[number])
            reply = load(client, "policy", path, upsert=True, **fields).raise_for_status().json()
            rollout.published(published(number, {server.url: reply["lora_version"]}))

        bench = Bench([], Rollout([server.url], section, Counting(), tokenizer, adapter_name=lambda: "policy"))
        try:
            publish(1, bench.rollout)
            first = bench.collect(1, 1)
            until(lambda: client.get("/get_load").json()[0]["num_reqs"] > 0)
            publish(2, bench.rollout, mode="switch")
            client.post("/pause_generation", json={"mode": "abort"}).raise_for_status()
            publish(3, bench.rollout)
            client.post("/continue_generation", json={}).raise_for_status()
            groups = [*first.result(60), *bench.collect(1, 3).result(60)]
        finally:
            bench.close()
    samples = [sample for group in groups for sample in group.samples]
    assert len(samples) == 8
    for sample in samples:
        assert len(sample.output_ids) == len(sample.logprobs) == len(sample.versions) == 600
        assert sample.finish == "length"
        assert sample.output_ids == [tokens[number] for number in sample.versions]
        assert sample.versions == sorted(sample.versions)
    assert any(sample.continuations for sample in samples)
    assert any(len(set(sample.versions)) > 1 for sample in samples)
    assert bench.count("tokens_unknown_version") == 0
