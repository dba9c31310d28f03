"""Routes with which this server joins and leaves a trainer's group, for weights that are broadcast."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sglang.srt.entrypoints.replies import json_response
from sglang.srt.entrypoints.requests_io import read_body, runtime_of
from sglang.srt.managers.io_struct import (
    DestroyWeightsUpdateGroupReqInput,
    InitWeightsUpdateGroupReqInput,
    WeightsUpdateGroupOutput,
)

router = APIRouter()

_init = msgspec.json.Decoder(InitWeightsUpdateGroupReqInput, strict=False)
_destroy = msgspec.json.Decoder(DestroyWeightsUpdateGroupReqInput, strict=False)


@router.post("/init_weights_update_group")
async def init_weights_update_group(request: Request) -> Response:
    """Join a group; replies when all members have."""
    body = await read_body(request, _init)
    return _reply(await runtime_of(request).manager.group_calls.join(body))


@router.post("/destroy_weights_update_group")
async def destroy_weights_update_group(request: Request) -> Response:
    """Leave a group."""
    body = await read_body(request, _destroy, empty_ok=True)
    return _reply(await runtime_of(request).manager.group_calls.leave(body))


def _reply(output: WeightsUpdateGroupOutput) -> Response:
    return json_response(output, HTTPStatus.OK if output.success else HTTPStatus.BAD_REQUEST)
