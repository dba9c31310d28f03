"""The table behind every operation: one mandatory torch reference, and faster kernels by device type.

Layers pick an implementation once, when they are built (`Op.on`), so a step pays nothing for the choice. A kernel module
registers itself beside the reference, in `ops/<family>.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable)


class Op(Generic[F]):
    """One operation.

    Args:
        reference: correct on every device and dtype; its docstring defines the operation.
        kernels: implementations with the same signature and result, by `torch.device.type`.
    """

    def __init__(self, reference: F, kernels: Mapping[str, F] | None = None) -> None:
        self.reference = reference
        self.kernels = dict(kernels or {})
        self._warned: set[str] = set()

    @property
    def name(self) -> str:
        """Name of the operation, for messages."""
        return self.reference.__name__

    def on(self, device: torch.device) -> F:
        """The kernel for a device; the reference, with one warning per device type, where there is none.

        On a CPU the reference is what is meant to run, so it goes without a warning.
        """
        kernel = self.kernels.get(device.type)
        if kernel is not None:
            return kernel
        if device.type != "cpu" and device.type not in self._warned:
            self._warned.add(device.type)
            logger.warning("no %s kernel for %s: using the torch reference", self.name, device.type)
        return self.reference
