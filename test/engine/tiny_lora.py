"""Adapters for tests of the back: payloads written without the front's reader, and a manager for the fake runner."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang.srt.lora.adapter import Adapter, AdapterModule, Span
from sglang.srt.lora.lora_manager import BaseTensor, LoRAManager, matrices
from sglang.srt.lora.slots import SlotPool
from sglang.srt.lora.weights import AdapterWeights
from sglang.srt.ops.slabs import ModelSlabs

HIDDEN, VOCAB = 8, 16
CPU = torch.device("cpu")
MODULE = "model.layers.0.self_attn.o_proj"


def write_adapter(
    path: Path, modules: Mapping[str, tuple[Tensor, Tensor, float]], base_copies: Mapping[str, Tensor] | None = None
) -> Adapter:
    """A payload: the bytes of (A, B, scale) by module name, and of base weights, in `path`."""
    data = bytearray()

    def span(tensor: Tensor) -> Span:
        tensor = tensor.detach().cpu().contiguous()
        data.extend(b"\0" * (-len(data) % 8))
        offset = len(data)
        data.extend(tensor.view(torch.uint8).numpy().tobytes())
        return Span(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)  # type: ignore[arg-type]

    made = tuple(AdapterModule(name, scale, span(a), span(b)) for name, (a, b, scale) in modules.items())
    copies = tuple((name, span(tensor)) for name, tensor in (base_copies or {}).items())
    path.write_bytes(data)
    return Adapter(str(path), len(data), made, copies)


def tiny_adapter(path: Path, seed: int = 0, rank: int = 2) -> Adapter:
    """A payload with one module of the tiny base."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, HIDDEN, generator=generator), torch.randn(HIDDEN, rank, generator=generator)
    return write_adapter(path, {MODULE: (a, b, 2.0)})


def slabs_of(tensors: Mapping[str, BaseTensor], max_rank: int = 32, dtype: str = "float32") -> ModelSlabs:
    """The slabs of a base with these tensors, one of which lies in a layer."""
    return ModelSlabs({name: tensor.shape for name, tensor in matrices(tensors).items()}, max_rank, dtype)


def manager_of(
    tensors: Mapping[str, BaseTensor],
    parameters: Mapping[str, Any],
    device: torch.device = CPU,
    *,
    max_rank: int = 32,
    num_slots: int = 2,
    dtype: str = "float32",
) -> LoRAManager:
    """A manager of a base with these tensors; a device other than the CPU gets rows."""
    return LoRAManager(tensors, parameters, slabs_of(tensors, max_rank, dtype), num_slots, device)


class GatedManager(LoRAManager):
    """A manager whose `stage` can be held up, and told to fail."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def stage(self, adapter: Adapter) -> AdapterWeights:
        weights = super().stage(adapter)
        assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        return weights


def tiny_manager(versions: int = 0, path: Path | None = None) -> GatedManager:
    """A manager of a base with two tensors; versions 1.. are staged."""
    tensors = {
        f"{MODULE}.weight": BaseTensor("layers.0.out", 0, (HIDDEN, HIDDEN)),
        "model.embed_tokens.weight": BaseTensor("embed_tokens", 0, (VOCAB, HIDDEN)),
    }
    parameters = {"layers.0.out": torch.ones(HIDDEN, HIDDEN), "embed_tokens": torch.ones(VOCAB, HIDDEN)}
    manager = GatedManager(tensors, parameters, slabs_of(tensors), 2, CPU)
    with tempfile.TemporaryDirectory() as directory:
        for version in range(1, versions + 1):
            manager.commit(version, manager.stage(tiny_adapter(Path(directory) / str(version), version)))
    return manager


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tiny_lora(versions: int, slots: int = 8, clock: Callable[[], float] | None = None) -> dict[str, Any]:
    """Arguments of `Bench`: versions 1.. staged, so many slots."""
    pool = SlotPool(slots) if clock is None else SlotPool(slots, clock=clock)
    return {"lora": tiny_manager(versions), "lora_slots": pool}


def distinct(column: np.ndarray) -> set[int]:
    """Adapter versions that a step names."""
    return set(column.tolist()) - {0}
