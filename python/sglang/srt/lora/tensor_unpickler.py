"""Reads the pickles of tensors that stock SGLang's clients send, without pickle and without torch.

Called by `adapter_reader`. A small machine of its own executes the opcodes that such pickles consist of. A global is an
inert token from an allow-list, calls go through `_CALLS`, and what comes out are strings, numbers, tuples, lists, dicts
and tensors over the payload's own bytes.
Invariant: no payload reaches an import, an attribute or a Python callable that is not a function of this file.

Tensors come in-line (`pickle.dumps`): `_rebuild_tensor_v2` over a storage that `torch.save` wrote in its old format,
five pickles and then the bytes. Handles (shared memory, file descriptors, CUDA IPC) belong to another process and are
refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter import DType
from sglang.srt.lora.safetensors_bytes import ITEM_BYTES, MAX_DIMS, MAX_TENSORS

MAX_OPCODES = 4_000_000
_MAX_GLOBAL_BYTES = 256

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_REDUCTIONS = "torch.multiprocessing.reductions"
_HANDLE_MODULES = (_REDUCTIONS, "sglang.srt.utils.patch_torch", "multiprocessing.resource_sharer")


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as the payload describes it.

    Attributes:
        dtype: float32, float16 or bfloat16.
        values: unsigned integers of the same width, in the tensor's shape and strides, over the payload's bytes.
    """

    dtype: DType
    values: NDArray[Any]


def unpickle_tensors(payload: memoryview, flattened_bucket: bool = False) -> dict[str, RawTensor]:
    """Read a pickled dict name -> tensor, a list of (name, tensor), or a flattened bucket.

    Args:
        payload: the pickle.
        flattened_bucket: the pickle is {"flattened_tensor": tensor, "metadata": [FlattenedTensorMetadata, …]}.

    Raises:
        AdapterError: invalid_adapter; anything that is not plain tensors, with the position of what is not.
    """
    value = _Machine(payload, iter(range(MAX_OPCODES))).run()
    named = _unflatten(value) if flattened_bucket else _named_tensors(value)
    if len(named) > MAX_TENSORS:
        _refuse(f"{len(named)} tensors exceed the limit of {MAX_TENSORS}")
    tensors: dict[str, RawTensor] = {}
    for name, tensor in named:
        if name in tensors:
            _refuse(f"tensor {name!r} is there twice")
        tensors[name] = _as_float(name, tensor)
    return tensors


def _refuse(problem: str) -> NoReturn:
    raise AdapterError("invalid_adapter", f"serialized tensors: {problem}")


# ---- what a pickle may be made of ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Global:
    """A name of the allow-list; stands for nothing."""

    module: str
    name: str


@dataclass(slots=True)
class _Record:
    """An instance of a metadata class."""

    fields: dict[str, Any]


@dataclass(slots=True)
class _Storage:
    """Elements of one dtype; the old torch.save format announces them before their bytes."""

    dtype: str
    numel: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class _Strided:
    """A tensor of any dtype."""

    dtype: str
    values: NDArray[Any]


