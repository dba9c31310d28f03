"""What the front asks of the scheduler besides generating: submit, abort, stop, pause, continue, flush, statistics.

One handler a message type, in a table; those about adapters are LoRAControl's, about groups GroupControl's. Owns the
pause state. Called by the scheduler's loop between two steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.managers.group_control import GroupControl
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo, PauseMode
from sglang.srt.managers.lora_control import LoRAControl
from sglang.srt.managers.output_processor import OutputProcessor
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.request import Request
from sglang.srt.managers.stats import StatsCollector

Send = Callable[[wire.ToFront], None]


class SchedulerControl:
    """Handles the front's messages.

    Args:
        drain: reads the results of every step in flight; retraction and flush need a quiet device.
        device: the model's.
    """

    def __init__(
        self,
        planner: Planner,
        outputs: OutputProcessor,
        stats: StatsCollector,
        send: Send,
        drain: Callable[[], None],
        lora: LoRAManager | None,
        device: torch.device,
    ) -> None:
        self.planner = planner
        self.outputs = outputs
        self.stats = stats
        self.send = send
        self.drain = drain
        self.paused: PauseMode | None = None
        self.requests: dict[int, Request] = {}
        self.lora = LoRAControl(lora, planner, stats, self.requests, drain, self._reply)
        self.groups = GroupControl(device, self._reply)
        self._arrivals = itertools.count()
        self._handlers: dict[type, Callable[[Any], None]] = {
            wire.SubmitBatch: self._submit,
            wire.AbortRequests: self._abort,
            wire.StopRequests: self._stop,
            wire.PauseCall: self._pause,
            wire.ContinueCall: self._continue,
            wire.FlushCacheCall: self._flush_cache,
            wire.StatsCall: self._stats,
            **self.lora.handlers,
            **self.groups.handlers,
        }

    @property
    def working(self) -> bool:
        """Whether threads of ours work on calls, which `poll` answers."""
        return self.lora.staging or self.groups.pending

    def poll(self) -> bool:
        """Finish the calls whose threads have ended; whether there were any."""
        staged, grouped = self.lora.poll(), self.groups.poll()
        return staged or grouped

    def handle(self, message: wire.ToBack) -> None:
        """Act on one message."""
        self._handlers[type(message)](message)

    def forget(self, request: Request) -> None:
        """The request's terminal row has been written."""
        del self.requests[request.req_id]

    def _submit(self, message: wire.SubmitBatch) -> None:
        capacity = self.planner.kv.capacity
        for submitted in message.requests:
            assert submitted.req_id not in self.requests, f"req_id {submitted.req_id} submitted twice"
            request = Request.from_wire(submitted, next(self._arrivals), capacity)
            self.requests[request.req_id] = request
            self.planner.add(request)
            if not self.lora.knows(request.version_id):
                self._refuse(request, f"Adapter version {request.version_id} is not loaded; load it again.")
            elif request.max_new_tokens < min(1, submitted.sampling.max_new_tokens):
                length = len(request.prompt)
                text = f"The input ({length} tokens) does not fit the KV cache ({capacity} tokens)"
                self._refuse(request, f"{text}; send a shorter prompt.")

    def _refuse(self, request: Request, text: str) -> None:
        self.outputs.finish(request, Finish.ABORT, request.abort_info(text, 400, "BadRequestError"))

    def _abort(self, message: wire.AbortRequests) -> None:
        for request in self._known(message.req_ids):
            waiting = request.abort_info("Abort in waiting queue")
            info = request.abort_info("Aborted") if waiting.was_running else waiting
            self.outputs.finish(request, Finish.ABORT, info)

    def _stop(self, message: wire.StopRequests) -> None:
        for request in self._known(message.req_ids):
            self.outputs.finish(request, Finish.STOP, FinishInfo(num_retractions=request.num_retractions))

    def _known(self, req_ids: list[int]) -> list[Request]:
        """The live ones, each once; the others' terminal rows are already on their way."""
        return [self.requests[i] for i in dict.fromkeys(req_ids) if i in self.requests]

    def _pause(self, message: wire.PauseCall) -> None:
        self.drain()
        if message.mode is PauseMode.RETRACT:
            self.planner.retract_all()
        self.paused = message.mode
        self._reply(message.call_id, True)

    def _continue(self, message: wire.ContinueCall) -> None:
        self.paused = None
        self._reply(message.call_id, True)

    def _flush_cache(self, message: wire.FlushCacheCall) -> None:
        self.drain()
        holders = len(self.planner.live)
        if holders:
            self._reply(message.call_id, False, f"{holders} running requests own KV pages")
            return
        self.planner.kv.clear_cache()
        self._reply(message.call_id, True)

    def _stats(self, message: wire.StatsCall) -> None:
        self._reply(message.call_id, True)

    def _reply(self, call_id: int, success: bool, message: str = "", code: str = "") -> None:
        # Rows first: whoever reads these numbers must not find requests that they no longer count.
        self.outputs.flush()
        stats = self.stats.snapshot(self.planner, self.paused is not None)
        self.send(wire.CallReply(call_id, success, message, stats, code))
