"""What a client is told: finish reasons, native reply bodies, and the chunks the OpenAI layer builds on.

Used by `request_lifecycle` (finish reasons) and TokenizerManager (bodies). Reads records, changes only how much of one
has been sent.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo
from sglang.srt.managers.request_state import Alternatives, RequestRecord
from sglang.srt.parser.tokenizer import Tokenizer

WAITING_ABORT = FinishInfo(message="Abort in waiting queue", was_running=False)
"""End of a request that was aborted before it had been sent to the scheduler."""

Entry = list[Any]
"""`[log-probability or None, token id, text or None]`."""


class OutputChunk(msgspec.Struct):
    """What one record has newly produced.

    Fields:
        index: place of the record in the reply (input-major, then sample).
        text, token_ids, logprobs: deltas; `logprobs` is empty unless asked for.
        output_top, output_ids_logprobs: alternatives for each of `token_ids`, None unless asked for.
        finish_reason: set on the record's last chunk.
        record: the sequence itself: prompt_tokens, cached_tokens, completion_tokens, extras, meta_info().
    """

    index: int
    rid: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    output_top: list[Alternatives] | None
    output_ids_logprobs: list[Alternatives] | None
    finish_reason: dict[str, Any] | None
    record: RequestRecord


def finish_reason(finish: Finish, info: FinishInfo, completion_tokens: int) -> dict[str, Any]:
    """`finish_reason` of a terminal row, in upstream's form."""
    if finish is Finish.STOP:
        return {"type": "stop", "matched": info.message or None if info.matched is None else info.matched}
    if finish is Finish.LENGTH:
        return {"type": "length", "length": completion_tokens}
    if info.status_code:
        return {
            "type": "abort",
            "message": info.message,
            "status_code": info.status_code,
            "err_type": info.err_type or None,
        }
    if not info.was_running:
        return {"type": "abort", "message": info.message or WAITING_ABORT.message}
    return {"type": "abort", "message": info.message or "Aborted", "status_code": None, "err_type": None}


def abort_error(reason: dict[str, Any]) -> Exception | None:
    """The error a non-streaming client gets for this finish reason: None unless the scheduler refused the request."""
    status = reason.get("status_code")
    if not status:
        return None
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return RequestError(reason["message"], status, reason["err_type"] or "BadRequestError")
    return ServiceUnavailableError(reason["message"])


def take_chunk(record: RequestRecord) -> OutputChunk:
    """Everything the record has produced since the last chunk."""
    text, start = record.take_text(), record.sent_tokens
    options = record.prompt.logprobs
    record.sent_tokens = len(record.output_ids)
    return OutputChunk(
        index=record.index,
        rid=record.rid,
        text=text,
        token_ids=record.output_ids[start:],
        logprobs=record.logprobs[start:],
        output_top=record.extras.output_top[start:] if options and options.top_num else None,
        output_ids_logprobs=record.extras.output_ids[start:] if options and options.token_ids else None,
        finish_reason=record.finish_reason,
        record=record,
    )


class NativeReply:
    """Renders one record as `/generate` bodies, each cumulative unless `incremental`.

    Log-probability entries are built once; a body copies the lists, so that a caller may keep it.
    """

    def __init__(self, record: RequestRecord, tokenizer: Tokenizer | None, *, incremental: bool = False) -> None:
        self.record = record
        self.incremental = incremental
        options = record.prompt.logprobs
        self._tokenizer = tokenizer if options is not None and options.with_text else None
        self._text = ""
        self._entries: list[Entry] = []
        self._top: list[list[Entry] | None] = []
        self._ids: list[list[Entry] | None] = []

    def render(self) -> dict[str, Any]:
        """The body as of now."""
        record = self.record
        start = record.sent_tokens if self.incremental else 0
        delta = record.take_text()
        body: dict[str, Any] = {}
        if record.detokenizer is not None:
            self._text = delta if self.incremental else self._text + delta
            body["text"] = self._text
        body["output_ids"] = record.output_ids[start:]
        body["meta_info"] = record.meta_info()
        if record.prompt.logprobs is not None:
            body["meta_info"].update(self._logprobs(start))
        if record.group.stream and record.group.is_list:
            body["index"] = record.index
        record.sent_tokens = len(record.output_ids)
        return body

    def _logprobs(self, start: int) -> dict[str, Any]:
        record, options, extras = self.record, self.record.prompt.logprobs, self.record.extras
        assert options is not None
        built = len(self._entries)
        self._entries += self._positions(record.logprobs[built:], record.output_ids[built:])
        first = max(options.start, 0)
        fields: dict[str, Any] = {
            "input_token_logprobs": self._positions(extras.input_logprobs, record.prompt.token_ids[first:]),
            "output_token_logprobs": self._entries[start:],
            "output_token_logprobs_length": len(self._entries) - start,
        }
        if options.top_num:
            self._top += [self._alternatives(a) for a in extras.output_top[len(self._top) :]]
            fields["input_top_logprobs"] = [self._alternatives(a) for a in extras.input_top]
            fields["output_top_logprobs"] = self._top[start:]
        if options.token_ids:
            self._ids += [self._alternatives(a) for a in extras.output_ids[len(self._ids) :]]
            fields["input_token_ids_logprobs"] = [self._alternatives(a) for a in extras.input_ids]
            fields["output_token_ids_logprobs"] = self._ids[start:]
        return fields

    def _positions(self, logprobs: list[float] | list[float | None], tokens: list[int]) -> list[Entry]:
        return [[value, token, self._token_text(token)] for value, token in zip(logprobs, tokens, strict=False)]

    def _alternatives(self, alternatives: Alternatives) -> list[Entry] | None:
        return [[value, token, self._token_text(token)] for value, token in alternatives] or None

    def _token_text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)
