"""Messages between the front process and the back process.

Everything here crosses a socket as msgpack. Tags are part of the wire format; a golden test holds them. A request is
known by `req_id`, a number the front never reuses: client rids stay in the front, so a reused rid cannot alias.
Invariant: every `req_id` sent in a `SubmitBatch` comes back in exactly one `StepOutput` row whose `finish` is not
`Finish.NONE`, also when the request is refused, aborted or arrives while the scheduler is shutting down.

Integers that form columns travel as packed little-endian bytes: 25 us for a decode step of 512 requests.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang.srt.lora.adapter import Adapter
from sglang.srt.sampling.sampling_params import SamplingSpec

BASE_VERSION = 0
"""`version_id` of the base model; adapter versions count from 1."""


class Finish(enum.IntEnum):
    """Why a sequence ended; NONE while it is running."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3


class PauseMode(str, enum.Enum):
    """How `/pause_generation` treats requests in flight. ABORT is the front's work and never crosses the wire."""

    ABORT = "abort"
    RETRACT = "retract"
    IN_PLACE = "in_place"


# ---- front to back -------------------------------------------------------------------------------------------------


class SubmitRequest(msgspec.Struct, array_like=True, frozen=True):
    """One sequence to generate.

    Fields:
        input_ids: packed int32.
        version_id: weights to run on; BASE_VERSION or an adapter version.
        extra_key: further part of the prefix-cache namespace (client's extra_key / cache_salt), "" for none.
        logprob_start: first prompt position whose log-probability is wanted; len(input_ids) or more for none.
        top_logprobs_num: alternatives to report per position, 0 for none.
        token_ids_logprob: ids to report at each position.
    """

    req_id: int
    input_ids: bytes
    sampling: SamplingSpec
    version_id: int = BASE_VERSION
    extra_key: str = ""
    priority: int = 0
    return_logprob: bool = False
    logprob_start: int = 0
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()


