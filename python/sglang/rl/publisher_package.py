"""An adapter as the bytes that every server gets: made once, of any framework's tensors.

Called by `publisher`. Imports no framework: torch and PEFT are used only when the tensors are theirs.
The bytes are a safetensors image: of a slab, as servers keep adapters, where all servers have the same layout and the
adapter fills it (`publisher_slab`); else of contiguous tensors, in the order of their names.
Invariants: equal tensors under equal names and equal configs give equal bytes in either form, whatever their order;
nothing is left out silently.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sglang.rl.publisher_slab import SlabPlan

DType = Literal["bfloat16", "float16", "float32"]
Form = Literal["slab", "tensors"]
DTYPES: tuple[DType, ...] = ("bfloat16", "float16", "float32")

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_CODES: dict[DType, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ITEM_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_ALIGNMENT = 8
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_ADAPTER_NAME = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]))\.(?!weight$)[^.]+(\.weight)?$")


class Package:
    """A serialised adapter.

    Args:
        tensors: by PEFT's names; of torch (DTensors are gathered), numpy, or anything that numpy takes.
        config: as adapter_config.json has it.
        dtype: of all tensors, into which they are rounded.
        layout: of the slabs that all servers take, as they describe it; None when there is none.

    Attributes:
        config: adapter_config.json.
        form: what the image is of.
        header, data, zeros: together a safetensors image; data, uint8 [n], are the numbers, zeros so many bytes.
        on_device: data, as a torch tensor, where the tensors are, if that is a GPU.

    Raises:
        ValueError, TypeError: there are no tensors, or one that cannot be sent; names it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any],
        dtype: DType = "bfloat16",
        layout: Mapping[str, Any] | None = None,
    ) -> None:
        if not tensors:
            raise ValueError("the adapter has no tensors; give a PeftModel, or its state dict by PEFT's names")
        self.config = json.dumps(plain(config), sort_keys=True).encode()
        self._dtype = dtype
        named = dict(sorted((_plain_name(name), tensor) for name, tensor in tensors.items()))
        if len(named) != len(tensors):
            raise ValueError("two tensors have the same name; give the tensors of one adapter")
        shapes = {name: tuple(int(n) for n in tensor.shape) for name, tensor in named.items()}
        slab = None if layout is None else _plan_slab(shapes, self.config, layout, dtype)
        self.form: Form = "tensors" if slab is None else "slab"
        if slab is not None:
            named = {name: named[name] for name in slab.order}
        self.shapes = {name: shapes[name] for name in named}
        self.on_device: Any = None
        if _all_torch(named):
            joined = _torch_bytes(named, dtype)
            self.on_device = joined if joined.is_cuda else None
            self.data: NDArray[np.uint8] = joined.cpu().numpy()
        else:
            self.data = _numpy_bytes(named, dtype)
        assert self.data.nbytes == sum(self._sizes()), "the tensors changed their shapes"
        self.header, self.zeros = (self._make_header(), 0) if slab is None else (slab.head, slab.zeros)
        self._digest: str | None = None
        self._pickle: str | None = None
        # Hashing takes as long as sending, so it runs beside it.
        self._hashing = threading.Thread(target=self._hash, name="publish digest", daemon=True)
        self._hashing.start()

    @property
    def digest(self) -> str:
        """SHA-256 of config and image, hexadecimal."""
        self._hashing.join()
        assert self._digest is not None
        return self._digest

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return len(self.header) + self.data.nbytes + self.zeros

    def image(self) -> list[bytes | memoryview]:
        """The safetensors image, in pieces."""
        return [self.header, self.data.data, bytes(self.zeros)]

    def tensor(self) -> Any:
        """The image as a torch tensor, uint8 [nbytes], on the device where the tensors are."""
        import torch

        data = torch.from_numpy(self.data) if self.on_device is None else self.on_device
        image = torch.empty(self.nbytes, dtype=torch.uint8, device=data.device)
        start, end = len(self.header), self.nbytes - self.zeros
        image[:start] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8).to(data.device)
        image[start:end] = data
        image[end:] = 0
        if image.is_cuda:
            torch.cuda.current_stream(image.device).synchronize()  # it is read by another stream
        return image

    def files(self) -> dict[str, list[bytes | memoryview]]:
        """What the directory of an adapter holds."""
        return {CONFIG_FILE: [self.config], WEIGHTS_FILE: self.image()}

    def check_finite(self) -> None:
        """For servers that do not look themselves.

        Raises:
            ValueError: a tensor has NaN or infinite values.
        """
        from sgl_kernel.lora.bf16 import all_finite

        kind = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[self._dtype]
        for name, part in self._parts():
            if not all_finite(part.view(kind)):
                raise ValueError(f"{name} has NaN or infinite values in {self._dtype}; look at the training")

    def make_pickle(self) -> str:
        """The tensors as stock servers take them in a request: base64 of torch tensors, pickled. Made once."""
        if self._pickle is None:
            import torch

            from sglang.srt.utils.serialization import MultiprocessingSerializer

            kind = getattr(torch, self._dtype)
            named = {n: torch.from_numpy(part).view(kind).reshape(self.shapes[n]) for n, part in self._parts()}
            self._pickle = str(MultiprocessingSerializer.serialize(named, output_str=True))
        return self._pickle

    def _parts(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        start = 0
        for name, size in zip(self.shapes, self._sizes(), strict=True):
            yield name, self.data[start : start + size]
            start += size

    def _sizes(self) -> list[int]:
        return [math.prod(shape) * _ITEM_BYTES[self._dtype] for shape in self.shapes.values()]

    def _make_header(self) -> bytes:
        entries, start = {}, 0
        for name, part in self._parts():
            offsets = [start, start + len(part)]
            entries[name] = {"dtype": _CODES[self._dtype], "shape": list(self.shapes[name]), "data_offsets": offsets}
            start = offsets[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def _hash(self) -> None:
        digest = hashlib.sha256(self.config)
        for piece in self.image():
            digest.update(piece)
        self._digest = digest.hexdigest()


def gather(adapter: Any, config: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the config of an adapter, whatever form it has.

    Of a sharded model every rank has to call this, because its DTensors are gathered here; one of them publishes what
    it returns.

    Args:
        adapter: a PeftModel, or a mapping of tensors by PEFT's names.
        config: LoraConfig or mapping; None for the PeftModel's own.

    Raises:
        TypeError, ValueError: it is neither; or there is no config.
    """
    if isinstance(adapter, Mapping):
        tensors = dict(adapter)
    elif hasattr(adapter, "peft_config"):
        name = getattr(adapter, "active_adapter", "default")
        config = adapter.peft_config[name] if config is None else config
        # Without a look at the hub, or base weights that every server has.
        read = importlib.import_module("peft").get_peft_model_state_dict
        tensors = dict(read(adapter, adapter_name=name, save_embedding_layers=False))
    else:
        raise TypeError(f"{type(adapter).__name__} is neither a PeftModel nor a mapping of tensors by PEFT's names")
    if config is None:
        raise ValueError(
            "tensors alone do not say how they are scaled; give the LoraConfig, or a dict like it, as config"
        )
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
    return whole, plain(config.to_dict() if hasattr(config, "to_dict") else config)


def plain(value: Any) -> Any:
    """A config as JSON takes it: enumerations by value, sets in order.

    Raises:
        TypeError: something that JSON has no form for.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"the config has {value!r}, which JSON has no form for; give plain values")


def _plain_name(name: str) -> str:
    """Without what wrappers add, and without the adapter's own name, as PEFT saves it."""
    return _ADAPTER_NAME.sub(r"\1\2", _WRAPPERS.sub("", name))


def _plan_slab(
    shapes: Mapping[str, tuple[int, ...]], config: bytes, layout: Mapping[str, Any], dtype: DType
) -> SlabPlan | None:
    """Imported here alone: it needs sgl_kernel, which publishing tensors of torch does without."""
    from sglang.rl.publisher_slab import plan_slab

    return plan_slab(tuple(shapes.items()), config, json.dumps(layout), dtype)


def _all_torch(tensors: Mapping[str, Any]) -> bool:
    return all(hasattr(tensor, "detach") and hasattr(tensor, "data_ptr") for tensor in tensors.values())


def _torch_bytes(tensors: Mapping[str, Any], dtype: DType) -> Any:
    """All tensors behind each other, rounded: a torch tensor, uint8 [nbytes], on their own device."""
    import torch

    kind = getattr(torch, dtype)
    parts = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; tensors of adapters are floating-point numbers")
        parts.append(tensor.detach().to(kind).contiguous().reshape(-1).view(torch.uint8))
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return torch.cat(parts)


def _numpy_bytes(tensors: Mapping[str, Any], dtype: DType) -> NDArray[np.uint8]:
    from sgl_kernel.lora import bf16

    convert = {"bfloat16": bf16.to_bf16_bits, "float16": bf16.to_float16, "float32": bf16.to_float32}[dtype]
    parts = []
    for name, tensor in tensors.items():
        try:
            parts.append(np.ascontiguousarray(convert(tensor)).reshape(-1).view(np.uint8))
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    return np.concatenate(parts)
