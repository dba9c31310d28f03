"""Runs steps on the device: owns the model, the KV pool, attention, the sampler and the tokens drawn last.

Called by the scheduler only. `launch` queues a step and returns at once on an accelerator; `StepResult.read` waits for
it. The token a sequence drew last stays on the device in `_last_tokens[slot]`, so the next step can be launched before
anybody has read it. Steps of decoding alone run as graphs, where there are any; every other step operation by
operation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.mem_cache.req_table import ReqTable
from sglang.srt.model_executor.cuda_graph import DecodeGraphs, GraphSample, StepColumns
from sglang.srt.model_executor.forward_context import (
    AttentionBackend,
    CapturableAttention,
    CausalLM,
    ForwardContext,
    KVPoolView,
    LoRABatch,
    StepShape,
)
from sglang.srt.sampling.logprobs import HostScore, ScoreOutput
from sglang.srt.sampling.sampler import (
    HostSample,
    SampleOutput,
    Sampler,
    SamplingRow,
    draws_whole,
    row_uniforms,
)
from sglang.srt.sampling.transfer import to_device

SCORE_SLICE = 256
"""Prompt rows whose logits exist at once: 256 x 150k x 4 bytes is 150 MB."""


@dataclass(eq=False, slots=True)
class ScoreRows:
    """Prompt positions of one sequence to score: hidden-state rows of the step, and the token each should predict."""

    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    sampling: SamplingRow


@dataclass(eq=False, slots=True)
class StepInput:
    """Host columns of a step (T tokens, B sequences, R sampled rows).

    Fields:
        input_ids, positions, out_locs: int64 [T]; slots: int64 [B].
        versions: int64 [B], the weights each sequence runs on (wire.BASE_VERSION: no adapter).
        lora_slots: adapter version in each device slot; those of `versions` are among them.
        decode_rows, decode_slots: tokens whose id is `_last_tokens[slot]`, int64.
        sample_rows: token rows whose hidden state is sampled, int64 [R]; sample_slots: where the drawn token goes.
    """

    shape: StepShape
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    out_locs: NDArray[np.int64]
    slots: NDArray[np.int64]
    versions: NDArray[np.int64]
    lora_slots: tuple[int, ...]
    decode_rows: NDArray[np.int64]
    decode_slots: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    sample_slots: NDArray[np.int64]
    sampling: Sequence[SamplingRow]
    scores: list[ScoreRows] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class StepResult:
    """A launched step: `read` waits for it and copies its results to the host.

    Fields:
        scores: one ScoreOutput list per ScoreRows of the input, in order.
    """

    sample: SampleOutput | GraphSample | None
    scores: list[list[ScoreOutput]]

    def read(self) -> tuple[HostSample | None, list[list[HostScore]]]:
        """(drawn tokens, None when the step drew none; prompt log-probabilities), both on the host."""
        sample = None if self.sample is None else self.sample.to_host()
        return sample, [[part.to_host() for part in parts] for parts in self.scores]


_NO_VERSIONS = np.empty(0, dtype=np.int64)


class RowAdapters(NamedTuple):
    """The adapters of one step's rows, and of any of them; `lora` is None when no row has one.

    Fields:
        versions: int64 [T].
    """

    lora: LoRAManager | None
    versions: NDArray[np.int64]

    def of_all(self) -> LoRABatch | None:
        """Of every row of the step."""
        return None if self.lora is None else self.lora.batch(self.versions)

    def of(self, rows: NDArray[np.int64]) -> LoRABatch | None:
        """What changes the logits of these rows, in this order."""
        return None if self.lora is None else self.lora.outside_slabs(self.versions[rows])


class ModelRunner:
    """Launches steps.

    Args:
        table: the page table, brought up to date at every launch.
        max_slots: rows of `_last_tokens`.
        lora: weights of the adapters that steps name; None when they name none.
    """

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        kv_pool: KVPoolView,
        sampler: Sampler,
        table: ReqTable,
        max_slots: int,
        device: torch.device,
        lora: LoRAManager | None = None,
    ) -> None:
        self.model = model
        self.attention = attention
        self.kv_pool = kv_pool
        self.sampler = sampler
        self.table = table
        self.device = device
        self.lora = lora
        # One more than there are slots, for the padding of captured steps.
        self._last_tokens = torch.zeros(max_slots + 1, dtype=torch.int64, device=device)
        self._graphs: DecodeGraphs | None = None

    def capture(self, attention: CapturableAttention, buckets: Sequence[int], dtype: torch.dtype) -> None:
        """Capture decode steps of so many rows; nothing may be running.

        Args:
            attention: the runner's own.
            dtype: of the logits.
        """
        parts = (self.model, attention, self.kv_pool, self.table, self.sampler, self._last_tokens, self.lora)
        graphs = DecodeGraphs(*parts, buckets, dtype)
        graphs.capture()
        self._graphs = graphs

    @torch.inference_mode()
    def launch(self, step: StepInput) -> StepResult:
        """Queue one step; results are valid once `StepResult.read` returns."""
        if self.lora is not None and step.versions.any():
            self.lora.load(step.lora_slots)
        decodes = len(step.decode_rows) == len(step.input_ids) and not step.scores
        if decodes and self._graphs is not None and self._graphs.takes(len(step.slots), step.versions):
            return self._replay(step, self._graphs)
        return self._run(step)

    def _replay(self, step: StepInput, graphs: DecodeGraphs) -> StepResult:
        self.table.leave_to_step(step.slots, step.positions)
        self.table.flush()
        plan = self.sampler.plan(step.sampling)
        columns = StepColumns(
            step.positions,
            step.out_locs,
            step.slots,
            step.shape.kv_lens,
            step.versions,
            plan.row_temperature,
            row_uniforms(plan, step.sampling),
        )
        pending = graphs.launch(columns)
        if draws_whole(plan, step.sampling):
            return StepResult(GraphSample(pending, plan, len(step.slots)), [])
        # What the graph has drawn is of no use: these rows want more than it can do.
        sample = self.sampler.sample(graphs.logits[: len(step.slots)], step.sampling)
        self._last_tokens[to_device(step.sample_slots, self.device)] = sample.tokens
        sample.start_copy()
        return StepResult(sample, [])

    def _run(self, step: StepInput) -> StepResult:
        self.table.flush()
        tokens, rows, slots = self._upload(step)
        input_ids, positions, out_locs = tokens
        if len(step.decode_rows) == len(input_ids):
            input_ids = self._last_tokens[slots]
        elif len(step.decode_rows):
            decode_rows, decode_slots = to_device(np.stack([step.decode_rows, step.decode_slots]), self.device)
            input_ids[decode_rows] = self._last_tokens[decode_slots]
        self.attention.plan(step.shape, slots)
        adapters = self._adapters(step)
        ctx = ForwardContext(input_ids, positions, out_locs, self.kv_pool, self.attention, adapters.of_all())
        hidden = self.model.forward(ctx)
        scores = [self._score(hidden, wanted, adapters) for wanted in step.scores]
        sample = self._sample(hidden, rows, step, adapters)
        # Queued now, so that reading them does not wait for a step launched later.
        if sample is not None:
            sample.start_copy()
        for part in itertools.chain.from_iterable(scores):
            part.start_copy()
        return StepResult(sample, scores)

    def _adapters(self, step: StepInput) -> RowAdapters:
        if self.lora is None or not step.versions.any():
            return RowAdapters(None, _NO_VERSIONS)
        return RowAdapters(self.lora, np.repeat(step.versions, step.shape.query_lens))

    def _upload(self, step: StepInput) -> tuple[Tensor, Tensor, Tensor]:
        """(token columns [3, T], sample rows [R], slots [B]) in one packed copy."""
        num_tokens, num_rows = len(step.input_ids), len(step.sample_rows)
        packed = np.concatenate([step.input_ids, step.positions, step.out_locs, step.sample_rows, step.slots])
        device = to_device(packed, self.device)
        tokens = device[: 3 * num_tokens].view(3, num_tokens)
        return tokens, device[3 * num_tokens : 3 * num_tokens + num_rows], device[3 * num_tokens + num_rows :]

    def _sample(self, hidden: Tensor, rows: Tensor, step: StepInput, adapters: RowAdapters) -> SampleOutput | None:
        if not len(step.sample_rows):
            return None
        if len(step.sample_rows) != len(hidden):
            hidden = hidden[rows]
        logits = self.model.compute_logits(hidden, adapters.of(step.sample_rows))
        output = self.sampler.sample(logits, step.sampling)
        self._last_tokens[to_device(step.sample_slots, self.device)] = output.tokens
        return output

    def _score(self, hidden: Tensor, wanted: ScoreRows, adapters: RowAdapters) -> list[ScoreOutput]:
        rows, targets = to_device(np.stack([wanted.rows, wanted.targets]), self.device)
        row = wanted.sampling
        return [
            self.sampler.score(
                self.model.compute_logits(
                    hidden[rows[i : i + SCORE_SLICE]], adapters.of(wanted.rows[i : i + SCORE_SLICE])
                ),
                targets[i : i + SCORE_SLICE],
                row.spec,
                row.top_logprobs_num,
                row.token_ids_logprob,
            )
            for i in range(0, len(rows), SCORE_SLICE)
        ]
