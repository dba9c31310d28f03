"""Servers that say what a publisher hears, without a model: a versioned one, a stock one, and everything going wrong.

    with FakeServer() as server: ...                     # stages and commits
    with FakeServer(stock=True) as server: ...           # knows names alone

`server.on[path]` replaces the answers to a path, in order: each a function of the call that returns a reply, `None` for
the usual one, or one of the constants below. The last one stays when `always` holds.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CUT, LOSE, HANG, BUSY = "cut", "lose", "hang", "busy"
"""Close without a reply; do it and then close; never answer; answer 503."""

Answer = Callable[["Call"], tuple[int, Any]] | str | None


@dataclass
class Call:
    """A request: the JSON of its body, and what follows it."""

    path: str
    body: dict[str, Any]
    tensors: bytes = b""


@dataclass
class FakeServer:
    """See the module.

    Fields:
        key, open_to: what it asks for, and what else for some paths.
        serving: name -> (version, digest); staged: version -> (name, digest).
        calls: paths, in order; taken: what was read from paths or bodies.
        users: name -> how many requests a stock server believes to run on it.
        paused, running: for pauses; the requests a pause does not end.
        slab_layout: of the slabs that it takes.
    """

    stock: bool = False
    key: str | None = None
    open_to: dict[str, str] = field(default_factory=dict)
    serving: dict[str, tuple[int, str]] = field(default_factory=dict)
    staged: dict[int, tuple[str, str]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    taken: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    users: dict[str, int] = field(default_factory=dict)
    on: dict[str, list[Answer]] = field(default_factory=dict)
    always: bool = False
    paused: bool = False
    running: int = 0
    reads_files: bool = True
    slab_layout: dict[str, Any] | None = None
    modes: list[str] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._adapters = threading.Lock()
        self._versions = 0
        self._stopping = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake._handle(self)

            do_POST = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self._stopping.clear()
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop; connections that hang are closed."""
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def restart(self) -> None:
        """Forget everything and start on the same port."""
        self.stop()
        self.serving, self.staged, self.paused, self._versions = {}, {}, False, 0
        self.start()

    def count(self, path: str) -> int:
        return self.calls.count(path)

    # ---- the wire ------------------------------------------------------------------------------------------------

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        raw = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        with self._lock:
            self.calls.append(path)
            queue = self.on.get(path) or [None]
            answer = queue[0] if self.always and len(queue) == 1 else queue.pop(0)
        key = self.open_to.get(path, self.key)
        if key is not None and handler.headers.get("authorization") != f"Bearer {key}":
            self._send(handler, 401, {"error": "Unauthorized"})
            return
        if answer == CUT:
            self._cut(handler)
        elif answer == HANG:
            self._stopping.wait(30)
            self._cut(handler)
        elif answer == BUSY:
            self._send(handler, 503, {"message": "starting"})
        else:
            call = self._parse(path, raw, handler.headers.get("content-type") or "")
            reply = answer(call) if callable(answer) else self._answer(call)
            if answer == LOSE:
                self._cut(handler)
            else:
                self._send(handler, *reply)

    @staticmethod
    def _parse(path: str, raw: bytes, content_type: str) -> Call:
        if content_type != "application/octet-stream":
            return Call(path, json.loads(raw) if raw else {})
        size = int.from_bytes(raw[:8], "little")
        return Call(path, json.loads(raw[8 : 8 + size]), raw[8 + size :])

    @staticmethod
    def _cut(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, value: Any) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    # ---- what it does --------------------------------------------------------------------------------------------

    def _answer(self, call: Call) -> tuple[int, Any]:
        name = call.path.strip("/").replace("/", "_")
        known = STOCK_PATHS if self.stock else VERSIONED_PATHS
        if name not in known | COMMON_PATHS:
            return 404, {"detail": "Not Found"}
        if name in LOCKED_PATHS and self.stock:
            with self._adapters:  # one lock for loads and unloads, as stock has it
                return getattr(self, name)(call)
        return getattr(self, name)(call)

    def lora_adapters(self, call: Call) -> tuple[int, Any]:
        listed = [
            {"lora_name": name, "lora_version": version, "digest": digest, "state": "serving"}
            for name, (version, digest) in self.serving.items()
        ]
        return 200, {"adapters": listed, "slab_layout": self.slab_layout}

    def v1_models(self, call: Call) -> tuple[int, Any]:
        return 200, {"data": [{"id": name} for name in ("base", *self.serving)]}

    def stage_lora_adapter(self, call: Call) -> tuple[int, Any]:
        read = self._read(call)
        if read is None:
            return 400, {"error_code": "adapter_not_found", "error_message": "there is no directory"}
        name, digest = call.body["lora_name"], hashlib.sha256(read).hexdigest()
        with self._lock:
            if self.serving.get(name, (0, ""))[1] == digest:
                return 200, {"lora_version": self.serving[name][0], "digest": digest, "state": "serving"}
            for version, other in self.staged.items():
                if other == (name, digest):
                    return 200, {"lora_version": version, "digest": digest, "state": "staging"}
            self._versions += 1
            self.staged = {v: s for v, s in self.staged.items() if s[0] != name} | {self._versions: (name, digest)}
            return 200, {"lora_version": self._versions, "digest": digest, "state": "staging"}

    def commit_lora_adapter(self, call: Call) -> tuple[int, Any]:
        name, version = call.body["lora_name"], call.body["lora_version"]
        with self._lock:
            self.modes.append(call.body["mode"])
            wanted = version, call.body["digest"]
            if self.serving.get(name) == wanted:
                return 200, {"success": True}
            if self.staged.get(version) != (name, wanted[1]):
                return 400, {"error_code": "adapter_not_found", "error_message": f"no staged version {version}"}
            del self.staged[version]
            self.serving[name] = wanted
            return 200, {"success": True}

    def drop_lora_adapter(self, call: Call) -> tuple[int, Any]:
        self.staged.pop(call.body["lora_version"], None)
        return 200, {"success": True}

    def load_lora_adapter(self, call: Call) -> tuple[int, Any]:
        name = call.body["lora_name"]
        if name in self.serving:
            return 400, {"success": False, "error_message": f"{name} is already loaded", "loaded_adapters": {}}
        if self._read(call) is None:
            return 400, {"success": False, "error_message": "no such path"}
        self.serving[name] = (0, "")
        return 200, {"success": True, "loaded_adapters": dict.fromkeys(self.serving, "")}

    load_lora_adapter_from_tensors = load_lora_adapter

    def unload_lora_adapter(self, call: Call) -> tuple[int, Any]:
        name = call.body["lora_name"]
        if name not in self.serving:
            return 400, {"success": False, "error_message": f"LoRA with name {name} does not exist"}
        while self.users.get(name) and self.stock and not self._stopping.wait(0.01):
            pass
        self.serving.pop(name)
        return 200, {"success": True}

    def pause_generation(self, call: Call) -> tuple[int, Any]:
        self.paused = True
        return 200, {"status": "ok"}

    def continue_generation(self, call: Call) -> tuple[int, Any]:
        self.paused = False
        return 200, {"status": "ok"}

    def get_load(self, call: Call) -> tuple[int, Any]:
        return 200, [{"dp_rank": 0, "num_reqs": self.running + 5, "num_waiting_reqs": 5}]

    def abort_request(self, call: Call) -> tuple[int, Any]:
        self.running = 0
        return 200, ""

    def flush_cache(self, call: Call) -> tuple[int, Any]:
        return (200, "Cache flushed.\n") if self.running == 0 else (400, "Flush cache failed.\n")

    def _read(self, call: Call) -> bytes | None:
        path = call.body.get("lora_path")
        if path is None:
            config, image = call.body["config_dict"], call.tensors or call.body["serialized_tensors"].encode()
        elif self.reads_files and Path(path).is_dir():
            config = json.loads((Path(path) / "adapter_config.json").read_text())
            image = (Path(path) / "adapter_model.safetensors").read_bytes()
        else:
            return None
        self.taken.append((config, image))
        return json.dumps(config).encode() + image


COMMON_PATHS = {
    "v1_models", "load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter", "pause_generation",
    "continue_generation", "get_load", "abort_request", "flush_cache",
}  # fmt: skip
VERSIONED_PATHS = {"lora_adapters", "stage_lora_adapter", "commit_lora_adapter", "drop_lora_adapter"}
STOCK_PATHS: set[str] = set()
LOCKED_PATHS = {"load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"}
