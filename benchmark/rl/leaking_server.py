"""A server that counts the users of an adapter as stock SGLang 0.5.12 does, and loses count where that one does.

    with LeakingServer(url_of_a_real_server) as server: ...

A proxy: the real server behind it generates; names, counts and waiting are stock's. It has stock's routes alone, so a
publisher takes it for a stock server and loads every policy under a name of its own.

Stock's accounting. A request counts when it arrives and is taken off the count where its output is processed. Not taken
off: a request that was aborted while it waited, one that was refused after it had been counted, one whose client has
gone. `n > 1` is taken off once too often, for the request that warms the cache up. An adapter is unloaded, also to make
room at `max_loaded`, once its count is 0; loads and unloads wait in line behind that, for ever if need be.

Invariant: with `leaks=False` every request is taken off as often as it was counted, and nothing else is different.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

POLL_SECONDS = 0.01
FORWARDED = frozenset(
    ("/health", "/get_load", "/abort_request", "/flush_cache", "/pause_generation", "/continue_generation")
)
Reply = tuple[int, bytes]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what this is about: nothing to report."""


class LeakingServer:
    """See the module.

    Args:
        upstream: URL of the real server.
        max_loaded: names in memory, as ``--max-loaded-loras``.

    Attributes:
        url: where it listens.
        users: name -> its count; that of an unloaded name is 0, or it would not have been unloaded.
    """

    def __init__(self, upstream: str, *, max_loaded: int = 2, leaks: bool = True) -> None:
        self.users: Counter[str] = Counter()
        self._upstream, self._max_loaded, self._leaks = upstream, max_loaded, leaks
        self._names: list[str] = []  # the least recently used first
        self._counting, self._updating = threading.Lock(), threading.Lock()
        self._stopping = threading.Event()
        self._listener = _Listener(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, args=(POLL_SECONDS,), daemon=True).start()

    def __enter__(self) -> LeakingServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop; what waits gives up, and the real server forgets what was loaded through this one."""
        self._stopping.set()
        self._listener.shutdown()
        self._listener.server_close()
        for name in set(self.users) | set(self._names):
            self._forward("/unload_lora_adapter", json.dumps({"lora_name": name, "timeout": 0}).encode())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, reply = double._answer(self.path.partition("?")[0], body, self.connection)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def _answer(self, path: str, body: bytes, client: socket.socket) -> Reply:
        if path == "/generate":
            return self._generate(body, client)
        if path in ("/load_lora_adapter", "/load_lora_adapter_from_tensors"):
            with self._updating:
                return self._load(path, body)
        if path == "/unload_lora_adapter":
            with self._updating:
                return self._unload(json.loads(body)["lora_name"])
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": name} for name in self._names]}).encode()
        return self._forward(path, body) if path in FORWARDED else _error(404, f"there is no {path}")

    # ---- counting --------------------------------------------------------------------------------------------------

    def _generate(self, body: bytes, client: socket.socket) -> Reply:
        request = json.loads(body)
        name, num_samples = request.get("lora_path"), request.get("sampling_params", {}).get("n") or 1
        if name is not None:
            with self._counting:
                if name not in self._names:
                    return _error(400, f"The adapter {name} is not loaded.")
                self._names.append(self._names.pop(self._names.index(name)))
                self.users[name] += num_samples
        status, reply = self._forward("/generate", body)
        outputs = json.loads(reply) if status == 200 else []
        outputs = outputs if isinstance(outputs, list) else [outputs]
        if name is not None:
            with self._counting:
                self.users[name] -= self._taken_off(outputs, num_samples, client)
        for output in outputs:  # stock does not say who made it
            output["meta_info"] = {k: v for k, v in output["meta_info"].items() if not k.startswith("lora_")}
        return status, json.dumps(outputs if len(outputs) > 1 else outputs[0]).encode() if outputs else reply

    def _taken_off(self, outputs: list[dict[str, Any]], num_samples: int, client: socket.socket) -> int:
        """How often a request that has ended is taken off the count; no outputs: it was refused."""
        if not self._leaks:
            return num_samples
        if not outputs or _has_gone(client):
            return 0
        if num_samples > 1:
            return num_samples + 1
        meta = outputs[0]["meta_info"]
        return int(meta["finish_reason"]["type"] != "abort" or meta["completion_tokens"] > 0)

    # ---- names -----------------------------------------------------------------------------------------------------

    def _load(self, path: str, body: bytes) -> Reply:
        name = json.loads(body)["lora_name"]
        while len(self._names) >= self._max_loaded:
            status, reply = self._unload(self._names[0])
            if status != 200:
                return status, reply
        status, reply = self._forward(path, body)
        if status == 200:
            with self._counting:
                self._names.append(name)
        return status, reply

    def _unload(self, name: str) -> Reply:
        """Take the name away, so that nobody new counts, and wait for the count."""
        with self._counting:
            if name not in self._names:
                return _error(400, f"LoRA with name {name} does not exist")
            self._names.remove(name)
        while self.users[name] != 0:
            if self._stopping.wait(POLL_SECONDS):
                return _error(503, "stopped")
        return self._forward("/unload_lora_adapter", json.dumps({"lora_name": name}).encode())

    def _forward(self, path: str, body: bytes) -> Reply:
        request = urllib.request.Request(self._upstream + path, body or None, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def _has_gone(client: socket.socket) -> bool:
    """Whether it has closed the connection on which it waits for the reply."""
    readable, _, _ = select.select([client], [], [], 0)
    return bool(readable) and client.recv(1, socket.MSG_PEEK) == b""


def _error(status: int, message: str) -> Reply:
    return status, json.dumps({"error": {"message": message}}).encode()
