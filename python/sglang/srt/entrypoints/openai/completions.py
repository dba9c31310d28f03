"""`/v1/completions`: one call, without its HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.entrypoints.openai.calls import CallContext, finish_fields, raise_if_failed
from sglang.srt.entrypoints.openai.logprobs import Positions, TokenTexts, completion_logprobs
from sglang.srt.entrypoints.openai.prompts import tokenizer_of
from sglang.srt.entrypoints.openai.protocol import Chunk, CompletionChunkChoice, CompletionRequest
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_state import RequestRecord
from sglang.srt.managers.response import OutputChunk

KIND = "text_completion"
DEFAULT_MAX_TOKENS = 16


class CompletionCall:
    """One plain completion, of one or several prompts."""

    def __init__(self, runtime: Runtime, request: CompletionRequest) -> None:
        self._request = request
        self._tokenizer = tokenizer_of(runtime.manager)
        self._texts = TokenTexts(self._tokenizer)
        self._context = CallContext(runtime, request)
        self._offsets: dict[int, int] = {}

    async def native_request(self) -> GenerateReqInput:
        """Text prompts stay text, token prompts ids; `echo` with `logprobs` asks for the prompt's log-probabilities."""
        request = self._request
        self._check()
        return self._context.native_request(
            DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
            {},
            return_logprob=request.logprobs is not None,
            top_logprobs_num=request.logprobs or 0,
            logprob_start_len=0 if request.echo and request.logprobs is not None else -1,
            **self._prompt_fields(),
        )

    def _check(self) -> None:
        request = self._request
        if request.suffix:
            raise RequestError("suffix is not supported; put the whole context into the prompt.")
        if request.best_of is not None and request.best_of != self._context.n:
            raise RequestError(f"best_of {request.best_of} is not supported; ask for n samples and choose among them.")

    def _prompt_fields(self) -> dict[str, Any]:
        prompt: Any = self._request.prompt
        if not prompt or (isinstance(prompt, list) and any(item in ("", []) for item in prompt)):
            raise RequestError("Prompt cannot be empty")
        if isinstance(prompt, str) or all(isinstance(item, str) for item in prompt):
            return {"text": prompt}
        if any(isinstance(item, str) for item in prompt):
            raise RequestError("prompt mixes texts and token ids; send one kind.")
        return {"input_ids": prompt}

    def reply(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Body of the reply."""
        choices = [self._choice(index, item) for index, item in enumerate(items)]
        return self._context.reply(KIND, choices, items)

    def _choice(self, index: int, item: dict[str, Any]) -> dict[str, Any]:
        meta = item["meta_info"]
        text, logprobs = item["text"], None
        positions = Positions.from_native(meta, "output")
        if self._request.echo:
            text = self._echo(index) + text
            positions = Positions.from_native(meta, "input") + positions
        if self._request.logprobs is not None:
            logprobs = self._format(index, positions)
        return {"index": index, "text": text, "logprobs": logprobs, **finish_fields(meta["finish_reason"])}

    async def chunks(self, outputs: AsyncGenerator[OutputChunk, None]) -> AsyncGenerator[Chunk, None]:
        """Events: the text as it comes (first the prompt, with `echo`), and the usage."""
        started: set[int] = set()
        async for output in outputs:
            raise_if_failed(output.finish_reason)
            self._context.count(output)
            first = output.index not in started
            started.add(output.index)
            yield self._chunk(output, with_prompt=first and bool(self._request.echo))
        for chunk in self._context.final_chunks(KIND):
            yield chunk

    def _chunk(self, output: OutputChunk, with_prompt: bool) -> Chunk:
        text, logprobs = output.text, None
        top = output.output_top or [[] for _ in output.token_ids]
        if with_prompt:
            text = self._echo(output.index) + text
        if self._request.logprobs is not None:
            positions = Positions(output.token_ids, list(output.logprobs), top)
            if with_prompt:
                positions = _prompt_positions(output.record) + positions
            logprobs = self._format(output.index, positions)
        choice = CompletionChunkChoice(
            index=output.index, text=text, logprobs=logprobs, **finish_fields(output.finish_reason)
        )
        return self._context.chunk(KIND, output, choice)

    def _format(self, index: int, positions: Positions) -> dict[str, Any]:
        formatted, self._offsets[index] = completion_logprobs(
            positions, self._texts, with_top=bool(self._request.logprobs), offset=self._offsets.get(index, 0)
        )
        return formatted

    def _echo(self, index: int) -> str:
        prompt: Any = self._request.prompt
        number = index // self._context.n
        if isinstance(prompt, list) and isinstance(prompt[0], str | list):
            prompt = prompt[number]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=self._request.skip_special_tokens is not False)


def _prompt_positions(record: RequestRecord) -> Positions:
    extras = record.extras
    ids = record.prompt.token_ids[: len(extras.input_logprobs)]
    return Positions(ids, list(extras.input_logprobs), extras.input_top or [[] for _ in ids])
