"""What the front asks of the scheduler about adapter versions: stage, free, switch. Part of SchedulerControl.

Staging runs on a thread of its own while steps go on, paused or not; `poll` commits what has finished, between two
steps, and only then is the call answered. Invariant: a version is known exactly from its successful answer until it is
freed, and no live request names one that is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.weights import AdapterWeights
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.request import Request
from sglang.srt.managers.stats import StatsCollector

logger = logging.getLogger(__name__)

Reply = Callable[[int, bool, str], None]
"""(call_id, success, message); sends the rows collected so far first."""


class LoRAControl:
    """Handles the calls about adapter versions.

    Args:
        manager: None without --enable-lora; every call fails then.
        requests: the live ones; read only.
        drain: reads the results of every step in flight and sends their rows.
    """

    def __init__(
        self,
        manager: LoRAManager | None,
        planner: Planner,
        stats: StatsCollector,
        requests: Mapping[int, Request],
        drain: Callable[[], None],
        reply: Reply,
    ) -> None:
        self.manager = manager
        self.handlers: dict[type, Callable[[Any], None]] = {
            wire.StageAdapterCall: self._stage,
            wire.FreeAdapterCall: self._free,
            wire.SwitchVersionCall: self._switch,
        }
        self._planner = planner
        self._stats = stats
        self._requests = requests
        self._drain = drain
        self._reply = reply
        self._staging: dict[int, tuple[int, Future[AdapterWeights]]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage-adapter")

    @property
    def staging(self) -> bool:
        """Whether an adapter is on its way."""
        return bool(self._staging)

    def knows(self, version_id: int) -> bool:
        """Whether requests may name this version."""
        return version_id == BASE_VERSION or (self.manager is not None and version_id in self.manager)

    def poll(self) -> bool:
        """Commit adapters that have been copied, answer their calls; whether there were any."""
        done = [version for version, (_, future) in self._staging.items() if future.done()]
        for version_id in done:
            call_id, future = self._staging.pop(version_id)
            error = future.exception()
            if error is None:
                assert self.manager is not None
                self.manager.commit(version_id, future.result())
                self._reply(call_id, True, "")
            else:
                logger.warning("adapter version %d was not staged", version_id, exc_info=error)
                self._reply(call_id, False, f"{type(error).__name__}: {error}")
        return bool(done)

    def _stage(self, message: wire.StageAdapterCall) -> None:
        version_id = message.version_id
        if self.manager is None:
            self._reply(message.call_id, False, "adapters need --enable-lora")
        elif self.knows(version_id) or version_id in self._staging:
            self._reply(message.call_id, False, f"version {version_id} is taken")
        else:
            future = self._worker.submit(self.manager.stage, message.adapter)
            self._staging[version_id] = message.call_id, future

    def _free(self, message: wire.FreeAdapterCall) -> None:
        version_id = message.version_id
        if self.manager is None or version_id not in self.manager:
            self._reply(message.call_id, False, f"no adapter version {version_id} is staged")
            return
        holders = [r.req_id for r in self._requests.values() if r.version_id == version_id]
        if holders:
            # The front frees a version after its last lease, so one of the two has lost count.
            self._stats.violations += 1
            text = f"adapter version {version_id} is named by {len(holders)} live requests ({holders[:5]}…)"
            logger.error("scheduler invariant violated: freeing, but %s", text)
            self._reply(message.call_id, False, text)
            return
        freed = self.manager.free(version_id)
        self._planner.forget_version(version_id)
        self._reply(message.call_id, True, f"freed {freed} bytes")

    def _switch(self, message: wire.SwitchVersionCall) -> None:
        old, new = message.old_version_id, message.new_version_id
        unknown = [str(version) for version in (old, new) if not self.knows(version)]
        if unknown:
            self._reply(message.call_id, False, f"no adapter version {' or '.join(unknown)} is staged")
            return
        # The tokens drawn so far are the old version's, and their rows leave before the answer does.
        self._drain()
        if old != new:
            self._planner.switch(old, new)
        self._reply(message.call_id, True, "")
