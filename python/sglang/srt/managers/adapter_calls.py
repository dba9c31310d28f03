"""The adapter endpoints without their HTTP: request objects in, upstream's reply objects out.

Created by TokenizerManager. Every outcome is a `LoRAUpdateOutput`; only a dead back raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from sglang.srt.errors import AdapterError
from sglang.srt.lora.lease import TENSOR_SOURCE, AdapterVersion
from sglang.srt.managers.adapter_service import AdapterService, LoadRequest, ReadAdapter
from sglang.srt.managers.group_calls import GroupCalls
from sglang.srt.managers.io_struct.requests import (
    CommitLoRAAdapterReqInput,
    DropLoRAAdapterReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    StageLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.io_struct.wire import Ready


class Reader(Protocol):
    """`lora.adapter_reader.AdapterReader`."""

    slab_layout: Mapping[str, Any] | None

    def read_directory(self, path: str) -> ReadAdapter:
        """From a directory."""

    def read_tensors(
        self,
        config_dict: dict[str, Any],
        payload: str | list[str] | bytes | bytearray | memoryview,
        load_format: str | None,
        expected_checksums: Any = None,
        added_tokens: dict[str, Any] | None = None,
    ) -> ReadAdapter:
        """From a request."""


class AdapterCalls:
    """Load, in one step or in two, unload and list.

    Args:
        groups: bring what trainers broadcast.
        frozen: set while a pause keeps requests from ending, so that nobody must wait for one.
    """

    def __init__(
        self, service: AdapterService, reader: Reader | None, groups: GroupCalls, frozen: asyncio.Event
    ) -> None:
        self._service = service
        self._reader = reader
        self._groups = groups
        self._frozen = frozen

    def back_is_ready(self, ready: Ready) -> None:
        """From now on adapters may come as slabs, too."""
        if self._reader is not None:
            self._reader.slab_layout = ready.slab_layout

    async def load(self, obj: LoadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Load from a directory."""
        return await self._replied(obj.lora_name, self._load(obj))

    async def load_from_tensors(self, obj: LoadLoRAAdapterFromTensorsReqInput) -> LoRAUpdateOutput:
        """Load from tensors in the request."""
        return await self._replied(obj.lora_name, self._load_from_tensors(obj))

    async def unload(self, obj: UnloadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Unload. While a pause keeps its holders from ending, the reply comes at once and says how many there are."""
        return await self._replied(obj.lora_name, self._unload(obj))

    async def stage(self, obj: StageLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Bring a version into memory that its name does not mean yet."""
        return await self._replied(obj.lora_name, self._stage(obj))

    async def commit(self, obj: CommitLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Make a name mean what was staged."""
        return await self._replied(obj.lora_name, self._commit(obj))

    async def drop(self, obj: DropLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Forget what was staged. A success, too, when there is nothing (any more) to forget."""
        return await self._replied(obj.lora_name, self._drop(obj))

    def listing(self) -> dict[str, Any]:
        """Every version in memory, and the layout that a slab must have, for `/lora_adapters`."""
        registry, reader = self._service.registry, self._reader
        return {
            "adapters": [_describe(version) for version in registry.versions.values()],
            "slab_layout": None if reader is None else reader.slab_layout,
        }

    async def _load(self, obj: LoadLoRAAdapterReqInput) -> dict[str, Any]:
        reader = self._require_reader()
        return _loaded(
            await self._service.load(
                LoadRequest(
                    name=obj.lora_name,
                    source=obj.lora_path,
                    read=lambda: reader.read_directory(obj.lora_path),
                    pinned=obj.pinned,
                    upsert=obj.upsert,
                    mode=obj.mode,
                )
            )
        )

    async def _load_from_tensors(self, obj: LoadLoRAAdapterFromTensorsReqInput) -> dict[str, Any]:
        reader, payload = self._require_reader(), _payload(obj)
        return _loaded(
            await self._service.load(
                LoadRequest(
                    name=obj.lora_name,
                    source=TENSOR_SOURCE,
                    read=lambda: reader.read_tensors(
                        obj.config_dict, payload, obj.load_format, obj.expected_checksums, obj.added_tokens_config
                    ),
                    identity=obj,
                    pinned=obj.pinned,
                    upsert=obj.upsert,
                    mode=obj.mode,
                )
            )
        )

    async def _stage(self, obj: StageLoRAAdapterReqInput) -> dict[str, Any]:
        reader, path, tensors, group = self._require_reader(), obj.lora_path, obj.tensors, obj.group_name
        if sum(source is not None for source in (path, tensors, group)) != 1:
            raise AdapterError("invalid_adapter", "Send exactly one of lora_path, tensors and group_name.")
        config = obj.config_dict or {}
        if path is not None:
            return await self._stage_as(obj, path, lambda: reader.read_directory(path))
        if group is None:
            image = tensors or b""
            return await self._stage_as(obj, TENSOR_SOURCE, lambda: reader.read_tensors(config, image, "safetensors"))
        async with self._groups.received(group, obj.broadcast, obj.nbytes, obj.timeout) as sent:
            return await self._stage_as(obj, TENSOR_SOURCE, lambda: reader.read_tensors(config, sent, "safetensors"))

    async def _stage_as(
        self, obj: StageLoRAAdapterReqInput, source: str, read: Callable[[], ReadAdapter]
    ) -> dict[str, Any]:
        request = LoadRequest(name=obj.lora_name, source=source, read=read, pinned=obj.pinned, upsert=True)
        return _staged(await self._service.stage(request, obj.timeout))

    async def _commit(self, obj: CommitLoRAAdapterReqInput) -> dict[str, Any]:
        return _staged(await self._service.commit(obj.lora_name, obj.lora_version, obj.digest, obj.mode))

    async def _drop(self, obj: DropLoRAAdapterReqInput) -> dict[str, Any]:
        self._service.drop(obj.lora_name, obj.lora_version)
        return {"lora_version": obj.lora_version}

    async def _unload(self, obj: UnloadLoRAAdapterReqInput) -> dict[str, Any]:
        unloading = asyncio.ensure_future(self._service.unload(obj.lora_name, obj.timeout, abort=obj.abort))
        if obj.abort or await _first(unloading, self._frozen):
            versions = await unloading
        else:
            versions = self._service.registry.named(obj.lora_name)
        return {
            "nbytes": sum(version.info.nbytes for version in versions),
            "num_holders": sum(version.num_holders for version in versions),
        }

    def _require_reader(self) -> Reader:
        self._service.require_enabled()
        assert self._reader is not None
        return self._reader

    async def _replied(self, name: str, work: Awaitable[dict[str, Any]]) -> LoRAUpdateOutput:
        try:
            fields: dict[str, Any] = await work
        except AdapterError as error:
            fields = {"success": False, "error_message": error.message, "error_code": error.code}
        loaded = {n: ref.lora_path or "" for n, ref in self._service.registry.get_all_adapters().items()}
        return LoRAUpdateOutput(lora_name=name, loaded_adapters=loaded, **fields)


async def _first(work: asyncio.Future[Any], event: asyncio.Event) -> bool:
    """Wait for the work or the event, whichever comes first; whether it was the work, which is cancelled if not."""
    work.add_done_callback(lambda _: work.cancelled() or work.exception())  # its caller may be gone before it fails
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        waiting.cancel()
        if not work.done():
            work.cancel()


def _payload(obj: LoadLoRAAdapterFromTensorsReqInput) -> str | list[str]:
    given = [p for p in (obj.serialized_tensors, obj.serialized_named_tensors) if p]
    if len(given) != 1:
        raise AdapterError(
            "invalid_adapter", "Send the tensors in one of serialized_tensors and serialized_named_tensors."
        )
    return given[0]


def _loaded(version: AdapterVersion) -> dict[str, Any]:
    info = version.info
    return {
        "lora_version": version.version_id,
        "digest": info.digest,
        "num_tensors": info.num_tensors,
        "rank": info.rank,
        "nbytes": info.nbytes,
    }


def _staged(version: AdapterVersion) -> dict[str, Any]:
    return {**_loaded(version), "state": version.state.name.lower()}


def _describe(version: AdapterVersion) -> dict[str, Any]:
    return {
        "lora_name": version.name,
        "lora_path": version.ref.lora_path,
        "state": version.state.name.lower(),
        **_loaded(version),
        "num_leases": len(version.leases),
        "num_holders": version.num_holders,
        "pinned": version.pinned,
        "source": "tensors" if version.info.source == TENSOR_SOURCE else "path",
    }
