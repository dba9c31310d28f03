"""Takes a StepOutput message apart: 512 rows of columns become tokens on records.

Called by `request_lifecycle` for every step, so it is the front's hot loop: columns are converted once, and a row that
only adds a token costs well under a microsecond or two. It ends no record; it says which ones ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo
from sglang.srt.managers.request_state import RequestMetrics, RequestRecord

_PLAIN = FinishInfo()


@dataclass(slots=True)
class StepResult:
    """What a step means for records.

    Fields:
        stopped: (record, stop string that matched).
        terminal: (record, how, details): the scheduler is done with these.
        broken: (record, error raised while its row was processed).
        late_rows: rows of requests that nobody knows (any more).
        num_tokens: output tokens of all rows.
    """

    stopped: list[tuple[RequestRecord, str]] = field(default_factory=list)
    terminal: list[tuple[RequestRecord, Finish, FinishInfo]] = field(default_factory=list)
    broken: list[tuple[RequestRecord, Exception]] = field(default_factory=list)
    late_rows: int = 0
    num_tokens: int = 0


def apply_step(
    output: wire.StepOutput, records: Mapping[int, RequestRecord], now: float, metrics: RequestMetrics | None
) -> StepResult:
    """Give every row's tokens to its record.

    Args:
        records: live records by req_id.
        now: `time.perf_counter()`.
    """
    req_ids = wire.unpack(output.req_ids, "<i8").tolist()
    counts = wire.unpack(output.num_tokens, "<i4").tolist()
    tokens = wire.unpack(output.tokens, "<i4").tolist()
    logprobs = wire.unpack(output.logprobs, "<f4").tolist()
    extras, infos = output.extras, output.finish_info
    result = StepResult(num_tokens=len(tokens))
    for row, cached in output.cached_tokens.items():
        if (record := records.get(req_ids[row])) is not None:
            record.cached_tokens = cached
    end = 0
    for row, (req_id, count, finish) in enumerate(zip(req_ids, counts, output.finish, strict=True)):
        start, end = end, end + count
        record = records.get(req_id)
        if record is None:
            result.late_rows += 1
            continue
        if finish:
            result.terminal.append((record, Finish(finish), infos.get(row, _PLAIN)))
        if not record.listening or not (count or row in extras):
            continue
        try:
            if metrics is not None:
                _observe(metrics, record, count, now)
            record.accrue(tokens[start:end], logprobs[start:end], extras.get(row))
            if finish == Finish.STOP:
                _hide_stop_token(record, infos.get(row, _PLAIN))
            if record.check_stops and (matched := record.decode()) is not None:
                result.stopped.append((record, matched))
            elif record.group.stream and not finish and record.update_due:
                record.group.notify(record)
        except Exception as error:  # one client's row must not take down the others
            result.broken.append((record, error))
    return result


def _hide_stop_token(record: RequestRecord, info: FinishInfo) -> None:
    if info.matched is not None and record.output_ids[-1:] == [info.matched] and not record.prompt.params.no_stop_trim:
        record.hidden = 1


def _observe(metrics: RequestMetrics, record: RequestRecord, count: int, now: float) -> None:
    if not count or not record.log_metrics:
        return
    if record.output_ids:
        metrics.inter_token(record, now - record.last_token_at, count)
    else:
        metrics.first_token(record, now - record.created_at)
    record.last_token_at = now
