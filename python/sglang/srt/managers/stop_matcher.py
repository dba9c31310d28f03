"""Finds stop strings and stop patterns in text that arrives in pieces, and holds back what may turn out to be one.

Owned by a `Detokenizer`, one per sequence. Text is *released* once no match can begin in it any more, so a client never
sees a part of a stop string. Special tokens that the output skips are searched but never released: a stop string such
as ``<|im_end|>`` works whether or not special tokens are shown.

Of several matches that one piece completes, the one that starts first wins; at the same start, strings before patterns
and otherwise in the order given. Patterns see the last `CONTEXT` characters before the held text (for ``\\b``,
look-behind and ``^`` in multi-line mode), and a match spans at most `MAX_HELD` characters: beyond that the held text
goes out. That bounds the work for each piece, whatever the length of the output.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import regex  # type: ignore[import-untyped]

from sglang.srt.errors import RequestError

logger = logging.getLogger(__name__)

CONTEXT = 256
MAX_HELD = 4096
PATTERN_TIMEOUT = 0.1
"""Seconds one search may take. A pattern that backtracks longer would stall every other request."""


class _Match(NamedTuple):
    start: int
    end: int
    what: str


class StopMatcher:
    """The search state of one sequence.

    Args:
        strings: non-empty stop strings.
        patterns: regular expressions.
        keep_match: release the matched text too (`no_stop_trim`).

    Raises:
        RequestError: a pattern does not compile.
    """

    __slots__ = (
        "_firsts",
        "_hidden",
        "_ignored",
        "_keep_match",
        "_longest",
        "_patterns",
        "_start",
        "_strings",
        "_text",
    )

    def __init__(self, strings: Sequence[str], patterns: Sequence[str], keep_match: bool) -> None:
        self._strings = tuple(strings)
        self._firsts = {s[0] for s in strings}
        self._longest = max(map(len, strings), default=0)
        self._patterns = [(source, _compile(source)) for source in patterns]
        self._keep_match = keep_match
        self._text = ""  # context, then held text
        self._start = 0  # where the held text begins
        self._ignored = 0  # patterns do not look before this: a match was found there and not accepted
        self._hidden: list[tuple[int, int]] = []  # spans of the held text that are never released

    def push(self, text: str, *, hidden: bool = False, accept: bool = True) -> tuple[str, str | None]:
        """Add a piece of text.

        Args:
            hidden: search it, but never release it.
            accept: False ignores matches that this piece completes.

        Returns:
            Released text, and the stop string or pattern that matched. After a match nothing more may be pushed.
        """
        if not text:
            return "", None
        if not self._text and not self._patterns and self._firsts.isdisjoint(text):
            return "" if hidden else text, None  # nothing held, nothing can begin: most pieces
        begin = len(self._text)
        self._text += text
        if hidden:
            self._hidden.append((begin, len(self._text)))
        hold, match = self._search_patterns() if self._patterns else (len(self._text), None)
        if self._strings:
            match = self._search_strings(begin, match)
            hold = min(hold, self._string_hold())
        if match is not None and accept:
            return self._release(match.end if self._keep_match else match.start), match.what
        if match is not None:
            self._ignored = len(self._text)
        released = self._release(hold)
        self._trim()
        return released, None

    def flush(self) -> str:
        """Release everything: the sequence is over."""
        return self._release(len(self._text))

    def _search_strings(self, begin: int, best: _Match | None) -> _Match | None:
        """The first match that ends after `begin`, or `best` when that starts earlier."""
        for string in self._strings:
            at = self._text.find(string, max(self._start, begin - len(string) + 1))
            if at >= 0 and (best is None or at < best.start or (at == best.start and best.what not in self._strings)):
                best = _Match(at, at + len(string), string)
        return best

    def _string_hold(self) -> int:
        """Where the longest end of the text that could begin a stop string starts."""
        text, size = self._text, len(self._text)
        for at in range(max(self._start, size - self._longest + 1), size):
            if text[at] in self._firsts:
                tail = text[at:]
                if any(len(s) > len(tail) and s.startswith(tail) for s in self._strings):
                    return at
        return size

    def _search_patterns(self) -> tuple[int, _Match | None]:
        """Where the text to hold starts, and the first match of a pattern."""
        size, best = len(self._text), None
        hold, start = size, max(self._start, self._ignored)
        for item in tuple(self._patterns):
            source, pattern = item
            try:
                # `partial` asks for a complete match first, then for one that the end of the text cuts short.
                found = pattern.search(self._text, start, partial=True, timeout=PATTERN_TIMEOUT)
            except TimeoutError:
                logger.warning("stop_regex %r is ignored: a search took over %g s", source, PATTERN_TIMEOUT)
                self._patterns.remove(item)
                continue
            if found is not None and found.partial:
                hold = min(hold, found.start())
            elif found is not None and (best is None or found.start() < best.start):
                best = _Match(found.start(), found.end(), source)
        return max(hold, size - MAX_HELD), best

    def _release(self, end: int) -> str:
        """Visible part of the held text up to `end`, which becomes the new start."""
        start, self._start = self._start, end
        if not self._hidden:
            return self._text[start:end]
        visible, at = [], start
        for first, last in self._hidden:
            visible.append(self._text[at : min(first, end)])
            at = max(at, min(last, end))
        visible.append(self._text[at:end])
        self._hidden = [(max(first, end), last) for first, last in self._hidden if last > end]
        return "".join(visible)

    def _trim(self) -> None:
        """Drop released text beyond the context."""
        drop = self._start - (CONTEXT if self._patterns else 0)
        # In patterns' case not at every piece: the copy costs more than the memory.
        if drop <= (CONTEXT if self._patterns else 0):
            return
        self._text = self._text[drop:]
        self._start, self._ignored = self._start - drop, max(0, self._ignored - drop)
        self._hidden = [(first - drop, last - drop) for first, last in self._hidden]


def _compile(source: str) -> Any:
    try:
        return regex.compile(source)
    except regex.error as error:
        raise RequestError(f"stop_regex {source!r} is not a valid regular expression: {error}.") from error
