"""Token embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sglang.srt.ops.op import Op


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the table.

    Args:
        ids: int64 [T], each in [0, V).
        table: [V, N].

    Returns:
        [T, N], new, so that it may serve as the residual that layers add to in place.
    """
    return F.embedding(ids, table)


EMBEDDING = Op(embedding)
