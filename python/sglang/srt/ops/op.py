"""An operation with more than one implementation: a mandatory torch reference, and kernels by device type.

A family starts as a plain function. With its first kernel the function becomes the reference of an `Op` of the same
public name, so that callers do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Generic, ParamSpec

from torch import Tensor

logger = logging.getLogger(__name__)

P = ParamSpec("P")


class Op(Generic[P]):
    """Calls the kernel of its first argument's device, or the reference where that device has none.

    Args:
        reference: right on every device and dtype; its docstring defines the operation.
        kernels: the same signature and result, by `torch.device.type`.
    """

    def __init__(self, reference: Callable[P, Tensor], kernels: Mapping[str, Callable[P, Tensor]]) -> None:
        self.reference = reference
        self.kernels = dict(kernels)
        self.__doc__ = reference.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Run the operation."""
        first = args[0]
        assert isinstance(first, Tensor)
        kernel = self.kernels.get(first.device.type)
        return self._fall_back(first.device.type)(*args, **kwargs) if kernel is None else kernel(*args, **kwargs)

    def _fall_back(self, device_type: str) -> Callable[P, Tensor]:
        """The reference, from now on, for a device without a kernel; says so once."""
        if device_type != "cpu":
            logger.warning("no %s kernel for %s: torch reference", self.reference.__name__, device_type)
        self.kernels[device_type] = self.reference
        return self.reference
