"""What the loss of one count does to a training run: the same loop, with the same one aborted request, three times.

    python benchmark/rl/leak_control.py

Against a server that counts as stock SGLang 0.5.12 does (`leaking_server`) the run stops at the publish that has to
evict the adapter of that request, although nothing runs on it. Against the same one with its counts repaired, and
against ours, it finishes. One JSON line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leaking_server import LeakingServer

from sglang.rl import metrics
from sglang.rl.config import load_recipe
from sglang.rl.publisher import PublishError
from sglang.rl.servers import Servers
from sglang.rl.train import Run

MAX_LOADED = 2
LOOP = ("rollout.groups=4", "rollout.samples=4", "task.eval={}", "eval.every=0", "checkpoint_every=0")


def post(url: str, path: str, body: dict[str, Any] | None) -> Any:
    """The JSON that a call returns, None when it returns nothing; without a body it is a GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read()
    return json.loads(text) if text else None


def abort_while_queued(url: str, stop: threading.Event) -> None:
    """The event: once a policy is published, ask it for something, and change one's mind while the request waits."""
    adapter = None
    while adapter is None and not stop.wait(0.02):
        names = [model["id"] for model in post(url, "/v1/models", None)["data"]]
        adapter = next((name for name in names if name.startswith(("policy", "lora_v"))), None)
    if adapter is None:
        return
    body = {"text": "1+1=", "rid": "victim", "lora_path": adapter, "sampling_params": {"max_new_tokens": 4}}
    replies: list[Any] = []
    victim = threading.Thread(target=lambda: replies.append(post(url, "/generate", body)))
    post(url, "/pause_generation", {"mode": "in_place"})  # nothing is taken from the queue while we are in it
    try:
        victim.start()
        while victim.is_alive() and not stop.wait(0.05):  # until it has arrived
            post(url, "/abort_request", {"rid": "victim"})
    finally:
        post(url, "/continue_generation", {})
    victim.join()
    logging.info("a request on %s was aborted while it waited: %s", adapter, replies[0]["meta_info"]["finish_reason"])


@contextlib.contextmanager
def another_client(url: str) -> Iterator[None]:
    """`abort_while_queued` beside what is done inside."""
    stop = threading.Event()
    thread = threading.Thread(target=abort_while_queued, args=(url, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def train(url: str, steps: int, timeout: float, out: Path) -> dict[str, Any]:
    """One run; what became of it."""
    overrides = (*LOOP, f"steps={steps}", f"server.urls=[{url!r}]", f"server.timeout={timeout}", f"out={out}")
    started, error = time.perf_counter(), None
    run = Run(load_recipe("tiny-cpu", overrides), resume=False)
    try:
        with another_client(url):
            run.run()
    except PublishError as failure:
        error = str(failure)
    finally:
        run.close()
    done = metrics.read_log(out / metrics.FILE)[-1][metrics.STEP]
    outcome = f"stopped at publish {done + 1} of {steps}" if error else f"finished, {done} publishes"
    return {"outcome": outcome, "publishes": done, "error": error, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description="What the loss of one count does to a training run.")
    parser.add_argument("--steps", type=int, default=6, help="of each run, a publish each")
    parser.add_argument("--timeout", type=float, default=6.0, help="seconds after which the trainer gives a publish up")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="[%(asctime)s] %(levelname)s %(message)s")
    recipe = load_recipe("tiny-cpu")
    with tempfile.TemporaryDirectory() as directory:
        flags = ("--max-loaded-loras", str(MAX_LOADED))
        servers = Servers(recipe.server, recipe.model.path, Path(directory) / "server.log", flags)
        servers.ensure()
        (ours,) = servers.urls
        try:
            for name, leaks in (("counts as stock does", True), ("its counts repaired", False)):
                with LeakingServer(ours, max_loaded=MAX_LOADED, leaks=leaks) as double:
                    report = train(double.url, args.steps, args.timeout, Path(directory) / name)
                    users = {name: count for name, count in double.users.items() if count}
                print(json.dumps({"server": name, **report, "counted": users}), flush=True)
            print(json.dumps({"server": "ours", **train(ours, args.steps, args.timeout, Path(directory) / "ours")}))
        finally:
            servers.close()


if __name__ == "__main__":
    main()
