"""The publisher against servers that fail in every way: nothing half-published goes unsaid, and nothing hangs."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from rl.fake_servers import BUSY, CUT, HANG, LOSE, Call, FakeServer
from safetensors.numpy import load
from unit.lora.slab_images import servers_layout, slab_config, slab_tensors

from sglang.rl.publisher import Publisher, PublishError, Version

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
STAGE, COMMIT, LIST = "/stage_lora_adapter", "/commit_lora_adapter", "/lora_adapters"


def adapter(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight": rng.standard_normal(s, dtype=np.float32)
        for f, s in (("A", (2, 8)), ("B", (8, 2)))
    }


@contextlib.contextmanager
def fleet(*servers: FakeServer, **options: Any) -> Iterator[Publisher]:
    """A publisher to these, all started; afterwards nothing may be left in shared memory."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        shared = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        fields: dict[str, Any] = {"timeout": 5.0, "grace": 0.1, "dtype": "float32", "directory": shared} | options
        yield stack.enter_context(Publisher([server.url for server in servers], **fields))
        assert not os.listdir(shared)


def versions(*servers: FakeServer, name: str = "policy") -> list[int | None]:
    return [server.serving[name][0] if name in server.serving else None for server in servers]


def refuses(publisher: Publisher, *args: Any, **fields: Any) -> PublishError:
    with pytest.raises(PublishError) as caught:
        publisher.publish(*args, **fields)
    return caught.value


# ---- what is published ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "bytes"])
def test_every_server_gets_the_same_bytes(transport):
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, transport=transport) as publisher:
        version = publisher.publish(adapter(), CONFIG)
        assert version.name == "policy"
        assert version.number == 1
        assert a.taken == b.taken
        config, image = a.taken[0]
        assert config == CONFIG
        assert {name: value.tolist() for name, value in load(image).items()} == {
            name: value.tolist() for name, value in adapter().items()
        }
        assert version.nbytes == len(image)
        for url, server in ((a.url, a), (b.url, b)):
            report = version.servers[url]
            assert (report.kind, report.transport) == ("versioned", transport)
            assert (report.version_id, report.digest) == server.serving["policy"]
            assert set(report.phases) == {"probe", "stage", "commit"}
            assert 0 < report.latency_s <= version.latency_s
        assert publisher.current is version
        assert version.warnings == []


def test_successive_versions_and_followers():
    a = FakeServer()
    with fleet(a) as publisher:
        seen: list[Version] = []
        publisher.follow(seen.append)
        published = [publisher.publish(adapter(seed), CONFIG) for seed in range(3)]
        assert [v.number for v in published] == [1, 2, 3]
        assert len({v.digest for v in published}) == 3
        assert seen == published
        assert versions(a) == [3]
        assert a.modes == ["finish_old"] * 3


def test_publishing_the_same_again_changes_nothing():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b) as publisher:
        first, second = publisher.publish(adapter(), CONFIG), publisher.publish(adapter(), CONFIG)
        assert first.digest == second.digest
        assert first.servers[a.url].version_id == second.servers[a.url].version_id == 1
        assert versions(a, b) == [1, 1]


# ---- slabs ---------------------------------------------------------------------------------------------------------


def taking(max_rank: int = 16, dtype: str = "float32", **fields: Any) -> FakeServer:
    """A server that takes slabs of the model of `slab_tensors`."""
    return FakeServer(slab_layout=servers_layout(max_rank, dtype).describe(), **fields)


@pytest.mark.parametrize("transport", ["shm", "bytes"])
def test_servers_of_one_layout_get_a_slab_whatever_their_largest_rank(transport):
    a, b = taking(16), taking(256)
    with fleet(a, b, transport=transport) as publisher:
        first, again = (publisher.publish(slab_tensors(), slab_config()) for _ in range(2))
        assert (first.form, again.form, first.digest) == ("slab", "slab", again.digest)
        assert versions(a, b) == [1, 1]
        assert {name for _, image in (*a.taken, *b.taken) for name in load(image)} == {"lora_slab"}
        assert len({image for _, image in (*a.taken, *b.taken)}) == 1
        large = publisher.publish(slab_tensors(rank=32), slab_config(r=32))
        assert large.form == "tensors", "one of them says what is wrong with it"


