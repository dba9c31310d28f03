"""The clients' pickles: tensors come out, and nothing else ever happens (H1, H10)."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import os
import pickle
import struct
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.lora.torch_pickles import Text, call, dump, image, name, storage, tensor, tensor_over, value

from sglang.srt.errors import AdapterError
from sglang.srt.lora import tensor_unpickler
from sglang.srt.lora.tensor_unpickler import unpickle_tensors

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)
GOOD = dump({"a": tensor(MATRIX)})
METADATA = ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")


def read(payload: bytes, bucket: bool = False) -> dict[str, tuple[str, np.ndarray]]:
    found = unpickle_tensors(memoryview(payload), bucket)
    floats = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    return {key: (raw.dtype, raw.values.view(floats[raw.dtype])) for key, raw in found.items()}


def metadata(title: str, shape: tuple[int, ...], dtype: str, start: int, end: int) -> Text:
    state = {
        "name": title,
        "shape": call(name("torch", "Size"), shape),
        "dtype": name("torch", dtype),
        "start_idx": start,
        "end_idx": end,
        "numel": end - start,
    }
    return Text(name(*METADATA) + b")\x81" + value(state) + b"b")


def flat(data: bytes) -> Text:
    return tensor_over(storage(data, "ByteStorage", len(data)), 0, (len(data),), (1,))


# ---- what clients send ---------------------------------------------------------------------------------------------


def test_a_dict_of_tensors():
    dtype, values = read(GOOD)["a"]
    assert dtype == "float32" and np.array_equal(values, MATRIX)


def test_a_list_of_pairs_and_every_float_dtype():
    half, bf16 = np.ones((2, 2), np.float16), np.full((3,), 0x3F80, np.uint16)
    found = read(dump([("h", tensor(half, "HalfStorage")), ("b", tensor(bf16, "BFloat16Storage"))]))
    assert found["h"][0] == "float16" and np.array_equal(found["h"][1], half)
    assert found["b"][0] == "bfloat16" and np.array_equal(found["b"][1], bf16)


def test_strides_and_offsets_are_honoured():
    stored = storage(np.arange(10, dtype=np.float32).tobytes())
    found = read(dump({"t": tensor_over(stored, 1, (2, 3), (1, 3)), "row": tensor_over(stored, 9, (1,), (1,))}))
    assert found["t"][1].tolist() == [[1, 4, 7], [2, 5, 8]] and found["row"][1].tolist() == [9]


def test_parameters_and_ordered_dicts():
    parameter = call(name("torch._utils", "_rebuild_parameter"), tensor(MATRIX), True, {})
    ordered = Text(call(name("collections", "OrderedDict")) + b"(" + value("p") + value(parameter) + b"u")
    assert np.array_equal(read(dump(ordered))["p"][1], MATRIX)


def test_flattened_bucket():
    halves = np.arange(4, dtype=np.float16)
    data = MATRIX.tobytes() + halves.tobytes()
    parts = [metadata("m", (2, 3), "float32", 0, 24), metadata("h", (4,), "float16", 24, 32)]
    found = read(dump({"flattened_tensor": flat(data), "metadata": parts}), bucket=True)
    assert np.array_equal(found["m"][1], MATRIX) and np.array_equal(found["h"][1], halves)


@pytest.mark.parametrize(
    "bucket",
    [
        {"metadata": []},
        {"flattened_tensor": flat(bytes(8)), "metadata": "none"},
        {"flattened_tensor": flat(bytes(8)), "metadata": [{"name": "m"}]},
        {"flattened_tensor": 3, "metadata": []},
        {"flattened_tensor": tensor_over(storage(bytes(16)), 0, (2,), (2,)), "metadata": []},
        {"flattened_tensor": flat(bytes(8)), "metadata": [metadata("m", (2,), "float32", 0, 4)]},
        {"flattened_tensor": flat(bytes(8)), "metadata": [metadata("m", (4,), "float32", 0, 16)]},
        {"flattened_tensor": flat(bytes(8)), "metadata": [metadata("m", (-2,), "float32", 0, 8)]},
        {"flattened_tensor": flat(bytes(8)), "metadata": [metadata("m", (2,), "float32", -8, 0)]},
        {"flattened_tensor": flat(bytes(8)), "metadata": [metadata("m", (2,), "FloatStorage", 0, 8)]},
        {"flattened_tensor": flat(bytes(8)), "metadata": [metadata("m", (1,), "int64", 0, 8)]},
        {"flattened_tensor": flat(bytes(8)), "metadata": [Text(name(*METADATA) + b")\x81")]},
    ],
)
def test_buckets_that_lie_are_refused(bucket):
    with pytest.raises(AdapterError) as caught:
        read(dump(bucket), bucket=True)
    assert caught.value.code == "invalid_adapter"


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("torch.multiprocessing.reductions", "rebuild_tensor"),
        ("torch.multiprocessing.reductions", "rebuild_storage_fd"),
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
        ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"),
    ],
)
def test_c22_handles_get_a_remedy(module, attribute):
    with pytest.raises(AdapterError, match=rf"{attribute} is a handle .* send the tensors as base64 of safetensors"):
        read(dump({"a": call(name(module, attribute), 1)}))


# ---- what attackers send -------------------------------------------------------------------------------------------


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.made


class Canary:
    """Where hostile code would leave a trace."""

    path = f"/tmp/sglang-test-canary-{os.getpid()}"
    command = f"touch {path}"


def dotted(path: str, *args: object) -> Text:
    """STACK_GLOBAL with a dotted name, then a call."""
    module, _, attribute = path.partition(":")
    return Text(value(module) + value(attribute) + b"\x93" + value(args) + b"R")


BOMB = Text(b"]" + b"".join(b"(" + b"h\x00" * 10 + b"eq\x00" for _ in range(3)))
TENSOR = tensor(MATRIX)
CORPUS: dict[str, bytes] = {
    "os.system": pickle.dumps(Reduced(os.system, Canary.command)),
    "os.system by protocol 0": pickle.dumps(Reduced(os.system, Canary.command), protocol=0),
    "os.system by protocol 2": pickle.dumps(Reduced(os.system, Canary.command), protocol=2),
    "posix.system inside a dict": dump({"a": call(name("posix", "system"), Canary.command)}),
    "eval": pickle.dumps(Reduced(eval, f"__import__('os').system('{Canary.command}')")),
    "exec": pickle.dumps(Reduced(exec, f"import os; os.system('{Canary.command}')")),
    "subprocess": pickle.dumps(Reduced(subprocess.Popen, ["touch", Canary.path])),
    "getattr chain": dump({"a": call(name("builtins", "getattr"), name("os", "path"), "join")}),
    "__import__": pickle.dumps(Reduced(builtins.__import__, "os")),
    "dotted name from an allowed module": dump({"a": dotted("torch:storage.os.system", Canary.command)}),
    "dotted name from an allowed class": dump({"a": dotted("collections:OrderedDict.fromkeys", ["x"])}),
    "dotted name over GLOBAL": dump({"a": call(name("torch._utils", "os.system"), Canary.command)}),
    "dunder of an allowed function": dump({"a": dotted("torch._utils:_rebuild_tensor_v2.__globals__.get", "os")}),
    "nested pickle": dump({"a": call(name("pickle", "loads"), pickle.dumps(Reduced(os.system, Canary.command)))}),
    "nested pickle as a storage": dump(
        {"a": call(name("torch.storage", "_load_from_bytes"), pickle.dumps(Reduced(os.system, Canary.command)))}
    ),
    "global inside a storage": dump(
        {
            "a": call(
                name("torch.storage", "_load_from_bytes"), image(b"", "FloatStorage").replace(b"torch\n", b"posix\n")
            )
        }
    ),
    "storage inside a storage": dump(
        {"a": call(name("torch.storage", "_load_from_bytes"), b"\x80\x02" + storage(bytes(4)) + b".")}
    ),
    "torch.load": dump({"a": call(name("torch", "load"), "/etc/passwd")}),
    "torch.hub.load": dump({"a": call(name("torch.hub", "load"), "a/b", "c")}),
    "torch.jit": dump({"a": call(name("torch.jit", "load"), "/tmp/x")}),
    "numpy": pickle.dumps({"a": np.ones(3)}),
    "builtins.open": dump({"a": call(name("builtins", "open"), Canary.path, "w")}),
    "importlib": dump({"a": call(name("importlib", "import_module"), "os")}),
    "functools.partial": dump({"a": call(name("functools", "partial"), name("os", "system"), Canary.command)}),
    "operator.attrgetter": dump({"a": call(name("operator", "attrgetter"), "system")}),
    "copyreg": dump({"a": call(name("copyreg", "_reconstructor"), name("builtins", "object"), name("os", "x"), None)}),
    "copyreg.add_extension": dump({"a": call(name("copyreg", "add_extension"), "os", "system", 1)}),
    "extension code": b"\x80\x02\x82\x01.",
    "extension code of four bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
    "INST": b"\x80\x02(S'id'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00ido.",
    "NEWOBJ of an allowed function": dump({"a": Text(name("torch._utils", "_rebuild_tensor_v2") + b")\x81")}),
    "NEWOBJ with arguments": dump({"a": Text(name(*METADATA) + value((1,)) + b"\x81")}),
    "NEWOBJ_EX": dump({"a": Text(name(*METADATA) + b")}\x92")}),
    "BUILD on a class": dump({"a": Text(name(*METADATA) + value({"__setstate__": 1}) + b"b")}),
    "BUILD on a function": dump({"a": Text(name("torch", "Size") + value((None, {"__code__": 1})) + b"b")}),
    "BUILD on a tensor": dump({"a": Text(TENSOR + value({"__class__": 1}) + b"b")}),
    "BUILD with slots": dump({"a": Text(name(*METADATA) + b")\x81" + value((None, {"__class__": 1})) + b"b")}),
    "call of a string": dump({"a": call(Text(value("os.system")), "id")}),
    "call of a dtype": dump({"a": call(name("torch", "float32"), 1)}),
    "call of a result": dump({"a": call(call(name("torch", "Size"), (1,)), 1)}),
    "call without a tuple": dump({"a": Text(name("torch", "Size") + value([1]) + b"R")}),
    "Size of strings": dump({"a": call(name("torch", "Size"), ("x",))}),
    "Size of negatives": dump({"a": call(name("torch", "Size"), (-1,))}),
    "OrderedDict with arguments": dump({"a": call(name("collections", "OrderedDict"), [("x", 1)])}),
    "tensor over bytes": dump({"a": tensor_over(bytes(8), 0, (2,), (1,))}),
    "tensor beyond its storage": dump({"a": tensor_over(storage(bytes(8)), 0, (3,), (1,))}),
    "tensor by a large stride": dump({"a": tensor_over(storage(bytes(8)), 0, (2,), (1 << 60,))}),
    "tensor by a large offset": dump({"a": tensor_over(storage(bytes(8)), 1 << 60, (1,), (1,))}),
    "tensor by a negative offset": dump({"a": tensor_over(storage(bytes(8)), -1, (1,), (1,))}),
    "tensor by a negative stride": dump({"a": tensor_over(storage(bytes(8)), 1, (2,), (-1,))}),
    "tensor of many dimensions": dump({"a": tensor_over(storage(bytes(8)), 0, (1,) * 99, (1,) * 99)}),
    "tensor of booleans as sizes": dump({"a": tensor_over(storage(bytes(8)), 0, (True,), (1,))}),
    "tensor larger than memory by stride 0": dump({"a": tensor_over(storage(bytes(8)), 0, (1 << 61, 1 << 61), (0, 0))}),
    "tensor with sizes and no strides": dump({"a": tensor_over(storage(bytes(8)), 0, (1, 1), (1,))}),
    "tensor without arguments": dump({"a": call(name("torch._utils", "_rebuild_tensor_v2"))}),
    "parameter of nothing": dump({"a": call(name("torch._utils", "_rebuild_parameter"))}),
    "storage longer than its bytes": dump({"a": tensor_over(storage(bytes(8), numel=1 << 40), 0, (9,), (1,))}),
    "storage of another kind": dump({"a": tensor_over(storage(bytes(8), "QInt8Storage"), 0, (2,), (1,))}),
    "storage of a big-endian machine": dump(
        {"a": call(name("torch.storage", "_load_from_bytes"), image(bytes(4), little_endian=False))}
    ),
    "persistent id outside a storage": dump({"a": Text(value(("storage", 1, "1", "cpu", 1, None)) + b"Q")}),
    "integers": dump({"a": tensor(np.arange(3), "LongStorage")}),
    "name twice": dump([("a", TENSOR), ("a", TENSOR)]),
    "key that is no string": b"\x80\x04}K\x01" + TENSOR + b"s.",
    "pair of three": dump([("a", TENSOR, 1)]),
    "no tensor": dump({"a": 1}),
    "nothing": dump(None),
    "bytes in place of a dict": dump(b"x"),
    "self-containing list": b"\x80\x04]\x94h\x00a.",
    "memo bomb": dump(BOMB),
    "deep tuples": b"\x80\x04)" + b"\x85" * 300_000 + b".",
    "deep lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep dicts": b"\x80\x04" + (b"}" + value("k")) * 50_000 + b"N" + b"s" * 50_000 + b".",
    "huge LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 100 + b".",
    "huge text integer": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "huge string announced": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge bytes announced": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge frame": b"\x80\x04\x95" + b"\xff" * 8,
    "missing memo": b"\x80\x04h\x07.",
    "empty stack": b"\x80\x04.",
    "pop past a mark": b"\x80\x04N(\x85.",
    "mark missing": b"\x80\x04Nt.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "unknown opcode": b"\x80\x04\xff.",
    "text that is not UTF-8": b"\x80\x04\x8c\x02\xff\xfe.",
    "endless name": b"\x80\x02c" + b"a" * 100_000,
    "zip of torch.save": b"PK\x03\x04" + bytes(30),
    "empty": b"",
    "cut": GOOD[:-1],
}


def test_the_corpus_is_hostile():
    """At least some of it runs code when pickle loads it."""
    canary = Path(Canary.path)
    canary.unlink(missing_ok=True)
    pickle.loads(CORPUS["os.system"])
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize("payload", CORPUS.values(), ids=CORPUS)
def test_h1_pickle_corpus_is_refused(payload, monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("pickle or an import was used")

    with monkeypatch.context() as patched:
        patched.setattr(pickle, "loads", forbidden)
        patched.setattr(pickle, "Unpickler", forbidden)
        patched.setattr(os, "system", forbidden)
        started = time.process_time()
        for bucket in (False, True):
            with pytest.raises(AdapterError) as caught:
                unpickle_tensors(memoryview(payload), bucket)
            assert caught.value.code == "invalid_adapter" and caught.value.status == 400
            assert len(str(caught.value)) < 2000
    assert time.process_time() - started < 5
    assert not Path(Canary.path).exists()


def test_h1_nothing_of_the_machine_can_be_changed():
    before = {key: repr(entry) for key, entry in vars(tensor_unpickler).items()}
    for payload in CORPUS.values():
        with pytest.raises(AdapterError):
            unpickle_tensors(memoryview(payload))
    assert {key: repr(entry) for key, entry in vars(tensor_unpickler).items()} == before
    assert not copyreg._extension_registry  # type: ignore[attr-defined]
    assert np.array_equal(read(GOOD)["a"][1], MATRIX)


def test_h1_the_module_uses_neither_pickle_nor_torch():
    source = Path(tensor_unpickler.__file__).read_text()
    assert not [word for word in ("import pickle", "import torch", "getattr(", "eval(", "exec(") if word in source]


def test_h10_opcodes_have_a_budget_that_inner_pickles_share(monkeypatch):
    monkeypatch.setattr(tensor_unpickler, "MAX_OPCODES", 200)
    with pytest.raises(AdapterError, match="more than 200 opcodes"):
        read(b"\x80\x04" + b"N" * 300 + b".")
    with pytest.raises(AdapterError, match="more than 200 opcodes"):
        read(dump({str(i): TENSOR for i in range(5)}))


@given(st.binary(max_size=300))
def test_h1_noise_is_refused_or_empty(noise):
    with contextlib.suppress(AdapterError):
        assert not unpickle_tensors(memoryview(b"\x80\x04" + noise + b"."))


@given(st.data())
def test_h1_damaged_payloads_are_refused_or_read(data):
    """No flipped byte leads to anything but tensors or the one error."""
    payload = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(AdapterError):
        unpickle_tensors(memoryview(bytes(payload)))


@given(st.integers(0, len(GOOD) - 1))
def test_h10_truncated_payloads_are_refused(length):
    with pytest.raises(AdapterError):
        unpickle_tensors(memoryview(GOOD[:length]))


def test_an_empty_dict_is_no_error_here():
    assert read(pickle.dumps({})) == {} == read(pickle.dumps(OrderedDict()))
