"""Trainers' groups as the front sees them: who joins is checked here, the back's members are asked, bytes are brought.

Created by TokenizerManager. The back owns the groups; what it refuses is an `AdapterError` here.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter_reader import DEFAULT_MAX_BYTES
from sglang.srt.lora.adapter_source import MAX_JSON_BYTES
from sglang.srt.lora.host_buffer import HostBuffers
from sglang.srt.managers.control_client import ControlClient
from sglang.srt.managers.io_struct.requests import (
    DestroyWeightsUpdateGroupReqInput,
    InitWeightsUpdateGroupReqInput,
    WeightsUpdateGroupOutput,
)

BACKENDS = ("nccl", "gloo")
MAX_BYTES = DEFAULT_MAX_BYTES + MAX_JSON_BYTES
"""Most bytes of a broadcast: an image's tensors and its head."""
_NAME = re.compile(r"[A-Za-z0-9._@/+-]{1,256}")


class GroupCalls:
    """Join, leave, receive."""

    def __init__(self, control: ControlClient) -> None:
        self._control = control
        self._buffers = HostBuffers()

    async def join(self, obj: InitWeightsUpdateGroupReqInput) -> WeightsUpdateGroupOutput:
        """Become a member; an older group of this name is left."""
        problem = _problem(obj)
        if problem:
            return WeightsUpdateGroupOutput(success=False, message=problem, error_code="invalid_group")
        rank, size = obj.rank_offset, obj.world_size
        reply = await self._control.join_group(
            obj.group_name, obj.master_address, obj.master_port, rank, size, obj.backend, obj.timeout
        )
        if not reply.success:
            return WeightsUpdateGroupOutput(success=False, message=reply.message, error_code=reply.code)
        return WeightsUpdateGroupOutput(success=True, message=f"joined group {obj.group_name} as {rank} of {size}")

    async def leave(self, obj: DestroyWeightsUpdateGroupReqInput) -> WeightsUpdateGroupOutput:
        """Leave a group."""
        reply = await self._control.leave_group(obj.group_name)
        if not reply.success:
            return WeightsUpdateGroupOutput(success=False, message=reply.message, error_code="no_group")
        return WeightsUpdateGroupOutput(success=True, message=f"left group {obj.group_name}")

    @asynccontextmanager
    async def received(
        self, group: str, broadcast: str | None, nbytes: int | None, seconds: float
    ) -> AsyncIterator[memoryview]:
        """What the group's trainer broadcasts, [nbytes], until the end of the block.

        Raises:
            AdapterError: no_group (make it again), broadcast_cancelled or broadcast_failed (the group is as good as
                before), invalid_adapter, capacity.
        """
        if not broadcast or not _NAME.fullmatch(broadcast):
            raise AdapterError("invalid_adapter", f"broadcast {broadcast!r} must be a name of {_NAME.pattern}.")
        if nbytes is None or not 0 < nbytes <= MAX_BYTES:
            raise AdapterError(
                "invalid_adapter", f"nbytes {nbytes} must be the size of the image, at most {MAX_BYTES}."
            )
        try:
            buffer = self._buffers.take(nbytes)
        except OSError as error:
            raise AdapterError("capacity", f"there is no memory for a broadcast of {nbytes} bytes: {error}") from error
        done = False
        try:
            reply = await self._control.receive(group, broadcast, buffer.path, nbytes, seconds)
            if not reply.success:
                raise AdapterError(reply.code, f"The broadcast was not received: {reply.message}.")
            yield buffer.view.data
            done = True
        finally:
            # After a failure somebody may write or read there still; then nobody else gets this memory.
            if done:
                self._buffers.give_back(buffer)
            else:
                buffer.close()


def _problem(obj: InitWeightsUpdateGroupReqInput) -> str:
    """What is wrong with a place in a group; says the field, its value and the remedy."""
    if not _NAME.fullmatch(obj.group_name):
        return f"group_name {obj.group_name!r} must be 1 to 256 letters, digits or ._@/+- characters"
    if obj.backend not in BACKENDS:
        return f"backend {obj.backend!r} must be nccl (from GPU to GPU) or gloo (between hosts' memories)"
    if not obj.master_address:
        return "master_address is empty; give the address of the trainer's TCPStore"
    if not 0 < obj.master_port < 1 << 16:
        return f"master_port {obj.master_port} must be the port of the trainer's TCPStore, 1 to 65535"
    if not 0 < obj.rank_offset < obj.world_size:
        return (
            f"rank_offset {obj.rank_offset} must be 1 to world_size - 1 (world_size is {obj.world_size}): rank 0 is "
            "the trainer"
        )
    return ""
