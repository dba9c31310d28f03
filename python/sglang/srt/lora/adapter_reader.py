"""Turns what a client sends, a directory or tensors in a request, into an `Adapter` that fits the model.

Called by the adapter service in a worker thread; holds nothing between calls. Names, shapes and ranks are checked on
the headers, before memory is taken; then every tensor is read once, straight into the buffer that the back will map.
Invariants: what comes out needs no further check; the files are never read again; a call that fails leaves nothing; all
problems of one stage are in one message.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoRASection
from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter import Adapter, AdapterModule, DType, Span
from sglang.srt.lora.adapter_config import AdapterConfig, parse_adapter_config
from sglang.srt.lora.host_buffer import HostBuffer
from sglang.srt.lora.safetensors_bytes import (
    ITEM_BYTES,
    PREFIX_BYTES,
    TensorEntry,
    header_bytes,
    looks_like_safetensors,
    parse_header,
    parse_image,
)
from sglang.srt.lora.target_modules import (
    EMBEDDING,
    HEAD,
    allowed_kinds,
    kind_of,
    module_shapes,
    parse_base_copy,
    parse_factor,
    parts_of,
)
from sglang.srt.lora.tensor_unpickler import RawTensor, unpickle_tensors

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE, ADDED_TOKENS_FILE = "adapter_config.json", "adapter_model.safetensors", "added_tokens.json"
DEFAULT_MAX_BYTES = 8 << 30
"""Most bytes of tensors an adapter may have."""

_MAX_JSON_BYTES = 16 << 20
_MAX_LISTED = 20
_ALIGNMENT = 64
_SLICE = 1 << 20
"""Elements that are checked for NaN at once."""
_EXPONENTS: dict[DType, int] = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""Bits that are all set in NaN and infinities, and in no other number."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class ReadAdapter:
    """A validated adapter and the memory it lies in.

    Attributes:
        digest: SHA-256 of its content: equal for equal modules, whatever route and order they came by.
        num_tensors: tensors the client sent.
        nbytes: size of the buffer.
    """

    adapter: Adapter
    buffer: HostBuffer
    digest: str
    num_tensors: int
    nbytes: int
    max_rank: int

    def close(self) -> None:
        """Give the memory back; safe to call twice."""
        self.buffer.close()


class AdapterReader:
    """Reads adapters of one model.

    Args:
        model_path: what the server serves, compared with the adapter's base_model_name_or_path.
        max_bytes: most bytes of tensors; None for DEFAULT_MAX_BYTES.
    """

    def __init__(self, model: ModelConfig, lora: LoRASection, model_path: str, max_bytes: int | None = None) -> None:
        self._lora = lora
        self._model_path = model_path
        self._vocab_size = model.vocab_size
        self._shapes = module_shapes(model)
        self._max_bytes = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes

    def read_directory(self, path: str) -> ReadAdapter:
        """Read adapter_config.json and adapter_model.safetensors.

        Args:
            path: directory; relative to --lora-root when there is one, which it must not leave.

        Raises:
            AdapterError: adapter_not_found, path_unreadable (the same call may work later) or invalid_adapter.
        """
        directory = _Directory(path, self._lora.root)
        config = parse_adapter_config(directory.json(CONFIG_FILE))
        if ADDED_TOKENS_FILE in directory.names:
            self._check_added_tokens(directory.json(ADDED_TOKENS_FILE))
        with directory.open(WEIGHTS_FILE) as fd:
            return self._read(config, _FileTensors(fd, directory.describe(WEIGHTS_FILE), self._max_bytes))

    def read_tensors(
        self,
        config_dict: Mapping[str, Any],
        payload: str | list[str] | bytes,
        load_format: str | None = None,
        expected_checksums: Mapping[str, str] | None = None,
        added_tokens: Mapping[str, Any] | None = None,
    ) -> ReadAdapter:
        """Read tensors that came in a request.

        Args:
            config_dict: what adapter_config.json would say.
            payload: a safetensors image or a pickle of tensors, as bytes or base64; or a list of equal ones, one per
                tensor-parallel rank.
            load_format: safetensors, flattened_bucket, or None to tell by the bytes.
            expected_checksums: hex SHA-256 of each tensor's bytes by its name as sent; exactly these must have come.
            added_tokens: what added_tokens.json would say.

        Raises:
            AdapterError: invalid_adapter.
        """
        config = parse_adapter_config(config_dict)
        self._check_added_tokens(added_tokens or {})
        if load_format not in (None, "safetensors", "flattened_bucket"):
            raise _invalid(f"load_format {load_format!r} is neither safetensors nor flattened_bucket")
        image = memoryview(_decode(payload, self._max_bytes))
        source: _Source
        if load_format == "safetensors" or (load_format is None and looks_like_safetensors(image)):
            source = _ImageTensors(image, self._max_bytes)
        else:
            source = _PickledTensors(unpickle_tensors(image, load_format == "flattened_bucket"))
        return self._read(config, source, expected_checksums)

    def _read(self, config: AdapterConfig, source: _Source, checksums: Mapping[str, str] | None = None) -> ReadAdapter:
        self._check_base(config)
        plan = _Fit(self._shapes, self._lora, config, source.entries).plan()
        spans, size = _lay_out(source.entries, self._max_bytes)
        buffer = _allocate(size)
        try:
            for name, span in spans.items():
                source.read_into(name, _bytes_of(buffer, span, source.entries[name].nbytes))
            source.finish()
            _raise_all(_content_problems(buffer, spans, source.entries, checksums))
            modules = tuple(module.made(spans) for module in plan.modules)
            copies = tuple((name, spans[tensor]) for name, tensor in plan.base_copies)
            adapter = Adapter(buffer.path, buffer.nbytes, modules, copies)
            return ReadAdapter(adapter, buffer, _digest(adapter, buffer), len(spans), size, adapter.max_rank)
        except BaseException:
            buffer.close()
            raise

    def _check_added_tokens(self, tokens: Mapping[str, Any]) -> None:
        """Files copied from the base list its own tokens: only ids beyond the vocabulary are added ones."""
        added = [token for token, i in tokens.items() if type(i) is not int or i >= self._vocab_size]
        if added:
            shown = ", ".join(map(repr, added[:_MAX_LISTED]))
            raise _invalid(f"{len(added)} added tokens ({shown}) are not supported: the model has {self._vocab_size}")

    def _check_base(self, config: AdapterConfig) -> None:
        if not config.base_model or _is_same_model(config.base_model, self._model_path):
            return
        message = (
            f"the adapter's base_model_name_or_path is {config.base_model!r}, the server runs {self._model_path!r}"
        )
        if self._lora.strict:
            raise _invalid(f"{message}, and --lora-strict-loading is on")
        logger.warning("%s", message)


# ---- does it fit the model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Module:
    """A module and the tensors it is made of; `rows` rows of b belong to it, from `first_row` on."""

    name: str
    rank: int
    scale: float
    a: str
    b: str
    first_row: int
    rows: int

    def made(self, spans: Mapping[str, Span]) -> AdapterModule:
        """The same with places instead of names."""
        b = spans[self.b]
        offset = b.offset + self.first_row * self.rank * ITEM_BYTES[b.dtype]
        return AdapterModule(self.name, self.scale, spans[self.a], Span(b.dtype, (self.rows, self.rank), offset))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Modules by name, and (name of the model's tensor, name as sent) of repeated base weights."""

    modules: list[_Module]
    base_copies: list[tuple[str, str]]


