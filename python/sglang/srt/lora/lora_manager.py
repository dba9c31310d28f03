"""Owner of the weights of every staged adapter version on the host; DeviceSlots has those that the device holds.

`stage` runs on a worker thread and touches no shared state; `commit`, `free` and `load` are called by the scheduler
between two steps, `batch` by ModelRunner within one.
Invariants: a version's bytes never change; its file is read while it is staged and never again; a version that failed
to stage leaves nothing.

On a CPU there are no device slots: operators read the host's slabs where they were packed, for a row of their own would
be the same bytes once more, in the same memory. These slabs are of their adapter's own rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.errors import WeightError
from sglang.srt.lora.adapter import Adapter
from sglang.srt.lora.adapter_copier import AdapterCopier, AdapterFile
from sglang.srt.lora.batch_info import BatchInfo, group_rows
from sglang.srt.lora.device_slots import DeviceSlots
from sglang.srt.lora.slab_batch import SlabBatch, row_slots
from sglang.srt.lora.weight_tails import WeightTails
from sglang.srt.lora.weights import AdapterWeights, Place
from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.model_executor.forward_context import LoRABatch
from sglang.srt.ops.packed import PackedWeight
from sglang.srt.ops.slabs import BatchShape, LoraBatch, LoraSite, ModelSlabs, build_batch

PACKED_TOLERANCE = 0.1
"""Relative Frobenius error up to which a base weight stored in few bits counts as the one that an adapter repeats."""
_SLICE = 4096
"""Rows of a base weight that are widened at once."""
_DECODE_TILE, _PROMPT_TILE = 16, 64
_DECODE_ROWS = 256
"""Rows up to which a step's tiles are those for decoding."""


class BaseTensor(NamedTuple):
    """Rows [start, start + shape[0]) of a parameter of the base model."""

    parameter: str
    start: int
    shape: tuple[int, ...]


