"""How one batch is sampled: which rows need which treatment, and their parameters as columns on the device.

Built by `Sampler` from the batch's rows and kept while the batch stays the same: decode steps pay for it once.
Invariant: a plan depends on the rows' parameters only, never on their positions or penalties' state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang.srt.sampling.distribution import FLOAT_MAX
from sglang.srt.sampling.penalties import PenaltyState
from sglang.srt.sampling.sampling_params import SamplingSpec
from sglang.srt.sampling.transfer import to_device


@dataclass(slots=True)
class SamplingRow:
    """What to sample in one row of the logits.

    Fields:
        position: number of output tokens before this one.
        penalties: of this request; None only when `PenaltyState.create` gave None for its spec.
        top_logprobs_num, token_ids_logprob: alternatives to report; either implies `return_logprob`.
    """

    spec: SamplingSpec
    position: int
    penalties: PenaltyState | None = None
    return_logprob: bool = False
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()

    @property
    def wants_logprob(self) -> bool:
        """Whether any log-probability of this row is reported."""
        return self.return_logprob or self.top_logprobs_num > 0 or bool(self.token_ids_logprob)


PlanKey = list[tuple[SamplingSpec, bool, int, tuple[int, ...]]]


def plan_key(rows: Sequence[SamplingRow]) -> PlanKey:
    """Everything a plan depends on; equal keys have equal plans."""
    return [(row.spec, row.return_logprob, row.top_logprobs_num, row.token_ids_logprob) for row in rows]


class RowSet:
    """Some rows of a larger set, in order; reading or writing all of them copies nothing.

    Attributes:
        rows: their numbers.
    """

    def __init__(self, rows: list[int], size: int, device: torch.device) -> None:
        self.rows = rows
        self._size = size
        self._device = device

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def index(self) -> Tensor | None:
        """The same as int64 [n] on the device, or None when they are all rows; made when first needed."""
        if len(self.rows) == self._size:
            return None
        return to_device(np.asarray(self.rows, np.int64), self._device)

    def take(self, values: Tensor) -> Tensor:
        """The set's rows of `values`."""
        return values if self.index is None else values[self.index]

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values` to the set's rows of `target`."""
        if self.index is None:
            target.copy_(values)
        else:
            target[self.index] = values.to(target.dtype)


class Filters:
    """What narrows the distributions of F rows.

    A token stays when fewer than `top_k` tokens are likelier, the tokens above it hold at most `top_p` of the
    probability, and its own is at least `min_p` of the largest; equals rank by token id.

    Attributes:
        columns: float64 [3, F] top_k, top_p (inf when it filters nothing), min_p.
    """

    def __init__(self, specs: list[SamplingSpec], device: torch.device) -> None:
        rows = [(spec.top_k, np.inf if spec.top_p >= 1.0 else spec.top_p, spec.min_p) for spec in specs]
        self.columns = np.asarray(rows, np.float64).reshape(-1, 3).T
        self._device = device

    @functools.cached_property
    def on_device(self) -> Tensor:
        """`columns` as a tensor on the device."""
        return to_device(self.columns, self._device)


class SamplingPlan:
    """Treatment of R rows.

    Attributes:
        seeds: uint64 [R].
        greedy: rows that take the arg-max.
        soft: rows whose softmax weights are needed (drawn rows, and rows whose log-probabilities come from them).
        temperature: float32 [soft], or None when it is 1 in all of them.
        plain, filtered: rows drawn from the whole distribution, and rows with top-k, top-p or min-p.
        plain_soft, filtered_soft, logprob_soft: the same rows (and `logprob`) by their place among the soft rows.
        logprob: rows that report log-probabilities; top, ids: those that report alternatives.
        whole: whether all rows are greedy or drawn from their whole distribution, and report nothing but the
            log-probability of their token, as `RowSampler` has it. `row_temperature`: float32 [R], 0 for greedy ones.
        token_ids: int64 [ids, longest list], padded with 0, for `ids`.
    """

    def __init__(
        self, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device, original_logprob: bool
    ) -> None:
        self.key = plan_key(rows)
        self.device = device
        self._size = len(rows)
        specs = [row.spec for row in rows]
        self.seeds = np.asarray([spec.seed for spec in specs], np.uint64)
        wants = [i for i, row in enumerate(rows) if row.wants_logprob]
        drawn = [i for i, spec in enumerate(specs) if not spec.is_greedy]
        narrow = {i for i in drawn if _is_narrowed(specs[i], vocab_size)}
        self.greedy = self._among_all([i for i, spec in enumerate(specs) if spec.is_greedy])
        self.plain = self._among_all([i for i in drawn if i not in narrow])
        self.filtered = self._among_all([i for i in drawn if i in narrow])
        self.soft = self._among_all(sorted(drawn if original_logprob else {*drawn, *wants}))
        self.plain_soft = self._among_soft(self.plain)
        self.filtered_soft = self._among_soft(self.filtered)
        self.temperature = self._temperatures([specs[i].temperature for i in self.soft.rows])
        self.filters = Filters([specs[i] for i in self.filtered.rows], device)
        self.logprob = self._among_all(wants)
        self.logprob_soft = None if original_logprob else self._among_soft(self.logprob)
        self._plan_alternatives(rows)
        greedy = set(self.greedy.rows)
        at_one = all(specs[i].temperature == 1.0 for i in wants if original_logprob or i in greedy)
        self.whole = at_one and not (self.filtered or self.top or self.ids)
        temperatures = [0.0 if i in greedy else min(spec.temperature, FLOAT_MAX) for i, spec in enumerate(specs)]
        self.row_temperature = np.asarray(temperatures, np.float32)

    @functools.cached_property
    def row_temperature_on_device(self) -> Tensor:
        """`row_temperature` as a tensor."""
        return to_device(self.row_temperature, self.device)

    def _among_all(self, rows: list[int]) -> RowSet:
        return RowSet(rows, self._size, self.device)

    def _among_soft(self, rows: RowSet) -> RowSet:
        place = {row: i for i, row in enumerate(self.soft.rows)}
        return RowSet([place[row] for row in rows.rows], len(self.soft), self.device)

    def _temperatures(self, values: list[float]) -> Tensor | None:
        if all(value == 1.0 for value in values):
            return None
        return to_device(np.minimum(np.asarray(values), FLOAT_MAX).astype(np.float32), self.device)

    def _plan_alternatives(self, rows: Sequence[SamplingRow]) -> None:
        self.top = self._among_all([i for i, row in enumerate(rows) if row.top_logprobs_num > 0])
        self.top_nums = [rows[i].top_logprobs_num for i in self.top.rows]
        self.ids = self._among_all([i for i, row in enumerate(rows) if row.token_ids_logprob])
        self.id_lists = [rows[i].token_ids_logprob for i in self.ids.rows]
        table = np.zeros((len(self.ids), max(map(len, self.id_lists), default=0)), np.int64)
        for line, ids in zip(table, self.id_lists, strict=True):
            line[: len(ids)] = ids
        self.token_ids = to_device(table, self.device)
        place = {row: i for i, row in enumerate(self.logprob.rows)}
        self.top_logprob = RowSet([place[i] for i in self.top.rows], len(self.logprob), self.device)
        self.ids_logprob = RowSet([place[i] for i in self.ids.rows], len(self.logprob), self.device)


def _is_narrowed(spec: SamplingSpec, vocab_size: int) -> bool:
    return spec.top_p < 1.0 or spec.min_p > 0.0 or spec.top_k < vocab_size
