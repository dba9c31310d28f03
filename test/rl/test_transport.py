"""HTTP calls that end in time, and directories that are always removed."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time

import pytest

from sglang.rl.transport import Deadline, HttpClient, SharedFiles, TransportError, fan_out, is_local


def test_files_are_there_until_the_end(tmp_path):
    with SharedFiles(str(tmp_path), {"a": [b"one", memoryview(b"two")], "b": []}) as files:
        assert sorted(os.listdir(files.path)) == ["a", "b"]
        with open(os.path.join(files.path, "a"), "rb") as file:
            assert file.read() == b"onetwo"
    files.close()
    assert not os.listdir(tmp_path)


def test_a_failure_to_write_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        SharedFiles(str(tmp_path), {"no/such": [b"x"]})
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    old = time.time() - 3600
    for name in ("sglang-publish-dead", "sglang-publish-live", "sglang-publish-young", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"x")
        if "young" not in name:
            os.utime(tmp_path / name, (old, old))
    held = os.open(tmp_path / "sglang-publish-live", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    SharedFiles(str(tmp_path), {}).close()
    os.close(held)
    assert sorted(os.listdir(tmp_path)) == ["other", "sglang-publish-live", "sglang-publish-young"]


def test_which_hosts_are_this_one():
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert not is_local("192.0.2.1")  # reserved for documentation


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"garbage\r\n\r\n"])
def test_a_reply_that_is_none_is_an_error(said):
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        client = HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(TransportError):
            client.call("GET", "/", deadline=Deadline(5))


def test_bodies_that_are_no_json_are_empty():
    from sglang.rl.transport import Reply

    assert Reply(200, b"Cache flushed.").json() == {}
    assert Reply(200, b"[1]").json() == {"value": [1]}


def test_a_passed_deadline_sends_nothing():
    with pytest.raises(TransportError, match="no answer within 0 s"):
        HttpClient("http://127.0.0.1:1").call("GET", "/", deadline=Deadline(0))


def test_a_fan_out_ends_whatever_its_work_does():
    never, interrupted = threading.Event(), []

    def fail() -> int:
        raise ValueError("mine")

    outcomes = fan_out({"good": lambda: 1, "late": never.wait, "bad": fail}, 0.1, interrupted.append)
    never.set()
    assert outcomes["good"].value == 1
    assert isinstance(outcomes["bad"].error, ValueError)
    assert isinstance(outcomes["late"].error, TransportError)
    assert interrupted == ["late"]
