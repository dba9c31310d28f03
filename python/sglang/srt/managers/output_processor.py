"""Turns step results into rows for the front, and ends sequences.

Called by the scheduler after a step's results have been read, and by SchedulerControl for requests that end without a
step. `finish` is the only place where a request ends: it frees the memory and writes the terminal row, once.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.managers.batch import StepPlan
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo, RowLogprobs
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.request import Request
from sglang.srt.sampling.logprobs import HostScore, PackedScores, concat_scores
from sglang.srt.sampling.sampler import HostSample

NAN_MESSAGE = "NaN happened"
"""Upstream's word for a sequence ended because its logits were not numbers."""


class StepColumns:
    """Rows of one StepOutput under construction."""

    def __init__(self) -> None:
        self.req_ids: list[int] = []
        self.finish: list[int] = []
        self.num_tokens: list[int] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.any_logprobs = False
        self.cached_tokens: dict[int, int] = {}
        self.finish_info: dict[int, FinishInfo] = {}
        self.extras: dict[int, RowLogprobs] = {}

    def add(self, request: Request, token: int | None, logprob: float | None) -> int:
        """Append a row with no or one token; returns its number."""
        self.req_ids.append(request.req_id)
        self.finish.append(Finish.NONE)
        self.num_tokens.append(0 if token is None else 1)
        if token is not None:
            self.tokens.append(token)
            self.logprobs.append(0.0 if logprob is None else logprob)
            self.any_logprobs |= logprob is not None
        row = len(self.req_ids) - 1
        if not request.cached_tokens_sent:
            request.cached_tokens_sent = True
            self.cached_tokens[row] = request.cached_tokens
        return row

    def end(self, row: int, finish: Finish, info: FinishInfo) -> None:
        """Make a row terminal."""
        self.finish[row] = finish
        self.finish_info[row] = info

    def message(self) -> wire.StepOutput:
        """The rows as packed columns."""
        return wire.StepOutput(
            req_ids=wire.pack(self.req_ids, "<i8"),
            finish=wire.pack(self.finish, "u1"),
            num_tokens=wire.pack(self.num_tokens, "<i4"),
            tokens=wire.pack(self.tokens, "<i4"),
            logprobs=wire.pack(self.logprobs, "<f4") if self.any_logprobs else b"",
            cached_tokens=self.cached_tokens,
            finish_info=self.finish_info,
            extras=self.extras,
        )


class OutputProcessor:
    """Owns the rows not yet sent.

    Args:
        on_finish: told about every request that ended.
    """

    def __init__(
        self, planner: Planner, send: Callable[[wire.ToFront], None], on_finish: Callable[[Request], None]
    ) -> None:
        self.planner = planner
        self.send = send
        self.on_finish = on_finish
        self.num_generated = 0
        self._columns = StepColumns()

    def process(self, plan: StepPlan, sample: HostSample | None, scores: list[list[HostScore]]) -> None:
        """Account for one step's results; requests that ended while it was in flight are skipped."""
        scored = iter(scores)
        index = 0
        for segment in plan.segments:
            request = segment.request
            parts = next(scored) if segment.is_scored else []
            row = index if segment.samples else None
            index += segment.samples
            if request.finished:
                continue
            request.input_scores += parts
            if row is not None:
                assert sample is not None
                self._append(request, sample, row)
            elif segment.end == request.num_known and request.max_new_tokens == 0:
                self._end_scored(request)

    def finish(self, request: Request, finish: Finish, info: FinishInfo) -> None:
        """End a request without a new token."""
        self._end(request, self._columns.add(request, None, None), finish, info)

    def flush(self) -> None:
        """Send the rows collected since the last call, if any."""
        if self._columns.req_ids:
            self.send(self._columns.message())
            self._columns = StepColumns()

    def _end_scored(self, request: Request) -> None:
        """A request for no new token ends when its prompt has been read."""
        row = self._columns.add(request, None, None)
        self._add_extras(request, row, None, 0)
        self._end(request, row, Finish.LENGTH, FinishInfo(num_retractions=request.num_retractions))

    def _append(self, request: Request, sample: HostSample, index: int) -> None:
        if sample.bad_rows[index]:
            info = FinishInfo(message=NAN_MESSAGE, num_retractions=request.num_retractions)
            self.finish(request, Finish.STOP, info)
            return
        token = int(sample.tokens[index])
        request.output.append(token)
        self.num_generated += 1
        options = request.sampling
        logprob = float(sample.logprobs[index]) if options.return_logprob and sample.logprobs is not None else None
        row = self._columns.add(request, token, logprob)
        if options.return_logprob:
            self._add_extras(request, row, sample, index)
        ended = request.check_stop(token)
        if ended is not None:
            self._end(request, row, *ended)

    def _add_extras(self, request: Request, row: int, sample: HostSample | None, index: int) -> None:
        """Alternatives of the new token (if there is one), and once, with the first row, the prompt's scores."""
        top = sample.top.get(index) if sample else None
        ids = sample.ids.get(index) if sample else None
        scores = self._take_scores(request)
        if top is None and ids is None and scores is None:
            return
        prompt = None if scores is None else self._pack(request, scores)
        self._columns.extras[row] = RowLogprobs(
            input_logprobs=prompt.logprobs if prompt else None,
            input_top=prompt.top if prompt else None,
            input_ids=prompt.ids if prompt else None,
            output_top=top,
            output_ids=ids,
        )

    def _pack(self, request: Request, scores: list[HostScore]) -> PackedScores:
        options = request.sampling
        return concat_scores(
            [scores],
            missing_first=request.logprob_start == 0,
            wants_top=options.top_logprobs_num > 0,
            wants_ids=bool(options.token_ids_logprob),
        )

    def _take_scores(self, request: Request) -> list[HostScore] | None:
        if not request.wants_input_scores:
            return None
        request.input_scores_sent = True
        scores, request.input_scores = request.input_scores, []
        return scores

    def _end(self, request: Request, row: int, finish: Finish, info: FinishInfo) -> None:
        self._columns.end(row, finish, info)
        self.planner.remove(request)
        self.on_finish(request)
