"""Read-only view of a GGUF file: metadata values and dequantised tensors, through the `gguf` library.

Called by `config.model_config` and `parser.tokenizer` (metadata, in the front) and by `model_loader` (tensors, in the
back). The file is memory-mapped; a tensor is read when asked for. Names stay GGUF's: mapping them to parameters, and
undoing llama.cpp's permutation of q and k, is the model loader's work.
"""

from __future__ import annotations

import functools
import os
import struct
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from sglang.srt.errors import ConfigError

_LENGTH = struct.Struct("<Q")
_ARRAY_HEADER = struct.Struct("<IQ")


class GGUFFile:
    """One open GGUF file.

    Args:
        path: the file.

    Raises:
        ConfigError: the file cannot be read as GGUF.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._reader = _FastReader(path)
        except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
            raise ConfigError(f"{path} is not a readable GGUF file ({error}); download or convert it again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        """`general.architecture`, e.g. ``llama``."""
        name: str = self.require("general.architecture")
        return name

    def field(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key as str, int, float, bool or a list of them; `default` when the key is absent."""
        field = self._reader.get_field(key)
        if field is None:
            return default
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            return _array_values(field)
        return field.contents()

    def require(self, key: str) -> Any:
        """Value of a metadata key; raises ConfigError when the key is absent."""
        value = self.field(key)
        if value is None:
            raise ConfigError(f"{self.path} has no metadata key {key!r}; convert the model again")
        return value

    def tensor_names(self) -> list[str]:
        """Names in file order."""
        return list(self._tensors)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape in row-major order ([out, in] for a matrix); raises KeyError for an unknown name."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The tensor dequantised to float32, shape `tensor_shape(name)`.

        May be a read-only view of the file when it is stored as float32.

        Raises:
            KeyError: unknown name.
            ConfigError: a quantisation type the `gguf` library cannot decode.
        """
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ConfigError(f"{self.path}: tensor {name} is {kind}, which cannot be dequantised ({error})") from error
        return np.asarray(values, dtype=np.float32).reshape(self.tensor_shape(name))

    def stored(self, name: str) -> tuple[str, NDArray[Any]]:
        """(type in lower case, e.g. ``q4_1``; the tensor as stored, a quantised one as uint8 [out, bytes of a row])."""
        tensor = self._tensors[name]
        kind: str = tensor.tensor_type.name.lower()
        return kind, tensor.data


def open_gguf(path: str) -> GGUFFile:
    """`GGUFFile(path)`, the last one kept: config and tokenizer of one start read the same metadata."""
    stat = os.stat(path)
    return _open_cached(os.path.abspath(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _open_cached(path: str, _mtime_ns: int, _size: int) -> GGUFFile:
    return GGUFFile(path)


def _array_values(field: Any) -> list[Any]:
    """Flatten an array field, whether its parts are whole arrays (`_FastReader`) or single elements (the library)."""
    values: list[Any] = []
    for index in field.data:
        part = field.parts[index]
        if field.types[-1] == gguf.GGUFValueType.STRING and part.dtype != object:
            values.append(str(part.tobytes(), "utf-8", "replace"))
        else:
            values.extend(part.tolist())
    return values


class _FastReader(gguf.GGUFReader):
    """The library's reader with arrays taken in one piece: it makes two numpy views per element, seconds a vocabulary.

    `_get_field_parts` is the library's internal hook. Should a later version stop calling it, reading gets slow again
    and stays right, because `_array_values` understands both layouts.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        item_type, count = _ARRAY_HEADER.unpack_from(self.data.data, orig_offs)
        kind, start = gguf.GGUFValueType(item_type), orig_offs + _ARRAY_HEADER.size
        if kind == gguf.GGUFValueType.STRING:
            values, end = self._read_strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            end = start + int(values.nbytes)
        else:
            raise ValueError(f"array of {kind.name} in the metadata")
        return end - orig_offs, [values], [0], [gguf.GGUFValueType.ARRAY, kind]

    def _read_strings(self, offset: int, count: int) -> tuple[NDArray[np.object_], int]:
        data = self.data.data
        strings = np.empty(count, dtype=object)
        for i in range(count):
            (length,) = _LENGTH.unpack_from(data, offset)
            start = offset + _LENGTH.size
            offset = start + length
            strings[i] = str(data[start:offset], "utf-8", "replace")
        return strings, offset
