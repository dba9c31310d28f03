"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.request_state import Alternatives
from sglang.srt.parser.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class TokenTexts:
    """Text of single tokens, special ones included; remembers what it has decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The token's text; bytes that are no text on their own show as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def raw(self, token_id: int) -> list[int]:
        """The token's bytes: exact where the tokenizer works on bytes, else those of its text."""
        exact = self._tokenizer.token_bytes
        return list(self(token_id).encode() if exact is None else exact[token_id])


@dataclass(slots=True)
class Positions:
    """Log-probabilities of consecutive tokens, as columns of equal length.

    Fields:
        logprobs: None for the first prompt token, which has none.
        top: alternatives, best first; empty where not asked for or not available.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[Alternatives] = field(default_factory=list)

    @classmethod
    def from_native(cls, meta: dict[str, Any], side: str) -> Positions:
        """Read `meta_info` of a native reply; `side` is "input" or "output"."""
        entries = meta.get(f"{side}_token_logprobs") or []
        top = meta.get(f"{side}_top_logprobs") or [None] * len(entries)
        return cls(
            ids=[entry[1] for entry in entries],
            logprobs=[entry[0] for entry in entries],
            top=[[(entry[0], entry[1]) for entry in position or ()] for position in top],
        )

    def __add__(self, other: Positions) -> Positions:
        """These positions followed by the others."""
        return Positions(self.ids + other.ids, self.logprobs + other.logprobs, self.top + other.top)


def chat_logprobs(positions: Positions, texts: TokenTexts) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for token_id, logprob, top in zip(positions.ids, positions.logprobs, positions.top, strict=True):
        entry = _chat_entry(texts, token_id, logprob)
        entry["top_logprobs"] = [_chat_entry(texts, other, value) for value, other in top]
        content.append(entry)
    return {"content": content}


def _chat_entry(texts: TokenTexts, token_id: int, logprob: float | None) -> dict[str, Any]:
    return {"token": texts(token_id), "bytes": texts.raw(token_id), "logprob": _finite(logprob)}


def completion_logprobs(
    positions: Positions, texts: TokenTexts, *, with_top: bool, offset: int = 0
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion choice.

    Args:
        with_top: whether alternatives were asked for (`logprobs` > 0).
        offset: characters before the first position.

    Returns:
        The object, and the offset behind its last token.
    """
    tokens = [texts(token_id) for token_id in positions.ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    result = {
        "text_offset": offsets,
        "token_logprobs": [_finite(value) for value in positions.logprobs],
        "tokens": tokens,
        "top_logprobs": [_by_text(top, texts) for top in positions.top] if with_top else [],
    }
    return result, offset


def _by_text(top: Alternatives, texts: TokenTexts) -> dict[str, float | None] | None:
    if not top:
        return None
    # Several ids can decode to one text: keep the likeliest, which comes first.
    return {texts(token_id): _finite(logprob) for logprob, token_id in reversed(top)}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, FLOOR)
