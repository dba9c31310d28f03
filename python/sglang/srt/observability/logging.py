"""Log set-up of a process, and the log of requests (--log-requests).

Standard library only, so both processes can use it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from sglang.srt.errors import ConfigError
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_state import RequestMetrics, RequestRecord
from sglang.srt.parser.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = "[%(asctime)s %(levelname)s %(name)s] %(message)s"
SHORT_CHARACTERS = 2048
"""Longest text or list of ids in the log of requests below level 3."""


def configure_logging(level: str) -> None:
    """Send the root logger to stderr at `level` (a name in any case); replaces what was set up before.

    Raises:
        ConfigError: no such level.
    """
    try:
        logging.basicConfig(level=level.upper(), format=FORMAT, stream=sys.stderr, force=True)
    except ValueError as error:
        raise ConfigError(f"--log-level {level} must be debug, info, warning, error or critical") from error


class RequestLog:
    """Writes one line when a request comes and one when it has ended.

    Args:
        level: 0 names and counts, 1 also sampling parameters, 2 also shortened input and output, 3 all of them.
        tokenizer: decodes outputs; None logs their ids.
    """

    def __init__(self, level: int, tokenizer: Tokenizer | None) -> None:
        self._level = level
        self._tokenizer = tokenizer

    def received(self, obj: GenerateReqInput) -> None:
        """Log a request that has just come."""
        if obj.no_logs:
            return
        entry: dict[str, Any] = {"rid": obj.rid, "stream": obj.stream}
        if self._level >= 1:
            entry["sampling_params"] = obj.sampling_params
        if self._level >= 2:
            entry["input"] = self._short(obj.text if obj.text is not None else obj.input_ids)
        self._write("received", entry)

    def first_token(self, record: RequestRecord, seconds: float) -> None:
        """Not logged."""

    def inter_token(self, record: RequestRecord, seconds: float, num_tokens: int) -> None:
        """Not logged."""

    def finished(self, record: RequestRecord, seconds: float) -> None:
        """Log a sequence that has ended."""
        entry: dict[str, Any] = {
            "rid": record.rid,
            "finish_reason": record.finish_reason,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "seconds": round(seconds, 4),
        }
        if self._level >= 2:
            ids = record.output_ids
            entry["output"] = self._short(ids if self._tokenizer is None else self._tokenizer.decode(ids))
        self._write("finished", entry)

    def _short(self, value: Any) -> Any:
        if self._level >= 3:
            return value
        text = value if isinstance(value, str) else str(value)
        return text if len(text) <= SHORT_CHARACTERS else f"{text[:SHORT_CHARACTERS]}… ({len(text)} characters)"

    def _write(self, event: str, entry: dict[str, Any]) -> None:
        logger.info("request %s: %s", event, msgspec.json.encode(entry).decode())


class Observers:
    """Several observers of requests as one."""

    def __init__(self, observers: Sequence[RequestMetrics]) -> None:
        self._observers = observers

    def first_token(self, record: RequestRecord, seconds: float) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.first_token(record, seconds)

    def inter_token(self, record: RequestRecord, seconds: float, num_tokens: int) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.inter_token(record, seconds, num_tokens)

    def finished(self, record: RequestRecord, seconds: float) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.finished(record, seconds)