@pytest.mark.parametrize(
    "other",
    [
        FakeServer(),
        FakeServer(stock=True),
        FakeServer(slab_layout={"max_rank": 16}),
        FakeServer(slab_layout=[1]),  # type: ignore[arg-type]
        taking(dtype="bfloat16"),
    ],
    ids=["silent", "stock", "strange", "no object", "of another dtype"],
)
def test_a_mixed_fleet_gets_tensors(other):
    a = taking()
    with fleet(a, other, transport="shm") as publisher:
        version = publisher.publish(slab_tensors(), slab_config())
        assert version.form == "tensors"
        assert load(a.taken[0][1]).keys() == slab_tensors().keys()
        publisher.remove_server(other.url)
        assert publisher.publish(slab_tensors(), slab_config()).form == "slab"


def test_a_fleet_that_takes_no_slabs_and_one_of_nobody():
    a, b = FakeServer(slab_layout={}), FakeServer(slab_layout={})
    with fleet(a, b) as publisher:
        assert publisher.publish(slab_tensors(), slab_config()).form == "tensors"
        publisher.remove_server(a.url)
        publisher.remove_server(b.url)
        assert publisher.publish(slab_tensors(), slab_config()).servers == {}


def test_a_server_that_started_again_with_another_layout_is_asked_anew():
    a = taking()
    with fleet(a) as publisher:
        assert publisher.publish(slab_tensors(), slab_config()).form == "slab"
        a.slab_layout = servers_layout(dtype="bfloat16").describe()
        assert publisher.publish(slab_tensors(), slab_config()).form == "tensors"


# ---- where adapters are written ------------------------------------------------------------------------------------


def test_a_server_of_the_same_host_that_sees_no_files_gets_bytes():
    a, b = FakeServer(), FakeServer(reads_files=False)
    with fleet(a, b) as publisher:
        version = publisher.publish(adapter(), CONFIG)
        assert [version.servers[s.url].transport for s in (a, b)] == ["shm", "bytes"]
        publisher.publish(adapter(1), CONFIG)
        assert b.count(STAGE) == 3, "it is not tried again"


def test_a_server_that_must_read_files_and_cannot_is_an_error():
    a = FakeServer(reads_files=False)
    with fleet(a, transport="shm") as publisher:
        assert "no directory" in str(refuses(publisher, adapter(), CONFIG))


def test_a_directory_that_all_hosts_see(tmp_path):
    a = FakeServer()
    with fleet(a, directory=str(tmp_path)) as publisher:
        assert publisher.publish(adapter(), CONFIG).servers[a.url].transport == "path"
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_a_directory_that_cannot_be_written(tmp_path, transport):
    a = FakeServer()
    with fleet(a, directory=str(tmp_path / "none"), transport=transport) as publisher:
        if transport == "auto":
            assert publisher.publish(adapter(), CONFIG).servers[a.url].transport == "bytes"
        else:
            assert refuses(publisher, adapter(), CONFIG).phase == "writing"


def test_the_mode_is_told_to_servers():
    a = FakeServer()
    with fleet(a, mode="switch") as publisher:
        publisher.publish(adapter(), CONFIG)
        publisher.publish(adapter(1), CONFIG, mode="live")
        assert a.modes == ["switch", "finish_old"]