class _Fit:
    """Compares names, shapes and ranks with the model, the adapter's config and the server's limits."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        lora: LoRASection,
        config: AdapterConfig,
        entries: Mapping[str, TensorEntry],
    ) -> None:
        self._shapes, self._lora, self._config, self._entries = shapes, lora, config, entries
        self._problems: list[str] = []

    def plan(self) -> _Plan:
        """What to make of the tensors.

        Raises:
            AdapterError: invalid_adapter, with everything that does not fit.
        """
        factors, copies = self._sort_names()
        modules = [made for name, pair in factors.items() for made in self._modules(name, pair)]
        modules.sort(key=lambda module: module.name)
        self._check_names(modules)
        self._check_limits(modules)
        checked = [(name, tensor) for name, tensor in copies if self._fits_base(name, tensor, factors)]
        if not factors:
            self._problems.append(f"there are no LoRA factors among {len(self._entries)} tensors")
        _raise_all(self._problems)
        return _Plan(modules, checked)

    def _sort_names(self) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
        """Tensor names by module and factor, and the base weights as (model's tensor, tensor)."""
        factors: dict[str, dict[str, str]] = {}
        copies = []
        for tensor in self._entries:
            found, copied = parse_factor(tensor), parse_base_copy(tensor)
            if found is not None and all(part in self._shapes for part in parts_of(found.module)):
                other = factors.setdefault(found.module, {}).setdefault(found.factor, tensor)
                if other != tensor:
                    self._problems.append(f"{tensor} and {other} are both lora_{found.factor} of {found.module}")
            elif copied is not None:
                copies.append((f"{copied}.weight", tensor))
            else:
                self._problems.append(f"{tensor} matches no module of this model")
        return factors, copies

    def _modules(self, name: str, pair: Mapping[str, str]) -> list[_Module]:
        """One module, or each of those that a fused name stands for; they share A and have B's rows in turn."""
        if len(pair) < 2:
            (factor, tensor), missing = next(iter(pair.items())), {"A": "lora_B", "B": "lora_A"}
            self._problems.append(f"{tensor} has no {missing[factor]} beside it")
            return []
        parts = parts_of(name)
        rows = [self._shapes[part][0] for part in parts]
        rank, scale = self._config.rank_of(name), self._config.scale_of(name)
        self._check_shape(pair["A"], (rank, self._shapes[parts[0]][1]), rank)
        self._check_shape(pair["B"], (sum(rows), rank), rank)
        return [
            _Module(part, rank, scale, pair["A"], pair["B"], sum(rows[:i]), rows[i]) for i, part in enumerate(parts)
        ]

    def _check_shape(self, tensor: str, expected: tuple[int, int], rank: int) -> None:
        shape = self._entries[tensor].shape
        if shape != expected:
            self._problems.append(f"{tensor} is {list(shape)}; r={rank} and this model make it {list(expected)}")

    def _check_names(self, modules: list[_Module]) -> None:
        for before, module in zip(modules, modules[1:], strict=False):
            if before.name == module.name:
                self._problems.append(f"{module.name} has factors twice, in {before.b} and {module.b}")
        for module in modules:
            if not self._config.admits(module.name):
                self._problems.append(f"{module.a} is of a module that the adapter's config leaves out")
        unmet = self._config.unmet_targets(module.name for module in modules)
        self._problems += [f"target_modules names {entry}, of which no layer has tensors" for entry in unmet]

    def _check_limits(self, modules: list[_Module]) -> None:
        limit, kinds = self._lora.max_lora_rank, allowed_kinds(self._lora.target_modules)
        rank = max((module.rank for module in modules), default=0)
        if limit is not None and rank > limit:
            self._problems.append(
                f"rank {rank} is incompatible with --max-lora-rank {limit}; restart with a larger one"
            )
        strange = sorted({kind_of(module.name) for module in modules} - kinds) if kinds is not None else []
        if strange and self._lora.target_modules is not None:
            self._problems.append(
                f"adapters of {', '.join(strange)} are incompatible with --lora-target-modules "
                f"{' '.join(self._lora.target_modules)}"
            )

    def _fits_base(self, name: str, tensor: str, factors: Mapping[str, object]) -> bool:
        """Whether a base weight may be there: PEFT saves those of the embedding and the head beside factors of them."""
        shape, expected = self._entries[tensor].shape, self._shapes[HEAD]
        if EMBEDDING not in factors and HEAD not in factors:
            self._problems.append(
                f"{tensor} is a base weight, which adapters cannot change; save with save_embedding_layers=False"
            )
        elif shape != expected:
            self._problems.append(
                f"{tensor} is {list(shape)}, the model's is {list(expected)}: vocabularies must be equal"
            )
        return shape == expected


def _raise_all(problems: list[str]) -> None:
    if not problems:
        return
    rest = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    raise _invalid("; ".join(problems[:_MAX_LISTED] + rest))


def _invalid(problem: str) -> AdapterError:
    return AdapterError("invalid_adapter", f"invalid adapter: {problem}")


def _is_same_model(name: str, path: str) -> bool:
    """Whether a path, of a directory, a hub snapshot or a GGUF file, is likely to hold a model of that name."""
    if os.path.realpath(name) == os.path.realpath(path):
        return True
    wanted = name.rstrip("/").lower()
    parts = os.path.abspath(path).lower().split(os.sep)
    last = wanted.rpartition("/")[2]
    if parts[-1].endswith(".gguf") and parts[-1].startswith(last):
        return True
    return last in parts or f"models--{wanted.replace('/', '--')}" in parts


# ---- where the bytes come from -------------------------------------------------------------------------------------


class _Source(Protocol):
    """Tensors of one adapter: shapes at once, bytes later, in the order of `entries`."""

    entries: Mapping[str, TensorEntry]

    def read_into(self, name: str, target: NDArray[np.uint8]) -> None:
        """Copy a tensor, row-major, to uint8 [nbytes]."""

    def finish(self) -> None:
        """Called when all are read; raises AdapterError when what was read cannot be trusted."""


class _ImageTensors:
    """A safetensors image in memory."""

    def __init__(self, image: memoryview, max_bytes: int) -> None:
        layout, self._data = parse_image(image, max_bytes)
        self.entries: Mapping[str, TensorEntry] = layout.entries

    def read_into(self, name: str, target: NDArray[np.uint8]) -> None:
        entry = self.entries[name]
        target[:] = np.frombuffer(self._data[entry.begin : entry.begin + entry.nbytes], dtype=np.uint8)

    def finish(self) -> None:
        pass


class _PickledTensors:
    """Tensors of a pickle, of any strides."""

    def __init__(self, tensors: Mapping[str, RawTensor]) -> None:
        self._tensors = tensors
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(tensor.dtype, tensor.values.shape, 0, tensor.values.size * tensor.values.itemsize)
            for name, tensor in tensors.items()
        }

    def read_into(self, name: str, target: NDArray[np.uint8]) -> None:
        values = self._tensors[name].values
        target.view(values.dtype).reshape(values.shape)[:] = values

    def finish(self) -> None:
        pass


