"""Copies between host and device for the sampler: columns up, results down, never a synchronisation in the hot path.

Called by the modules of this package only. On a CPU device both directions are free.
Invariant: `HostCopy.wait` is the only call that blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of `values` on `device`; from pinned memory and asynchronous when the device is not the host."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to the host.

    Args:
        tensors: name -> tensor; None entries are dropped. Copies are queued on the current stream at once, so work
            queued after this does not delay them.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self._host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in present.items()}
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in present.values()):
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> dict[str, NDArray[Any]]:
        """Block until the copies have landed; name -> array."""
        if self._done is not None:
            self._done.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}
