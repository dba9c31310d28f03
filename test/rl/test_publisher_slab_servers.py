"""Slabs and real servers: what arrives by any transport computes, bit for bit, what the tensors do.

Server `b` has room for small ranks alone, so its slabs are laid out otherwise than those of `a`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import httpx
import numpy as np
import psutil
import pytest
from compat.lora_client import PROMPT, value_of
from compat.waiting import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_process import ServerProcess, together
from tiny_model import make_tiny_model

from sglang.rl.publisher import Publisher, PublishError, Version
from sglang.rl.publisher_package import Package
from sglang.rl.publisher_server import Server
from sglang.rl.transport import Deadline

pytestmark = pytest.mark.slow

Servers = tuple[ServerProcess, ServerProcess]
Adapter = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), context_length=4096, weight_scale=3.0)


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[Servers]:
    flags = ["--model-path", str(model), "--enable-lora", "--max-total-tokens", "8192", "--enable-metrics"]
    with together(ServerProcess(*flags), ServerProcess(*flags, "--max-lora-rank", "16")) as pair:
        yield pair


@pytest.fixture(autouse=True)
def nothing_stays(servers: Servers) -> Iterator[None]:
    yield
    for server in servers:
        for adapter in listing(server)["adapters"]:
            post(server, "/unload_lora_adapter", lora_name=adapter["lora_name"])
        until(lambda server=server: not listing(server)["adapters"])
        metrics = httpx.get(f"{server.url}/metrics").text
        for name in ("lora_leases", "lora_double_releases_total", "lora_free_failures_total"):
            assert value_of(metrics, name) == 0, name
        assert value_of(metrics, "invariant_violations_total") == 0


@pytest.fixture
def without_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are seen to take none."""
    probe = Server.probe

    def sees_none(server: Server, deadline: Deadline) -> set[str]:
        names = probe(server, deadline)
        server.slab_layout = None
        return names

    monkeypatch.setattr(Server, "probe", sees_none)


def random_adapter(model: Path, rank: int = 8, seed: int = 0, **options: Any) -> Adapter:
    tensors = adapters.random_adapter(adapters.read_shape(model), rank, seed)
    return tensors, adapters.adapter_config(tensors, lora_alpha=2 * rank + 0.3, **options)


def publish(servers: Servers, adapter: Adapter, transport: str = "bytes", **fields: Any) -> Version:
    fields = {"timeout": 20, "dtype": "float32"} | fields
    with Publisher([server.url for server in servers], transport=transport, **fields) as publisher:  # type: ignore[arg-type]
        return publisher.publish(*adapter)


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=30)


def listing(server: ServerProcess) -> dict[str, Any]:
    return httpx.get(f"{server.url}/lora_adapters").json()


def answers(server: ServerProcess, name: str = "policy") -> list[tuple[float, int]]:
    """(log-probability, token) of every token of a reply."""
    params = {"max_new_tokens": 16, "ignore_eos": True, "temperature": 0.0}
    reply = post(server, "/generate", input_ids=PROMPT, sampling_params=params, lora_path=name, return_logprob=True)
    return [(entry[0], entry[1]) for entry in reply.raise_for_status().json()["meta_info"]["output_token_logprobs"]]


@pytest.fixture(scope="module")
def as_tensors(servers: Servers, model: Path) -> tuple[str, list[list[tuple[float, int]]]]:
    """Digest and answers of the adapter that came as tensors."""
    tensors, config = random_adapter(model)
    image = b"".join(Package(tensors, config, "float32").image())
    digests = set()
    for server in servers:
        body = {"serialized_tensors": base64.b64encode(image).decode(), "config_dict": config}
        reply = post(server, "/load_lora_adapter_from_tensors", lora_name="as-tensors", **body)
        digests.add(reply.raise_for_status().json()["digest"])
    replies = [answers(server, "as-tensors") for server in servers]
    return digests.pop(), replies


@pytest.mark.parametrize("transport", ["shm", "bytes", "broadcast"])
def test_a_slab_computes_what_its_tensors_do(servers, model, as_tensors, transport):
    digest, expected = as_tensors
    version = publish(servers, random_adapter(model), transport)
    reports = version.servers.values()
    assert version.form == "slab"
    assert {report.transport for report in reports} == {transport}
    (found,) = {report.digest for report in reports}
    assert found not in (None, digest)
    assert [answers(server) for server in servers] == expected
    assert answers(servers[0]) != answers(servers[0], None)  # type: ignore[arg-type]


def test_every_transport_gives_one_version(servers, model):
    published = [publish(servers, random_adapter(model), transport) for transport in ("shm", "bytes", "broadcast")]
    published += [publish(servers, random_adapter(model), dtype="float32")]
    for server in servers:
        assert len({version.servers[server.url].version_id for version in published}) == 1
        assert [adapter["num_tensors"] for adapter in listing(server)["adapters"]] == [28]
    assert len({version.digest for version in published}) == 1


def test_what_no_slab_has_goes_as_tensors(servers, model, without_slabs):
    assert publish(servers, random_adapter(model)).form == "tensors"


