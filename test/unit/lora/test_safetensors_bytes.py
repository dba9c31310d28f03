"""The layout of safetensors images: what the official library writes, and every way it can be wrong (H10)."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from sglang.srt.errors import AdapterError
from sglang.srt.lora.safetensors_bytes import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorEntry,
    header_bytes,
    looks_like_safetensors,
    parse_image,
)

LIMIT = 1 << 20


def image(header: object, data: bytes = b"") -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str = "F32", shape: list | None = None, begin: int = 0, end: int = 8) -> dict:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes():
    tensors = {
        "b": np.ones((2, 3), np.float16),
        "a": np.full((4,), 2.0, np.float32),
        "empty": np.zeros((0, 5), np.float32),
    }
    layout, data = parse_image(memoryview(save(tensors, metadata={"format": "pt"})), LIMIT)
    assert {name: (e.dtype, e.shape) for name, e in layout.entries.items()} == {
        "a": ("float32", (4,)),
        "b": ("float16", (2, 3)),
        "empty": ("float32", (0, 5)),
    }
    for name, e in layout.entries.items():
        assert bytes(data[e.begin : e.begin + e.nbytes]) == tensors[name].tobytes()


def test_entries_come_in_the_order_of_their_bytes():
    layout, _ = parse_image(image({"z": entry(), "a": entry("BF16", [4], 8, 16)}, bytes(16)), LIMIT)
    assert layout.entries == {"z": TensorEntry("float32", (2,), 0, 8), "a": TensorEntry("bfloat16", (4,), 8, 8)}
    assert list(layout.entries) == ["z", "a"] and layout.nbytes == 16


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"t": entry()}, bytes(7), "describes 8 bytes of data, there are 7"),
        ({"t": entry()}, bytes(9), "describes 8 bytes of data, there are 9"),
        ({"t": entry(begin=4, end=12)}, bytes(12), "starts at byte 4"),
        ({"t": entry(), "u": entry(begin=4, end=12)}, bytes(12), "'u' starts at byte 4"),
        ({"t": entry(), "u": entry(begin=12, end=20)}, bytes(20), "'u' starts at byte 12"),
        ({"t": entry(end=12)}, bytes(12), "takes 8 bytes, its offsets are 0, 12"),
        ({"t": entry(begin=8, end=0)}, bytes(8), "its offsets are 8, 0"),
        ({"t": entry(begin=-8, end=0)}, bytes(8), "its offsets are -8, 0"),
        ({"t": entry(shape=[-1, -2])}, bytes(8), "dimensions or a negative one"),
        ({"t": entry(shape=[1] * 9)}, bytes(4), "9 dimensions"),
        ({"t": entry("F64", [1])}, bytes(8), "'t' is F64; adapters are F32, F16, BF16"),
        ({"t": entry("I64", [1])}, bytes(8), "'t' is I64"),
        ({"t": entry("F8_E4M3", [8])}, bytes(8), "F8_E4M3"),
        ({"t": {"dtype": "F32", "shape": [2]}}, bytes(8), "data_offsets"),
        ({"t": {**entry(), "more": 1}}, bytes(8), "more"),
        ({"t": entry(shape=["2"])}, bytes(8), "'t' is not as the format says"),
        ({"t": entry(shape=[1.5])}, bytes(8), "'t' is not as the format says"),
        ({"t": 3}, b"", "'t' is not as the format says"),
        ({"__metadata__": {"a": 1}}, b"", "not as the format says"),
        ([1], b"", "not as the format says"),
        (b"{" + b'"a":[' * 50_000, b"", "not as the format says"),
        (b'{"t": ', b"", "not as the format says"),
        (b'{"\xff": 1}', b"", "not as the format says"),
        ({"t": entry(shape=[1 << 40, 1 << 40], end=(1 << 80) * 4)}, b"", "exceed this server's limit"),
        ({"t": entry(shape=[1 << 30], end=4 << 30)}, b"", "exceed this server's limit"),
    ],
)
def test_h10_headers_that_lie_are_refused(header, data, message):
    with pytest.raises(AdapterError, match=message) as caught:
        parse_image(image(header, data), LIMIT)
    assert caught.value.code == "invalid_adapter"


def test_h10_budgets_come_before_allocation():
    huge = memoryview((1 << 60).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(AdapterError, match="announce a header"):
        parse_image(huge, LIMIT)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(AdapterError, match="announce a header"):
        header_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with pytest.raises(AdapterError, match="the header ends at byte"):
        parse_image(memoryview((1 << 20).to_bytes(8, "little") + b"{}"), LIMIT)


def test_h10_too_many_tensors_are_refused():
    header = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}
    with pytest.raises(AdapterError, match="65537 tensors exceed the limit"):
        parse_image(image(header), LIMIT)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 40])
def test_cut_images_are_refused(cut):
    whole = save({"t": np.ones(4, np.float32)})
    with pytest.raises(AdapterError, match="safetensors data"):
        parse_image(memoryview(whole[:cut]), LIMIT)


@given(st.binary(max_size=200))
def test_h10_noise_is_refused(noise):
    with pytest.raises(AdapterError):
        parse_image(memoryview(len(noise).to_bytes(8, "little") + b"{" + noise + b"x"), LIMIT)


def test_tells_images_from_pickles():
    assert looks_like_safetensors(memoryview(save({"t": np.ones(4, np.float32)})))
    assert not looks_like_safetensors(memoryview(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00{"))
    assert not looks_like_safetensors(memoryview(b"\x80\x02}q\x00."))
    assert not looks_like_safetensors(memoryview(b""))
