"""A run on disk: every so many steps what the next step depends on, and the adapter in PEFT's format.

Written by `train`. A checkpoint is a directory ``step_000025`` with a file for each rank, the director's state and the
adapter. Invariant: a directory with that name is complete; it is written under another one and then renamed, by rank 0
once every rank has written its part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang.rl import distributed

KEEP = 2


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint holds for one rank.

    Fields:
        step: steps that were done.
        trainer: `Trainer.state_dict`; director: rank 0's state.
    """

    step: int
    trainer: dict[str, Any]
    director: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, the last KEEP of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def latest(self) -> Restored | None:
        """The last one, this rank's part; None where there is none.

        Raises:
            ValueError: it was written by another number of ranks.
        """
        steps = self._steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        part = path / f"trainer_{distributed.rank()}.pt"
        if not part.exists():
            ranks = len(list(path.glob("trainer_*.pt")))
            raise ValueError(f"{path} is of {ranks} ranks, there are {distributed.world_size()}; resume with as many")
        trainer = torch.load(part, map_location="cpu", weights_only=True)
        director = json.loads((path / "director.json").read_text())
        return Restored(steps[-1], trainer, director)

    def save(
        self,
        step: int,
        trainer: Mapping[str, Any],
        director: Mapping[str, Any] | None,
        adapter: Mapping[str, Tensor],
        config: Any,
    ) -> None:
        """Write one; every rank must call it.

        Args:
            step: steps that are done.
            director: rank 0's, of what JSON can hold; None elsewhere.
            adapter: whole tensors by PEFT's names; config: its LoraConfig.
        """
        path = self._path(step)
        partial = path.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        torch.save(dict(trainer), partial / f"trainer_{distributed.rank()}.pt")
        if director is not None:
            from safetensors.torch import save_file

            (partial / "director.json").write_text(json.dumps(director))
            config.save_pretrained(partial / "adapter")
            contiguous = {name: tensor.contiguous() for name, tensor in adapter.items()}
            save_file(contiguous, partial / "adapter" / "adapter_model.safetensors")
        distributed.total(torch.zeros(1))  # everyone has written
        if director is not None:
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            for old in self._steps()[:-KEEP]:
                shutil.rmtree(self._path(old))

    def _steps(self) -> list[int]:
        found = self._directory.glob("step_*")
        return sorted(int(path.name.removeprefix("step_")) for path in found if not path.suffix)

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:06d}"
