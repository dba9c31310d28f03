"""Routes that load, unload and list adapters."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sglang.srt.entrypoints.replies import BodyError, json_response
from sglang.srt.entrypoints.requests_io import read_body, runtime_of
from sglang.srt.errors import RETRYABLE_CODES
from sglang.srt.lora.adapter_reader import DEFAULT_MAX_BYTES
from sglang.srt.lora.adapter_source import MAX_JSON_BYTES
from sglang.srt.managers.io_struct import (
    CommitLoRAAdapterReqInput,
    DropLoRAAdapterReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    StageLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
)

router = APIRouter()

_load = msgspec.json.Decoder(LoadLoRAAdapterReqInput, strict=False)
_load_from_tensors = msgspec.json.Decoder(LoadLoRAAdapterFromTensorsReqInput, strict=False)
_stage = msgspec.json.Decoder(StageLoRAAdapterReqInput, strict=False)
_commit = msgspec.json.Decoder(CommitLoRAAdapterReqInput, strict=False)
_drop = msgspec.json.Decoder(DropLoRAAdapterReqInput, strict=False)
_unload = msgspec.json.Decoder(UnloadLoRAAdapterReqInput, strict=False)

_LENGTH_BYTES = 8


@router.post("/load_lora_adapter")
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter from a directory; when this replies, the directory is not needed any more."""
    body = await read_body(request, _load)
    return _reply(await runtime_of(request).manager.load_lora_adapter(body))


@router.post("/load_lora_adapter_from_tensors")
async def load_lora_adapter_from_tensors(request: Request) -> Response:
    """Load an adapter from tensors in the body."""
    body = await read_body(request, _load_from_tensors)
    return _reply(await runtime_of(request).manager.load_lora_adapter_from_tensors(body))


@router.post("/stage_lora_adapter")
async def stage_lora_adapter(request: Request) -> Response:
    """Bring an adapter into memory under a name that goes on to mean what it means, until it is committed.

    The body is JSON; or, as `application/octet-stream`, the size of the JSON in eight bytes (little-endian), the JSON,
    and a safetensors image, of tensors or of a slab (`ops.slab_image`).
    """
    if request.headers.get("content-type", "").startswith("application/octet-stream"):
        body = await _read_framed(request)
    else:
        body = await read_body(request, _stage)
    return _reply(await runtime_of(request).manager.adapter_calls.stage(body))


@router.post("/commit_lora_adapter")
async def commit_lora_adapter(request: Request) -> Response:
    """Make a name mean the version that was staged under it; says so again when it does already."""
    body = await read_body(request, _commit)
    return _reply(await runtime_of(request).manager.adapter_calls.commit(body))


@router.post("/drop_lora_adapter")
async def drop_lora_adapter(request: Request) -> Response:
    """Forget a staged version."""
    body = await read_body(request, _drop)
    return _reply(await runtime_of(request).manager.adapter_calls.drop(body))


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> Response:
    """Take no new requests for an adapter; replies when its memory is free."""
    body = await read_body(request, _unload)
    return _reply(await runtime_of(request).manager.unload_lora_adapter(body))


@router.get("/lora_adapters")
async def lora_adapters(request: Request) -> Response:
    """Every adapter version in memory, with its state and who holds it; and the layout of slabs."""
    return json_response(runtime_of(request).manager.adapter_calls.listing())


async def _read_framed(request: Request) -> StageLoRAAdapterReqInput:
    """JSON and raw tensors, piece by piece: the loop never copies a whole adapter at once."""
    head, image, start = bytearray(), bytearray(), None
    async for piece in request.stream():
        if start is not None:
            image += piece
        else:
            head += piece
            start = _end_of_json(head)
            if start is not None and len(head) > start:
                image += memoryview(head)[start:]
        if len(image) > DEFAULT_MAX_BYTES + MAX_JSON_BYTES:
            raise BodyError(f"The body exceeds this server's limit of {DEFAULT_MAX_BYTES} bytes of tensors.")
    if start is None:
        raise BodyError("The body ends before its JSON does; send eight bytes of its size, the JSON, the tensors.")
    try:
        body = _stage.decode(memoryview(head)[_LENGTH_BYTES:start])
    except (ValueError, RecursionError) as error:
        raise BodyError(f"The JSON of the body is not valid: {error}") from error
    body.tensors = image
    return body


def _end_of_json(head: bytearray) -> int | None:
    """Where the tensors start; None when that much has not come yet."""
    size = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if len(head) >= _LENGTH_BYTES and size > MAX_JSON_BYTES:
        raise BodyError(f"The body announces {size} bytes of JSON; at most {MAX_JSON_BYTES} are taken.")
    end = _LENGTH_BYTES + size
    return end if len(head) >= max(end, _LENGTH_BYTES) else None


def _reply(output: LoRAUpdateOutput) -> Response:
    if output.success:
        return json_response(output)
    retryable = output.error_code in RETRYABLE_CODES
    return json_response(output, HTTPStatus.CONFLICT if retryable else HTTPStatus.BAD_REQUEST)
