"""`/v1/chat/completions`: one call, without its HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.entrypoints.openai.calls import CallContext, finish_fields, raise_if_failed
from sglang.srt.entrypoints.openai.logprobs import Positions, TokenTexts, chat_logprobs
from sglang.srt.entrypoints.openai.prompts import encode_chat, tokenizer_of
from sglang.srt.entrypoints.openai.protocol import ChatChunkChoice, ChatCompletionRequest, Chunk, Delta
from sglang.srt.entrypoints.openai.sampling import tool_constraint
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.response import OutputChunk

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


class ChatCall:
    """One chat completion."""

    def __init__(self, runtime: Runtime, request: ChatCompletionRequest) -> None:
        self._request = request
        self._context_length = runtime.config.model.context_length
        self._tokenizer = tokenizer_of(runtime.manager)
        self._texts = TokenTexts(self._tokenizer)
        self._context = CallContext(runtime, request)

    async def native_request(self) -> GenerateReqInput:
        """The chat as token ids; without a limit the answer may fill the rest of the context."""
        request = self._request
        extra = tool_constraint(request)
        if request.tools and request.tool_choice != "none":
            extra["skip_special_tokens"] = False  # models mark tool calls with special tokens
        ids = await encode_chat(self._tokenizer, request.messages, request)
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        if limit is None:
            limit = max(self._context_length - len(ids), 1)
        return self._context.native_request(
            limit,
            extra,
            input_ids=ids,
            return_logprob=bool(request.logprobs),
            top_logprobs_num=request.top_logprobs or 0,
        )

    def reply(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Body of the reply."""
        choices = [self._choice(index, item) for index, item in enumerate(items)]
        return self._context.reply(KIND, choices, items)

    def _choice(self, index: int, item: dict[str, Any]) -> dict[str, Any]:
        meta = item["meta_info"]
        message = {"role": "assistant", "content": item["text"], "reasoning_content": None, "tool_calls": None}
        logprobs = None
        if self._request.logprobs:
            logprobs = chat_logprobs(Positions.from_native(meta, "output"), self._texts)
        return {"index": index, "message": message, "logprobs": logprobs, **finish_fields(meta["finish_reason"])}

    async def chunks(self, outputs: AsyncGenerator[OutputChunk, None]) -> AsyncGenerator[Chunk, None]:
        """Events: the role, the text as it comes, the finish reason (for each choice), and the usage."""
        started: set[int] = set()
        async for output in outputs:
            raise_if_failed(output.finish_reason)
            self._context.count(output)
            if output.index not in started:
                started.add(output.index)
                yield self._chunk(output, Delta(reasoning_content=None, role="assistant", content=""))
            logprobs = self._logprobs(output)
            if output.text or logprobs:
                yield self._chunk(output, Delta(reasoning_content=None, content=output.text), logprobs=logprobs)
            if output.finish_reason is not None:
                yield self._chunk(output, Delta(reasoning_content=None), **finish_fields(output.finish_reason))
        for chunk in self._context.final_chunks(CHUNK_KIND):
            yield chunk

    def _chunk(self, output: OutputChunk, delta: Delta, **fields: Any) -> Chunk:
        return self._context.chunk(CHUNK_KIND, output, ChatChunkChoice(index=output.index, delta=delta, **fields))

    def _logprobs(self, output: OutputChunk) -> dict[str, Any] | None:
        if not self._request.logprobs or not output.token_ids:
            return None
        top = output.output_top or [[] for _ in output.token_ids]
        return chat_logprobs(Positions(output.token_ids, list(output.logprobs), top), self._texts)
