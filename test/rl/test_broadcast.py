"""The transport broadcast: real servers, gloo, adapters that say a token of their own.

Server `b` takes small ranks alone. Whatever goes wrong, both go on serving what they served, and say so in time.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import httpx
import psutil
import pytest
from compat.lora_client import PROMPT
from server_process import ServerProcess, together
from tiny_model import make_tiny_model

from sglang.rl.publisher import Publisher, PublishError
from sglang.rl.publisher_server import Refused, Server

pytestmark = pytest.mark.slow

Servers = tuple[ServerProcess, ServerProcess]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny"), context_length=4096, weight_scale=3.0))


@pytest.fixture(scope="module")
def servers(model: str) -> Iterator[Servers]:
    flags = ["--model-path", model, "--enable-lora", "--max-total-tokens", "8192"]
    with together(ServerProcess(*flags), ServerProcess(*flags, "--max-lora-rank", "1")) as pair:
        yield pair


@pytest.fixture
def publisher(servers: Servers) -> Iterator[Publisher]:
    with Publisher([server.url for server in servers], transport="broadcast", timeout=20) as publisher:
        yield publisher


def saying(model: str, token: int) -> tuple[Any, Any]:
    tensors = adapters.telling_adapter(adapters.read_shape(Path(model)), token)
    return tensors, adapters.adapter_config(tensors)


def large(model: str) -> tuple[Any, Any]:
    tensors = adapters.random_adapter(adapters.read_shape(Path(model)), 4, seed=1)
    return tensors, adapters.adapter_config(tensors)


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=30)


def ask(server: ServerProcess) -> dict[str, Any]:
    params = {"max_new_tokens": 4, "ignore_eos": True, "temperature": 0.0}
    reply = post(server, "/generate", input_ids=PROMPT, sampling_params=params, lora_path="policy", return_logprob=True)
    return reply.raise_for_status().json()


def says(server: ServerProcess, token: int) -> bool:
    return set(ask(server)["output_ids"]) == {token}


def joined(version: Any) -> bool:
    """Whether a group was made for it."""
    return any("join" in report.phases for report in version.servers.values())


def test_the_same_arrives_as_by_shared_memory(servers, publisher, model):
    urls = [server.url for server in servers]
    tensors, config = saying(model, 100)
    by_broadcast = publisher.publish(tensors, config)
    broadcast = [ask(server) for server in servers]
    assert [by_broadcast.servers[url].transport for url in urls] == ["broadcast"] * 2
    assert joined(by_broadcast)
    assert not joined(publisher.publish(*saying(model, 101))), "the group stays"
    assert all(says(server, 101) for server in servers)
    with Publisher(urls, transport="shm") as other:
        by_shm = other.publish(tensors, config)
    assert by_shm.digest == by_broadcast.digest
    assert {by_shm.servers[url].digest for url in urls} == {by_broadcast.servers[url].digest for url in urls}
    for server, reply in zip(servers, broadcast, strict=True):
        same = ask(server)
        assert same["output_ids"] == reply["output_ids"] == [100] * 4
        assert same["meta_info"]["output_token_logprobs"] == reply["meta_info"]["output_token_logprobs"]
    again = publisher.publish(tensors, config)
    assert [again.servers[url].version_id for url in urls] == [by_shm.servers[url].version_id for url in urls]


def test_torch_tensors_and_a_server_less(servers, publisher, model):
    import torch

    tensors, config = saying(model, 102)
    publisher.publish({name: torch.from_numpy(value) for name, value in tensors.items()}, config)
    publisher.remove_server(servers[1].url)
    version = publisher.publish(*saying(model, 103))
    assert joined(version)
    assert says(servers[0], 103) and says(servers[1], 102)


def test_a_server_that_does_not_take_what_came_keeps_all_from_it(servers, publisher, model):
    publisher.publish(*saying(model, 110))
    with pytest.raises(PublishError, match="--max-lora-rank 1") as caught:
        publisher.publish(*large(model))
    assert (caught.value.phase, set(caught.value.failures)) == ("stage", {servers[1].url})
    assert all(says(server, 110) for server in servers)
    assert not joined(publisher.publish(*saying(model, 111))), "the group is as good as before"


def let_refuse(monkeypatch: pytest.MonkeyPatch, url: str, call: str, refusal: Refused) -> None:
    """One server answers a call with a refusal, the others as ever."""
    real = getattr(Server, call)

    def refuses(server: Server, *args: Any) -> Any:
        if server.url == url:
            raise refusal
        return real(server, *args)

    monkeypatch.setattr(Server, call, refuses)


def test_a_server_that_refuses_to_take_part_costs_the_others_no_time(servers, publisher, model, monkeypatch):
    publisher.publish(*saying(model, 112))
    let_refuse(monkeypatch, servers[1].url, "stage_broadcast", Refused(400, "capacity", "all are pinned"))
    started = time.monotonic()
    with pytest.raises(PublishError, match="all are pinned") as caught:
        publisher.publish(*saying(model, 113))
    assert time.monotonic() - started < 5, "of 20"
    assert set(caught.value.failures) == {servers[1].url}, "it alone is to blame"
    monkeypatch.undo()
    assert all(says(server, 112) for server in servers)
    assert not joined(publisher.publish(*saying(model, 113)))
    assert all(says(server, 113) for server in servers)


def test_a_server_that_does_not_join_costs_the_others_no_time(servers, publisher, model, monkeypatch):
    let_refuse(monkeypatch, servers[1].url, "join_group", Refused(400, "invalid_group", "this server runs on cpu"))
    started = time.monotonic()
    with pytest.raises(PublishError, match="runs on cpu") as caught:
        publisher.publish(*saying(model, 114))
    assert time.monotonic() - started < 5, "of 20"
    assert set(caught.value.failures) == {servers[1].url}
    monkeypatch.undo()
    publisher.publish(*saying(model, 114))
    assert all(says(server, 114) for server in servers)


def test_a_broadcast_that_never_comes(servers, publisher, model):
    publisher.publish(*saying(model, 120))
    body = {"lora_name": "policy", "group_name": "publish-policy", "broadcast": "none", "nbytes": 1000}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, servers[0], "/stage_lora_adapter", **body, config_dict={}, timeout=1.0)
        asked = 0
        while not waiting.done():
            assert says(servers[0], 120)
            asked += 1
    reply = waiting.result().json()
    assert asked > 3, "requests are served meanwhile"
    assert waiting.result().status_code == 409
    assert reply["error_code"] == "broadcast_failed"
    assert "broadcast 'none' did not come within 1.0 s" in reply["error_message"]
    assert not joined(publisher.publish(*saying(model, 121)))


def test_what_is_no_group_is_refused(servers, publisher, model):
    place = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    for field, value, match in [
        ("group_name", "a b", "group_name 'a b' must be 1 to 256 letters"),
        ("group_name", "", "group_name '' must be"),
        ("backend", "mpi", "backend 'mpi' must be nccl"),
        ("backend", "nccl", "this server runs on cpu: its backend must be gloo"),
        ("master_address", "", "master_address is empty; give"),
        ("master_port", 0, "master_port 0 must be the port"),
        ("rank_offset", 0, "rank 0 is the trainer"),
        ("rank_offset", 2, "rank_offset 2 must be 1 to world_size - 1"),
        ("world_size", "many", "world_size"),
    ]:
        reply = post(servers[0], "/init_weights_update_group", **{**place, field: value})
        assert reply.status_code == 400, field
        assert match in reply.json()["message"]
    reply = post(servers[0], "/init_weights_update_group", **place, timeout=0.3)
    assert (reply.status_code, reply.json()["error_code"]) == (400, "no_group"), "nobody listens there"
    stage = {"lora_name": "policy", "config_dict": {}, "broadcast": "x", "nbytes": 10}
    for fields, match in [
        ({"group_name": "unheard-of"}, "there is no group 'unheard-of' on this server; make it with /init_weights"),
        ({"group_name": "weight_update_group"}, "make it with /init_weights_update_group"),
        ({"group_name": "g", "nbytes": 1 << 40}, "must be the size of the image, at most"),
        ({"group_name": "g", "nbytes": None}, "nbytes None"),
        ({"group_name": "g", "broadcast": None}, "broadcast None must be a name"),
        ({"group_name": "g", "lora_path": "/x"}, "exactly one of"),
        ({}, "exactly one of"),
    ]:
        reply = post(servers[0], "/stage_lora_adapter", **{**stage, **fields})
        assert reply.status_code == 400
        assert match in reply.json()["error_message"]
    reply = post(servers[0], "/destroy_weights_update_group", group_name="unheard-of")
    assert (reply.status_code, reply.json()["success"]) == (400, False)
    publisher.publish(*saying(model, 125))
    reply = post(servers[0], "/destroy_weights_update_group", group_name="publish-policy")
    assert reply.json() == {"success": True, "message": "left group publish-policy"}
    assert joined(publisher.publish(*saying(model, 126))), "a server that has lost its group gets a new one"


def test_a_trainer_that_starts_again(servers, model):
    urls = [server.url for server in servers]
    first = Publisher(urls, transport="broadcast", timeout=20)
    first.publish(*saying(model, 130))  # and dies: nobody closes it
    with Publisher(urls, transport="broadcast", timeout=20) as second:
        second.publish(*saying(model, 131))
        assert all(says(server, 131) for server in servers)
    first.close()


def test_servers_that_hang_die_and_start_again(servers, publisher, model):
    a, b = servers
    publisher.publish(*saying(model, 140))
    assert b.process is not None
    back = psutil.Process(b.process.pid).children(recursive=True)[-1]
    hasty = Publisher([a.url, b.url], "another", transport="broadcast", timeout=2)
    hasty.publish(*saying(model, 141))
    assert says(a, 140), "two groups, two policies"
    # It takes calls and does nothing; the other one is not kept longer than the call may take.
    back.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(PublishError) as caught:
        hasty.publish(*saying(model, 142))
    assert time.monotonic() - started < 8
    assert set(caught.value.failures) == {b.url}
    assert says(a, 140)
    # It dies in the middle: when the publication has begun.
    threading.Timer(0.5, lambda: [back.kill(), b.process and b.process.kill()]).start()
    started = time.monotonic()
    with pytest.raises(PublishError) as caught:
        publisher.publish(*saying(model, 143))
    assert time.monotonic() - started < 10, "of 20"
    assert set(caught.value.failures) == {b.url}
    assert says(a, 140)
    b.process.wait()
    b.__enter__()
    version = publisher.publish(*saying(model, 144))
    assert joined(version)
    assert says(a, 144) and says(b, 144)
    hasty.publish(*saying(model, 145))
    hasty.close()
