"""The policy's loss: how far an update may go, and what it did on the way.

Called by `trainer`, once per minibatch for the bounds and once per micro-batch for the loss. Pure functions of
tensors, but for `LossStats`, which adds up a step's statistics on the device and reads them off once.
Invariants: losses of micro-batches add up to the loss of the minibatch, gradients too, however it was cut and over
however many ranks; nothing off the loss mask has any influence, NaN included.

Literature:
    PPO: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (the clipped objective).
    GRPO: Shao et al. 2024, "DeepSeekMath" (the same clip with advantages relative to a group, see `advantages`).
    M2PO: Zheng, Zhao and Chen 2025, "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on
        LLMs?" (second-moment trust policy optimization).
    KL: Schulman 2020, "Approximating KL Divergence" (the estimator k3: unbiased, never negative).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sglang.rl import metrics
from sglang.rl.batching import MicroBatch
from sglang.rl.config import LossSection

WIDEST_LOW = 0.95
WIDEST_HIGH = 20.0
"""Bounds of M2PO where the second moment allows everything."""

MAX_LOG_RATIO = 20.0
"""Importance weights are cut at its exponential: beyond it a token is broken, and its weight would overflow."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """A minibatch's trust region: importance weights from 1 - eps_low to 1 + eps_high.

    Fields:
        cut: |log weight| above which the second moment drops a token; infinite when it drops none.
        moment: mean square of log weights that push out of the trust region; kept_moment: of those not dropped.
    """

    eps_low: float
    eps_high: float
    cut: float = math.inf
    moment: float = 0.0
    kept_moment: float = 0.0


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Of a micro-batch.

    Fields:
        loss: float32 scalar with a gradient: this micro-batch's part of the minibatch's loss.
        means: metric -> float64 [2] without one, a sum and what to divide it by, to be added over micro-batches.
        peaks: metric -> scalar without one, a maximum.
    """

    loss: Tensor
    means: dict[str, Tensor]
    peaks: dict[str, Tensor]


def m2po_bounds(batches: Sequence[tuple[Tensor, MicroBatch]], threshold: float) -> Bounds:
    """M2PO's trust region.

    It is a property of the whole minibatch, not of a micro-batch: called once per minibatch, with all its micro-batches
    of this rank, and over all ranks where torch.distributed is initialised (every rank must call it then, and gets the
    same). The result is then given to `policy_loss` for each of the micro-batches.

    Only tokens count that push out of the trust region: those with a positive advantage that have become likelier and
    those with a negative one that have become less likely. Are their squared log weights above `threshold` on average,
    the largest are dropped until the mean of the rest is below it; tokens as large as a dropped one are dropped too.
    The largest that is left then bounds the weights on both sides, so that clipping takes the gradient of exactly the
    dropped tokens. If nothing has to be dropped, the bounds are the widest.

    Args:
        batches: log weights (new - old log-probabilities, float32 [B, L], detached) with their micro-batch.
    """
    found = [_outward(log_ratio, batch).cpu() for log_ratio, batch in batches]
    # On the CPU: sums of a sorted vector are then the same in every run.
    distances = _of_all_ranks(torch.cat(found) if found else torch.zeros(0), batches).sort().values
    squares = distances.double().square()
    counts = torch.arange(1, len(squares) + 1, dtype=torch.float64)
    means = squares.cumsum(0) / counts
    moment = means[-1].item() if len(means) else 0.0
    if moment <= threshold:
        return Bounds(WIDEST_LOW, WIDEST_HIGH, moment=moment, kept_moment=moment)
    dropped = distances[int((means < threshold).sum().item())]
    num_kept = int((distances < dropped).sum().item())
    cut = distances[num_kept - 1].item() if num_kept else 0.0
    eps_low = min(-math.expm1(-cut), WIDEST_LOW)
    eps_high = min(math.expm1(min(cut, MAX_LOG_RATIO)), WIDEST_HIGH)
    return Bounds(eps_low, eps_high, cut, moment, means[num_kept - 1].item() if num_kept else 0.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    batch: MicroBatch,
    section: LossSection,
    denominator: float,
    bounds: Bounds | None = None,
    ref_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """The clipped objective, negated, of one micro-batch: the mean over tokens, or over sequences of their means.

    The loss is a sum that is already divided by `denominator`, so that summing over micro-batches and ranks gives the
    minibatch's loss. Whoever averages gradients over ranks must multiply it by their number.

    Args:
        logprobs: float32 [B, L] with a gradient; of input_ids[:, t] given the tokens before, as all that follow.
        old_logprobs: float32 [B, L].
        batch: its loss mask and advantages are used.
        denominator: tokens of the loss mask (``section.normalize == "token"``) or sequences that have any, of the whole
            minibatch over all ranks.
        bounds: of the minibatch, needed by m2po; other algorithms take theirs from the section.
        ref_logprobs: float32 [B, L], of the reference; needed if ``section.kl_coef`` is not 0.

    Raises:
        ValueError: bounds or reference are missing.
    """
    if bounds is None:
        if section.algorithm == "m2po":
            raise ValueError("m2po needs bounds: call m2po_bounds once per minibatch")
        bounds = Bounds(section.eps_low, section.eps_high)
    if section.kl_coef and ref_logprobs is None:
        raise ValueError(f"loss.kl_coef is {section.kl_coef}: log-probabilities of the reference are needed")

    mask, advantages = batch.loss_mask, batch.advantages
    log_ratio = _difference(logprobs, old_logprobs, mask)
    # Bounds are compared as logarithms: M2PO's cut is a kept token's own log weight, and rounding must not clip that.
    low, high = math.log1p(-bounds.eps_low) if bounds.eps_low < 1 else -math.inf, math.log1p(bounds.eps_high)
    clipped = ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))
    kept = torch.where(clipped, log_ratio.detach().clamp(low, high), log_ratio)
    per_token = -kept.exp() * advantages
    means = _means(log_ratio.detach(), clipped, batch, bounds)
    if ref_logprobs is not None:
        kl = _k3(_difference(ref_logprobs, logprobs, mask))
        means[metrics.KL_REFERENCE] = _pair(kl.detach(), mask)
        per_token = per_token + section.kl_coef * kl
    weights = _weights(mask, section)
    loss = torch.where(mask, per_token, 0.0).mul(weights).sum()
    means[metrics.LOSS] = torch.stack([loss.detach().double(), weights.mul(mask).sum(dtype=torch.float64)])
    peaks = {metrics.RATIO_MAX: torch.where(mask, log_ratio.detach().exp(), 0.0).max()}
    return PolicyLoss(loss / denominator, means, peaks)