async def test_from_a_coroutine():
    a = FakeServer()
    with fleet(a) as publisher:
        assert (await publisher.publish_async(adapter(), CONFIG)).number == 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"servers": []}, "no servers"),
        ({"servers": "host:30000"}, "http://host:port"),
        ({"mode": "fast"}, "not one of live, switch, pause"),
        ({"transport": "pigeon"}, "not one of auto"),
        ({"dtype": "int8"}, "not one of bfloat16"),
        ({"timeout": 0}, "must be above 0"),
        ({"keep_last": 0}, "keep_last 0"),
        ({"versioned_name": "v"}, "must have {n}"),
    ],
)
def test_arguments_that_make_no_sense(fields, match):
    with pytest.raises(ValueError, match=match):
        Publisher(**({"servers": "http://127.0.0.1:1"} | fields))


def test_a_closed_publisher_publishes_nothing():
    publisher = Publisher("http://127.0.0.1:1")
    publisher.close()
    with pytest.raises(RuntimeError, match="closed"):
        publisher.publish(adapter(), CONFIG)


# ---- two phases ----------------------------------------------------------------------------------------------------


def test_one_of_three_down_at_stage_commits_nothing_anywhere():
    a, b, c = FakeServer(), FakeServer(), FakeServer()
    with fleet(a, b, c) as publisher:
        publisher.publish(adapter(), CONFIG)
        c.on[STAGE] = [CUT] * 9
        error = refuses(publisher, adapter(1), CONFIG)
        assert error.phase == "stage"
        assert set(error.failures) == {c.url}
        assert "Nothing was committed" in str(error)
        assert error.version is None
        assert versions(a, b, c) == [1, 1, 1]
        assert not a.staged and not b.staged, "what was staged elsewhere is dropped"
        assert publisher.current.number == 1
        c.on.clear()
        publisher.publish(adapter(1), CONFIG)
        assert versions(a, b, c) == [3, 3, 2]


def test_a_server_that_is_gone_is_found_before_anything_is_sent():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b) as publisher:
        b.stop()
        error = refuses(publisher, adapter(), CONFIG)
        assert (error.phase, set(error.failures)) == ("probe", {b.url})
        assert a.count(STAGE) == 0
        publisher.remove_server(b.url)
        publisher.publish(adapter(), CONFIG)
        b.start()
        publisher.add_server(b.url)
        again = publisher.publish(adapter(), CONFIG)
        assert set(again.servers) == {a.url, b.url}
        assert versions(a, b) == [1, 1]


@pytest.mark.parametrize("trouble", [CUT, LOSE, BUSY])
@pytest.mark.parametrize("path", [STAGE, COMMIT, LIST])
def test_what_passes_is_tried_again(path, trouble):
    a, b = FakeServer(), FakeServer()
    with fleet(a, b) as publisher:
        b.on[path] = [trouble, trouble]
        version = publisher.publish(adapter(), CONFIG)
        assert versions(a, b) == [1, 1]
        assert version.servers[b.url].version_id == 1
        assert b.count(path) >= 3


def test_a_server_that_is_still_starting_is_waited_for():
    a = FakeServer()
    with fleet(a) as publisher:
        a.on[LIST] = [BUSY] * 4
        publisher.publish(adapter(), CONFIG)
        assert a.count(LIST) == 5


def test_down_at_commit_says_who_serves_what_and_the_next_publication_repairs_it():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, timeout=0.5) as publisher:
        publisher.publish(adapter(), CONFIG)
        b.on[COMMIT], b.always = [CUT], True
        error = refuses(publisher, adapter(1), CONFIG)
        assert (error.phase, set(error.failures)) == ("commit", {b.url})
        assert b.count(COMMIT) > 4, "others have committed: it is tried for as long as there is time"
        assert error.serving == {a.url: "version 2, this one", b.url: "version 1, not this one"}
        assert "Publish again" in str(error)
        assert error.version is not None
        assert set(error.version.servers) == {a.url}
        assert publisher.current.number == 1
        b.on.clear()
        version = publisher.publish(adapter(1), CONFIG)
        assert versions(a, b) == [2, 2]
        assert version.servers[a.url].digest == version.servers[b.url].digest


def test_a_commit_whose_replies_were_all_lost_is_a_success():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, timeout=0.4) as publisher:
        b.on[COMMIT], b.always = [LOSE], True
        version = publisher.publish(adapter(), CONFIG)
        assert set(version.servers) == {a.url, b.url}
        assert versions(a, b) == [1, 1]


