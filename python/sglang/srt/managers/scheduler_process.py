"""The back process: `python -m sglang.srt.managers.scheduler_process`, started by entrypoints/launcher.

One JSON line on stdin says how to start (`BackStart`), and the end of stdin says that the front has gone, however it
died. Exit code 0 after SIGTERM or the end of stdin, 1 after an error that `BackFailed` has reported.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback

import msgspec
import torch

from sglang.srt.config.sections import Config
from sglang.srt.lora.slots import SlotPool
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.ipc import BackChannel, Endpoint
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.setup import build_engine

logger = logging.getLogger(__name__)

EXIT_GRACE = 10.0
"""Seconds after the front has gone until the process ends whatever it is doing."""


class BackStart(msgspec.Struct, frozen=True):
    """What the front writes to the back's stdin."""

    config: Config
    endpoint: Endpoint


def _watch_parent(stopping: threading.Event) -> None:
    sys.stdin.buffer.read()
    stopping.set()
    time.sleep(EXIT_GRACE)
    os._exit(0)


def _serve(config: Config, channel: BackChannel, stopping: threading.Event) -> None:
    """Load, report ready, and step until told to stop."""
    engine = build_engine(config)
    channel.send(engine.ready())
    lora = config.lora
    slots = SlotPool(lora.max_loras_per_batch, lora.eviction_policy) if lora.enabled else None
    planner = Planner(config.schedule, engine.kv, slots)
    depth = 1 if config.schedule.overlap else 0
    Scheduler(channel, engine.runner, planner, config.model.vocab_size, depth, engine.lora).run(stopping)


def main() -> int:
    """Run the back until the front goes."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=BackStart)
    logging.basicConfig(
        level=start.config.server.log_level.upper(), format="[%(asctime)s back] %(levelname)s %(message)s", force=True
    )
    stopping = threading.Event()
    # Ctrl-C reaches the whole process group; the front decides when the back ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    threading.Thread(target=_watch_parent, args=(stopping,), daemon=True).start()
    channel = BackChannel(start.endpoint)
    try:
        with torch.inference_mode():
            _serve(start.config, channel, stopping)
    except Exception as error:
        logger.error("the back process failed:\n%s", traceback.format_exc())
        channel.send(wire.BackFailed(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        channel.close()
    return 0


if __name__ == "__main__":
    # Skip interpreter teardown: daemon threads and CUDA contexts make it slow and noisy, and nothing is left to save.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
