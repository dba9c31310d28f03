"""Where each tensor of a checkpoint goes: HF name -> parameter, rows of it, and how tensor parallelism cuts it.

One declaration serves loading from disk, weight updates, and the error that names an unknown tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

import msgspec
from torch import Tensor

from sglang.srt.errors import WeightError


class Cut(Enum):
    """How ranks share a tensor: COLUMN by output rows, ROW by input columns, REPLICATED not at all."""

    COLUMN = "column"
    ROW = "row"
    REPLICATED = "replicated"


class Target(msgspec.Struct, frozen=True):
    """Rows [start, start + shape[0]) of a parameter."""

    parameter: str
    start: int
    shape: tuple[int, ...]
    cut: Cut


class WeightMap:
    """The checkpoint names of one model.

    Args:
        targets: HF name -> Target; every one must be loaded.
        ignored: endings of names that checkpoints hold and the model does not use.
    """

    def __init__(self, targets: dict[str, Target], ignored: tuple[str, ...] = ()) -> None:
        self.targets = targets
        self.ignored = ignored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        shapes: dict[str, tuple[int, ...]] = {}
        for target in self.targets.values():
            rows = max(target.start + target.shape[0], shapes.get(target.parameter, (0,))[0])
            shapes[target.parameter] = (rows, *target.shape[1:])
        return shapes

    def load(self, parameters: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
        """Copy a checkpoint into the parameters.

        Args:
            tensors: (HF name, tensor) pairs; read one at a time.
            source: what error messages call the checkpoint.

        Raises:
            WeightError: lists every tensor that is missing, unknown, there twice, or of another shape.
        """
        problems: list[str] = []
        seen: set[str] = set()
        for name, tensor in self._known(tensors, problems):
            target = self.targets[name]
            if tuple(tensor.shape) != target.shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, the model needs {list(target.shape)}")
            elif name in seen:
                problems.append(f"{name} is there twice")
            else:
                parameters[target.parameter].narrow(0, target.start, target.shape[0]).copy_(tensor)
            seen.add(name)
        problems += [f"{name} is missing" for name in self.targets if name not in seen]
        if problems:
            raise WeightError(f"{source} does not fit the model: " + "; ".join(problems))

    def _known(self, tensors: Iterable[tuple[str, Tensor]], problems: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name in self.targets:
                yield name, tensor
            elif not name.endswith(self.ignored or ("\0",)):
                problems.append(f"{name} {list(tensor.shape)} is unknown")