class LoRAManager:
    """Weights of adapter versions.

    Args:
        tensors: the base model's tensors by checkpoint name, ``{module}.weight`` among them.
        parameters: the base model's parameters; read, never written.
        slabs: made of the same tensors' shapes.
        num_slots: versions that a step may name; memory for them is taken at once, if the device is not the host.
        extended: parameters with room for A behind them, see WeightTails.

    Attributes:
        layout: of slabs, at the largest rank that adapters may have.
    """

    def __init__(
        self,
        tensors: Mapping[str, BaseTensor],
        parameters: Mapping[str, Tensor | PackedWeight],
        slabs: ModelSlabs,
        num_slots: int,
        device: torch.device,
        extended: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.device = device
        self.layout = slabs.layout
        self._parameters = parameters
        self._tensors = dict(tensors)
        self._places = {
            name: Place(tensor.parameter, tensor.start, slabs.places.get(name))
            for name, tensor in matrices(tensors).items()
        }
        if "lm_head.weight" not in self._tensors:
            # Tied: one base weight, but an adapter of lm_head changes logits only, one of embed_tokens inputs only.
            self._tensors["lm_head.weight"] = self._tensors["model.embed_tokens.weight"]
            self._places["lm_head"] = Place("lm_head", 0)
        self._host: dict[int, AdapterWeights] = {}
        self._fused = takes_slabs(device, slabs.dtype)
        rows = device.type != "cpu" or self._fused
        # Every slot's, the one that replaces it, and one on its way.
        pin, warm = device.type == "cuda", num_slots + 2
        self._copier = AdapterCopier(self._places, slabs, tight=not rows, pin=pin, warm=warm)
        self._sites = parameter_sites(tensors, slabs)
        self._tails = WeightTails(extended or {}, self._sites)
        self._slots = DeviceSlots(slabs.layout, num_slots, device, self._tails) if rows else None

    @property
    def versions(self) -> frozenset[int]:
        """Versions that requests may name."""
        return frozenset(self._host)

    @property
    def nbytes(self) -> int:
        """Host memory of all versions."""
        return sum(weights.nbytes for weights in self._host.values())

    def __contains__(self, version_id: int) -> bool:
        return version_id in self._host

    # ---- worker thread ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def stage(self, adapter: Adapter) -> AdapterWeights:
        """Copy an adapter out of its file and check the base weights that it repeats.

        Raises:
            WeightError: a base weight is not the model's own, or a module is not the model's.
            OSError, ValueError: the file cannot be mapped, or a number is too large for the model's dtype.
        """
        unknown = [m.name for m in adapter.modules if m.name not in self._places]
        if unknown:
            raise WeightError(f"the model has no module {', '.join(unknown)}")
        with AdapterFile(adapter) as file:
            for name, span in adapter.base_copies:
                self._check_base(name, file.tensor(span))
            return self._copier.copy(adapter, file)

    def _check_base(self, name: str, copy: Tensor) -> None:
        base = self._tensors.get(name)
        if base is None:
            raise WeightError(f"the model has no tensor {name}, which the adapter holds a copy of")
        if tuple(copy.shape) != base.shape:
            raise WeightError(f"{name} has shape {list(copy.shape)} in the adapter, {list(base.shape)} in the base")
        weight = self._parameters[base.parameter]
        if isinstance(weight, PackedWeight):
            rows = PackedWeight(weight.format, weight.data[base.start : base.start + base.shape[0]])
            same = _relative_error(rows, copy) < PACKED_TOLERANCE
        else:
            own = weight[base.start : base.start + base.shape[0]]
            same = torch.equal(own.to(copy.dtype), copy.to(own.device))
        if not same:
            raise WeightError(
                f"the adapter holds its own {name}, which differs from the base model's; "
                "only adapters of a frozen base can be served"
            )

    # ---- between steps ---------------------------------------------------------------------------------------------

    def commit(self, version_id: int, weights: AdapterWeights) -> None:
        """Make a staged version known."""
        assert version_id not in self._host, f"adapter version {version_id} is staged already"
        self._host[version_id] = weights
        if self._slots is not None:
            self._slots.prefetch(version_id, weights)

    def free(self, version_id: int) -> int:
        """Forget a version; returns the bytes of host memory that it had."""
        weights = self._host.pop(version_id)
        if self._slots is not None:
            self._slots.forget(version_id)
        return weights.nbytes

    # ---- within a step ---------------------------------------------------------------------------------------------

    def load(self, slots: tuple[int, ...]) -> None:
        """Have the versions of all slots on the device, for the steps that follow."""
        if self._slots is not None:
            self._slots.load(slots, self._host)

    def batch(self, versions: NDArray[np.int64]) -> LoRABatch | None:
        """The adapters of rows with these versions (int64 [T]), all loaded; None when no row has one."""
        if not versions.any():
            return None
        if not self._fused:
            return group_rows(versions, self._weights, self.device)
        assert self._slots is not None
        rows, slots = len(versions), self._slots.slabs.num_slots
        tile = _DECODE_TILE if rows <= _DECODE_ROWS else _PROMPT_TILE
        shape = BatchShape(1 << max(rows - 1, 63).bit_length(), slots, tile)
        words = torch.empty(shape.words, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.write_words(versions, shape, words.numpy())
        on_device = LoraBatch.to_device(words, shape, self.device)
        return self.slab_batch(on_device, self.tail_slots(versions), self.outside_slabs(versions))

    def outside_slabs(self, versions: NDArray[np.int64]) -> BatchInfo | None:
        """What these rows' adapters add to the embedding and the head (all of their modules, without slabs)."""
        if self._fused:
            versions = np.where(np.isin(versions, self._beyond_slabs(versions)), versions, BASE_VERSION)
        return group_rows(versions, self._weights, self.device)

    # ---- captured steps --------------------------------------------------------------------------------------------

    def words_shape(self, max_rows: int) -> BatchShape | None:
        """Of the words of captured decode steps; None where adapters are applied by operators that read none."""
        if not self._fused:
            return None
        assert self._slots is not None
        return BatchShape(max_rows, self._slots.slabs.num_slots, _DECODE_TILE)

    def captures(self, versions: NDArray[np.int64]) -> bool:
        """Whether a batch of slabs is all that rows with these versions (int64 [T], all loaded) need."""
        return self._fused and not self._beyond_slabs(versions)

    @property
    def num_tails(self) -> int:
        """Slots whose A lies behind the weights too; 0 for none."""
        return self._tails.num_slots

    @property
    def all_have_tails(self) -> bool:
        """Whether that is all of them."""
        return self._slots is not None and self.num_tails == self._slots.slabs.num_slots

    def tail_slots(self, versions: NDArray[np.int64]) -> int:
        """How many of the first slots have all these versions (int64 [T], all loaded); 0 when one has no tail."""
        assert self._slots is not None
        last = int(row_slots(versions, self._slots.versions).max())
        return last + 1 if last < self.num_tails else 0

    def slab_batch(self, words: LoraBatch, tail_slots: int = 0, others: BatchInfo | None = None) -> SlabBatch:
        """A batch that reads these words whenever its operators run; see SlabBatch."""
        assert self._slots is not None
        return SlabBatch(self._slots.slabs, self._sites, words, self._tails, tail_slots, others)

    def write_words(self, versions: NDArray[np.int64], shape: BatchShape, out: NDArray[np.int32]) -> None:
        """Fill the words of rows with these versions (int64 [T]), all loaded."""
        assert self._slots is not None
        build_batch(row_slots(versions, self._slots.versions), self._slots.slabs.ranks, shape, out)

    def _beyond_slabs(self, versions: NDArray[np.int64]) -> list[int]:
        """Those of these versions that have modules outside the slabs."""
        weights = self._weights
        return [v for v in np.unique(versions).tolist() if v != BASE_VERSION and weights[v].rest.numel()]

    @property
    def _weights(self) -> Mapping[int, AdapterWeights]:
        return self._host if self._slots is None else self._slots.weights


def takes_slabs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether adapters are applied by operators that read slabs; elsewhere torch applies them one by one."""
    return device.type == "cuda" and dtype == torch.bfloat16


def matrices(tensors: Mapping[str, BaseTensor]) -> dict[str, BaseTensor]:
    """The tensors that adapters may add to, by module name."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }


def parameter_sites(tensors: Mapping[str, BaseTensor], slabs: ModelSlabs) -> dict[str, LoraSite]:
    """Where the factors of a parameter lie in a slab, for the parameters that slabs have factors of."""
    places = {tensor.parameter: slabs.places.get(name) for name, tensor in matrices(tensors).items()}
    return {name: slabs.layout.site(place.layer, place.group) for name, place in places.items() if place is not None}


def _relative_error(packed: PackedWeight, copy: Tensor) -> float:
    """|packed - copy| / |copy|, Frobenius."""
    error = total = 0.0
    for start in range(0, len(copy), _SLICE):
        part = copy[start : start + _SLICE].float()
        own = PackedWeight(packed.format, packed.data[start : start + _SLICE]).unpack()
        error += float((own - part).double().square().sum())
        total += float(part.double().square().sum())
    return float((error / total) ** 0.5) if total else float("inf")
