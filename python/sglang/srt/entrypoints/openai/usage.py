"""Token counts of OpenAI replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Counts = tuple[int, int, int]
"""(prompt, completion, cached prompt) tokens of one choice."""


def usage(choices: Mapping[int, Counts], n: int, cache_report: bool) -> dict[str, Any]:
    """`usage` of a reply; a prompt counts once, however many samples it has.

    Args:
        choices: counts by choice index, input-major; samples of prompt p have the indices p*n .. p*n + n-1.
        cache_report: tell the cached tokens (--enable-cache-report).
    """
    firsts = {index // n: counts for index, counts in sorted(choices.items(), reverse=True)}
    prompt = sum(counts[0] for counts in firsts.values())
    completion = sum(counts[1] for counts in choices.values())
    cached = sum(counts[2] for counts in firsts.values())
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached} if cache_report and cached else None,
        "reasoning_tokens": 0,
    }


def native_counts(items: list[dict[str, Any]]) -> dict[int, Counts]:
    """Counts of a native reply's items."""
    metas = [item["meta_info"] for item in items]
    return {
        index: (meta.get("prompt_tokens", 0), meta.get("completion_tokens", 0), meta.get("cached_tokens", 0))
        for index, meta in enumerate(metas)
    }