_OTHER_ITEM_BYTES = {"float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
_ITEM_BYTES: dict[str, int] = dict(ITEM_BYTES) | _OTHER_ITEM_BYTES
_UNSIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_STORAGE_NAMES = {
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float64": "Double",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
_DTYPES = {_Global("torch", name): name for name in _ITEM_BYTES}
_STORAGES = {_Global("torch", f"{word}Storage"): name for name, word in _STORAGE_NAMES.items()}
_METADATA = _Global("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")


def _rebuild_tensor(args: tuple[Any, ...]) -> _Strided:
    """(storage, offset, size, stride, requires_grad, hooks[, metadata]) in elements."""
    if len(args) not in (6, 7):
        _refuse(f"a tensor of {len(args)} arguments")
    storage, (offset,), size, stride = args[0], _sizes(args[1:2]), _sizes(args[2]), _sizes(args[3])
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        _refuse(f"a tensor of {len(size)} dimensions with {len(stride)} strides, or without a storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.numel and 0 not in size:
        _refuse(f"a tensor {size} that ends outside its storage of {storage.numel} elements")
    item = _ITEM_BYTES[storage.dtype]
    if 0 in size:
        return _Strided(storage.dtype, np.zeros(0, _UNSIGNED[item]).reshape(size))
    elements: NDArray[Any] = np.frombuffer(storage.data, dtype=_UNSIGNED[item])
    strides = tuple(step * item for step in stride)
    values = np.lib.stride_tricks.as_strided(elements[offset:], size, strides, writeable=False)
    return _Strided(storage.dtype, values)


def _rebuild_parameter(args: tuple[Any, ...]) -> _Strided:
    if not args or not isinstance(args[0], _Strided):
        _refuse("a parameter that is no tensor")
    return args[0]


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(args[0]) if len(args) == 1 else _refuse("a torch.Size of more than one argument")


def _ordered_dict(args: tuple[Any, ...]) -> dict[str, Any]:
    if args:
        _refuse("an OrderedDict with arguments")
    return {}


def _load_storage(args: tuple[Any, ...], steps: Iterator[int]) -> _Storage:
    """The one storage in an image of `torch.save`'s old format."""
    if len(args) != 1 or not isinstance(args[0], memoryview):
        _refuse("a storage that is no bytes")
    image = args[0]
    values: list[Any] = []
    for _ in range(5):
        machine = _Machine(image, steps, storages=True)
        values.append(machine.run())
        image = image[machine.position :]
    magic, protocol, system, storage, keys = values
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        _refuse("a storage that torch.save did not write")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        _refuse("a storage of a big-endian machine")
    if not isinstance(storage, _Storage) or not isinstance(keys, list) or len(keys) != 1:
        _refuse("an image of torch.save that is not one storage")
    numel, data = int.from_bytes(image[:8], "little"), image[8:]
    if numel != storage.numel or len(data) != numel * _ITEM_BYTES[storage.dtype]:
        _refuse(f"a storage of {storage.numel} elements with {len(data)} bytes")
    return _Storage(storage.dtype, numel, data)


_CALLS: dict[_Global, Callable[[tuple[Any, ...]], Any]] = {
    _Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    _Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    _Global("torch", "Size"): _size,
    _Global("collections", "OrderedDict"): _ordered_dict,
}
_LOAD_STORAGE = _Global("torch.storage", "_load_from_bytes")
_KNOWN = frozenset([*_CALLS, _LOAD_STORAGE, *_DTYPES, *_STORAGES, _METADATA])
# An image of a storage holds no other storage, so reading one never recurses.
_KNOWN_IN_STORAGE = frozenset(_STORAGES)


def _find(module: str, name: str, known: frozenset[_Global]) -> _Global:
    found = _Global(module, name)
    if found in known:
        return found
    if module in _HANDLE_MODULES:
        _refuse(
            f"{module}.{name} is a handle (shared memory, file descriptor or CUDA IPC) into the sending process, which "
            "this server does not open; send the tensors as base64 of safetensors bytes, or pickle them with "
            "pickle.dumps after .cpu()"
        )
    _refuse(f"{module}.{name} is not a part of tensors; send base64 of safetensors bytes")


def _sizes(value: object) -> tuple[int, ...]:
    """A tuple or list of few integers from 0 on that fit a pointer."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS:
        _refuse(f"sizes that are no tuple of at most {MAX_DIMS}")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        _refuse("sizes that are no integers from 0 on")
    return tuple(value)


# ---- the machine ---------------------------------------------------------------------------------------------------


class _Machine:
    """Executes one pickle.

    Args:
        data: starts with the pickle; `position` is behind it after `run`.
        steps: one for each opcode that may still be executed, shared with the pickles inside this one.
        storages: persistent ids stand for storages, as in torch.save's old format; otherwise there are none.
    """

    def __init__(self, data: memoryview, steps: Iterator[int], storages: bool = False) -> None:
        self.data, self.position = data, 0
        self.steps, self.storages = steps, storages
        self.known = _KNOWN_IN_STORAGE if storages else _KNOWN
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The pickled value.

        Raises:
            AdapterError: invalid_adapter, with the position of the opcode at fault.
        """
        for _ in self.steps:
            start = self.position
            try:
                opcode = self.number(1)
                if opcode == _STOP:
                    return self.pop()
                if opcode not in _OPCODES:
                    _refuse(f"opcode {bytes([opcode])!r} at byte {start} is not a part of tensors (protocol 2 to 5 is)")
                _OPCODES[opcode](self)
            except (IndexError, KeyError, ValueError, struct.error) as error:
                if isinstance(error, AdapterError):
                    raise
                _refuse(f"the pickle is damaged at byte {start} ({error})")
        _refuse(f"more than {MAX_OPCODES} opcodes")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError(f"{count} bytes announced, {len(taken)} left")
        self.position += count
        return taken

    def number(self, size: int, signed: bool = False) -> int:
        """The next `size` bytes as a little-endian integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, size: int) -> str:
        """As many UTF-8 bytes as the next `size` bytes say."""
        return str(self.take(self.number(size)), "utf-8")

    def line(self) -> str:
        """Text up to a newline."""
        head = bytes(self.data[self.position : self.position + _MAX_GLOBAL_BYTES])
        length = head.index(b"\n")
        self.position += length + 1
        return head[:length].decode()

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take one value off the stack, never one from below a mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError("nothing between mark and top")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The value on top, which stays there and must be of a type."""
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"{kind.__name__} expected")
        return self.stack[-1]


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def execute(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return execute


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.top(dict)
    if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
        raise ValueError("dict keys must be strings")
    target.update(zip(items[::2], items[1::2], strict=True))


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, [key, value])


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a global without a name")
    machine.push(_find(module, name, machine.known))


def _reduce(machine: _Machine) -> None:
    args, called = machine.pop(), machine.pop()
    if called == _LOAD_STORAGE and isinstance(args, tuple):
        return machine.push(_load_storage(args, machine.steps))
    if not isinstance(called, _Global) or called not in _CALLS or not isinstance(args, tuple):
        raise ValueError("a call of something that cannot be called")
    machine.push(_CALLS[called](args))


def _new_object(machine: _Machine) -> None:
    args, kind = machine.pop(), machine.pop()
    if kind != _METADATA or args != ():
        raise ValueError("an object of a class that is not metadata")
    machine.push(_Record({}))


def _build(machine: _Machine) -> None:
    state = machine.pop()
    record = machine.top(_Record)
    if not isinstance(state, dict):
        raise ValueError("a state that is no dict")
    record.fields.update(state)


def _persistent_id(machine: _Machine) -> None:
    """('storage', type, key, location, number of elements, None)."""
    described = machine.pop()
    if not machine.storages or not isinstance(described, tuple) or len(described) != 6:
        raise ValueError("a persistent id that is no storage")
    word, kind, _, _, numel, view = described
    if word != "storage" or not isinstance(kind, _Global) or view is not None:
        raise ValueError("a persistent id that is no storage")
    (numel,) = _sizes((numel,))
    machine.push(_Storage(_STORAGES[kind], numel, memoryview(b"")))


def _put(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.memo.__setitem__(machine.number(size), machine.stack[-1])


def _text(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.text(size))


def _bytes(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(size)))


def _integer(size: int, signed: bool = False) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(size, signed))


def _get(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.memo[machine.number(size)])


_STOP = ord(".")
# The opcodes of protocols 2 to 5 that pickles of tensors consist of. Not among them: text integers and strings
# (protocol 0), INST, OBJ, EXT1-4, NEWOBJ_EX, LONG4, NEXT_BUFFER, sets, POP and DUP.
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    ord(code): execute
    for code, execute in {
        b"\x80": lambda machine: machine.take(1),  # PROTO
        b"\x95": lambda machine: machine.take(8),  # FRAME
        b"N": lambda machine: machine.push(None),
        b"\x88": lambda machine: machine.push(True),
        b"\x89": lambda machine: machine.push(False),
        b"K": _integer(1),
        b"M": _integer(2),
        b"J": _integer(4, signed=True),
        b"\x8a": lambda machine: machine.push(machine.number(machine.number(1), signed=True)),  # LONG1
        b"G": lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
        b"\x8c": _text(1),
        b"X": _text(4),
        b"\x8d": _text(8),
        b"C": _bytes(1),
        b"B": _bytes(4),
        b"\x8e": _bytes(8),
        b"\x96": _bytes(8),  # BYTEARRAY8
        b"(": lambda machine: machine.marks.append(len(machine.stack)),
        b"]": lambda machine: machine.push([]),
        b"}": lambda machine: machine.push({}),
        b")": lambda machine: machine.push(()),
        b"\x85": _tuple_of(1),
        b"\x86": _tuple_of(2),
        b"\x87": _tuple_of(3),
        b"t": lambda machine: machine.push(tuple(machine.pop_to_mark())),
        b"a": _append,
        b"e": lambda machine: _extend(machine, machine.pop_to_mark()),
        b"s": _set_item,
        b"u": lambda machine: _set_items(machine, machine.pop_to_mark()),
        b"q": _put(1),
        b"r": _put(4),
        b"\x94": lambda machine: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
        b"h": _get(1),
        b"j": _get(4),
        b"c": lambda machine: machine.push(_find(machine.line(), machine.line(), machine.known)),
        b"\x93": _stack_global,
        b"R": _reduce,
        b"\x81": _new_object,
        b"b": _build,
        b"Q": _persistent_id,
    }.items()
}


