"""Routes that load, unload and list adapters."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sglang.srt.entrypoints.replies import json_response
from sglang.srt.entrypoints.requests_io import read_body, runtime_of
from sglang.srt.errors import RETRYABLE_CODES
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)

router = APIRouter()

_load = msgspec.json.Decoder(LoadLoRAAdapterReqInput, strict=False)
_load_from_tensors = msgspec.json.Decoder(LoadLoRAAdapterFromTensorsReqInput, strict=False)
_unload = msgspec.json.Decoder(UnloadLoRAAdapterReqInput, strict=False)


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


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> Response:
    """Take no new requests for an adapter; replies when its memory is free."""
    body = await read_body(request, _unload)
    return _reply(await runtime_of(request).manager.unload_lora_adapter(body))


@router.get("/lora_adapters")
async def lora_adapters(request: Request) -> Response:
    """Every adapter version in memory, with its state and who holds it."""
    return json_response(runtime_of(request).manager.adapter_calls.listing())


def _reply(output: LoRAUpdateOutput) -> Response:
    if output.success:
        return json_response(output)
    retryable = output.error_code in RETRYABLE_CODES
    return json_response(output, HTTPStatus.CONFLICT if retryable else HTTPStatus.BAD_REQUEST)
