"""OpenAI's endpoints: chat and plain completions, models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sglang.srt.entrypoints.openai.calls import OpenAICall
from sglang.srt.entrypoints.openai.chat import ChatCall
from sglang.srt.entrypoints.openai.completions import CompletionCall
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, Chunk, CompletionRequest
from sglang.srt.entrypoints.replies import flat_error, json_response
from sglang.srt.entrypoints.requests_io import (
    DisconnectWatcher,
    event_stream,
    only_item,
    read_body,
    require_json,
    runtime_of,
)
from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.response import OutputChunk

router = APIRouter()

_chat = msgspec.json.Decoder(ChatCompletionRequest, strict=False)
_completion = msgspec.json.Decoder(CompletionRequest, strict=False)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a chat."""
    require_json(request)
    body = await read_body(request, _chat)
    return await _serve(request, ChatCall(runtime_of(request), body))


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    require_json(request)
    body = await read_body(request, _completion)
    return await _serve(request, CompletionCall(runtime_of(request), body))


async def _serve(request: Request, call: OpenAICall) -> Response:
    runtime = runtime_of(request)
    native = await call.native_request()
    watcher = DisconnectWatcher(request.receive)
    if native.stream:
        return await event_stream(_chunks(call, runtime.stream(native, watcher)), _stream_error)
    result = await only_item(runtime.generate(native, watcher))
    return json_response(call.reply(result if isinstance(result, list) else [result]))


async def _chunks(call: OpenAICall, outputs: AsyncGenerator[OutputChunk, None]) -> AsyncGenerator[Chunk, None]:
    async with contextlib.aclosing(outputs):  # a stream that ends early must end its request
        async for chunk in call.chunks(outputs):
            yield chunk


def _stream_error(error: RequestError | ServiceUnavailableError) -> dict[str, Any]:
    return {"error": flat_error(error.message, error.status, error.err_type)}


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base model, then its adapters."""
    return json_response({"object": "list", "data": _models(request)})


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> Response:
    """The base model, or an adapter, by its name; 404 for anything else."""
    for known in _models(request):
        if known["id"] == model:
            return json_response(known)
    error = {
        "message": f"The model '{model}' does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    return json_response({"error": error}, HTTPStatus.NOT_FOUND)


def _models(request: Request) -> list[dict[str, Any]]:
    runtime = runtime_of(request)
    base = runtime.config.server.served_model_name
    adapters = [
        _model(ref.lora_name, ref.lora_path, base, None)
        for ref in runtime.manager.lora_registry.get_all_adapters().values()
    ]
    return [_model(base, base, None, runtime.config.model.context_length), *adapters]


def _model(name: str | None, root: str | None, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sglang",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }
