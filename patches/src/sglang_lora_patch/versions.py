"""Which releases of SGLang this patch is for. Owns the list and nothing else.

Every release in `SUPPORTED` was transformed and checked; what else is installed is refused.
"""

from __future__ import annotations

SUPPORTED = (
    "0.5.9",
    "0.5.10",
    "0.5.10.post1",
    "0.5.11",
    "0.5.12",
    "0.5.12.post1",
    "0.5.13",
    "0.5.13.post1",
    "0.5.14",
    "0.5.15",
    "0.5.15.post1",
    "0.5.16",
    "0.5.17",
    "0.5.18",
    "0.5.19",
    "0.5.20",
    "0.5.21",
)
# The releases known to repair the count themselves.
FIXED = ("0.5.22", "0.5.23")


def why_not(version: str) -> str | None:
    """Why `version` is not for this patch; None when it is."""
    if version in SUPPORTED:
        return None
    if version in FIXED:
        return f"sglang {version} counts the users of an adapter itself: it needs no patch"
    return (
        f"sglang {version} is not a release this patch knows ({SUPPORTED[0]} to {SUPPORTED[-1]}); nothing was changed. "
        f"If it is a build of one of these, say which with --assume VERSION"
    )