def test_a_commit_that_fails_everywhere_changes_nothing():
    a, b = FakeServer(), FakeServer()

    def refuse(call: Call) -> tuple[int, Any]:
        return 400, {"error_code": "capacity", "error_message": "all are pinned"}

    with fleet(a, b) as publisher:
        a.on[COMMIT], b.on[COMMIT] = [refuse], [refuse]
        error = refuses(publisher, adapter(), CONFIG)
        assert error.version is None
        assert error.serving == dict.fromkeys((a.url, b.url), "nothing by this name")
        assert not a.staged and not b.staged


def test_a_server_that_started_again_between_the_phases_catches_up():
    a, b = FakeServer(), FakeServer()

    def forget(call: Call) -> tuple[int, Any]:
        b.staged.clear()
        return b.commit_lora_adapter(call)

    with fleet(a, b) as publisher:
        b.on[COMMIT] = [forget]
        publisher.publish(adapter(), CONFIG)
        assert a.serving["policy"][1] == b.serving["policy"][1]
        assert b.count(STAGE) == 2


def test_servers_that_read_different_content_are_told_apart():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b) as publisher:
        b.on[STAGE] = [lambda call: (200, {"lora_version": 1, "digest": "other"})]
        error = refuses(publisher, adapter(), CONFIG)
        assert "content other" in error.failures[b.url]
        assert versions(a, b) == [None, None]


def test_an_invalid_adapter_is_not_tried_again():
    a = FakeServer()
    with fleet(a) as publisher:
        a.on[STAGE] = [lambda call: (400, {"error_code": "invalid_adapter", "error_message": "q_proj is [3, 8]"})]
        error = refuses(publisher, adapter(), CONFIG)
        assert "q_proj is [3, 8]" in str(error)
        assert a.count(STAGE) == 1


# ---- nothing hangs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LIST, STAGE])
def test_a_server_that_never_answers(path):
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, timeout=0.5) as publisher:
        b.on[path] = [HANG]
        started = time.monotonic()
        error = refuses(publisher, adapter(), CONFIG)
        assert time.monotonic() - started < 4
        assert error.failures == {b.url: "no answer within 0.5 s"}
        assert versions(a) == [None]


def test_a_server_that_never_answers_a_commit():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, timeout=0.5) as publisher:
        b.on[COMMIT] = [HANG]
        error = refuses(publisher, adapter(), CONFIG)
        assert error.failures == {b.url: "no answer within 0.5 s"}
        assert error.serving[b.url] == "nothing by this name"
        assert set(error.version.servers) == {a.url}


def test_a_server_that_trickles():
    """Every byte comes in time, the reply never ends."""
    ended = threading.Event()

    def serve(listener) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Header: ")
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)
        ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        publisher = Publisher(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.4)
        error = refuses(publisher, adapter(), CONFIG)
        assert error.phase == "probe"
        assert ended.wait(5), "its connection is closed"


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_an_error_that_says_so():
    a = FakeServer(key="right")
    with fleet(a, api_key="wrong") as publisher:
        error = refuses(publisher, adapter(), CONFIG)
        assert error.phase == "probe"
        assert "Unauthorized" in str(error) and "admin_api_key" in str(error)
        assert a.count(LIST) == 1
    with fleet(FakeServer(key="right"), api_key="right") as publisher:
        publisher.publish(adapter(), CONFIG)


def test_calls_that_a_server_does_not_count_as_administration():
    """Stock servers want the api key for tensors in a request, and the admin key for the rest."""
    a = FakeServer(stock=True, key="admin", open_to={"/load_lora_adapter_from_tensors": "api", LIST: "api"})
    a.open_to["/v1/models"] = "api"
    with fleet(a, transport="bytes", api_key="api", admin_api_key="admin", keep_last=1) as publisher:
        for seed in range(2):
            publisher.publish(adapter(seed), CONFIG)
        assert list(a.serving) == ["lora_v2"]


