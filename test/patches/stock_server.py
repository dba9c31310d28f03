"""Stock's real HTTP server on a CPU: its own `launch_server` and its own sockets, with a scheduler process of ours.

    python stock_server.py PORT

Started by `stock.serve`, with the interpreter of the scratch environment. A request for one token is answered at once;
one for more waits in the queue until it is aborted. What came in and what went goes to stdout, a line each.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import sys
import tempfile

from stock_driver import Scheduler, settings

PROMPT_LIMIT = 32


class Outbox:
    """Stands for the queue of the driver's scheduler: what is put into it goes over the socket."""

    def __init__(self, send):
        self.put_nowait = send


class LiveScheduler(Scheduler):
    """The scheduler of the driver in a process of its own."""

    def request(self, message):
        self.mode = "finish" if message.sampling_params.max_new_tokens <= 1 else "queue"
        print("request", message.rid, self.mode, flush=True)  # noqa: T201
        super().request(message)

    def abort(self, message):
        super().abort(message)
        print("abort", message.rid, flush=True)  # noqa: T201


def scheduler(_, ports, *others):
    """In place of stock's `run_scheduler_process`; the last argument is the pipe to say "ready" on."""
    zmq = importlib.import_module("zmq")
    live = LiveScheduler(importlib.import_module("sglang.srt.managers.io_struct"))
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(ports.scheduler_input_ipc_name)
    outbox.connect(ports.tokenizer_ipc_name)
    live.inbox = Outbox(outbox.send_pyobj)
    others[-1].send({"status": "ready", "max_total_num_tokens": 4096, "max_req_input_len": PROMPT_LIMIT})
    while True:
        live.take(inbox.recv_pyobj())


def detokenizer(*_):
    """Without a tokenizer nothing is ever sent to it."""
    signal.pause()


def main():
    """Serve until killed."""
    http_server = importlib.import_module("sglang.srt.entrypoints.http_server")
    manager = importlib.import_module("sglang.srt.managers.tokenizer_manager")
    print("patched" if hasattr(manager, "_lora_patch") else "stock", manager.__file__, flush=True)  # noqa: T201
    # Both children are ours, and need nothing that they would have to import again: forks will do, a minute sooner.
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None
    with tempfile.TemporaryDirectory(prefix="stock-model-") as model:
        more = {"host": "127.0.0.1", "port": int(sys.argv[1]), "skip_server_warmup": True}
        arguments = settings(http_server.ServerArgs, model, **more)
        http_server.launch_server(
            arguments, run_scheduler_process_func=scheduler, run_detokenizer_process_func=detokenizer
        )


if __name__ == "__main__":
    main()
