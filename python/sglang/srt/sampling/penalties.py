"""What a request does to its logits before sampling: repetition, frequency and presence penalties, logit_bias, and the
ban on stop tokens before min_new_tokens.

Called by `sampler`; the scheduler creates a `PenaltyState` with the request, drops it with the request, and creates it
again from the output when a retracted request comes back. Rows without a state cost nothing.
Only tokens that occurred are touched (a few hundred numbers, not V), for all rows of the batch in one go, and new
tokens are recorded on the device, so the host never waits for them.
Order, as in stock SGLang: presence and frequency, then repetition, then bias, then the ban; and as there, all three
penalties look at generated tokens only (Hugging Face's repetition penalty counts the prompt too).
Invariant: a state holds the outputs it was created with, and one token per `record_tokens` call; the host knows how
many without asking the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.sampling.sampling_params import SamplingSpec
from sglang.srt.sampling.transfer import to_device


class PenaltyState:
    """Tokens one request has generated, and its additions to the logits; all tensors on the device.

    Attributes:
        bias: (ids int64, values float32) of logit_bias, or None.
        stop_ids: int64 ids banned while fewer than min_new_tokens have been generated, or None.
    """

    def __init__(self, spec: SamplingSpec, outputs: Tensor) -> None:
        self.frequency = spec.frequency_penalty
        self.presence = spec.presence_penalty
        self.repetition = spec.repetition_penalty
        self.min_new_tokens = spec.min_new_tokens
        self.bias: tuple[Tensor, Tensor] | None = None
        self.stop_ids: Tensor | None = None
        if spec.logit_bias:
            ids = to_device(np.fromiter(spec.logit_bias.keys(), np.int64), outputs.device)
            self.bias = ids, to_device(np.fromiter(spec.logit_bias.values(), np.float32), outputs.device)
        if spec.min_new_tokens and spec.stop_token_ids:
            self.stop_ids = to_device(np.asarray(spec.stop_token_ids, np.int64), outputs.device)
        self._ids = outputs
        self._size = len(outputs)

    @classmethod
    def create(
        cls,
        spec: SamplingSpec,
        output_ids: Sequence[int] | NDArray[np.integer[Any]],
        vocab_size: int,
        device: torch.device,
    ) -> PenaltyState | None:
        """The state of a request that has generated `output_ids` so far; None when its spec leaves logits as they are.

        Args:
            output_ids: on the host.
            vocab_size: V; every id is below it.
        """
        counts = spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0 or spec.repetition_penalty != 1.0
        if not (counts or spec.logit_bias or (spec.min_new_tokens and spec.stop_token_ids)):
            return None
        assert all(token < vocab_size for token in spec.logit_bias), "logit_bias id beyond the vocabulary"
        return cls(spec, to_device(np.asarray(output_ids, np.int64), device))

    @property
    def counts_outputs(self) -> bool:
        """Whether generated tokens matter one by one (frequency, presence)."""
        return self.frequency != 0.0 or self.presence != 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether any penalty looks at past tokens."""
        return self.counts_outputs or self.repetition != 1.0

    @property
    def outputs(self) -> Tensor:
        """int64 generated ids in order."""
        return self._ids[: self._size]

    def next_slot(self) -> Tensor:
        """int64 scalar view to copy the next token into; the state counts it as seen from now on."""
        if self._size == len(self._ids):
            room = torch.zeros(max(2 * self._size, 64), dtype=torch.int64, device=self._ids.device)
            room[: self._size] = self._ids
            self._ids = room
        self._size += 1
        return self._ids[self._size - 1]


Entry = tuple[int, int, PenaltyState]
"""(row of the batch, number of tokens generated before this one, state)."""


def apply_penalties(logits: Tensor, entries: Sequence[Entry]) -> None:
    """Change the rows of `logits` [R, V] float32 (contiguous) that have an entry, in place."""
    assert logits.is_contiguous(), "logits must be contiguous"
    flat, width = logits.view(-1), logits.shape[1]
    _penalize_outputs(flat, width, [e for e in entries if e[2].counts_outputs and len(e[2].outputs)])
    _penalize_repetition(flat, width, [e for e in entries if e[2].repetition != 1.0 and len(e[2].outputs)])
    biased = [(row, bias) for row, _, state in entries if (bias := state.bias) is not None]
    if biased:
        index = _flat_index([(row, ids) for row, (ids, _) in biased], width)
        flat.index_add_(0, index, torch.cat([values for _, (_, values) in biased]))
    banned = [
        (row, ids) for row, position, s in entries if (ids := s.stop_ids) is not None and position < s.min_new_tokens
    ]
    if banned:
        flat.index_fill_(0, _flat_index(banned, width), -torch.inf)


def record_tokens(tokens: Tensor, entries: Sequence[Entry]) -> None:
    """Count `tokens` int64 [R], just sampled, in the states of their rows."""
    counting = [(row, state) for row, _, state in entries if state.counts_tokens]
    if counting:
        torch._foreach_copy_([state.next_slot() for _, state in counting], [tokens[row] for row, _ in counting])


def _penalize_outputs(flat: Tensor, width: int, entries: list[Entry]) -> None:
    if not entries:
        return
    index = _flat_index([(row, state.outputs) for row, _, state in entries], width)
    spread = _spreader(flat.device, [len(state.outputs) for _, _, state in entries])
    # Repeated ids write the same value, so presence counts once; frequency adds up once per occurrence.
    flat.scatter_(0, index, flat[index] - spread([state.presence for _, _, state in entries]))
    flat.index_add_(0, index, spread([-state.frequency for _, _, state in entries]))


def _penalize_repetition(flat: Tensor, width: int, entries: list[Entry]) -> None:
    if not entries:
        return
    index = _flat_index([(row, state.outputs) for row, _, state in entries], width)
    spread = _spreader(flat.device, [len(state.outputs) for _, _, state in entries])
    factor = spread([state.repetition for _, _, state in entries])
    before = flat[index]
    flat.scatter_(0, index, torch.where(before < 0.0, before * factor, before / factor))


def _flat_index(rows: Sequence[tuple[int, Tensor]], width: int) -> Tensor:
    """int64 positions in the flattened logits of each row's ids, one row after the other."""
    if len(rows) == 1:
        row, ids = rows[0]
        return ids + row * width
    ids = torch.cat([ids for _, ids in rows])
    starts = to_device(np.asarray([row * width for row, _ in rows], np.int64), ids.device)
    lengths = to_device(np.asarray([len(ids) for _, ids in rows], np.int64), ids.device)
    return ids + torch.repeat_interleave(starts, lengths, output_size=len(ids))


def _spreader(device: torch.device, lengths: list[int]) -> Callable[[list[float]], Tensor]:
    """A function that repeats each row's number once per id of the row, as float32 on the device."""
    repeats = to_device(np.asarray(lengths, np.int64), device)
    total = sum(lengths)

    def spread(values: list[float]) -> Tensor:
        column = to_device(np.asarray(values, np.float32), device)
        return torch.repeat_interleave(column, repeats, output_size=total)

    return spread
