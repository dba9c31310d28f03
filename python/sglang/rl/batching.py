"""Attempts to tensors: which are trained on together, on which rank, padded to what.

Called by `train` on every rank with the same attempts; the tensors go to `trainer`. Three levels: a minibatch is one
optimizer step over all ranks, a rank's share of it is cut into micro-batches, and a micro-batch is one forward pass.
Invariants: every attempt is in exactly one micro-batch of one rank; what a minibatch holds depends on the seed and not
on the number of ranks; every rank has as many micro-batches, so that the collectives of sharded layers meet.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sglang.rl.samples import Sample

Plan = list[list[list[list[int]]]]
"""Indices of attempts: by minibatch, by rank, by micro-batch."""

NO_VERSION = -1
"""In `MicroBatch.versions`, where no adapter drew the token."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Attempts side by side, padded on the right; B of them, L tokens in the longest.

    An empty one has B = 1, L = 2 and a loss mask that is false everywhere: a forward and a backward pass of it do what
    sharded layers wait for and add zeros.

    Fields:
        input_ids: int64 [B, L], the prompt and the output.
        attention_mask: int64 [B, L], 1 on tokens, 0 on padding.
        position_ids: int64 [B, L], 0 on padding.
        loss_mask: bool [B, L], true on output tokens.
        logprobs: float32 [B, L], the server's of input_ids[:, t] given the tokens before; 0 off the loss mask.
        advantages: float32 [B, L], of the token's attempt; 0 off the loss mask.
        versions: int64 [B, L], of the adapter that drew the token; `NO_VERSION` off the loss mask.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    versions: Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def make_minibatches(
    samples: Sequence[Sample],
    advantages: Sequence[float],
    *,
    count: int,
    max_tokens: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    pad_id: int = 0,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each minibatch.

    Args:
        advantages: one per sample.
        count: minibatches; with fewer samples than that, one minibatch a sample.
        max_tokens: of a micro-batch, padding included; only a sample that is longer than that exceeds it, alone.
        seed: of the shuffle; give every step its own.
        pad_id: any token of the vocabulary; nothing attends to it.

    Raises:
        ValueError: a sample has no prompt, or not one log-probability and one version per output token.
    """
    if len(samples) != len(advantages):
        raise ValueError(f"{len(samples)} samples with {len(advantages)} advantages")
    lengths = [len(sample.prompt_ids) + len(sample.output_ids) for sample in samples]
    plan = plan_batches(lengths, count=count, max_tokens=max_tokens, seed=seed, world_size=world_size)
    return [
        [collate([samples[i] for i in rows], [advantages[i] for i in rows], pad_id) for rows in ranks[rank]]
        for ranks in plan
    ]


def plan_batches(lengths: Sequence[int], *, count: int, max_tokens: int, seed: int, world_size: int = 1) -> Plan:
    """Who trains on what, from lengths alone; the arguments are those of `make_minibatches`.

    Ranks get equal numbers of attempts and nearly equal numbers of tokens; at any time all ranks work on attempts of
    about the same length, the longest first, so that a lack of memory shows at once.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    parts = [part for part in _split(order, count) if part]
    return [_plan_ranks(part, lengths, max_tokens, world_size) for part in parts]


def collate(samples: Sequence[Sample], advantages: Sequence[float], pad_id: int = 0) -> MicroBatch:
    """Attempts as tensors, in their order; of none, an empty micro-batch.

    Raises:
        ValueError: as `make_minibatches`.
    """
    for sample in samples:
        _check(sample)
    if not samples:
        return _collate([Sample(prompt_ids=[pad_id, pad_id])], [0.0], pad_id)
    return _collate(samples, advantages, pad_id)


def _split(order: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    """`count` runs whose sizes differ by one at most."""
    size, rest = divmod(len(order), count)
    at = 0
    for i in range(count):
        end = at + size + (i < rest)
        yield order[at:end]
        at = end


def _plan_ranks(rows: Sequence[int], lengths: Sequence[int], max_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Micro-batches of one minibatch, by rank."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    # Dealt to and fro: 0 1 2 2 1 0 0 1 2, or rank 0 would have the longest of every round.
    for i, row in enumerate(sorted(rows, key=lambda row: (-lengths[row], row))):
        turn, place = divmod(i, world_size)
        shares[place if turn % 2 == 0 else world_size - 1 - place].append(row)
    ranks = [_cut(share, lengths, max_tokens) for share in shares]
    most = max(len(batches) for batches in ranks)
    return [batches + [[] for _ in range(most - len(batches))] for batches in ranks]


def _cut(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Longest first, each micro-batch filled before the next is begun."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _check(sample: Sample) -> None:
    if not sample.prompt_ids:
        raise ValueError("a sample has no prompt; nothing comes before its first token")
    num_tokens, num_logprobs, num_versions = len(sample.output_ids), len(sample.logprobs), len(sample.versions)
    if not num_tokens == num_logprobs == num_versions:
        raise ValueError(
            f"a sample has {num_tokens} output tokens, {num_logprobs} log-probabilities and {num_versions} versions; "
            "there must be one of each per token"
        )


def _collate(samples: Sequence[Sample], advantages: Sequence[float], pad_id: int) -> MicroBatch:
    shape = len(samples), max(len(sample.prompt_ids) + len(sample.output_ids) for sample in samples)
    batch = MicroBatch(
        input_ids=torch.full(shape, pad_id, dtype=torch.int64),
        attention_mask=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
        logprobs=torch.zeros(shape, dtype=torch.float32),
        advantages=torch.zeros(shape, dtype=torch.float32),
        versions=torch.full(shape, NO_VERSION, dtype=torch.int64),
    )
    for row, (sample, advantage) in enumerate(zip(samples, advantages, strict=True)):
        begin = len(sample.prompt_ids)
        end = begin + len(sample.output_ids)
        batch.input_ids[row, :end] = torch.tensor(sample.prompt_ids + sample.output_ids, dtype=torch.int64)
        batch.attention_mask[row, :end] = 1
        batch.position_ids[row, :end] = torch.arange(end)
        batch.loss_mask[row, begin:end] = True
        batch.logprobs[row, begin:end] = torch.tensor(sample.logprobs, dtype=torch.float32)
        batch.advantages[row, begin:end] = advantage
        batch.versions[row, begin:end] = torch.tensor(sample.versions, dtype=torch.int64)
    return batch
