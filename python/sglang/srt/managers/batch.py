"""One step on its way to the device: which tokens of which sequences, as host columns.

Built by the planner, consumed by ModelRunner (columns) and OutputProcessor (requests). Sequences are in the same order
in every column. Shape legend: T tokens, B sequences, R logit rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang.srt.managers.request import Request
from sglang.srt.mem_cache.kv_manager import KVManager, SequenceKV
from sglang.srt.model_executor.forward_context import StepShape
from sglang.srt.model_executor.model_runner import ScoreRows, StepInput


@dataclass(eq=False, slots=True)
class Segment:
    """Tokens [start, end) of one request; `samples` when the step draws a token after the last of them.

    A decode segment's token is on the device only: it was drawn by an earlier step, perhaps one still in flight.
    """

    request: Request
    start: int
    end: int
    samples: bool
    is_decode: bool
    score: tuple[int, int] = (0, 0)
    """Prompt positions [first, last) whose log-probability this step computes."""

    @property
    def is_scored(self) -> bool:
        """Whether prompt positions are scored."""
        return self.score[1] > 0


@dataclass(eq=False, slots=True)
class StepPlan:
    """A step: its segments, and the columns the device needs.

    Fields:
        inputs: what ModelRunner.launch takes.
    """

    segments: list[Segment]
    inputs: StepInput

    @property
    def sampled(self) -> list[Segment]:
        """Segments that draw a token, in row order of the sampler's output."""
        return [s for s in self.segments if s.samples]

    @property
    def first_chunks(self) -> list[Request]:
        """Requests whose prompt starts in this step, for the first time."""
        return [
            s.request
            for s in self.segments
            if not s.is_decode and s.start == s.request.cached_tokens and not s.request.num_retractions
        ]


def plan_segment(request: Request, end: int) -> Segment:
    """The segment that computes a request up to `end` tokens, prompt positions to score included."""
    start = request.num_computed
    total = request.num_known
    samples = end == total and request.remaining_outputs > 0
    segment = Segment(request, start, end, samples=samples, is_decode=False)
    if request.wants_input_scores:
        first = max(request.logprob_start, 1, start + 1)
        last = min(end + 1, len(request.prompt))
        if first < last:
            segment.score = (first, last)
    return segment


def plan_decode(request: Request) -> Segment:
    """The segment that computes the one token drawn last."""
    return Segment(request, request.num_computed, request.num_computed + 1, samples=True, is_decode=True)


def build_step(segments: list[Segment], kv: KVManager, lora_slots: tuple[int, ...] = ()) -> StepPlan:
    """Columns of a step; KV room for every segment has been reserved, and its version is in one of `lora_slots`."""
    starts = np.array([s.start for s in segments], dtype=np.int32)
    ends = np.array([s.end for s in segments], dtype=np.int32)
    slots = np.array([_slot(s) for s in segments], dtype=np.int64)
    lens = ends - starts
    last_rows = np.cumsum(lens) - 1
    if all(s.is_decode for s in segments):
        input_ids: NDArray[np.int64] = np.zeros(len(segments), dtype=np.int64)
        positions = starts.astype(np.int64)
        out_locs = _decode_locations(slots, positions, kv)
    else:
        input_ids = np.concatenate([_token_ids(s) for s in segments])
        positions = np.concatenate([np.arange(s.start, s.end) for s in segments])
        out_locs = np.concatenate([kv.locations(_kv(s), s.start, s.end) for s in segments])
    sampling_rows = []
    for segment in segments:
        if segment.samples:
            row = segment.request.sampling
            row.position = segment.request.num_scheduled_outputs
            sampling_rows.append(row)
    inputs = StepInput(
        shape=StepShape(query_lens=lens, kv_lens=ends),
        input_ids=input_ids,
        positions=positions,
        out_locs=out_locs,
        slots=slots,
        versions=np.array([s.request.version_id for s in segments], dtype=np.int64),
        lora_slots=lora_slots,
        decode_rows=_rows(segments, last_rows, lambda s: s.is_decode),
        decode_slots=_rows(segments, slots, lambda s: s.is_decode),
        sample_rows=_rows(segments, last_rows, lambda s: s.samples),
        sample_slots=_rows(segments, slots, lambda s: s.samples),
        sampling=sampling_rows,
        scores=[_score_rows(s, int(last)) for s, last in zip(segments, last_rows, strict=True) if s.is_scored],
    )
    return StepPlan(segments, inputs)


def _kv(segment: Segment) -> SequenceKV:
    assert segment.request.kv is not None
    return segment.request.kv


def _slot(segment: Segment) -> int:
    return _kv(segment).slot


def _rows(segments: list[Segment], column: NDArray[np.int64], chosen: Callable[[Segment], bool]) -> NDArray[np.int64]:
    mask = np.fromiter((chosen(s) for s in segments), dtype=bool, count=len(segments))
    return column[mask].astype(np.int64)


def _token_ids(segment: Segment) -> NDArray[np.int64]:
    if segment.is_decode:
        return np.zeros(1, dtype=np.int64)
    return segment.request.known_tokens[segment.start : segment.end].astype(np.int64)


def _decode_locations(slots: NDArray[np.int64], positions: NDArray[np.int64], kv: KVManager) -> NDArray[np.int64]:
    size = kv.page_size
    return kv.table.host[slots, positions // size].astype(np.int64) * size + positions % size


def _score_rows(segment: Segment, last_row: int) -> ScoreRows:
    """Position p is scored by the hidden state of p - 1."""
    first, last = segment.score
    row_of_start = last_row - (segment.end - segment.start - 1)
    rows = np.arange(first - 1, last - 1) - segment.start + row_of_start
    request = segment.request
    return ScoreRows(
        rows=rows,
        targets=request.prompt[first:last].astype(np.int64),
        sampling=request.sampling,
    )
