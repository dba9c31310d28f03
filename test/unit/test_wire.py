"""The wire format, frozen: tags, field orders and bytes of every message. A failure here means front and back of
different builds no longer understand each other; change the golden values only on purpose."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.lora.adapter import Adapter, AdapterModule, Span
from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling.sampling_params import SamplingSpec

GOLDEN_FIELDS: dict[str, tuple[str | None, str]] = {
    # struct: (tag, fields in wire order)
    "AbortRequests": ("abort", "req_ids"),
    "Adapter": (None, "path nbytes modules base_copies"),
    "BackFailed": ("failed", "message"),
    "CallReply": ("reply", "call_id success message stats code"),
    "ContinueCall": ("continue", "call_id"),
    "FinishInfo": (None, "matched message status_code err_type num_retractions was_running"),
    "FlushCacheCall": ("flush_cache", "call_id"),
    "FreeAdapterCall": ("free_adapter", "call_id version_id"),
    "JoinGroupCall": ("join_group", "call_id name address port rank size backend seconds"),
    "LeaveGroupCall": ("leave_group", "call_id name"),
    "PauseCall": ("pause", "call_id mode"),
    "Positions": (None, "counts ids logprobs"),
    "Ready": (
        "ready",
        "pid max_total_num_tokens max_req_input_len max_running_requests context_length device dtype memory_usage "
        "load_seconds slab_layout",
    ),
    "ReceiveCall": ("receive", "call_id group broadcast path nbytes seconds"),
    "RowLogprobs": (None, "input_logprobs input_top input_ids output_top output_ids"),
    "SamplingSpec": (
        None,
        "max_new_tokens min_new_tokens temperature top_k top_p min_p frequency_penalty presence_penalty "
        "repetition_penalty seed stop_token_ids logit_bias grammar",
    ),
    "SchedulerStats": (
        None,
        "num_running_reqs num_waiting_reqs num_retracted_reqs num_waiting_tokens paused num_used_tokens "
        "num_cached_tokens "
        "max_total_num_tokens max_running_requests gen_throughput cache_hit_rate prompt_tokens_total "
        "cached_tokens_total generation_tokens_total retractions_total steps_total host_seconds_total "
        "step_seconds_total invariant_violations_total lora_slots lora_evictions_total lora_bytes",
    ),
    "StageAdapterCall": ("stage_adapter", "call_id version_id adapter"),
    "StatsCall": ("stats", "call_id"),
    "StatsPush": ("stats_push", "stats"),
    "StepOutput": ("step", "req_ids finish num_tokens tokens logprobs cached_tokens finish_info extras"),
    "StopRequests": ("stop", "req_ids"),
    "SubmitBatch": ("submit", "requests"),
    "SubmitRequest": (
        None,
        "req_id input_ids sampling version_id extra_key priority return_logprob logprob_start "
        "top_logprobs_num token_ids_logprob",
    ),
    "SwitchVersionCall": ("switch_version", "call_id old_version_id new_version_id"),
}

SPEC = SamplingSpec(
    max_new_tokens=16,
    min_new_tokens=1,
    temperature=0.5,
    top_k=40,
    top_p=0.75,
    min_p=0.25,
    frequency_penalty=1.0,
    presence_penalty=-1.0,
    repetition_penalty=1.5,
    seed=2**63 - 1,
    stop_token_ids=(2,),
    logit_bias={5: -1.0},
    grammar=("regex", "a"),
)
STATS = wire.SchedulerStats(num_running_reqs=1, paused=True, gen_throughput=2.5)
REQUEST = wire.SubmitRequest(
    req_id=2**40,
    input_ids=wire.pack([1, 2], "<i4"),
    sampling=SPEC,
    version_id=3,
    extra_key="k",
    priority=-1,
    return_logprob=True,
    logprob_start=1,
    top_logprobs_num=2,
    token_ids_logprob=(7, 8),
)
POSITIONS = wire.Positions(
    counts=wire.pack([0, 1], "<i4"), ids=wire.pack([9], "<i4"), logprobs=wire.pack([-0.5], "<f4")
)
STEP = wire.StepOutput(
    req_ids=wire.pack([2**40, 2], "<i8"),
    finish=wire.pack([wire.Finish.NONE, wire.Finish.STOP], "u1"),
    num_tokens=wire.pack([1, 0], "<i4"),
    tokens=wire.pack([5], "<i4"),
    logprobs=wire.pack([-1.0], "<f4"),
    cached_tokens={0: 3},
    finish_info={1: wire.FinishInfo(matched=2)},
    extras={0: wire.RowLogprobs(input_logprobs=wire.pack([np.nan, -2.0], "<f4"), input_top=POSITIONS)},
)

SPANS = (Span("bfloat16", (2, 8), 0), Span("float32", (8, 2), 32))
ADAPTER = Adapter("/a", 96, (AdapterModule("lm_head", 0.5, *SPANS),), (("lm_head.weight", SPANS[0]),))

TO_BACK: list[tuple[Any, str]] = [
    (
        wire.SubmitBatch([REQUEST]),
        "92a67375626d6974919acf0000010000000000c40801000000020000009d1001cb3fe000000000000028cb3fe80000000000"
        "00cb3fd0000000000000cb3ff0000000000000cbbff0000000000000cb3ff8000000000000cf7fffffffffffffff91028105"
        "cbbff000000000000092a57265676578a16103a16bffc30102920708",
    ),
    (wire.AbortRequests([1, 300]), "92a561626f72749201cd012c"),
    (wire.StopRequests([1]), "92a473746f709101"),
    (wire.PauseCall(1, wire.PauseMode.IN_PLACE), "93a5706175736501a8696e5f706c616365"),
    (wire.ContinueCall(2), "92a8636f6e74696e756502"),
    (wire.FlushCacheCall(3), "92ab666c7573685f636163686503"),
    (wire.StatsCall(4), "92a5737461747304"),
    (
        wire.StageAdapterCall(5, 7, ADAPTER),
        "94ad73746167655f61646170746572050794a22f61609194a76c6d5f68656164cb3fe000000000000093a862666c6f6174"
        "31369202080093a7666c6f61743332920802209192ae6c6d5f686561642e77656967687493a862666c6f61743136920208"
        "00",
    ),
    (wire.FreeAdapterCall(6, 7), "93ac667265655f616461707465720607"),
    (wire.SwitchVersionCall(7, 7, 8), "94ae7377697463685f76657273696f6e070708"),
    (
        wire.JoinGroupCall(8, "g", "h", 29500, 1, 3, "gloo", 1.5),
        "99aa6a6f696e5f67726f757008a167a168cd733c0103a4676c6f6fcb3ff8000000000000",
    ),
    (wire.LeaveGroupCall(9, "g"), "93ab6c656176655f67726f757009a167"),
    (wire.ReceiveCall(10, "g", "b", "/p", 96, 1.5), "97a7726563656976650aa167a162a22f7060cb3ff8000000000000"),
]
TO_FRONT: list[tuple[Any, str]] = [
    (
        wire.Ready(1, 2, 3, 4, 5, "cpu", "float32", {"weight": 0.5}, 1.5),
        "9ba572656164790102030405a3637075a7666c6f6174333281a6776569676874cb3fe0000000000000cb3ff8000000000000c0",
    ),
    (
        STEP,
        "99a473746570c41000000000000100000200000000000000c4020001c4080100000000000000c40405000000c404000080bf8100038101"
        "9602a000a000c3810095c4080000c07f000000c093c4080000000001000000c40409000000c404000000bfc0c0c0",
    ),
    (
        wire.StatsPush(STATS),
        "92aa73746174735f70757368dc001601000000c300000000cb4004000000000000cb00000000000000000000000000cb00"
        "00000000000000cb000000000000000000900000",
    ),
    (wire.CallReply(1, True, "ok"), "96a57265706c7901c3a26f6bc0a0"),
    (
        wire.CallReply(1, False, stats=STATS, code="busy"),
        "96a57265706c7901c2a0dc001601000000c300000000cb4004000000000000cb00000000000000000000000000cb000000"
        "0000000000cb000000000000000000900000a462757379",
    ),
    (wire.BackFailed("why"), "92a66661696c6564a3776879"),
]


def structs() -> dict[str, type[msgspec.Struct]]:
    """Every struct that crosses the wire, `SamplingSpec` included."""
    return {
        name: value
        for name, value in vars(wire).items()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    }


def test_every_struct_keeps_its_tag_and_field_order() -> None:
    found = {
        name: (struct.__struct_config__.tag, " ".join(struct.__struct_fields__)) for name, struct in structs().items()
    }
    assert found == GOLDEN_FIELDS


def test_every_struct_is_an_immutable_array() -> None:
    for name, struct in structs().items():
        assert struct.__struct_config__.array_like, name
        assert struct.__struct_config__.frozen, name


def test_unions_hold_every_tagged_message_once() -> None:
    to_back, to_front = set(typing.get_args(wire.ToBack)), set(typing.get_args(wire.ToFront))
    tagged = {struct for struct in structs().values() if struct.__struct_config__.tag is not None}
    assert to_back | to_front == tagged
    assert not to_back & to_front


def test_enumerations_keep_their_values() -> None:
    assert {f.name: f.value for f in wire.Finish} == {"NONE": 0, "STOP": 1, "LENGTH": 2, "ABORT": 3}
    assert {m.name: m.value for m in wire.PauseMode} == {
        "ABORT": "abort",
        "RETRACT": "retract",
        "IN_PLACE": "in_place",
    }
    assert wire.BASE_VERSION == 0


@pytest.mark.parametrize(("message", "golden"), TO_BACK, ids=lambda value: type(value).__name__)
def test_bytes_to_the_back(message: wire.ToBack, golden: str) -> None:
    assert wire.encoder.encode(message).hex() == golden
    assert wire.to_back_decoder.decode(bytes.fromhex(golden)) == message


@pytest.mark.parametrize(("message", "golden"), TO_FRONT, ids=lambda value: type(value).__name__)
def test_bytes_to_the_front(message: wire.ToFront, golden: str) -> None:
    assert wire.encoder.encode(message).hex() == golden
    assert wire.to_front_decoder.decode(bytes.fromhex(golden)) == message


def test_golden_bytes_cover_every_message() -> None:
    covered = {type(message) for message, _ in TO_BACK + TO_FRONT}
    assert covered == {*typing.get_args(wire.ToBack), *typing.get_args(wire.ToFront)}


def test_a_message_for_the_other_side_does_not_decode() -> None:
    for message, _ in TO_BACK:
        with pytest.raises(msgspec.ValidationError):
            wire.to_front_decoder.decode(wire.encoder.encode(message))
    for message, _ in TO_FRONT:
        with pytest.raises(msgspec.ValidationError):
            wire.to_back_decoder.decode(wire.encoder.encode(message))


@pytest.mark.parametrize("data", [b"", b"\x90", b"\x91\xa5nosuch", b"\x80", b"\x92\xa5abort\xa1x"])
def test_garbage_does_not_decode(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.to_back_decoder.decode(data)


def test_optional_fields_may_be_missing_on_the_wire() -> None:
    short = msgspec.msgpack.encode(["step", b"", b"", b"", b""])
    assert wire.to_front_decoder.decode(short) == wire.StepOutput(b"", b"", b"", b"")


finite = st.floats(allow_nan=False, width=32)
ids32 = st.integers(-(2**31), 2**31 - 1)
packed_ids = st.lists(ids32, max_size=5).map(lambda values: wire.pack(values, "<i4"))
positions = st.builds(wire.Positions, packed_ids, packed_ids, packed_ids)
specs = st.builds(
    SamplingSpec,
    max_new_tokens=st.integers(0, 2**40),
    min_new_tokens=st.integers(0, 2**40),
    temperature=finite,
    top_k=st.integers(1, 2**31),
    top_p=finite,
    min_p=finite,
    frequency_penalty=finite,
    presence_penalty=finite,
    repetition_penalty=finite,
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(ids32, max_size=3).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 2**31), finite, max_size=3),
    grammar=st.none() | st.tuples(st.text(max_size=3), st.text(max_size=3)),
)
requests = st.builds(
    wire.SubmitRequest,
    req_id=st.integers(0, 2**63 - 1),
    input_ids=packed_ids,
    sampling=specs,
    version_id=st.integers(0, 2**63 - 1),
    extra_key=st.text(max_size=5),
    priority=ids32,
    return_logprob=st.booleans(),
    logprob_start=st.integers(0, 2**31),
    top_logprobs_num=st.integers(0, 20),
    token_ids_logprob=st.lists(ids32, max_size=3).map(tuple),
)
rows = st.integers(0, 2**31)
steps = st.builds(
    wire.StepOutput,
    *[packed_ids] * 4,
    logprobs=packed_ids,
    cached_tokens=st.dictionaries(rows, rows, max_size=3),
    finish_info=st.dictionaries(
        rows,
        st.builds(
            wire.FinishInfo,
            matched=st.none() | ids32,
            message=st.text(max_size=5),
            status_code=st.integers(0, 599),
            err_type=st.text(max_size=5),
            num_retractions=rows,
            was_running=st.booleans(),
        ),
        max_size=3,
    ),
    extras=st.dictionaries(
        rows,
        st.builds(
            wire.RowLogprobs,
            input_logprobs=st.none() | packed_ids,
            input_top=st.none() | positions,
            input_ids=st.none() | positions,
            output_top=st.none() | positions,
            output_ids=st.none() | positions,
        ),
        max_size=3,
    ),
)


@given(message=st.builds(wire.SubmitBatch, st.lists(requests, max_size=4)))
def test_requests_survive_the_trip(message: wire.SubmitBatch) -> None:
    assert wire.to_back_decoder.decode(wire.encoder.encode(message)) == message


@given(message=steps)
def test_steps_survive_the_trip(message: wire.StepOutput) -> None:
    assert wire.to_front_decoder.decode(wire.encoder.encode(message)) == message


def test_a_specs_floats_cross_unrounded() -> None:
    batch = wire.SubmitBatch([msgspec.structs.replace(REQUEST, sampling=msgspec.structs.replace(SPEC, top_p=0.1))])
    decoded = wire.to_back_decoder.decode(wire.encoder.encode(batch))
    assert isinstance(decoded, wire.SubmitBatch)
    assert decoded.requests[0].sampling.top_p == 0.1


@pytest.mark.parametrize(
    ("values", "dtype", "data"),
    [
        ([1, -1], "<i4", "01000000ffffffff"),
        ([2**40], "<i8", "0000000000010000"),
        ([0, 255], "u1", "00ff"),
        ([1.0], "<f4", "0000803f"),
        ([], "<i4", ""),
        (np.arange(6, dtype=np.int64)[::3], "<i4", "0000000003000000"),
        (np.array([[1, 2], [3, 4]]).T, "u1", "01030204"),
    ],
)
def test_pack_is_little_endian_and_dense(values: Any, dtype: str, data: str) -> None:
    assert wire.pack(values, dtype).hex() == data
    assert wire.unpack(bytes.fromhex(data), dtype).tolist() == np.asarray(values, dtype=dtype).ravel().tolist()


def test_unpacked_columns_are_read_only() -> None:
    column = wire.unpack(wire.pack([1], "<i4"), "<i4")
    with pytest.raises(ValueError, match="read-only"):
        column[0] = 2
