"""Is the server fit to serve? The two questions behind `/health` and `/health_generate`."""

from __future__ import annotations

import asyncio
import logging
import uuid

from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.errors import SglangError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 20.0
"""How long the scheduler may take to answer; stock's clients wait this long too."""
PAUSE_CHECK_SECONDS = 0.5
"""How soon a probe that was caught by a pause notices it."""


async def is_alive(runtime: Runtime, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether the server is up and its scheduler answers within `timeout` seconds; a paused server is alive."""
    if runtime.manager.status is not ServerStatus.UP:
        return False
    if runtime.manager.paused is not None:
        return True
    try:
        await asyncio.wait_for(runtime.manager.scheduler_stats(), timeout)
    except asyncio.TimeoutError:
        logger.error("health check failed: the scheduler has not answered for %.0f s", timeout)
        return False
    except SglangError as error:
        logger.error("health check failed: %s", error)
        return False
    return True


async def can_generate(runtime: Runtime, timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether one token can be generated within `timeout` seconds.

    A probe that waits behind other work counts as healthy as long as the scheduler makes steps; a paused server is
    healthy without a probe.
    """
    if not await is_alive(runtime, timeout):
        return False
    before = runtime.manager.stats.steps_total
    probe = asyncio.create_task(_generate_one_token(runtime))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    try:
        while not probe.done() and runtime.manager.paused is None and loop.time() < deadline:
            await asyncio.wait([probe], timeout=min(PAUSE_CHECK_SECONDS, deadline - loop.time()))
        if probe.done() and probe.exception() is None:
            return True
        return await is_alive(runtime, timeout) and (
            runtime.manager.paused is not None or runtime.manager.stats.steps_total > before
        )
    finally:
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)


async def _generate_one_token(runtime: Runtime) -> None:
    body = GenerateReqInput(
        rid=f"HEALTH_CHECK_{uuid.uuid4().hex}",
        input_ids=[0],
        sampling_params={"max_new_tokens": 1, "temperature": 0.0},
        log_metrics=False,
        no_logs=True,
    )
    async for _ in runtime.manager.generate_request(body):
        pass