# ---- pause ---------------------------------------------------------------------------------------------------------


def test_pause_drains_commits_flushes_and_resumes():
    a = FakeServer(running=3)
    with fleet(a, mode="pause") as publisher:
        version = publisher.publish(adapter(), CONFIG)
        calls = [path for path in a.calls if path != "/get_load"]
        assert calls == [
            LIST, STAGE, "/pause_generation", "/abort_request", COMMIT, "/flush_cache", "/continue_generation",
        ]  # fmt: skip
        assert not a.paused
        assert version.warnings == []


def test_a_server_that_does_not_drain_or_flush_is_a_warning():
    a = FakeServer(running=3)
    with fleet(a, mode="pause") as publisher:
        a.on["/abort_request"] = [lambda call: (200, "")]
        version = publisher.publish(adapter(), CONFIG)
        assert len(version.warnings) == 2
        assert "still ran" in version.warnings[0]
        assert "Flush cache failed" in version.warnings[1]
        assert not a.paused


@pytest.mark.parametrize("phase", ["pause", "drain", "commit"])
def test_whatever_fails_the_others_are_resumed(phase):
    path = {"pause": "/pause_generation", "drain": "/get_load", "commit": COMMIT}[phase]
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, mode="pause", timeout=0.6, grace=0.05) as publisher:
        b.on[path], b.always = [CUT], True
        assert refuses(publisher, adapter(), CONFIG).phase == phase
        assert not a.paused and not b.paused
        assert a.count("/continue_generation") == b.count("/continue_generation") == 1


def test_a_server_that_cannot_be_resumed_is_named():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, mode="pause", timeout=0.4) as publisher:
        b.on["/continue_generation"] = [CUT] * 99
        error = refuses(publisher, adapter(), CONFIG)
        assert (error.phase, set(error.failures)) == ("resume", {b.url})
        assert versions(a, b) == [1, 1]
        assert set(error.version.servers) == {a.url, b.url}


def test_a_failure_and_then_no_resume_is_in_one_message():
    a, b = FakeServer(), FakeServer()
    with fleet(a, b, mode="pause", timeout=0.4) as publisher:
        b.on["/pause_generation"] = b.on["/continue_generation"] = [CUT]
        b.always = True
        error = refuses(publisher, adapter(), CONFIG)
        assert error.phase == "pause"
        assert f"{b.url} could not be resumed" in str(error)
        assert not a.paused


# ---- stock servers -------------------------------------------------------------------------------------------------


def test_a_stock_server_gets_a_name_per_version():
    a = FakeServer(stock=True, serving={"lora_v6": (0, ""), "lora_v2": (0, ""), "lora_vx": (0, "")})
    with fleet(a) as publisher:
        version = publisher.publish(adapter(), CONFIG)
        assert (version.name, version.number) == ("lora_v7", 7), "names that are taken hold older bytes"
        report = version.servers[a.url]
        assert (report.kind, report.version_id, report.digest) == ("stock", None, None)
        for seed in range(3):
            publisher.publish(adapter(seed), CONFIG)
        assert sorted(a.serving) == ["lora_v10", "lora_v2", "lora_v6", "lora_v9", "lora_vx"], "only our own go"
        assert publisher.current.name == "lora_v10"


@pytest.mark.parametrize("keep_last", [1, 2, 4, 9])
def test_the_last_names_stay_loaded(keep_last):
    a = FakeServer(stock=True)
    with fleet(a, keep_last=keep_last) as publisher:
        for seed in range(5):
            publisher.publish(adapter(seed), CONFIG)
            assert len(a.serving) == min(seed + 1, keep_last)
        assert sorted(a.serving) == [f"lora_v{n}" for n in range(max(1, 6 - keep_last), 6)]


