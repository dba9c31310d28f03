"""What chat and plain completions have in common: identity of a call, its native request, its usage, its end."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec

from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.entrypoints.openai.protocol import ChatChunkChoice, Chunk, CommonRequest, CompletionChunkChoice
from sglang.srt.entrypoints.openai.sampling import cache_key, sampling_params
from sglang.srt.entrypoints.openai.usage import Counts, native_counts, usage
from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.response import OutputChunk

ADAPTER_FIELDS = ("lora_name", "lora_version", "lora_version_spans")
"""See RequestRecord.adapter_info."""


class OpenAICall(Protocol):
    """One request to an OpenAI endpoint."""

    async def native_request(self) -> GenerateReqInput:
        """What the TokenizerManager is to run; raises RequestError for what it cannot."""

    def reply(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Body of the reply, from the native reply's items."""

    def chunks(self, outputs: AsyncGenerator[OutputChunk, None]) -> AsyncGenerator[Chunk, None]:
        """Events of the stream, from the native deltas."""


class CallContext:
    """Identity and bookkeeping of one call.

    Attributes:
        id: `id` of the reply, which is also the rid that `/abort_request` takes.
        n: samples of each prompt.
    """

    def __init__(self, runtime: Runtime, request: CommonRequest) -> None:
        server = runtime.config.server
        self._server = server
        self._request = request
        rid = request.rid or uuid.uuid4().hex
        self._rid = rid
        self.id = rid if isinstance(rid, str) else rid[0]
        self.created = int(time.time())
        self.model = request.model or server.served_model_name
        self.n = 1 if request.n is None else request.n
        self._counts: dict[int, Counts] = {}
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)

    def native_request(self, max_new_tokens: int, extra_params: dict[str, Any], **fields: Any) -> GenerateReqInput:
        """The native request with the fields every endpoint shares."""
        request = self._request
        params = {**sampling_params(request, self._server, max_new_tokens), **extra_params}
        return GenerateReqInput(
            rid=self._rid,
            sampling_params=params,
            stream=bool(request.stream),
            model=request.model,
            lora_path=request.lora_path,
            extra_key=cache_key(request),
            priority=request.priority,
            custom_logit_processor=request.custom_logit_processor,
            session_params=request.session_params,
            return_hidden_states=bool(request.return_hidden_states),
            **fields,
        )

    def reply(self, kind: str, choices: list[dict[str, Any]], items: list[dict[str, Any]]) -> dict[str, Any]:
        """The reply's envelope."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage(native_counts(items), self.n, self._server.enable_cache_report),
            "metadata": _metadata([item["meta_info"] for item in items]),
        }

    def count(self, output: OutputChunk) -> None:
        """Note the token counts of a choice."""
        record = output.record
        self._counts[output.index] = (record.prompt_tokens, record.completion_tokens, record.cached_tokens)

    def chunk(self, kind: str, output: OutputChunk, choice: ChatChunkChoice | CompletionChunkChoice) -> Chunk:
        """An event with one choice; the choice's last one says which adapter made it."""
        counts = None
        if self._continuous_usage:
            counts = usage({choice.index: self._counts[choice.index]}, self.n, self._server.enable_cache_report)
        choices: Any = [choice]
        adapter = _texts(output.record.adapter_info()) if choice.finish_reason is not None else None
        return Chunk(
            id=self.id,
            object=kind,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=counts,
            metadata=adapter or None,
        )

    def final_chunks(self, kind: str) -> list[Chunk]:
        """The closing usage event, when asked for."""
        if not self._include_usage:
            return []
        totals = usage(self._counts, self.n, self._server.enable_cache_report)
        return [Chunk(id=self.id, object=kind, created=self.created, model=self.model, choices=[], usage=totals)]


def _metadata(metas: list[dict[str, Any]]) -> dict[str, str]:
    """Weights behind a reply: the first choice's, and every choice's where they differ."""
    adapters = [{name: meta[name] for name in ADAPTER_FIELDS if name in meta} for meta in metas]
    metadata = {"weight_version": metas[0]["weight_version"], **adapters[0]}
    if any(adapter != adapters[0] for adapter in adapters):
        metadata["choices"] = adapters
    return _texts(metadata)


def _texts(fields: dict[str, Any]) -> dict[str, str]:
    """OpenAI's metadata maps strings to strings: other values become JSON text."""
    return {k: v if isinstance(v, str) else msgspec.json.encode(v).decode() for k, v in fields.items()}


def raise_if_failed(finish_reason: dict[str, Any] | None) -> None:
    """Turn an abort that carries a status into the error it stands for; other ends pass.

    Raises:
        ServiceUnavailableError: status 5xx.
        RequestError: status 4xx.
    """
    if finish_reason is None or finish_reason["type"] != "abort" or not finish_reason.get("status_code"):
        return
    status, message = int(finish_reason["status_code"]), finish_reason.get("message") or "Generation aborted."
    if status >= 500:
        raise ServiceUnavailableError(message)
    raise RequestError(message, status, finish_reason.get("err_type") or "BadRequestError")


def finish_fields(finish_reason: dict[str, Any] | None) -> dict[str, Any]:
    """`finish_reason` and `matched_stop` of a choice."""
    if finish_reason is None:
        return {"finish_reason": None, "matched_stop": None}
    return {"finish_reason": finish_reason["type"], "matched_stop": finish_reason.get("matched")}