class LossStats:
    """Statistics of a step, added up on the device and read once."""

    def __init__(self) -> None:
        self._means: dict[str, Tensor] = {}
        self._peaks: dict[str, Tensor] = {}

    def add(self, part: PolicyLoss) -> None:
        """Take a micro-batch's in."""
        for name, pair in part.means.items():
            self._means[name] = self._means[name] + pair if name in self._means else pair
        for name, peak in part.peaks.items():
            self._peaks[name] = torch.maximum(self._peaks[name], peak) if name in self._peaks else peak

    def add_gap(self, batch: MicroBatch, logprobs: Tensor, version: int) -> None:
        """Take in how far the trainer's log-probabilities (float32 [B, L]) are from the server's.

        Only of tokens that `version`, which is the trainer's, has drawn: those of older ones differ because the policy
        does.
        """
        mask = batch.loss_mask & (batch.versions == version)
        gap = _difference(logprobs.detach(), batch.logprobs, mask).abs()
        means = {metrics.LOGP_GAP_MEAN: _pair(gap, mask)}
        self.add(PolicyLoss(gap.sum(), means, {metrics.LOGP_GAP_MAX: torch.where(mask, gap, -torch.inf).max()}))

    def reduce(self) -> dict[str, float]:
        """Means and maxima over everything added on all ranks, by the names of `metrics`.

        Every rank must call it, having added the same kinds of things. A mean or maximum of nothing is NaN.
        """
        if not self._means:
            return {}
        pairs = torch.stack(list(self._means.values()))
        peaks = torch.stack(list(self._peaks.values())).double()
        if dist.is_initialized():
            dist.all_reduce(pairs)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        peaks = peaks.masked_fill(peaks == -torch.inf, torch.nan)
        values = torch.cat([pairs[:, 0] / pairs[:, 1], peaks]).tolist()
        return dict(zip([*self._means, *self._peaks], values, strict=True))


def _means(log_ratio: Tensor, clipped: Tensor, batch: MicroBatch, bounds: Bounds) -> dict[str, Tensor]:
    mask = batch.loss_mask
    dropped = (batch.advantages * log_ratio.sign() > 0) & (log_ratio.abs() > bounds.cut)
    return {
        metrics.RATIO_MEAN: _pair(log_ratio.exp(), mask),
        metrics.CLIP_SHARE: _pair(clipped, mask),
        metrics.MASK_SHARE: _pair(dropped, mask),
        # Tokens were drawn by the old policy: k3 of new / old is its divergence from the new one.
        metrics.KL: _pair(_k3(log_ratio), mask),
        metrics.M2: _pair(log_ratio.square(), mask),
    }


def _pair(values: Tensor, mask: Tensor) -> Tensor:
    """float64 [2]: the sum over the mask, and the mask's size."""
    return torch.stack([torch.where(mask, values.double(), 0.0).sum(), mask.sum(dtype=torch.float64)])


def _difference(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """first - second within what `exp` bears; 0 off the mask, so that no NaN of padding reaches a gradient."""
    return torch.where(mask, first - second, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _k3(log_ratio: Tensor) -> Tensor:
    return log_ratio.expm1() - log_ratio


def _weights(mask: Tensor, section: LossSection) -> Tensor:
    """float32 [B, 1]: of a token in the sum."""
    if section.normalize == "token":
        return torch.ones_like(mask[:, :1], dtype=torch.float32)
    return 1.0 / mask.sum(1, keepdim=True).clamp(min=1)


def _outward(log_ratio: Tensor, batch: MicroBatch) -> Tensor:
    """float32 [N]: |log weight| of tokens that push out of the trust region."""
    log_ratio = _difference(log_ratio.detach(), torch.zeros_like(log_ratio), batch.loss_mask)
    return log_ratio.abs()[batch.advantages * log_ratio.sign() > 0]


def _of_all_ranks(values: Tensor, batches: Sequence[tuple[Tensor, MicroBatch]]) -> Tensor:
    """Everyone's float32 [N], one after the other, on the CPU."""
    if not dist.is_initialized():
        return values
    # NCCL takes tensors of its device only; on that of the micro-batches every backend can work.
    device = batches[0][0].device if batches else values.device
    size = torch.tensor(len(values), device=device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    padded = torch.full((int(size.item()),), -1.0, device=device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    together = torch.cat(parts).cpu()
    return together[together >= 0]