def test_adapters_of_other_forms_follow_each_other(servers, model):
    shape = adapters.read_shape(model)
    head = adapters.telling_adapter(shape, 100)
    forms = [
        publish(servers, (head, adapters.adapter_config(head))).form,
        publish(servers, random_adapter(model, 16, seed=2)).form,
        publish(servers, random_adapter(model, 4, seed=3)).form,
        publish(servers, random_adapter(model, 8, seed=4, use_rslora=True)).form,
        publish(servers, random_adapter(model, 8, seed=4), dtype="bfloat16").form,
    ]
    assert forms == ["tensors", "slab", "tensors", "slab", "tensors"]
    with pytest.raises(PublishError, match="--max-lora-rank 16"):
        publish(servers, random_adapter(model, 24))


def test_servers_say_their_layout(servers):
    for server, max_rank in zip(servers, (256, 16), strict=True):
        layout = listing(server)["slab_layout"]
        assert layout == httpx.get(f"{server.url}/server_info").json()["slab_layout"]
        assert (layout["max_rank"], layout["dtype"], layout["num_layers"]) == (max_rank, "float32", 2)


def slab_image(server: ServerProcess, adapter: Adapter) -> bytes:
    package = Package(*adapter, "float32", listing(server)["slab_layout"])
    assert package.form == "slab"
    return b"".join(package.image())


def test_upstreams_calls_take_slabs_too(servers, model, as_tensors, tmp_path):
    (server, _), (tensors, config) = servers, random_adapter(model)
    image = slab_image(server, (tensors, config))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(image)
    by_path = post(server, "/load_lora_adapter", lora_name="path", lora_path=str(tmp_path))
    sums = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in tensors.items()}
    body = {"serialized_tensors": base64.b64encode(image).decode(), "config_dict": config, "expected_checksums": sums}
    by_bytes = post(server, "/load_lora_adapter_from_tensors", lora_name="bytes", **body)
    assert by_path.json()["digest"] == by_bytes.json()["digest"]
    assert answers(server, "path") == answers(server, "bytes") == as_tensors[1][0]
    refused = post(server, "/load_lora_adapter_from_tensors", lora_name="x", **{**body, "expected_checksums": {}})
    assert refused.status_code == 400 and "expected_checksums" in refused.text


def stage(server: ServerProcess, image: bytes, config: dict[str, Any]) -> httpx.Response:
    head = json.dumps({"lora_name": "policy", "config_dict": config, "timeout": 60}).encode()
    content = len(head).to_bytes(8, "little") + head + image
    headers = {"Content-Type": "application/octet-stream"}
    return httpx.post(f"{server.url}/stage_lora_adapter", content=content, headers=headers, timeout=30)


def test_corrupted_slabs_are_refused_and_change_nothing(servers, model):
    """Cut, overwritten, with another table, header or config: 400 with a reason, and the server goes on as before."""
    server, adapter = servers[0], random_adapter(model)
    version = publish(servers, adapter).servers[server.url].version_id
    answers(server)  # from now on the prompt is in the cache, which changes the last bits
    before, image = answers(server), slab_image(server, random_adapter(model, seed=1))
    front = psutil.Process(server.process.pid)
    open_files = front.num_fds()
    slab_start = 8 + int.from_bytes(image[:8], "little")

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def stays_up(data: st.DataObject) -> None:
        cut = data.draw(st.booleans())
        spoiled = bytearray(image)
        if cut:
            del spoiled[data.draw(st.integers(0, len(image) - 1)) :]
        else:
            # Of the numbers themselves any that is finite is as good as any other.
            offset = data.draw(st.integers(0, slab_start + 16 + 14 * 8 - 1))
            spoiled[offset] ^= data.draw(st.integers(1, 255))
        reply = stage(server, bytes(spoiled), adapter[1])
        if reply.status_code == 200:  # spaces of the header, and the like
            assert not cut and reply.json()["state"] == "staging"
            post(server, "/drop_lora_adapter", lora_name="policy", lora_version=reply.json()["lora_version"])
        else:
            assert reply.status_code == 400
            assert reply.json()["error_code"] == "invalid_adapter" and reply.json()["error_message"]

    stays_up()
    (serving,) = (a for a in listing(server)["adapters"] if a["state"] == "serving")
    assert serving["lora_version"] == version
    assert answers(server) == before
    until(lambda: front.num_fds() <= open_files + 2)


def test_one_server_that_refuses_a_slab_keeps_all_from_it(servers, model, monkeypatch):
    """It has started again with another model since it was asked."""
    published = publish(servers, random_adapter(model))
    probe = Server.probe

    def is_late(server: Server, deadline: Deadline) -> set[str]:
        names = probe(server, deadline)
        server.slab_layout = {**(server.slab_layout or {}), "num_layers": 1}
        return names

    monkeypatch.setattr(Server, "probe", is_late)
    tensors, config = random_adapter(model, seed=5)
    first = {name: value for name, value in tensors.items() if ".0." in name}
    with pytest.raises(PublishError, match="num_layers is 1, this server's is 2; pack for the slab_layout") as caught:
        publish(servers, (first, config))
    assert caught.value.phase == "stage" and len(caught.value.failures) == 2
    for server in servers:
        (listed,) = listing(server)["adapters"]
        assert listed["lora_version"] == published.servers[server.url].version_id
