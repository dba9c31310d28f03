"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sglang.srt.entrypoints.openai.prompts import encode_chat, tokenizer_of
from sglang.srt.entrypoints.openai.protocol import DetokenizeRequest, TokenizeRequest
from sglang.srt.entrypoints.replies import json_response
from sglang.srt.entrypoints.requests_io import read_body, runtime_of
from sglang.srt.errors import RequestError
from sglang.srt.parser.tokenizer import Tokenizer

router = APIRouter()


_tokenize = msgspec.json.Decoder(TokenizeRequest, strict=False)
_detokenize = msgspec.json.Decoder(DetokenizeRequest, strict=False)


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, as the model would see them."""
    body = await read_body(request, _tokenize)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Exactly one of 'prompt' or 'messages' must be provided.")
    runtime = runtime_of(request)
    tokenizer = tokenizer_of(runtime.manager)
    tokens: Any
    if body.messages is not None:
        tokens = await encode_chat(tokenizer, body.messages, body)
    else:
        tokens = await asyncio.to_thread(_encode, tokenizer, body.prompt, body.add_special_tokens)
    count = [len(ids) for ids in tokens] if isinstance(body.prompt, list) else len(tokens)
    reply = {"tokens": tokens, "count": count, "max_model_len": runtime.config.model.context_length}
    return json_response(reply)


def _encode(tokenizer: Tokenizer, prompt: str | list[str] | None, special: bool) -> list[Any]:
    if isinstance(prompt, list):
        return [tokenizer.encode(text, add_special_tokens=special) for text in prompt]
    return tokenizer.encode(prompt or "", add_special_tokens=special)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of token ids."""
    body = await read_body(request, _detokenize)
    tokenizer = tokenizer_of(runtime_of(request).manager)
    if any(isinstance(item, list) for item in body.tokens):
        text: Any = [_decode(tokenizer, item, body.skip_special_tokens) for item in body.tokens]
    else:
        text = _decode(tokenizer, body.tokens, body.skip_special_tokens)
    return json_response({"text": text})


def _decode(tokenizer: Tokenizer, ids: Any, skip_special_tokens: bool) -> str:
    if not isinstance(ids, list) or any(isinstance(i, list) for i in ids):
        raise RequestError("tokens mixes ids and lists; send a flat list, or one list per text.")
    for i in ids:
        if not 0 <= i < tokenizer.vocab_size:
            raise RequestError(f"token id {i} is outside the vocabulary [0, {tokenizer.vocab_size - 1}].")
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
