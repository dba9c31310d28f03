"""Public helpers under upstream's import path; each loads on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.utils.process import kill_process_tree

__all__ = ["kill_process_tree"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sglang.srt.utils' has no attribute {name!r}")
    from sglang.srt.utils import process

    return getattr(process, name)
