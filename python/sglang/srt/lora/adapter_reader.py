"""Turns what a client sends, a directory or tensors in a request, into an `Adapter` that fits the model.

Called by the adapter service in a worker thread; holds nothing between calls. Names, shapes and ranks are checked on
the headers, before memory is taken; then every tensor is read once, straight into the buffer that the back will map.
Invariants: what comes out needs no further check; the files are never read again; a call that fails leaves nothing; all
problems of one stage are in one message.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoRASection
from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter import Adapter, DType, Span
from sglang.srt.lora.adapter_config import AdapterConfig, parse_adapter_config
from sglang.srt.lora.adapter_fit import AdapterFit
from sglang.srt.lora.adapter_source import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterDirectory,
    FileTensors,
    ImageTensors,
    PickledTensors,
    TensorSource,
    decode_payload,
)
from sglang.srt.lora.host_buffer import HostBuffer
from sglang.srt.lora.problems import MAX_LISTED, invalid, raise_all
from sglang.srt.lora.safetensors_bytes import ITEM_BYTES, TensorEntry, looks_like_safetensors
from sglang.srt.lora.target_modules import module_shapes
from sglang.srt.lora.tensor_unpickler import unpickle_tensors

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 8 << 30
"""Most bytes of tensors an adapter may have."""

_ALIGNMENT = 64
_SLICE = 1 << 20
"""Elements that are checked for NaN at once."""
_EXPONENTS: dict[DType, int] = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""Bits that are all set in NaN and infinities, and in no other number."""


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
        directory = AdapterDirectory(path, self._lora.root)
        config = parse_adapter_config(directory.json(CONFIG_FILE))
        if ADDED_TOKENS_FILE in directory.names:
            self._check_added_tokens(directory.json(ADDED_TOKENS_FILE))
        with directory.open(WEIGHTS_FILE) as fd:
            return self._read(config, FileTensors(fd, directory.describe(WEIGHTS_FILE), self._max_bytes))

    def read_tensors(
        self,
        config_dict: Mapping[str, Any],
        payload: str | list[str] | bytes | bytearray,
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
            raise invalid(f"load_format {load_format!r} is neither safetensors nor flattened_bucket")
        if expected_checksums is not None and not isinstance(expected_checksums, Mapping):
            raise invalid("expected_checksums must be a dict of tensor names and SHA-256 sums")
        image = memoryview(decode_payload(payload, self._max_bytes))
        source: TensorSource
        if load_format == "safetensors" or (load_format is None and looks_like_safetensors(image)):
            source = ImageTensors(image, self._max_bytes)
        else:
            source = PickledTensors(unpickle_tensors(image, load_format == "flattened_bucket"))
        return self._read(config, source, expected_checksums)

    def _read(
        self, config: AdapterConfig, source: TensorSource, checksums: Mapping[str, str] | None = None
    ) -> ReadAdapter:
        self._check_base(config)
        plan = AdapterFit(self._shapes, self._lora, config, source.entries).plan()
        spans, size = _lay_out(source.entries, self._max_bytes)
        buffer = _allocate(size)
        try:
            for name, span in spans.items():
                source.read_into(name, _bytes_of(buffer, span, source.entries[name].nbytes))
            source.finish()
            raise_all(_content_problems(buffer, spans, source.entries, checksums))
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
            shown = ", ".join(map(repr, added[:MAX_LISTED]))
            raise invalid(f"{len(added)} added tokens ({shown}) are not supported: the model has {self._vocab_size}")

    def _check_base(self, config: AdapterConfig) -> None:
        if not config.base_model or _is_same_model(config.base_model, self._model_path):
            return
        message = (
            f"the adapter's base_model_name_or_path is {config.base_model!r}, the server runs {self._model_path!r}"
        )
        if self._lora.strict:
            raise invalid(f"{message}, and --lora-strict-loading is on")
        logger.warning("%s", message)


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


def _lay_out(entries: Mapping[str, TensorEntry], max_bytes: int) -> tuple[dict[str, Span], int]:
    """A place for every tensor (all of two dimensions), in order, and the bytes they take together."""
    spans, end = {}, 0
    for name, entry in entries.items():
        spans[name] = Span(entry.dtype, (entry.shape[0], entry.shape[1]), end)
        end += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    if end > max_bytes:
        raise invalid(f"{end} bytes of tensors exceed this server's limit of {max_bytes}")
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
