"""Where each tensor of a checkpoint goes: HF name -> parameter, rows of it, and how tensor parallelism cuts it.

One declaration serves loading from disk, weight updates, and the error that names an unknown tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

import msgspec
from torch import Tensor

from sglang.srt.errors import WeightError
from sglang.srt.ops.packed import PackedWeight, stack
from sglang.srt.ops.packed import Parameter as Parameter


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

    def load(self, parameters: dict[str, Parameter], tensors: Iterable[tuple[str, Parameter]], source: str) -> None:
        """Copy a checkpoint into the parameters.

        A parameter all of whose parts are packed in one format becomes packed; other packed parts are widened.

        Args:
            parameters: dense tensors of the right shapes; entries are replaced by packed ones.
            tensors: (HF name, tensor) pairs; read one at a time.
            source: what error messages call the checkpoint.

        Raises:
            WeightError: lists every tensor that is missing, unknown, there twice, or of another shape.
        """
        problems: list[str] = []
        seen: set[str] = set()
        packed: dict[str, dict[int, PackedWeight]] = {}
        for name, tensor in self._known(tensors, problems):
            target = self.targets[name]
            if tuple(tensor.shape) != target.shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, the model needs {list(target.shape)}")
            elif name in seen:
                problems.append(f"{name} is there twice")
            elif isinstance(tensor, PackedWeight):
                packed.setdefault(target.parameter, {})[target.start] = tensor
            else:
                _fill(parameters, target.parameter, target.start, tensor)
            seen.add(name)
        problems += [f"{name} is missing" for name in self.targets if name not in seen]
        if problems:
            raise WeightError(f"{source} does not fit the model: " + "; ".join(problems))
        for name, parts in packed.items():
            _place(parameters, name, parts)

    def _known(self, tensors: Iterable[tuple[str, Parameter]], problems: list[str]) -> Iterator[tuple[str, Parameter]]:
        for name, tensor in tensors:
            if name in self.targets:
                yield name, tensor
            elif not name.endswith(self.ignored or ("\0",)):
                problems.append(f"{name} {list(tensor.shape)} is unknown")


def _fill(parameters: dict[str, Parameter], name: str, start: int, tensor: Tensor) -> None:
    parameter = parameters[name]
    assert isinstance(parameter, Tensor)
    parameter.narrow(0, start, len(tensor)).copy_(tensor)


def _place(parameters: dict[str, Parameter], name: str, parts: dict[int, PackedWeight]) -> None:
    """Make a parameter packed when its packed parts are all of it and of one format, else widen them into place."""
    ordered = [parts[start] for start in sorted(parts)]
    whole = sum(part.shape[0] for part in ordered) == parameters[name].shape[0]
    if whole and len({part.format for part in ordered}) == 1:
        parameters[name] = stack(ordered)
        return
    for start, part in parts.items():
        _fill(parameters, name, start, part.unpack())
