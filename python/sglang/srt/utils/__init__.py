"""Public helpers under upstream's import path; each loads on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.utils.process import kill_process_tree
    from sglang.srt.utils.serialization import MultiprocessingSerializer

__all__ = ["MultiprocessingSerializer", "kill_process_tree"]

_MODULES = {
    "MultiprocessingSerializer": "sglang.srt.utils.serialization",
    "kill_process_tree": "sglang.srt.utils.process",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sglang.srt.utils' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
