"""Logits to tokens and log-probabilities, for a batch of requests that each want something else.

Owned by `ModelRunner`, one per back process; not thread-safe. The draw of a row is a pure function of its logits, its
spec and its position: same seed, same text, whatever the batch around it. Nothing here waits for the device.

Invariants: penalties act on raw logits, then temperature, softmax, and top-k, top-p, min-p on those probabilities
(each on the whole distribution: none renormalises for the next). Reported log-probabilities are those after penalties
and temperature, before the filters, or of the raw logits with `return_original_logprob`.

Batches of which no row wants more than its token (`SamplingPlan.whole`) take two kernels on a GPU, see `draw_rows`;
captured steps call those directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling import device_draw, host_draw
from sglang.srt.sampling.distribution import FLOAT_MAX, Normalizer, Workspace, uniforms
from sglang.srt.sampling.logprobs import ScoreOutput, pack_positions
from sglang.srt.sampling.penalties import PenaltyState, apply_penalties, record_tokens
from sglang.srt.sampling.plan import SamplingPlan, SamplingRow, plan_key
from sglang.srt.sampling.sampling_params import SamplingSpec
from sglang.srt.sampling.transfer import HostCopy, to_device

__all__ = ["HostSample", "PenaltyState", "SampleOutput", "Sampler", "SamplingRow", "ScoreOutput"]

SCORE_AFTER_TEMPERATURE = True
"""Whether log-probabilities of prompt tokens are taken after temperature, as those of output tokens are. (Stock SGLang
0.5.12 divides only the output's logits by the temperature.)"""
SCORE_ROWS = 64
"""Prompt positions whose weights are in memory at once."""


class DrawRows(Protocol):
    """`ops.triton.sampling.RowSampler.sample`."""

    def __call__(
        self, logits: Tensor, temperature: Tensor, uniforms: Tensor, tokens: Tensor, logprobs: Tensor, bad: Tensor
    ) -> None:
        """One token per row, all in place."""


def _row_kernels(max_rows: int, vocab_size: int, device: torch.device) -> DrawRows | None:
    if not max_rows or device.type != "cuda":
        return None
    from sglang.srt.ops.triton.sampling import RowSampler

    return RowSampler(max_rows, vocab_size, device).sample


def draws_whole(plan: SamplingPlan, rows: Sequence[SamplingRow]) -> bool:
    """Whether `draw_rows` gives these rows all that they want."""
    return plan.whole and all(row.penalties is None for row in rows)


def row_uniforms(plan: SamplingPlan, rows: Sequence[SamplingRow]) -> NDArray[np.float64]:
    """The uniform number of every row's next token, [R]."""
    positions = np.fromiter((row.position for row in rows), np.uint64, len(rows))
    return uniforms(plan.seeds, positions)


@dataclass(slots=True)
class HostSample:
    """Results of a step as arrays.

    Fields:
        tokens: int64 [R]; logprobs: float32 [R], 0 for rows that did not ask, or None when none did.
        bad_rows: bool [R], rows whose logits hold a NaN or nothing above -inf: token 0, log-probability NaN.
        top, ids: row -> alternatives to its new token (one position), for rows that asked.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None
    bad_rows: NDArray[np.bool_]
    top: dict[int, wire.Positions]
    ids: dict[int, wire.Positions]


@dataclass(slots=True)
class SampleOutput:
    """Results of a step on the device, nothing synchronised; see `HostSample`.

    Fields:
        top_ids int64, top_logprobs float32: [rows of plan.top, n]; ids_logprobs: float32 [rows of plan.ids, m].
    """

    tokens: Tensor
    bad_rows: Tensor
    plan: SamplingPlan
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    ids_logprobs: Tensor | None = None
    _copy: HostCopy | None = None

    def start_copy(self) -> None:
        """Queue the copies to the host now, so that `to_host` does not wait for work queued later."""
        if self._copy is None:
            names = ("tokens", "bad_rows", "logprobs", "top_ids", "top_logprobs", "ids_logprobs")
            self._copy = HostCopy({name: getattr(self, name) for name in names})

    def to_host(self) -> HostSample:
        """The results as arrays; blocks until the device has them."""
        self.start_copy()
        assert self._copy is not None
        arrays = self._copy.wait()
        top: dict[int, wire.Positions] = {}
        for i, (row, count) in enumerate(zip(self.plan.top.rows, self.plan.top_nums, strict=True)):
            top[row] = pack_positions([(arrays["top_ids"][i, :count], arrays["top_logprobs"][i, :count])])
        ids: dict[int, wire.Positions] = {}
        for i, (row, tokens) in enumerate(zip(self.plan.ids.rows, self.plan.id_lists, strict=True)):
            ids[row] = pack_positions([(np.asarray(tokens), arrays["ids_logprobs"][i, : len(tokens)])])
        return HostSample(arrays["tokens"], arrays.get("logprobs"), arrays["bad_rows"], top, ids)


class Sampler:
    """Samples and scores.

    Args:
        vocab_size: V, width of the logits.
        return_original_logprob: report log-probabilities of the raw logits, before penalties and temperature.
        max_rows: the most that one batch has; on a GPU with Triton, memory for their kernels. 0: never use these.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, return_original_logprob: bool = False, max_rows: int = 0
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.return_original_logprob = return_original_logprob
        self._draws = host_draw if device.type == "cpu" else device_draw
        self._workspace = Workspace(vocab_size, device)
        self._plan: SamplingPlan | None = None
        self.draw_rows: DrawRows | None = _row_kernels(max_rows, vocab_size, device)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampleOutput:
        """One token per row; the tokens are also counted in the rows' penalties.

        Args:
            logits: [R, V], contiguous. Rows with penalties are overwritten.
            rows: what each row wants.
        """
        assert logits.shape == (len(rows), self.vocab_size), (logits.shape, len(rows), self.vocab_size)
        plan = self.plan(rows)
        if self.draw_rows is not None and draws_whole(plan, rows):
            return self._draw_whole(logits, plan, rows)
        logits = logits.float()
        penalties = [(i, row.position, row.penalties) for i, row in enumerate(rows) if row.penalties is not None]
        keep_raw = self.return_original_logprob and bool(penalties) and len(plan.logprob) > 0
        reported = logits.clone() if keep_raw else logits
        apply_penalties(logits, penalties)

        output = SampleOutput(
            tokens=torch.zeros(len(rows), dtype=torch.int64, device=self.device),
            bad_rows=torch.zeros(len(rows), dtype=torch.bool, device=self.device),
            plan=plan,
        )
        self._take_greedy(logits, output)
        normalizer = self._draw(logits, output, rows)
        record_tokens(output.tokens, penalties)
        if len(plan.logprob):
            if normalizer is None:
                normalizer = self._workspace.weights(plan.logprob.take(reported), None).normalizer
            self._report(reported, output, normalizer)
        return output

    @torch.inference_mode()
    def score(
        self,
        logits: Tensor,
        targets: Tensor,
        spec: SamplingSpec,
        top_num: int = 0,
        token_ids: tuple[int, ...] = (),
    ) -> ScoreOutput:
        """Log-probabilities of prompt tokens; call it for as many positions at a time as logits fit in memory.

        Args:
            logits: [P, V], unchanged; targets: int64 [P], the token that follows each position.
            top_num: alternatives to report at each position; token_ids: tokens to report at each position.
        """
        assert len(logits) == len(targets) > 0, (len(logits), len(targets))
        temperature = self._score_temperature(spec)
        wanted = to_device(np.asarray(token_ids, np.int64), self.device)
        chosen, top_ids, top_logprobs, ids_logprobs = [], [], [], []
        for start in range(0, len(targets), SCORE_ROWS):
            part = logits[start : start + SCORE_ROWS].float()
            size = len(part)
            normalizer = self._workspace.weights(part, None if temperature is None else temperature[:size]).normalizer
            chosen.append(normalizer.logprobs(part.gather(1, targets[start : start + size, None]).squeeze(1)))
            if top_num:
                values, ids = self._draws.top_entries(part, top_num)
                top_ids.append(ids)
                top_logprobs.append(normalizer.logprobs(values))
            if token_ids:
                ids_logprobs.append(normalizer.logprobs(part[:, wanted]))
        return ScoreOutput(
            torch.cat(chosen),
            (torch.cat(top_ids), torch.cat(top_logprobs)) if top_num else None,
            token_ids,
            torch.cat(ids_logprobs) if token_ids else None,
        )

    def _score_temperature(self, spec: SamplingSpec) -> Tensor | None:
        if not SCORE_AFTER_TEMPERATURE or self.return_original_logprob or spec.temperature == 1.0:
            return None
        return torch.full((SCORE_ROWS,), min(spec.temperature, FLOAT_MAX), device=self.device)

    def plan(self, rows: Sequence[SamplingRow]) -> SamplingPlan:
        """How these rows are sampled: the plan of the last batch if nothing has changed."""
        if self._plan is None or self._plan.key != plan_key(rows):
            self._plan = SamplingPlan(rows, self.vocab_size, self.device, self.return_original_logprob)
        return self._plan

    def _draw_whole(self, logits: Tensor, plan: SamplingPlan, rows: Sequence[SamplingRow]) -> SampleOutput:
        assert self.draw_rows is not None
        output = SampleOutput(
            tokens=torch.empty(len(rows), dtype=torch.int64, device=self.device),
            bad_rows=torch.empty(len(rows), dtype=torch.bool, device=self.device),
            plan=plan,
        )
        logprobs = torch.empty(len(rows), dtype=torch.float32, device=self.device)
        numbers = to_device(row_uniforms(plan, rows), self.device)
        temperature = plan.row_temperature_on_device
        self.draw_rows(logits, temperature, numbers, tokens=output.tokens, logprobs=logprobs, bad=output.bad_rows)
        output.logprobs = logprobs if len(plan.logprob) else None
        return output

    def _draw_plain(self, logits: Tensor, plan: SamplingPlan, numbers: NDArray[np.float64]) -> Tensor:
        """By the kernels too, so that what a row draws does not depend on what other rows want."""
        assert self.draw_rows is not None
        rows = plan.plain
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        logprobs = torch.empty(len(rows), dtype=torch.float32, device=self.device)
        bad = torch.empty(len(rows), dtype=torch.bool, device=self.device)
        temperature = rows.take(plan.row_temperature_on_device)
        self.draw_rows(rows.take(logits), temperature, to_device(numbers, self.device), tokens, logprobs, bad)
        return tokens

    def _take_greedy(self, logits: Tensor, output: SampleOutput) -> None:
        """Fill tokens and bad_rows of the greedy rows."""
        rows = output.plan.greedy
        if len(rows):
            selected = rows.take(logits)
            best = self._draws.argmax_rows(selected)
            rows.put(output.tokens, best)
            rows.put(output.bad_rows, ~(selected.gather(1, best[:, None]).squeeze(1) > -torch.inf))
            output.tokens.masked_fill_(output.bad_rows, 0)

    def _draw(self, logits: Tensor, output: SampleOutput, rows: Sequence[SamplingRow]) -> Normalizer | None:
        """Fill tokens and bad_rows of the drawn rows; the normaliser of the logprob rows if it comes with them."""
        plan = output.plan
        if not len(plan.soft):
            return None
        weights = self._workspace.weights(plan.soft.take(logits), plan.temperature)
        drawn = plan.plain.rows + plan.filtered.rows
        if drawn:
            positions = np.asarray([rows[i].position for i in drawn], np.uint64)
            whole, narrowed = np.split(uniforms(plan.seeds[drawn], positions), [len(plan.plain)])
            if len(plan.plain) and self.draw_rows is not None:
                plan.plain.put(output.tokens, self._draw_plain(logits, plan, whole))
            elif len(plan.plain):
                plan.plain.put(output.tokens, self._draws.draw(weights, plan.plain_soft.index, whole))
            if len(plan.filtered):
                tokens = self._draws.draw_filtered(weights, plan.filtered_soft.index, narrowed, plan.filters)
                plan.filtered.put(output.tokens, tokens)
        plan.soft.put(output.bad_rows, weights.bad)
        output.tokens.masked_fill_(output.bad_rows, 0)
        return None if plan.logprob_soft is None else weights.normalizer.take(plan.logprob_soft.index)

    def _report(self, logits: Tensor, output: SampleOutput, normalizer: Normalizer) -> None:
        """Fill the log-probabilities that rows asked for; `normalizer` is that of the logprob rows."""
        plan = output.plan
        chosen = logits.gather(1, output.tokens[:, None]).squeeze(1)
        output.logprobs = torch.zeros(len(logits), device=self.device)
        plan.logprob.put(output.logprobs, normalizer.logprobs(plan.logprob.take(chosen)))
        if len(plan.top):
            values, output.top_ids = self._draws.top_entries(plan.top.take(logits), max(plan.top_nums))
            output.top_logprobs = normalizer.take(plan.top_logprob.index).logprobs(values)
        if len(plan.ids):
            values = plan.ids.take(logits).gather(1, plan.token_ids)
            output.ids_logprobs = normalizer.take(plan.ids_logprob.index).logprobs(values)
