"""The publisher and real servers: adapters say a token of their own, so every reply proves which version made it.

Server `a` asks for keys; server `b` takes small ranks alone and reads adapters below a directory of its own alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import httpx
import pytest
from compat.lora_client import PROMPT, value_of
from compat.waiting import until
from server_process import ServerProcess, together
from tiny_model import make_tiny_model

from sglang.rl.publisher import TRANSPORTS, Publisher, PublishError, Version
from sglang.rl.publisher_server import Server
from sglang.rl.transport import Deadline

pytestmark = pytest.mark.slow

Enough = Callable[[dict[str, Any]], bool]

KEYS = {"api_key": "asks", "admin_api_key": "changes"}
CONTEXT = 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny"), context_length=CONTEXT, weight_scale=3.0))


@pytest.fixture(scope="module")
def servers(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    flags = ["--model-path", model, "--enable-lora", "--max-total-tokens", str(3 * CONTEXT), "--enable-metrics"]
    keys = ["--api-key", KEYS["api_key"], "--admin-api-key", KEYS["admin_api_key"]]
    root = str(tmp_path_factory.mktemp("root"))
    first = ServerProcess(*flags, *keys)
    second = ServerProcess(*flags, *keys, "--max-lora-rank", "1", "--lora-root", root)
    with together(first, second) as pair:
        yield pair


class Policy:
    """Adapters that say their token, and clients that ask for them."""

    def __init__(self, model: str, server: ServerProcess) -> None:
        self.shape = adapters.read_shape(Path(model))
        self.http = httpx.Client(
            base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {KEYS['api_key']}"}
        )

    def saying(self, token: int) -> tuple[Any, Any]:
        """Tensors and config."""
        tensors = adapters.telling_adapter(self.shape, token)
        return tensors, adapters.adapter_config(tensors)

    def ask(self, tokens: int = 4, name: str = "policy") -> dict[str, Any]:
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        body = {"input_ids": PROMPT, "sampling_params": params, "lora_path": name}
        return self.http.post("/generate", json=body).raise_for_status().json()

    def stream(self, started: threading.Event, tokens: int, enough: Enough) -> dict[str, Any]:
        """The last event of a stream, or the first one that is enough; then the client hangs up."""
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        body = {"input_ids": PROMPT, "sampling_params": params, "lora_path": "policy", "stream": True}
        last = {}
        with self.http.stream("POST", "/generate", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line[5:])
                    started.set()
                    if enough(last):
                        break
        return last

    def listing(self) -> list[dict[str, Any]]:
        return self.http.get("/lora_adapters").json()["adapters"]

    def unload_all(self) -> None:
        """No name means anything, and nothing is in memory."""
        key = {"Authorization": f"Bearer {KEYS['admin_api_key']}"}
        for adapter in self.listing():
            self.http.post("/unload_lora_adapter", json={"lora_name": adapter["lora_name"]}, headers=key)
        until(lambda: not self.listing())

    def quiet(self) -> bool:
        """One version, held by nobody."""
        listed = self.listing()
        return len(listed) == 1 and not listed[0]["num_holders"]


@pytest.fixture
def policy(model: str, servers: tuple[ServerProcess, ServerProcess]) -> Iterator[Policy]:
    policy = Policy(model, servers[0])
    with policy.http:
        policy.unload_all()
        yield policy
        until(policy.quiet)
        metrics = policy.http.get("/metrics").text
        for name in ("lora_leases", "lora_double_releases_total", "lora_free_failures_total"):
            assert value_of(metrics, name) == 0, name
        assert value_of(metrics, "invariant_violations_total") == 0


def streaming(
    pool: ThreadPoolExecutor, policy: Policy, count: int, tokens: int = 90_000, enough: Enough = lambda _: False
) -> list[Future[dict[str, Any]]]:
    """Streams that have had their first token."""
    events = [threading.Event() for _ in range(count)]
    futures = [pool.submit(policy.stream, event, tokens, enough) for event in events]
    assert all(event.wait(30) for event in events)
    return futures


def made_by(version: Version, url: str) -> int | None:
    return version.servers[url].version_id


@pytest.mark.parametrize("transport", ["shm", "bytes"])
def test_live_publishing_ends_no_stream(servers, policy, transport):
    url = servers[0].url
    with Publisher(url, transport=transport, **KEYS) as publisher, ThreadPoolExecutor(8) as pool:
        published = [publisher.publish(*policy.saying(100))]
        ending, lasting, over = [], [], threading.Event()
        for token in range(101, 105):
            ending.append(streaming(pool, policy, 1, 100))
            lasting.append(streaming(pool, policy, 1, enough=lambda _: over.is_set()))
            published.append(publisher.publish(*policy.saying(token)))
            assert set(policy.ask()["output_ids"]) == {token}
        over.set()  # those that are to last have run through every publication behind theirs
        for futures, reason in ((ending, "length"), (lasting, None)):
            for i, reply in enumerate(future.result(60) for (future,) in futures):
                meta = reply["meta_info"]
                assert (meta["finish_reason"] or {}).get("type") == reason
                assert set(reply["output_ids"]) == {100 + i}
                assert meta["lora_version"] == made_by(published[i], url)
                assert "lora_version_spans" not in meta
        assert all(len(future.result()["output_ids"]) == 100 for (future,) in ending)
    assert [version.servers[url].transport for version in published] == [transport] * 5
    (listed,) = (adapter for adapter in policy.listing() if adapter["state"] == "serving")
    assert listed["digest"] == published[-1].servers[url].digest


def test_switch_moves_running_streams(servers, policy):
    url = servers[0].url
    with Publisher(url, mode="switch", **KEYS) as publisher, ThreadPoolExecutor(4) as pool:
        old = publisher.publish(*policy.saying(110))
        running = streaming(pool, policy, 2, enough=lambda event: 111 in event["output_ids"])
        new = publisher.publish(*policy.saying(111))
        for reply in (future.result(60) for future in running):
            (zero, first), (start, second) = reply["meta_info"]["lora_version_spans"]
            assert (zero, first, second) == (0, made_by(old, url), made_by(new, url))
            assert set(reply["output_ids"][:start]) == {110}
            assert set(reply["output_ids"][start:]) == {111}
            assert reply["meta_info"]["finish_reason"] is None


def test_pause_aborts_what_runs_and_resumes(servers, policy):
    with Publisher(servers[0].url, mode="pause", **KEYS) as publisher, ThreadPoolExecutor(4) as pool:
        publisher.publish(*policy.saying(120))
        running = streaming(pool, policy, 3)
        version = publisher.publish(*policy.saying(121))
        for reply in (future.result(10) for future in running):
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
            assert set(reply["output_ids"]) == {120}
        assert set(policy.ask()["output_ids"]) == {121}
        assert version.warnings == []
        assert {"pause", "drain", "commit", "flush", "resume"} <= set(version.servers[servers[0].url].phases)


def test_two_servers_change_over_together_or_not_at_all(servers, policy):
    urls = [server.url for server in servers]
    with Publisher(urls, **KEYS) as publisher:
        version = publisher.publish(*policy.saying(130))
        reports = [version.servers[url] for url in urls]
        assert len({report.digest for report in reports}) == 1
        assert [report.transport for report in reports] == ["shm", "bytes"], "the second may not read shared memory"
        until(policy.quiet)
        serving = [adapter["digest"] for adapter in policy.listing()]
        # The second server has no room for this rank, the first would take it.
        large = adapters.random_adapter(policy.shape, 4, seed=1)
        with pytest.raises(PublishError, match="--max-lora-rank 1") as caught:
            publisher.publish(large, adapters.adapter_config(large))
        assert (caught.value.phase, set(caught.value.failures)) == ("stage", {urls[1]})
        until(lambda: [adapter["digest"] for adapter in policy.listing()] == serving)
        assert set(policy.ask()["output_ids"]) == {130}
        again = publisher.publish(*policy.saying(130))
        assert [again.servers[url].version_id for url in urls] == [report.version_id for report in reports]


@pytest.mark.parametrize(("mode", "transport"), [("live", "shm"), ("pause", "bytes")])
def test_the_calls_for_stock_servers_are_upstreams(servers, policy, monkeypatch, mode, transport):
    """Whoever knows no more than names and paths, or pickled tensors, is served as well."""
    probe = Server.probe

    def sees_a_stock_server(server: Server, deadline: Deadline) -> set[str]:
        names = probe(server, deadline)
        server.kind = "stock"
        return names

    monkeypatch.setattr(Server, "probe", sees_a_stock_server)
    with Publisher(servers[0].url, mode=mode, transport=transport, keep_last=1, **KEYS) as publisher:
        for token in range(160, 163):
            version = publisher.publish(*policy.saying(token))
            assert set(policy.ask(name=version.name)["output_ids"]) == {token}
            assert version.warnings == []
        assert version.name == "lora_v3"
        assert version.servers[servers[0].url].transport == transport


@pytest.mark.parametrize("keys", [{}, {"api_key": "asks"}, {"api_key": "wrong", "admin_api_key": "wrong"}])
def test_the_keys_of_a_server(servers, policy, keys):
    with Publisher(servers[0].url, **KEYS) as publisher:
        publisher.publish(*policy.saying(140))
    for transport in TRANSPORTS:
        publisher = Publisher(servers[0].url, transport=transport, **keys)
        with pytest.raises(PublishError, match="admin_api_key"):
            publisher.publish(*policy.saying(141))
    assert set(policy.ask()["output_ids"]) == {140}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "before its JSON"),
        ((1000).to_bytes(8, "little") + b"{}", "before its JSON"),
        ((1 << 40).to_bytes(8, "little"), "at most"),
        ((2).to_bytes(8, "little") + b"{]", "not valid"),
        ((2).to_bytes(8, "little") + b"{}", "lora_name"),
        ((17).to_bytes(8, "little") + b'{"lora_name":"x"}', "safetensors"),
    ],
)
def test_a_body_that_is_none_is_refused(servers, policy, content, match):
    with Publisher(servers[0].url, **KEYS) as publisher:
        publisher.publish(*policy.saying(150))
    headers = {"Authorization": f"Bearer {KEYS['admin_api_key']}", "Content-Type": "application/octet-stream"}
    reply = policy.http.post("/stage_lora_adapter", content=content, headers=headers)
    assert reply.status_code == 400
    assert match in reply.text
