"""One optimizer and the policy it moves: a step's micro-batches in, statistics out.

Called by `train` with the same plan on every rank (`batching` deals the samples out). Owns the policy, the optimizer
and the learning rate's schedule, and nothing of rollouts or servers.
Invariants: an update of several micro-batches is that of one large batch, up to the order of additions; with the same
state and batches it is the same bit for bit, also after `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang.rl import distributed
from sglang.rl.batching import MicroBatch
from sglang.rl.config import Recipe
from sglang.rl.losses import LossStats, m2po_bounds, policy_loss
from sglang.rl.policy import Policy, adapter_state, trainable


@dataclass(frozen=True, slots=True)
class Prepared:
    """A micro-batch on the device, with log-probabilities of its tokens, float32 [B, L].

    Fields:
        current: by the policy before the step; old: what the loss compares with; reference: by the base model.
    """

    batch: MicroBatch
    current: Tensor
    old: Tensor
    reference: Tensor | None


class Trainer:
    """Moves the adapter of a policy.

    Args:
        policy: see `policy.load_policy`.
    """

    def __init__(self, policy: Policy, recipe: Recipe, device: torch.device) -> None:
        self.policy = policy
        self.device = device
        self.updates = 0
        self._recipe = recipe
        self._parameters = trainable(policy)
        optim = recipe.optim
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    def update(self, minibatches: Sequence[Sequence[MicroBatch]], version: int) -> dict[str, float]:
        """One optimizer step for each minibatch.

        Args:
            minibatches: this rank's micro-batches, at least one; every rank has as many of each minibatch.
            version: number of the policy before the update.

        Returns:
            means over the step, by the names of `metrics`.
        """
        self.policy.train()
        prepared = [[self._prepare(batch.to(self.device)) for batch in batches] for batches in minibatches]
        stats = LossStats()
        for item in (item for batches in prepared for item in batches):
            stats.add_gap(item.batch, item.current, version)
        norms = [self._step(batches, stats, first=i == 0) for i, batches in enumerate(prepared)]
        return {**stats.reduce(), "grad_norm": sum(norms) / len(norms), "lr": self._rate()}

    def _prepare(self, batch: MicroBatch) -> Prepared:
        """Old log-probabilities: the policy's own before the update, or those that the servers drew with."""
        loss = self._recipe.loss
        with torch.no_grad():
            current = self._logprobs(batch)
            reference = None
            if loss.kl_coef:
                with self.policy.base_only():
                    reference = self._logprobs(batch)
        return Prepared(batch, current, current if loss.recompute_logprob else batch.logprobs, reference)

    @torch.no_grad()
    def gap(self, batches: Sequence[MicroBatch], version: int) -> dict[str, float]:
        """How far the servers' log-probabilities are from the policy's, by the names of `metrics`.

        Args:
            batches: this rank's, drawn at the rollouts' temperature; every rank has as many.
        """
        stats = LossStats()
        for batch in (batch.to(self.device) for batch in batches):
            stats.add_gap(batch, self._logprobs(batch), version)
        return stats.reduce()

    def _step(self, batches: Sequence[Prepared], stats: LossStats, *, first: bool) -> float:
        """One optimizer step; the norm of its gradient."""
        loss = self._recipe.loss
        bounds = None
        if loss.algorithm == "m2po":
            bounds = m2po_bounds([self._pair(item, fresh=first) for item in batches], loss.m2_threshold)
        denominator = self._denominator([item.batch for item in batches])
        for item in batches:
            new = self._logprobs(item.batch)
            part = policy_loss(new, item.old, item.batch, loss, denominator, bounds, item.reference)
            # Gradients are averaged over ranks; the denominator already counts everyone's tokens.
            (part.loss * distributed.world_size()).backward()  # type: ignore[no-untyped-call]
            stats.add(part)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.optim.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(full)

    def _pair(self, item: Prepared, *, fresh: bool) -> tuple[Tensor, MicroBatch]:
        """How far the policy is from the old log-probabilities; before the step's first update it is `current`."""
        if fresh:
            return item.current - item.old, item.batch
        with torch.no_grad():
            return self._logprobs(item.batch) - item.old, item.batch

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        found: Tensor = self.policy(
            batch.input_ids, batch.attention_mask, batch.position_ids, self._recipe.rollout.temperature
        )
        return found

    def _denominator(self, batches: Sequence[MicroBatch]) -> float:
        """Tokens (or sequences) of the minibatch on all ranks."""
        whole = self._recipe.loss.normalize == "token"
        count = sum(float((b.loss_mask.sum() if whole else b.loss_mask.any(1).sum()).item()) for b in batches)
        return max(1.0, float(distributed.total(torch.tensor(count, dtype=torch.float64)).item()))

    def _rate(self) -> float:
        """Learning rate of the next update."""
        optim = self._recipe.optim
        return optim.lr * min(1.0, (self.updates + 1) / max(1, optim.warmup_steps))

    # ---- what outlives a process -----------------------------------------------------------------------------------

    def adapter(self) -> dict[str, Tensor]:
        """The adapter, whole, on the CPU; every rank must call it."""
        return adapter_state(self.policy)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on; this rank's part where parameters are sharded."""
        return {
            "parameters": [_local(parameter).clone() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
            "updates": self.updates,
            "world_size": distributed.world_size(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: it was taken with another number of ranks.
        """
        if state["world_size"] != distributed.world_size():
            raise ValueError(
                f"the checkpoint is of {state['world_size']} ranks, there are {distributed.world_size()}; "
                "resume with as many"
            )
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                _local(parameter).copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def _local(parameter: Tensor) -> Tensor:
    """This rank's part."""
    data = parameter.data
    return data.to_local() if hasattr(data, "to_local") else data