def test_a_mixed_fleet_has_one_name():
    a, b = FakeServer(), FakeServer(stock=True)
    with fleet(a, b, versioned_name="judge-{n}") as publisher:
        for seed in range(4):
            version = publisher.publish(adapter(seed), CONFIG)
        assert version.name == "judge-4"
        assert sorted(a.serving) == sorted(b.serving) == ["judge-3", "judge-4"]
        error = refuses(publisher, adapter(), CONFIG, mode="switch")
        assert set(error.failures) == {b.url}


def test_a_load_whose_reply_was_lost_is_no_error_on_a_stock_server():
    a = FakeServer(stock=True)
    with fleet(a) as publisher:
        a.on["/load_lora_adapter"] = [LOSE]
        assert publisher.publish(adapter(), CONFIG).name == "lora_v1"
        assert a.count("/load_lora_adapter") == 2


def test_a_stock_server_takes_no_broadcast():
    a, b = FakeServer(), FakeServer(stock=True)
    with fleet(a, b, transport="broadcast") as publisher:
        error = refuses(publisher, adapter(), CONFIG)
        assert (set(error.failures), a.count(STAGE)) == ({b.url}, 0)


def test_a_name_that_somebody_else_has_taken_is_an_error():
    a = FakeServer(stock=True)
    with fleet(a) as publisher:
        a.on["/v1/models"] = [lambda call: (404, {})]
        a.serving["lora_v1"] = (0, "")
        assert "already loaded" in str(refuses(publisher, adapter(), CONFIG))
        a.serving.clear()
        assert publisher.publish(adapter(), CONFIG).name == "lora_v2"


def test_one_stock_server_down_takes_the_name_from_the_others():
    a, b = FakeServer(stock=True), FakeServer(stock=True)
    with fleet(a, b) as publisher:
        b.on["/load_lora_adapter"] = [CUT] * 3
        assert refuses(publisher, adapter(), CONFIG).phase == "stage"
        assert a.serving == {}


def test_a_leaked_count_of_a_stock_server_hangs_nobody():
    a = FakeServer(stock=True, users={"lora_v1": 1})
    with fleet(a, keep_last=1, timeout=0.5) as publisher:
        publisher.publish(adapter(), CONFIG)
        started = time.monotonic()
        version = publisher.publish(adapter(1), CONFIG)
        assert time.monotonic() - started < 4
        assert (version.name, len(version.warnings)) == ("lora_v2", 1)
        assert "lora_v1 has not returned" in version.warnings[0]
        # Its one lock is held: every later load waits as well, and the error says why.
        error = refuses(publisher, adapter(2), CONFIG)
        assert (error.phase, "lora_v1 has not returned" in error.failures[a.url]) == ("stage", True)
        a.users.clear()
        version = publisher.publish(adapter(2), CONFIG)
        assert version.name == "lora_v4"
        assert publisher.publish(adapter(3), CONFIG).warnings == []
        assert len(a.serving) <= 3


def test_pause_loads_within_the_pause_on_a_stock_server():
    a = FakeServer(stock=True, running=1)
    with fleet(a, mode="pause") as publisher:
        publisher.publish(adapter(), CONFIG)
        calls = [path for path in a.calls if path not in ("/get_load", "/v1/models", LIST)]
        assert calls == [
            "/pause_generation", "/abort_request", "/load_lora_adapter", "/flush_cache", "/continue_generation",
        ]  # fmt: skip


def test_a_stock_server_elsewhere_gets_pickled_tensors():
    a = FakeServer(stock=True)
    with fleet(a, transport="bytes") as publisher:
        version = publisher.publish(adapter(), CONFIG)
        assert version.servers[a.url].transport == "bytes"
        assert a.count("/load_lora_adapter_from_tensors") == 1


def test_nothing_that_is_not_finite_reaches_a_stock_server():
    tensors = adapter()
    name = next(iter(tensors))
    tensors[name][0, 0] = np.nan
    with fleet(FakeServer(stock=True)) as publisher, pytest.raises(ValueError, match="lora_A.weight has NaN"):
        publisher.publish(tensors, CONFIG)
