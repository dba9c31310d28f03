"""How adapters are refused: every problem of a stage in one message."""

from __future__ import annotations

from sglang.srt.errors import AdapterError

MAX_LISTED = 20
"""Problems, or names, that a message lists."""


def raise_all(problems: list[str]) -> None:
    """Refuse, unless there is nothing to say.

    Raises:
        AdapterError: invalid_adapter.
    """
    if not problems:
        return
    rest = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    raise invalid("; ".join(problems[:MAX_LISTED] + rest))


def invalid(problem: str) -> AdapterError:
    """The error for one problem."""
    return AdapterError("invalid_adapter", f"invalid adapter: {problem}")
