"""Turns what a client sends, a directory or tensors in a request, into an `Adapter` that fits the model.

Called by the adapter service in a worker thread. Names, shapes and ranks are checked on the headers, before memory is
taken; then every tensor is read once, straight into the buffer that the back will read. A safetensors image may hold a
slab instead of tensors (`adapter_slab`). Between calls it holds what versions of one policy share: where their tensors
go, and the buffer of the last one.
Invariants: what comes out needs no further check; the files are never read again; a call that fails leaves nothing; all
problems of one stage are in one message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoRASection
from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter import Adapter
from sglang.srt.lora.adapter_config import AdapterConfig, parse_adapter_config
from sglang.srt.lora.adapter_fit import AdapterFit
from sglang.srt.lora.adapter_image import AdapterImage, keep_slab, lay_out
from sglang.srt.lora.adapter_slab import AdapterSlab
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
from sglang.srt.lora.host_buffer import HostBuffer, HostBuffers
from sglang.srt.lora.problems import MAX_LISTED, invalid, raise_all
from sglang.srt.lora.safetensors_bytes import Layout, looks_like_safetensors
from sglang.srt.lora.target_modules import module_shapes
from sglang.srt.lora.tensor_unpickler import unpickle_tensors

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 8 << 30
"""Most bytes of tensors an adapter may have."""
MAX_THREADS = 16


@dataclass
class ReadAdapter:
    """A validated adapter and the memory it lies in.

    Attributes:
        digest: of its content, in SHA-256: equal for equal modules, whatever route and order they came by. A slab has
            another one than its tensors.
        num_tensors: tensors the client sent.
        nbytes: size of the buffer.
    """

    adapter: Adapter
    buffer: HostBuffer
    digest: str
    num_tensors: int
    buffers: HostBuffers
    closed: bool = False

    @property
    def nbytes(self) -> int:
        """See the class."""
        return self.adapter.nbytes

    @property
    def max_rank(self) -> int:
        """Largest rank of its modules."""
        return self.adapter.max_rank

    def close(self) -> None:
        """Give the memory back: the back has copied it, or will not. Safe to call twice."""
        if not self.closed:
            self.closed = True
            self.buffers.give_back(self.buffer)


class AdapterReader:
    """Reads adapters of one model.

    Args:
        model_path: what the server serves, compared with the adapter's base_model_name_or_path.
        max_bytes: most bytes of tensors; None for DEFAULT_MAX_BYTES.

    Attributes:
        slab_layout: what the back keeps adapters in, as it describes it; None until it has said so.
    """

    def __init__(self, model: ModelConfig, lora: LoRASection, model_path: str, max_bytes: int | None = None) -> None:
        self._lora = lora
        self._model_path = model_path
        self._vocab_size = model.vocab_size
        self._shapes = module_shapes(model)
        self._max_bytes = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
        self.slab_layout: Mapping[str, Any] | None = None
        self._buffers = HostBuffers()
        # Its threads never wait for a file: one that hangs must not take them from other loads.
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="examine-adapter")
        self._last: tuple[AdapterConfig, Layout, AdapterImage] | None = None

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
        payload: str | list[str] | bytes | bytearray | memoryview,
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
            expected_checksums: hex SHA-256 of each tensor's bytes by its name as sent, or, of a slab, by the name that
                PEFT gives it; exactly these must have come.
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
        image = self._image(config, source.layout)
        buffer = self._take(image.nbytes)
        try:
            image.fill(source, buffer.view)
            source.finish()
            digest, finite = image.examine(buffer.view, self._pool)
            raise_all(_content_problems(image, buffer.view, finite, checksums))
        except BaseException:
            buffer.close()
            raise
        adapter = Adapter(buffer.path, image.nbytes, image.modules, image.base_copies)
        return ReadAdapter(adapter, buffer, digest, len(image.pieces), self._buffers)

    def _image(self, config: AdapterConfig, layout: Layout) -> AdapterImage:
        """What to make of tensors of these names and shapes: mostly the same as of the last ones."""
        last = self._last
        if last is None or last[:2] != (config, layout):
            last = self._last = config, layout, self._new_image(config, layout)
        image = last[2]
        if image.nbytes > self._max_bytes:
            raise invalid(f"{image.nbytes} bytes of tensors exceed this server's limit of {self._max_bytes}")
        return image

    def _new_image(self, config: AdapterConfig, layout: Layout) -> AdapterImage:
        if layout.slab is None:
            return lay_out(AdapterFit(self._shapes, self._lora, config, layout.entries).plan(), layout.entries)
        slab = AdapterSlab(layout.slab, layout.nbytes, self.slab_layout)
        return keep_slab(AdapterFit(self._shapes, self._lora, config, slab.entries).plan(), slab)

    def _take(self, size: int) -> HostBuffer:
        try:
            return self._buffers.take(size)
        except OSError as error:
            raise AdapterError("capacity", f"there is no memory for {size} bytes of adapter: {error}") from error

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


def _content_problems(
    image: AdapterImage, view: NDArray[np.uint8], finite: bool, checksums: Mapping[str, str] | None
) -> list[str]:
    """What is wrong with the bytes. Returned, not raised: a traceback would hold on to views of the buffer."""
    problems = [] if image.frame is None else image.frame.problems(view)
    if not finite:
        problems += [f"{name} has NaN or infinite values" for name in image.not_finite(view)]
    if checksums is None:
        return problems
    problems += [
        f"{name} is not what expected_checksums says (SHA-256)"
        for name in image.pieces
        if image.checksum(name, view) != checksums.get(name)
    ]
    return problems + [
        f"{name} is in expected_checksums but was not sent" for name in checksums if name not in image.pieces
    ]
