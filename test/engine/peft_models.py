"""Random adapters made by PEFT, as payloads for our engine, and PEFT's own log-probabilities to compare with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine.tiny_lora import write_adapter

from sglang.srt.lora.adapter import Adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ATTENTION + MLP


class PeftModels:
    """One base model with any number of PEFT adapters.

    Args:
        model: transformers' base model.
        path: where payloads go.
    """

    def __init__(self, model: Any, path: Path) -> None:
        self._model: Any = model
        self._path = path
        self._names: list[str] = []

    def add(self, **options: Any) -> tuple[str, Adapter]:
        """An adapter of a `LoraConfig` with these options, random in both factors: (PEFT's name, payload)."""
        import peft

        name = f"adapter{len(self._names)}"
        config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ALL, **options})
        torch.manual_seed(100 + len(self._names))
        with warnings.catch_warnings():
            # PEFT advises against adapting tied weights; here each side is compared by itself.
            warnings.simplefilter("ignore", UserWarning)
            if not self._names:
                self._model = peft.get_peft_model(self._model, config, adapter_name=name).eval()
            else:
                self._model.add_adapter(name, config)
        self._names.append(name)
        modules = self._modules(name)
        for a, b, _ in modules.values():
            torch.nn.init.normal_(a, std=0.3)
            torch.nn.init.normal_(b, std=0.1)
        return name, write_adapter(self._path / name, modules)

    @torch.inference_mode()
    def logprobs(self, ids: list[int], name: str | None) -> np.ndarray:
        """[len(ids), V] under an adapter, or the base."""
        tokens = torch.tensor([ids], device=next(self._model.parameters()).device)
        if name is None:
            if not self._names:
                logits = self._model(tokens).logits
            else:
                with self._model.disable_adapter():
                    logits = self._model(tokens).logits
        else:
            self._model.set_adapter(name)
            logits = self._model(tokens).logits
        return logits[0].float().log_softmax(-1).cpu().numpy()

    @torch.inference_mode()
    def mixed_logprobs(self, ids: list[int], old: str, new: str, border: int) -> np.ndarray:
        """[len(ids), V]: tokens before `border` are read under one adapter, the others under another on the same KV."""
        self._model.set_adapter(old)
        first = self._model(torch.tensor([ids[:border]]), use_cache=True)
        self._model.set_adapter(new)
        second = self._model(torch.tensor([ids[border:]]), past_key_values=first.past_key_values)
        return torch.cat([first.logits[0], second.logits[0]]).float().log_softmax(-1).numpy()

    def _modules(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        from peft.tuners.lora import LoraLayer

        found = {}
        for full_name, module in self._model.named_modules():
            if not isinstance(module, LoraLayer) or name not in module.scaling:
                continue
            if name in module.lora_embedding_A:
                a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
            else:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
            found[full_name.removeprefix("base_model.model.")] = (a.data, b.data, float(module.scaling[name]))
        return found