class SubmitBatch(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """Every request the front accepted in one event-loop turn."""

    requests: list[SubmitRequest]


class AbortRequests(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """End these requests, wherever they are. Unknown ids are ignored: their terminal row is already on its way."""

    req_ids: list[int]


class StopRequests(msgspec.Struct, tag="stop", array_like=True, frozen=True):
    """The front found a stop string: end these requests as finished (their terminal row says `Finish.STOP`)."""

    req_ids: list[int]


class PauseCall(msgspec.Struct, tag="pause", array_like=True, frozen=True):
    """Freeze the loop (IN_PLACE) or send every running request back to the queue (RETRACT). Answer: CallReply."""

    call_id: int
    mode: PauseMode


class ContinueCall(msgspec.Struct, tag="continue", array_like=True, frozen=True):
    """Undo PauseCall. Answer: CallReply."""

    call_id: int


class FlushCacheCall(msgspec.Struct, tag="flush_cache", array_like=True, frozen=True):
    """Empty the prefix cache; fails while any request owns KV pages. Answer: CallReply."""

    call_id: int


class StatsCall(msgspec.Struct, tag="stats", array_like=True, frozen=True):
    """Ask for the scheduler's state now. Answer: CallReply with `stats`."""

    call_id: int


class StageAdapterCall(msgspec.Struct, tag="stage_adapter", array_like=True, frozen=True):
    """Copy an adapter out of the front's buffer; once answered, requests may name `version_id`. Answer: CallReply.

    Decoding goes on meanwhile. On failure nothing of the adapter is left and the version is not known.
    """

    call_id: int
    version_id: int
    adapter: Adapter


class FreeAdapterCall(msgspec.Struct, tag="free_adapter", array_like=True, frozen=True):
    """Forget a version that no live request names: its weights and its prefix-cache pages. Answer: CallReply."""

    call_id: int
    version_id: int


class SwitchVersionCall(msgspec.Struct, tag="switch_version", array_like=True, frozen=True):
    """Move every live request of a version to another one, from the next step on. Answer: CallReply.

    Rows sent before the answer are the old version's, rows after it the new one's.
    """

    call_id: int
    old_version_id: int
    new_version_id: int


class JoinGroupCall(msgspec.Struct, tag="join_group", array_like=True, frozen=True):
    """Become a member of a trainer's group, in the place of an older one of its name. Answer: CallReply.

    Fields: of `weight_sync.broadcast_group.GroupSpec`; seconds: that it may take.
    """

    call_id: int
    name: str
    address: str
    port: int
    rank: int
    size: int
    backend: str
    seconds: float


class LeaveGroupCall(msgspec.Struct, tag="leave_group", array_like=True, frozen=True):
    """Forget a group; what waits in it fails. Answer: CallReply."""

    call_id: int
    name: str


class ReceiveCall(msgspec.Struct, tag="receive", array_like=True, frozen=True):
    """Fill the front's buffer with what the trainer sends to a group. Answer: CallReply.

    Calls of one group are done one after the other; decoding goes on meanwhile.

    Fields:
        broadcast: which one; path, nbytes: of the buffer; seconds: that it may take to come.
    """

    call_id: int
    group: str
    broadcast: str
    path: str
    nbytes: int
    seconds: float


# ---- back to front -------------------------------------------------------------------------------------------------


class SchedulerStats(msgspec.Struct, array_like=True, frozen=True):
    """State of one scheduler, pushed at most every 100 ms and at every turn to idle.

    Fields:
        num_waiting_reqs: queued, retracted ones included; num_retracted_reqs: the retracted part of them.
        num_waiting_tokens: known tokens of the queued requests.
        num_used_tokens: KV tokens owned by live requests; num_cached_tokens: evictable prefix-cache tokens.
        gen_throughput: output tokens per second over the last second or so.
        cache_hit_rate: cached prompt tokens / prompt tokens, of the recent past.
        *_total: counters since start.
        host_seconds_total, step_seconds_total: time the loop spent outside the model, and in all.
        invariant_violations_total: accounting errors seen by the idle check; anything but 0 is a bug.
        lora_slots: adapter version in each device slot, BASE_VERSION for a free one; empty without --enable-lora.
        lora_evictions_total: versions that lost their slot to another one.
        lora_bytes: host memory of all staged versions.
    """

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_retracted_reqs: int = 0
    num_waiting_tokens: int = 0
    paused: bool = False
    num_used_tokens: int = 0
    num_cached_tokens: int = 0
    max_total_num_tokens: int = 0
    max_running_requests: int = 0
    gen_throughput: float = 0.0
    cache_hit_rate: float = 0.0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    retractions_total: int = 0
    steps_total: int = 0
    host_seconds_total: float = 0.0
    step_seconds_total: float = 0.0
    invariant_violations_total: int = 0
    lora_slots: tuple[int, ...] = ()
    lora_evictions_total: int = 0
    lora_bytes: int = 0


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The back's first message: weights are loaded, requests may come.

    Fields:
        max_req_input_len: longest prompt the scheduler takes (tokens).
        memory_usage: GiB by use: weight, kvcache.
        slab_layout: how adapters lie in memory, as `LoraLayout.describe` says it; None without --enable-lora.
    """

    pid: int
    max_total_num_tokens: int
    max_req_input_len: int
    max_running_requests: int
    context_length: int
    device: str
    dtype: str
    memory_usage: dict[str, float]
    load_seconds: float
    slab_layout: dict[str, Any] | None = None


class Positions(msgspec.Struct, array_like=True, frozen=True):
    """Per-position alternatives: `counts[i]` (int32) entries of `ids` (int32), `logprobs` (float32) are position i's.

    A count of 0 stands for "not available" (the first prompt position).
    """

    counts: bytes
    ids: bytes
    logprobs: bytes


class RowLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probability extras of one row; each field is None when not asked for or not part of this message.

    Fields:
        input_logprobs: packed float32, one per prompt position from `logprob_start`; NaN for position 0 (none).
        input_top, input_ids: alternatives at those positions (same length).
        output_top, output_ids: alternatives for this message's new tokens.
    """

    input_logprobs: bytes | None = None
    input_top: Positions | None = None
    input_ids: Positions | None = None
    output_top: Positions | None = None
    output_ids: Positions | None = None


class FinishInfo(msgspec.Struct, array_like=True, frozen=True):
    """Details of a terminal row.

    Fields:
        matched: the stop id that ended the sequence, or None.
        message, status_code, err_type: of an abort; status_code 0 stands for none.
        was_running: False when the request was ended before it ever reached a forward pass.
    """

    matched: int | None = None
    message: str = ""
    status_code: int = 0
    err_type: str = ""
    num_retractions: int = 0
    was_running: bool = True


class StepOutput(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """What one scheduler step produced, as columns; row r is one request.

    Fields:
        req_ids: int64[rows]; finish: uint8[rows] (`Finish`); num_tokens: int32[rows], new tokens of the row.
        tokens: int32[sum(num_tokens)]; logprobs: float32, aligned with `tokens`, or empty when no row asked.
        cached_tokens: row -> prompt tokens found in the prefix cache, sent with a request's first row.
        finish_info: row -> details, for every terminal row.
        extras: row -> RowLogprobs, for rows that asked for more than their own log-probability.
    """

    req_ids: bytes
    finish: bytes
    num_tokens: bytes
    tokens: bytes
    logprobs: bytes = b""
    cached_tokens: dict[int, int] = {}
    finish_info: dict[int, FinishInfo] = {}
    extras: dict[int, RowLogprobs] = {}


class StatsPush(msgspec.Struct, tag="stats_push", array_like=True, frozen=True):
    """Unasked statistics."""

    stats: SchedulerStats


class CallReply(msgspec.Struct, tag="reply", array_like=True, frozen=True):
    """Answer to the *Call message with the same `call_id`. `code`: what a caller may branch on; calls say which."""

    call_id: int
    success: bool
    message: str = ""
    stats: SchedulerStats | None = None
    code: str = ""


class BackFailed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """The back is about to exit on an error; the front fails every live request with it."""

    message: str


AdapterCall = StageAdapterCall | FreeAdapterCall | SwitchVersionCall
GroupCall = JoinGroupCall | LeaveGroupCall | ReceiveCall
Call = PauseCall | ContinueCall | FlushCacheCall | StatsCall | AdapterCall | GroupCall
ToBack = SubmitBatch | AbortRequests | StopRequests | Call
ToFront = Ready | StepOutput | StatsPush | CallReply | BackFailed

encoder = msgspec.msgpack.Encoder()
to_back_decoder: msgspec.msgpack.Decoder[ToBack] = msgspec.msgpack.Decoder(ToBack)
to_front_decoder: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def pack(values: Any, dtype: str) -> bytes:
    """Pack a sequence or array of numbers as little-endian bytes of numpy `dtype` (e.g. ``"<i4"``)."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def unpack(data: bytes, dtype: str) -> NDArray[Any]:
    """Inverse of `pack`: a read-only 1-D array over `data`."""
    return np.frombuffer(data, dtype=dtype)