class _FileTensors:
    """A safetensors file, read front to back.

    Raises:
        AdapterError: path_unreadable when it is shorter or longer than it says, or changes meanwhile.
    """

    def __init__(self, fd: int, described: str, max_bytes: int) -> None:
        self._fd, self._described = fd, described
        self._before = os.fstat(fd)
        prefix = os.pread(fd, PREFIX_BYTES, 0)
        if len(prefix) < PREFIX_BYTES:
            self._unreadable("is not written completely")
        self._start = PREFIX_BYTES + header_bytes(prefix)
        if self._start > self._before.st_size:
            self._unreadable("is not written completely")
        layout = parse_header(os.pread(fd, self._start - PREFIX_BYTES, PREFIX_BYTES), max_bytes)
        if self._start + layout.nbytes != self._before.st_size:
            self._unreadable(f"has {self._before.st_size} bytes, its header describes {self._start + layout.nbytes}")
        self.entries: Mapping[str, TensorEntry] = layout.entries

    def read_into(self, name: str, target: NDArray[np.uint8]) -> None:
        position, rest = self._start + self.entries[name].begin, target.data
        while rest:
            count = os.preadv(self._fd, [rest], position)
            if count == 0:
                self._unreadable("became shorter while it was read")
            position, rest = position + count, rest[count:]

    def finish(self) -> None:
        after = os.fstat(self._fd)
        if (after.st_size, after.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            self._unreadable("changed while it was read")

    def _unreadable(self, problem: str) -> NoReturn:
        raise AdapterError("path_unreadable", f"{self._described} {problem}; load it again when it is complete")


class _Directory:
    """Files of an adapter's directory, none of them outside the root.

    Raises:
        AdapterError: adapter_not_found; the message says what is there instead.
    """

    def __init__(self, path: str, root: str | None) -> None:
        if not path or "\0" in path:
            raise AdapterError("adapter_not_found", f"{path!r} is no path of an adapter")
        self._path = path
        self._root = None if root is None else os.path.realpath(root)
        self._real = self._inside(os.path.join(root or "", path))
        self.names = self._list()
        if CONFIG_FILE not in self.names:
            raise AdapterError("adapter_not_found", f"{path!r} holds no {CONFIG_FILE}, only {self._shown()}")
        if WEIGHTS_FILE not in self.names:
            self._refuse_other_weights()

    def describe(self, name: str) -> str:
        """A file as messages call it."""
        return repr(os.path.join(self._path, name))

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Descriptor of a regular file, for reading; any failure to read it becomes path_unreadable."""
        path = self._inside(os.path.join(self._real, name))
        try:
            # Not blocking: a pipe in the place of a file must not hold the thread.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError("not a regular file")
                yield fd
            finally:
                os.close(fd)
        except OSError as error:
            raise AdapterError("path_unreadable", f"{self.describe(name)} cannot be read: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; one that does not parse is taken for half-written."""
        with self.open(name) as fd:
            text = os.pread(fd, _MAX_JSON_BYTES, 0)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError("path_unreadable", f"{self.describe(name)} is no complete JSON: {error}") from error
        if not isinstance(value, dict):
            raise _invalid(f"{self.describe(name)} is not a JSON object")
        return value

    def _inside(self, path: str) -> str:
        """The real path, links followed; refused without a look at what is there when it leaves the root."""
        real = os.path.realpath(path)
        if self._root is not None and os.path.commonpath([self._root, real]) != self._root:
            raise AdapterError("adapter_not_found", f"{self._path!r} is outside --lora-root {self._root}")
        return real

    def _list(self) -> list[str]:
        try:
            return sorted(os.listdir(self._real))
        except NotADirectoryError:
            raise AdapterError("adapter_not_found", f"{self._path!r} is no directory; pass the adapter's") from None
        except FileNotFoundError:
            hint = "; names on the hub are not fetched: download it first" if _HUB_ID.fullmatch(self._path) else ""
            raise AdapterError("adapter_not_found", f"there is no directory {self._path!r}{hint}") from None
        except OSError as error:
            raise AdapterError("path_unreadable", f"{self._path!r} cannot be read: {error}") from error

    def _refuse_other_weights(self) -> NoReturn:
        other = [name for name in self.names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if other:
            raise _invalid(
                f"{self._path!r} has its weights in {other[0]}, a pickle, not in {WEIGHTS_FILE}; convert them"
            )
        raise AdapterError("adapter_not_found", f"{self._path!r} holds no {WEIGHTS_FILE}, only {self._shown()}")

    def _shown(self) -> str:
        return ", ".join(self.names[:_MAX_LISTED]) or "nothing"


def _decode(payload: str | list[str] | bytes, max_bytes: int) -> bytes:
    """The bytes behind base64; of a list, whose items are the same for every rank, behind the first."""
    if isinstance(payload, list):
        if not payload or not all(isinstance(item, str) for item in payload):
            raise _invalid("a list of serialized tensors must hold base64 strings, at least one")
        payload = payload[0]
    if isinstance(payload, bytes):
        return payload
    if len(payload) * 3 // 4 > max_bytes + _MAX_JSON_BYTES:
        raise _invalid(f"{len(payload)} characters of base64 exceed this server's limit of {max_bytes} bytes")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise _invalid(f"serialized tensors are not base64: {error}") from error


# ---- bytes in the buffer -------------------------------------------------------------------------------------------


def _lay_out(entries: Mapping[str, TensorEntry], max_bytes: int) -> tuple[dict[str, Span], int]:
    """A place for every tensor (all of two dimensions), in order, and the bytes they take together."""
    spans, end = {}, 0
    for name, entry in entries.items():
        spans[name] = Span(entry.dtype, (entry.shape[0], entry.shape[1]), end)
        end += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    if end > max_bytes:
        raise _invalid(f"{end} bytes of tensors exceed this server's limit of {max_bytes}")
    return spans, end


def _allocate(size: int) -> HostBuffer:
    try:
        return HostBuffer(size)
    except OSError as error:
        raise AdapterError("capacity", f"there is no memory for {size} bytes of adapter: {error}") from error


def _bytes_of(buffer: HostBuffer, span: Span, nbytes: int) -> NDArray[np.uint8]:
    return buffer.view[span.offset : span.offset + nbytes]


def _content_problems(
    buffer: HostBuffer,
    spans: Mapping[str, Span],
    entries: Mapping[str, TensorEntry],
    checksums: Mapping[str, str] | None,
) -> list[str]:
    """What is wrong with the bytes. Returned, not raised: a traceback would hold on to views of the buffer."""
    problems = []
    for name, span in spans.items():
        data = _bytes_of(buffer, span, entries[name].nbytes)
        if not _all_finite(data, span.dtype):
            problems.append(f"{name} has NaN or infinite values")
        if checksums is not None and hashlib.sha256(data.data).hexdigest() != checksums.get(name):
            problems.append(f"{name} is not what expected_checksums says (SHA-256)")
    problems += [f"{name} is in expected_checksums but was not sent" for name in checksums or () if name not in spans]
    return problems


def _all_finite(data: NDArray[np.uint8], dtype: DType) -> bool:
    """Whether no element is NaN or infinite; works on the bits, in slices."""
    words = data.view(np.uint32 if ITEM_BYTES[dtype] == 4 else np.uint16)
    exponents = words.dtype.type(_EXPONENTS[dtype])
    slices = (words[start : start + _SLICE] for start in range(0, len(words), _SLICE))
    return all((part & exponents).max() < exponents for part in slices)


def _digest(adapter: Adapter, buffer: HostBuffer) -> str:
    """SHA-256 over the modules in the order of their names: name, scale, and dtype, shape and bytes of both factors."""
    digest = hashlib.sha256()
    for module in adapter.modules:
        _add(digest, (module.name, module.scale.hex()), (module.a, module.b), buffer)
    for name, span in sorted(adapter.base_copies):
        _add(digest, (name,), (span,), buffer)
    return digest.hexdigest()


def _add(digest: Any, header: Iterable[str], spans: Iterable[Span], buffer: HostBuffer) -> None:
    digest.update(json.dumps(header).encode())
    for span in spans:
        digest.update(json.dumps([span.dtype, span.shape]).encode())
        digest.update(_bytes_of(buffer, span, span.shape[0] * span.shape[1] * ITEM_BYTES[span.dtype]).data)
