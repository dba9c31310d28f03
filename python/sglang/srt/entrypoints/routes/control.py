"""Routes that change the server: flush, abort, pause, continue."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse, Response

from sglang.srt.entrypoints.replies import json_response
from sglang.srt.entrypoints.requests_io import read_body, runtime_of
from sglang.srt.managers.io_struct import AbortReq, ContinueGenerationReqInput, PauseGenerationReqInput

router = APIRouter()

_abort = msgspec.json.Decoder(AbortReq, strict=False)
_pause = msgspec.json.Decoder(PauseGenerationReqInput, strict=False)
_continue = msgspec.json.Decoder(ContinueGenerationReqInput, strict=False)


@router.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(request: Request, timeout: Annotated[float, Query(ge=0.0)] = 0.0) -> Response:
    """Empty the prefix cache, waiting up to `timeout` seconds for the requests that use it; 400 when they stay."""
    success, message = await runtime_of(request).manager.flush_cache(timeout)
    if success:
        return PlainTextResponse("Cache flushed.\n")
    return PlainTextResponse(message or "Flush cache failed.\n", HTTPStatus.BAD_REQUEST)


@router.post("/abort_request")
async def abort_request(request: Request) -> Response:
    """End one request, those whose rid starts alike, an adapter's, or all. An unknown rid may just have ended."""
    body = await read_body(request, _abort, empty_ok=True)
    runtime_of(request).manager.abort_request(
        rid=body.rid, abort_all=body.abort_all, prefix=body.prefix, lora_name=body.lora_name
    )
    return Response()


@router.post("/pause_generation")
async def pause_generation(request: Request) -> Response:
    """Stop generating; returns once nothing runs any more."""
    body = await read_body(request, _pause, empty_ok=True)
    await runtime_of(request).manager.pause_generation(body)
    return json_response({"message": "Generation paused successfully.", "status": "ok"})


@router.post("/continue_generation")
async def continue_generation(request: Request) -> Response:
    """Undo `/pause_generation`."""
    body = await read_body(request, _continue, empty_ok=True)
    await runtime_of(request).manager.continue_generation(body)
    return json_response({"message": "Generation continued successfully.", "status": "ok"})
