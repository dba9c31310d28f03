"""Turns one sequence's token ids into text as they arrive, and finds where the text must stop.

One `Detokenizer` per sequence, owned by its request record in the front. Nothing here ever rebuilds the whole text:
the work for a token does not depend on how many came before.
Invariant: the deltas joined equal the decoding of all ids, however the ids were cut into pushes. The one exception, a
byte-fallback decoder (SentencePiece) given bytes that are valid UTF-8 up to a token and broken after it: text that has
gone out cannot be taken back, so only the broken bytes become U+FFFD, where decoding at once replaces the whole run.

Byte-level tokenizers (GPT-2's kind: Llama 3, Qwen, SmolLM, newer Mistral) go through a table of bytes per token and an
incremental UTF-8 decoder: exact, in half the time of `DecodeStream`, or a third when several tokens come at once.
`DecodeStream` serves every other decoder.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from sglang.srt.managers.stop_matcher import StopMatcher
from sglang.srt.parser.tokenizer import TokenBytes, Tokenizer

MAX_PENDING = 64
"""Tokens a decoder may swallow before their text goes out as it is; an unfinished character takes at most four."""


class Detokenized(msgspec.Struct, frozen=True, gc=False):
    """What a push gave.

    Fields:
        text: new text, to append to what came before.
        matched: the stop string or pattern that ended the text, or None.
        num_tokens: how many of the pushed ids belong to the output: up to the one that completed the match.
    """

    text: str
    matched: str | None
    num_tokens: int


class Detokenizer:
    """Incremental text of one sequence.

    Args:
        skip_special_tokens: leave special tokens out of the text (stop strings still match them).
        stop_strings, stop_patterns: what ends the text; the match is cut off together with all that follows it.
        no_stop_trim: keep the match (never what follows it).
        min_new_tokens: matches completed by an earlier token than this many are ignored.

    Raises:
        RequestError: a stop pattern does not compile.
    """

    __slots__ = ("_hidden", "_matched", "_matcher", "_min_new_tokens", "_num_tokens", "_stream", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        stop_strings: Sequence[str] = (),
        stop_patterns: Sequence[str] = (),
        no_stop_trim: bool = False,
        min_new_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream = _text_stream(tokenizer)
        self._matcher = (
            StopMatcher(stop_strings, stop_patterns, no_stop_trim) if stop_strings or stop_patterns else None
        )
        self._min_new_tokens = min_new_tokens
        self._num_tokens = 0
        self._matched = False

    def push(self, ids: Sequence[int]) -> Detokenized:
        """Add token ids; returns their text, as far as it is certain. Nothing may be pushed after a match."""
        assert not self._matched, "the text has ended"
        if self._matcher is None:
            return Detokenized(self._visible(ids), None, len(ids))
        texts: list[str] = []
        for count, token_id in enumerate(ids, 1):
            text, matched = self._step(self._matcher, token_id)
            texts.append(text)
            if matched is not None:
                self._matched = True
                return Detokenized("".join(texts), matched, count)
        return Detokenized("".join(texts), None, len(ids))

    def finish(self) -> str:
        """The rest of the text, for a sequence that ended otherwise: held-back text, U+FFFD for unfinished bytes."""
        if self._matched:
            return ""
        rest = self._stream.finish()
        if self._matcher is None:
            return rest
        released, _ = self._matcher.push(rest, accept=False)
        return released + self._matcher.flush()

    def _visible(self, ids: Sequence[int]) -> str:
        hidden = self._hidden
        if len(ids) == 1:
            return "" if ids[0] in hidden else self._stream.step(ids[0])
        return self._stream.feed([i for i in ids if i not in hidden])

    def _step(self, matcher: StopMatcher, token_id: int) -> tuple[str, str | None]:
        self._num_tokens += 1
        accept = self._num_tokens >= self._min_new_tokens
        if token_id in self._hidden:
            text = self._tokenizer.id_to_token(token_id) or ""
            return matcher.push(text, hidden=True, accept=accept)
        return matcher.push(self._stream.step(token_id), accept=accept)


class _TextStream(Protocol):
    """Ids in, text out."""

    def step(self, token_id: int) -> str:
        """Text that this id completes."""

    def feed(self, ids: Iterable[int]) -> str:
        """Text that these ids complete."""

    def finish(self) -> str:
        """Text of what is still incomplete."""


def _text_stream(tokenizer: Tokenizer) -> _TextStream:
    table = tokenizer.token_bytes
    return _DecodedStream(tokenizer.backend) if table is None else _ByteStream(table)


class _ByteStream:
    """Byte-level decoders: the text is the UTF-8 decoding of the tokens' bytes, one after the other."""

    __slots__ = ("_rest", "_table")

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._rest = b""  # an unfinished character, at most three bytes

    def step(self, token_id: int) -> str:
        return self._decode(self._rest + self._table[token_id])

    def feed(self, ids: Iterable[int]) -> str:
        table = self._table
        return self._decode(self._rest + b"".join([table[i] for i in ids]))

    def _decode(self, data: bytes) -> str:
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def finish(self) -> str:
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", "replace")


class _DecodedStream:
    """Any other decoder, through `DecodeStream`, which needs help in two cases.

    It raises when bytes break a run whose beginning it has already given out, and it decodes again, with every token,
    all tokens that have produced nothing yet. Both end the run here: its text goes out and a new stream starts with
    the last good tokens as context.
    """

    __slots__ = ("_backend", "_context", "_pending", "_stream")

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=False)
        self._context: list[int] = []  # the tokens whose text went out last
        self._pending: list[int] = []  # tokens since then

    def feed(self, ids: Iterable[int]) -> str:
        return "".join([self.step(token_id) for token_id in ids])

    def finish(self) -> str:
        return self._pending_text() if self._pending else ""

    def step(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:  # the library raises bare Exception: "Invalid prefix encountered"
            text = self._pending_text()
            self._stream = DecodeStream(ids=self._pending, skip_special_tokens=False)
        if text is not None:
            self._context, self._pending = self._pending, []
            return text
        if len(self._pending) < MAX_PENDING:
            return ""
        text = self._pending_text()
        self._stream, self._pending = DecodeStream(ids=self._context, skip_special_tokens=False), []
        return text

    def _pending_text(self) -> str:
        if not self._context:
            return self._decode([], self._pending)
        guard = _plain_token(self._backend)
        before = self._decode(guard, self._context)
        after = self._decode(guard, self._context + self._pending)
        return after[len(before) :] if after.startswith(before) else self._decode(guard, self._pending)

    def _decode(self, guard: list[int], ids: list[int]) -> str:
        """Text of `ids` in the middle of a sequence: behind a guard, or the decoder strips a space as at the start."""
        prefix: str = self._backend.decode(guard, skip_special_tokens=False)
        text: str = self._backend.decode(guard + ids, skip_special_tokens=False)
        return text[len(prefix) :]


@functools.lru_cache(maxsize=4)
def _plain_token(backend: Backend) -> list[int]:
    """The id of a token that is one plain word whatever stands around it, in a list; empty when there is none."""
    for token_id in range(backend.get_vocab_size()):
        token = backend.id_to_token(token_id)
        if token is not None and token.isascii() and token.isalnum():
            return [token_id]
    return []
