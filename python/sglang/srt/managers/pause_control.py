"""Pausing: what holds requests back, who asked for it, and when it ends by itself.

Owned by TokenizerManager. A pause never waits for anything but the acks of what it aborts, and every pause has a
deadline, so a client that dies between pause and continue leaves a server that goes on.
Invariant: `continue_` undoes everything that any `pause` has done, in whatever order the two meet.
"""

from __future__ import annotations

import asyncio
import logging

from sglang.srt import environ
from sglang.srt.errors import AdapterError, RequestError, ServiceUnavailableError
from sglang.srt.managers.control_client import ControlClient
from sglang.srt.managers.io_struct.requests import ContinueGenerationReqInput, PauseGenerationReqInput
from sglang.srt.managers.io_struct.wire import CallReply, PauseMode
from sglang.srt.managers.request_lifecycle import RequestLifecycle

logger = logging.getLogger(__name__)


class PauseControl:
    """The pause that is on, if any.

    Attributes:
        mode: of the pause of the whole server; None while it runs. owner: who asked for it, as far as they said.
        frozen: set while the scheduler stands still, so that waiting for a request would wait for the end of the pause.
    """

    def __init__(self, lifecycle: RequestLifecycle, control: ControlClient) -> None:
        self.mode: PauseMode | None = None
        self.owner: str | None = None
        self._lifecycle = lifecycle
        self._control = control
        self.frozen = asyncio.Event()
        self._deadlines: dict[str | None, asyncio.TimerHandle] = {}
        self._resuming: set[asyncio.Task[None]] = set()

    async def pause(self, obj: PauseGenerationReqInput) -> None:
        """See TokenizerManager.pause_generation."""
        mode = _mode(obj)
        if obj.lora_name is not None and mode is not PauseMode.ABORT:
            raise RequestError(f"A pause of one adapter takes mode abort, got {mode.value}; publish needs no pause.")
        self._set_deadline(obj.lora_name, environ.SGLANG_PAUSE_TIMEOUT.get() if obj.timeout is None else obj.timeout)
        if obj.lora_name is not None:
            await self._abort_adapter(obj.lora_name)
            return
        self.mode, self.owner = mode, obj.owner
        if mode is PauseMode.ABORT:
            self._lifecycle.set_gate(is_open=False)
            in_flight = self._lifecycle.in_flight()
            for record in in_flight:
                self._lifecycle.abort(record)
            await self._lifecycle.closed(in_flight)
            return
        reply = self._control.pause(mode)
        self.frozen.set()
        self._lifecycle.set_gate(is_open=True)  # requests queue in the scheduler; those of a paused adapter still wait
        _require_success(await reply)

    async def continue_(self, obj: ContinueGenerationReqInput) -> None:
        """See TokenizerManager.continue_generation."""
        if obj.lora_name is not None:
            self._set_deadline(obj.lora_name, 0)
            self._lifecycle.set_gate(is_open=True, adapter=obj.lora_name)
            return
        if None not in (obj.owner, self.owner) and obj.owner != self.owner and self.mode is not None:
            raise AdapterError("busy", f"The pause belongs to {self.owner!r}; only its owner, or nobody, may end it.")
        self.mode = self.owner = None
        self.close()
        self._lifecycle.open_gates()
        if self.frozen.is_set():
            self.frozen.clear()
            _require_success(await self._control.resume())

    def close(self) -> None:
        """No deadline matters any more."""
        for scope in list(self._deadlines):
            self._set_deadline(scope, 0)

    async def _abort_adapter(self, name: str) -> None:
        self._lifecycle.set_gate(is_open=False, adapter=name)
        in_flight = self._lifecycle.in_flight(name)
        for record in in_flight:
            self._lifecycle.abort(record)
        await self._lifecycle.closed(in_flight)

    def _set_deadline(self, scope: str | None, seconds: float) -> None:
        """End the pause of an adapter, or of everything (None), after so many seconds; 0 takes the deadline back."""
        before = self._deadlines.pop(scope, None)
        if before is not None:
            before.cancel()
        if seconds > 0:
            loop = asyncio.get_running_loop()
            self._deadlines[scope] = loop.call_later(seconds, self._expire, scope, seconds)

    def _expire(self, scope: str | None, seconds: float) -> None:
        who = f" by {self.owner}" if self.owner and scope is None else ""
        logger.error("%s has been paused for %g s%s; continuing", scope or "generation", seconds, who)
        task = asyncio.create_task(self._continue_after_deadline(scope))
        self._resuming.add(task)
        task.add_done_callback(self._resuming.discard)

    async def _continue_after_deadline(self, scope: str | None) -> None:
        try:
            await self.continue_(ContinueGenerationReqInput(lora_name=scope, owner=self.owner))
        except (RequestError, ServiceUnavailableError) as error:
            logger.error("%s could not be continued: %s", scope or "generation", error)


def _mode(obj: PauseGenerationReqInput) -> PauseMode:
    try:
        return PauseMode(obj.mode)
    except ValueError:
        modes = ", ".join(mode.value for mode in PauseMode)
        raise RequestError(f"mode must be one of {modes}, got {obj.mode!r}.") from None


def _require_success(reply: CallReply) -> None:
    if not reply.success:
        raise RequestError(f"The scheduler refused: {reply.message}.")
