"""Does an adapter fit the model? Names, shapes and ranks, told from headers before any memory is taken.

Called by adapter_reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang.srt.config.sections import MAX_LORA_RANK, LoRASection
from sglang.srt.lora.adapter_config import AdapterConfig
from sglang.srt.lora.problems import raise_all
from sglang.srt.lora.safetensors_bytes import TensorEntry
from sglang.srt.lora.target_modules import (
    EMBEDDING,
    HEAD,
    allowed_kinds,
    kind_of,
    parse_base_copy,
    parse_factor,
    parts_of,
)


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A module and the tensors it is made of; `rows` rows of b belong to it, from `first_row` on."""

    name: str
    rank: int
    scale: float
    a: str
    b: str
    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Modules by name, and (name of the model's tensor, name as sent) of repeated base weights."""

    modules: list[PlannedModule]
    base_copies: list[tuple[str, str]]


class AdapterFit:
    """Compares names, shapes and ranks with the model, the adapter's config and the server's limits."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        lora: LoRASection,
        config: AdapterConfig,
        entries: Mapping[str, TensorEntry],
    ) -> None:
        self._shapes, self._lora, self._config, self._entries = shapes, lora, config, entries
        self._problems: list[str] = []

    def plan(self) -> AdapterPlan:
        """What to make of the tensors.

        Raises:
            AdapterError: invalid_adapter, with everything that does not fit.
        """
        factors, copies = self._sort_names()
        modules = [made for name, pair in factors.items() for made in self._modules(name, pair)]
        modules.sort(key=lambda module: module.name)
        self._check_names(modules)
        self._check_limits(modules)
        checked = [(name, tensor) for name, tensor in copies if self._fits_base(name, tensor, factors)]
        if not factors:
            self._problems.append(f"there are no LoRA factors among {len(self._entries)} tensors")
        raise_all(self._problems)
        return AdapterPlan(modules, checked)

    def _sort_names(self) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
        """Tensor names by module and factor, and the base weights as (model's tensor, tensor)."""
        factors: dict[str, dict[str, str]] = {}
        copies = []
        for tensor in self._entries:
            found, copied = parse_factor(tensor), parse_base_copy(tensor)
            if found is not None and all(part in self._shapes for part in parts_of(found.module)):
                other = factors.setdefault(found.module, {}).setdefault(found.factor, tensor)
                if other != tensor:
                    self._problems.append(f"{tensor} and {other} are both lora_{found.factor} of {found.module}")
            elif copied is not None:
                copies.append((f"{copied}.weight", tensor))
            else:
                self._problems.append(f"{tensor} matches no module of this model")
        return factors, copies

    def _modules(self, name: str, pair: Mapping[str, str]) -> list[PlannedModule]:
        """One module, or each of those that a fused name stands for; they share A and have B's rows in turn."""
        if len(pair) < 2:
            (factor, tensor), missing = next(iter(pair.items())), {"A": "lora_B", "B": "lora_A"}
            self._problems.append(f"{tensor} has no {missing[factor]} beside it")
            return []
        parts = parts_of(name)
        rows = [self._shapes[part][0] for part in parts]
        rank, scale = self._config.rank_of(name), self._config.scale_of(name)
        self._check_shape(pair["A"], (rank, self._shapes[parts[0]][1]), rank)
        self._check_shape(pair["B"], (sum(rows), rank), rank)
        return [
            PlannedModule(part, rank, scale, pair["A"], pair["B"], sum(rows[:i]), rows[i])
            for i, part in enumerate(parts)
        ]

    def _check_shape(self, tensor: str, expected: tuple[int, int], rank: int) -> None:
        shape = self._entries[tensor].shape
        if shape != expected:
            self._problems.append(f"{tensor} is {list(shape)}; r={rank} and this model make it {list(expected)}")

    def _check_names(self, modules: list[PlannedModule]) -> None:
        for before, module in zip(modules, modules[1:], strict=False):
            if before.name == module.name:
                self._problems.append(f"{module.name} has factors twice, in {before.b} and {module.b}")
        for module in modules:
            if not self._config.admits(module.name):
                self._problems.append(f"{module.a} is of a module that the adapter's config leaves out")
        unmet = self._config.unmet_targets(module.name for module in modules)
        self._problems += [f"target_modules names {entry}, of which no layer has tensors" for entry in unmet]

    def _check_limits(self, modules: list[PlannedModule]) -> None:
        limit, kinds = self._lora.max_lora_rank, allowed_kinds(self._lora.target_modules)
        rank = max((module.rank for module in modules), default=0)
        if rank > limit:
            remedy = "restart with a larger one" if limit < MAX_LORA_RANK else "no server takes larger ones"
            self._problems.append(f"rank {rank} is incompatible with --max-lora-rank {limit}; {remedy}")
        strange = sorted({kind_of(module.name) for module in modules} - kinds) if kinds is not None else []
        if strange and self._lora.target_modules is not None:
            self._problems.append(
                f"adapters of {', '.join(strange)} are incompatible with --lora-target-modules "
                f"{' '.join(self._lora.target_modules)}"
            )

    def _fits_base(self, name: str, tensor: str, factors: Mapping[str, object]) -> bool:
        """Whether a base weight may be there: PEFT saves those of the embedding and the head beside factors of them."""
        shape, expected = self._entries[tensor].shape, self._shapes[HEAD]
        if EMBEDDING not in factors and HEAD not in factors:
            self._problems.append(
                f"{tensor} is a base weight, which adapters cannot change; save with save_embedding_layers=False"
            )
        elif shape != expected:
            self._problems.append(
                f"{tensor} is {list(shape)}, the model's is {list(expected)}: vocabularies must be equal"
            )
        return shape == expected