def _extend(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


# ---- what the value must be ----------------------------------------------------------------------------------------


def _named_tensors(value: Any) -> list[tuple[str, Any]]:
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list):
        _refuse("neither a dict of tensors nor a list of (name, tensor)")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            _refuse("a list entry that is not (name, tensor)")
    return [(name, tensor) for name, tensor in pairs]


def _as_float(name: str, tensor: Any) -> RawTensor:
    if not isinstance(tensor, _Strided):
        _refuse(f"{name!r} is no tensor")
    if tensor.dtype not in ITEM_BYTES:
        _refuse(f"tensor {name!r} is {tensor.dtype}; adapters are {', '.join(ITEM_BYTES)}")
    return RawTensor(tensor.dtype, tensor.values)


def _unflatten(value: Any) -> list[tuple[str, _Strided]]:
    """Tensors of a bucket: each its own stretch of one flat tensor, with start and end in elements of that."""
    if not isinstance(value, dict) or not {"flattened_tensor", "metadata"} <= value.keys():
        _refuse("a flattened bucket has the keys flattened_tensor and metadata")
    flat, metadata = value["flattened_tensor"], value["metadata"]
    if not isinstance(flat, _Strided) or flat.values.ndim != 1 or not flat.values.flags.c_contiguous:
        _refuse("flattened_tensor must be one contiguous vector")
    if not isinstance(metadata, list) or not all(isinstance(entry, _Record) for entry in metadata):
        _refuse("metadata must be a list of FlattenedTensorMetadata")
    return [_stretch(flat.values, entry.fields) for entry in metadata]


def _stretch(flat: NDArray[Any], fields: dict[str, Any]) -> tuple[str, _Strided]:
    name, kind = fields.get("name"), fields.get("dtype")
    if not isinstance(name, str) or not isinstance(kind, _Global) or kind not in _DTYPES:
        _refuse(f"metadata of a tensor without a name or a dtype ({name!r})")
    shape, (start, end) = _sizes(fields.get("shape")), _sizes((fields.get("start_idx"), fields.get("end_idx")))
    dtype, stretch = _DTYPES[kind], flat[start:end].view(np.uint8)
    item = _ITEM_BYTES[dtype]
    if len(stretch) != math.prod(shape) * item or end > len(flat):
        _refuse(f"{name!r}: {shape} of {dtype} does not fill elements {start} to {end} of {len(flat)}")
    return name, _Strided(dtype, stretch.view(_UNSIGNED[item]).reshape(shape))
