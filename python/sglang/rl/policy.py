"""The trained model: a frozen base with an adapter, as a function from tokens to their log-probabilities.

Owned by `trainer`. Built with transformers and PEFT, sharded with FSDP2 (`fully_shard`) where torch.distributed runs.
Invariants: only the adapter has gradients, and it is kept in float32 whatever the base computes in; log-probabilities
are float32, at the temperature that the servers sample with, so that they are comparable with what servers report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sglang.rl.config import ModelSection
from sglang.srt.config.model_path import resolve_model_path

LOGIT_ROWS = 2048
"""Positions whose logits exist at once: 2048 x 152k x 4 bytes is 1.2 GB."""


class Policy(nn.Module):
    """Log-probabilities of given tokens.

    One module around everything, so that sharding sees one forward: the head is applied inside it, in pieces.

    Args:
        fp32_lm_head: whether logits are float32, whatever the model computes in.
    """

    def __init__(self, model: nn.Module, fp32_lm_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self._fp32_lm_head = fp32_lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, temperature: float) -> Tensor:
        """float32 [B, L]: of input_ids[:, t] given the tokens before; 0 at t = 0.

        Args:
            input_ids, attention_mask, position_ids: int64 [B, L], right-padded.
        """
        base: Any = self.model.get_base_model()  # type: ignore[operator]
        hidden = base.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        head = base.get_output_embeddings()
        rows, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        # No logits are kept for the backward pass: a piece at a time is computed again.
        parts = [
            checkpoint(_logprobs, head, part, target, temperature, self._fp32_lm_head, use_reentrant=False)
            for part, target in zip(torch.split(rows, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
        ]
        found = torch.cat(parts).view(len(input_ids), -1)
        return nn.functional.pad(found, (1, 0))

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Without the adapter: the reference of a KL term."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield


def _logprobs(head: Any, hidden: Tensor, targets: Tensor, temperature: float, fp32: bool) -> Tensor:
    logits = nn.functional.linear(hidden.float(), head.weight.float()) if fp32 else head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    chosen: Tensor = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(-1)
    return chosen


def load_policy(section: ModelSection, device: torch.device, seed: int) -> Policy:
    """The base model with a fresh adapter; sharded when torch.distributed runs, alike on every rank.

    Raises:
        OSError, ValueError: the path holds no model that transformers reads, or no layer has a target's name.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, section.dtype)
    path = Path(resolve_model_path(section.path))
    source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    base = AutoModelForCausalLM.from_pretrained(path.parent if source else path, dtype=dtype, **source)
    targets = section.lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.lora.rank,
        lora_alpha=section.lora.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
    )
    torch.manual_seed(seed)  # the adapter's A is random, and must be the same on every rank
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if section.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()  # type: ignore[no-untyped-call]
    policy = Policy(model, section.fp32_lm_head).to(device)
    if dist.is_initialized():
        _shard(policy, dtype)
    return policy


def _shard(policy: Policy, dtype: torch.dtype) -> None:
    """Every decoder layer on its own, then the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in policy.model.get_base_model().model.layers:  # type: ignore[operator]
        fully_shard(layer, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """The adapter's whole tensors on the CPU, float32, by PEFT's names; every rank must call it."""
    from peft import get_peft_model_state_dict
    from torch.distributed.tensor import DTensor

    whole = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            data = parameter.data
            whole[name] = (data.full_tensor() if isinstance(data, DTensor) else data).cpu()
    state: dict[str, Tensor] = get_peft_model_state_dict(policy.model, state_dict=whole)
    return state


def trainable(policy: Policy) -> list[nn.Parameter]:
    """The adapter's parameters, in an order that never changes."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]
