"""`FlattenedTensorBucket`: many tensors as one, for clients that push weights. Used in the client's process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FlattenedTensorMetadata:
    """Where a tensor lies in the bucket; `start_idx`, `end_idx` and `numel` count bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class FlattenedTensorBucket:
    """Upstream's public class.

    Args:
        named_tensors: (name, tensor) pairs to put together; or
        flattened_tensor, metadata: a bucket made before, uint8 [bytes] and what it holds.

    Raises:
        ValueError: neither, or no tensor at all.
    """

    supports_multi_dtypes = True

    def __init__(
        self,
        named_tensors: Iterable[tuple[str, Tensor]] | None = None,
        flattened_tensor: Tensor | None = None,
        metadata: list[FlattenedTensorMetadata] | None = None,
    ) -> None:
        if named_tensors is not None:
            flattened_tensor, metadata = _flatten(list(named_tensors))
        if flattened_tensor is None or metadata is None:
            raise ValueError("give named_tensors, or flattened_tensor and metadata")
        self.flattened_tensor = flattened_tensor
        self.metadata = metadata

    def get_flattened_tensor(self) -> Tensor:
        """uint8 [bytes]."""
        return self.flattened_tensor

    def get_metadata(self) -> list[FlattenedTensorMetadata]:
        """One entry a tensor."""
        return self.metadata

    def reconstruct_tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors, copied out: in a bucket of several dtypes they need not be aligned."""
        return [
            (m.name, self.flattened_tensor[m.start_idx : m.end_idx].clone().view(m.dtype).reshape(m.shape))
            for m in self.metadata
        ]


def _flatten(tensors: list[tuple[str, Tensor]]) -> tuple[Tensor, list[FlattenedTensorMetadata]]:
    if not tensors:
        raise ValueError("Cannot create empty tensor bucket")
    parts, metadata, start = [], [], 0
    for name, tensor in tensors:
        part = tensor.detach().flatten().view(torch.uint8)
        end = start + part.numel()
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, part.numel()))
        parts.append(part)
        start = end
    return torch.cat(parts), metadata
