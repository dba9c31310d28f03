"""`MultiprocessingSerializer`: how RL clients turn tensors into text for a request. Used in the client's process."""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any


class _InlinePickler(pickle.Pickler):
    """Pickles torch tensors with their bytes, from whatever device, instead of handles to the sender's memory."""

    def reducer_override(self, obj: Any) -> Any:
        """Reduce a tensor as a dense one on the CPU; everything else as ever."""
        if type(obj).__module__.partition(".")[0] == "torch" and hasattr(obj, "untyped_storage"):
            # A view would bring the whole storage behind it, so it is copied first.
            return obj.detach().cpu().clone().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


class MultiprocessingSerializer:
    """Upstream's public name. What it makes can be read by another process, on another host, at any later time."""

    @staticmethod
    def serialize(obj: Any, output_str: bool = False) -> bytes | str:
        """A dict of tensors, a list of (name, tensor), or a flattened bucket as bytes.

        Args:
            output_str: base64 text instead, as `/load_lora_adapter_from_tensors` takes it.
        """
        buffer = io.BytesIO()
        _InlinePickler(buffer).dump(obj)
        data = buffer.getvalue()
        return base64.b64encode(data).decode() if output_str else data
