"""`/generate`: the native endpoint."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sglang.srt.entrypoints.replies import json_response, native_error
from sglang.srt.entrypoints.requests_io import DisconnectWatcher, event_stream, only_item, read_body, runtime_of
from sglang.srt.managers.io_struct import GenerateReqInput

router = APIRouter()

_decoder = msgspec.json.Decoder(GenerateReqInput, strict=False)


@router.api_route("/generate", methods=["POST", "PUT"])
async def generate(request: Request) -> Response:
    """One prompt or a batch: a JSON reply, or cumulative events with `stream`."""
    body = await read_body(request, _decoder)
    replies = runtime_of(request).generate(body, DisconnectWatcher(request.receive))
    if body.stream:
        return await event_stream(replies, native_error)
    return json_response(await only_item(replies))
