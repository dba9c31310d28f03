"""`sglang.Engine`: the server's core inside a Python process, without HTTP.

The engine runs its own event loop in a daemon thread, so its synchronous methods work anywhere, also inside a running
loop (a notebook), and its asynchronous ones from any loop.
Invariant: the TokenizerManager is used on that loop only; `EngineManager` is what other threads hold.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import inspect
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar, cast

import msgspec

from sglang.srt.config.resolve import resolve
from sglang.srt.entrypoints import server_state
from sglang.srt.entrypoints.launcher import Runtime
from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import MultiprocessingSerializer

T = TypeVar("T")

_GENERATE_FIELDS = frozenset(GenerateReqInput.__struct_fields__)
IGNORED_FIELDS = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "external_trace_header",
        "routed_dp_rank",
        "routed_experts_start_len",
    }
)
"""Arguments of stock's `generate` that mean nothing to this server; `/generate` ignores them too."""


class FlushCacheResult(msgspec.Struct, frozen=True):
    """Outcome of `Engine.flush_cache`."""

    success: bool
    message: str = ""


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-engine", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this loop's thread."""
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; an interrupt of the waiting thread cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def await_(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and await it on the caller's loop; cancelling the caller cancels it."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def call(self, function: Callable[[], T]) -> T:
        """Call a plain function on the loop's thread and wait for its result."""
        if self.is_current:
            return function()

        async def run() -> T:
            return function()

        return self.run(run())

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """Iterate an asynchronous generator of the loop; leaving early closes it."""
        try:
            while (item := self.run(_next(items))) is not _END:
                yield cast(T, item)
        finally:
            self.run(_close(items))

    async def aiterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """`iterate` for a caller with a loop of its own."""
        try:
            while (item := await self.await_(_next(items))) is not _END:
                yield cast(T, item)
        finally:
            await self.await_(_close(items))

    def stop(self) -> None:
        """Cancel what still runs; end the loop and its thread."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_END: Any = object()


async def _next(items: AsyncGenerator[Any, None]) -> Any:
    return await anext(items, _END)


async def _close(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class EngineManager:
    """The TokenizerManager as other threads and loops may use it: its coroutines run on the engine's loop.

    Attributes that are no coroutines are read through.
    """

    def __init__(self, manager: TokenizerManager, loop: LoopThread) -> None:
        self._manager = manager
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._manager, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **kwargs: self._loop.await_(value(*args, **kwargs))
        if inspect.isasyncgenfunction(value):
            return lambda *args, **kwargs: self._loop.aiterate(value(*args, **kwargs))
        return value

    def abort_request(self, rid: str | None = None, abort_all: bool = False, **options: Any) -> int:
        """End requests; returns how many matched."""
        return self._loop.call(lambda: self._manager.abort_request(rid=rid, abort_all=abort_all, **options))


class Engine:
    """A model that generates, in this process's service.

    Logging of this process is the application's business; `log_level` is that of the model's process.

    Args:
        server_args: launch flags; or give them as keywords (`model_path=…`).

    Raises:
        ConfigError: flags that are refused.
        ServiceUnavailableError: the model could not be loaded; the message says why.
    """

    def __init__(self, *, server_args: ServerArgs | None = None, **kwargs: Any) -> None:
        if server_args is None:
            server_args = _server_args(kwargs)
        elif kwargs:
            raise ConfigError(f"Engine takes server_args or keywords, not both: {', '.join(sorted(kwargs))}")
        self.server_args = server_args
        config = resolve(server_args)
        self._pid = os.getpid()
        self._closed = False
        self._loop = LoopThread()
        self._runtime = Runtime(server_args, config)
        atexit.register(self.shutdown)
        try:
            self._loop.run(self._start())
        except BaseException:
            self.shutdown()
            raise
        self.tokenizer_manager = EngineManager(self._runtime.manager, self._loop)

    async def _start(self) -> None:
        await self._runtime.start()
        await self._runtime.wait_ready()

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """Generate for one prompt or a batch.

        Args:
            prompt, input_ids: one of the two; a list is a batch.
            fields: further fields of `/generate` (return_logprob, logprob_start_len, top_logprobs_num, rid, …).

        Returns:
            What `/generate` replies: a dict, or a list for a batch or n > 1; an iterator of dicts with `stream`.

        Raises:
            RequestError: bad input (a ValueError).
            ServiceUnavailableError: the engine cannot take or finish the request.
        """
        replies = self._replies(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._loop.iterate(replies)
        return self._loop.run(_only(replies))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """`generate` for a running loop; with `stream` the awaited result is an asynchronous iterator."""
        replies = self._replies(prompt, sampling_params, input_ids, stream, fields)
        if stream:
            return self._loop.aiterate(replies)
        return await self._loop.await_(_only(replies))

    def _replies(
        self, prompt: Any, sampling_params: Any, input_ids: Any, stream: bool, fields: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        unknown = set(fields) - _GENERATE_FIELDS - IGNORED_FIELDS
        if unknown:
            raise TypeError(f"generate() got unexpected arguments: {', '.join(sorted(unknown))}")
        body = {
            "text": prompt,
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "stream": stream,
            **{name: value for name, value in fields.items() if value is not None},
        }
        return self._runtime.generate(_convert(body, GenerateReqInput))

    def load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False, **options: Any
    ) -> LoRAUpdateOutput:
        """Load an adapter from a directory, which is not read again.

        Args:
            options: further fields of `/load_lora_adapter` (upsert, mode).

        Returns:
            `success`, and `error_message` or what was loaded.
        """
        obj = _convert(
            {"lora_name": lora_name, "lora_path": lora_path, "pinned": pinned, **options}, LoadLoRAAdapterReqInput
        )
        return self._loop.run(self._runtime.manager.load_lora_adapter(obj))

    async def async_load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False, **options: Any
    ) -> LoRAUpdateOutput:
        """`load_lora_adapter` for a running loop."""
        obj = _convert(
            {"lora_name": lora_name, "lora_path": lora_path, "pinned": pinned, **options}, LoadLoRAAdapterReqInput
        )
        return await self._loop.await_(self._runtime.manager.load_lora_adapter(obj))

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: Any,
        config_dict: dict[str, Any],
        load_format: str | None = None,
        pinned: bool = False,
        **options: Any,
    ) -> LoRAUpdateOutput:
        """Load an adapter from torch tensors.

        Args:
            tensors: {name: tensor} or (name, tensor) pairs; or a payload as the endpoint takes it, in `load_format`.
            config_dict: what adapter_config.json would say.
        """
        if not isinstance(tensors, str):
            tensors, load_format = MultiprocessingSerializer.serialize(dict(tensors), output_str=True), None
        body = {"lora_name": lora_name, "serialized_tensors": tensors, "config_dict": config_dict, "pinned": pinned}
        obj = _convert({**body, "load_format": load_format, **options}, LoadLoRAAdapterFromTensorsReqInput)
        return self._loop.run(self._runtime.manager.load_lora_adapter_from_tensors(obj))

    def unload_lora_adapter(self, lora_name: str, **options: Any) -> LoRAUpdateOutput:
        """Unload an adapter.

        Args:
            options: further fields of `/unload_lora_adapter` (timeout, abort).
        """
        obj = _convert({"lora_name": lora_name, **options}, UnloadLoRAAdapterReqInput)
        return self._loop.run(self._runtime.manager.unload_lora_adapter(obj))

    async def async_unload_lora_adapter(self, lora_name: str, **options: Any) -> LoRAUpdateOutput:
        """`unload_lora_adapter` for a running loop."""
        obj = _convert({"lora_name": lora_name, **options}, UnloadLoRAAdapterReqInput)
        return await self._loop.await_(self._runtime.manager.unload_lora_adapter(obj))

    def get_server_info(self) -> dict[str, Any]:
        """Launch flags and scheduler state, as `/server_info` tells them."""
        return self._loop.run(server_state.server_info(self._runtime))

    def flush_cache(self) -> FlushCacheResult:
        """Empty the prefix cache; fails while requests use it."""
        return FlushCacheResult(*self._loop.run(self._runtime.manager.flush_cache()))

    def shutdown(self) -> None:
        """End the model's process; requests still running fail. Idempotent, and called at interpreter exit."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.shutdown)
        self._loop.run(self._runtime.shutdown())
        self._loop.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def _server_args(kwargs: dict[str, Any]) -> ServerArgs:
    """ServerArgs of keywords; the model of a library is quiet unless told otherwise."""
    try:
        return ServerArgs(**{"log_level": "error", **kwargs})
    except TypeError as error:
        raise ConfigError(f"Engine: {error}") from error


def _convert(fields: dict[str, Any], kind: type[T]) -> T:
    """Arguments as a request object."""
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(f"{kind.__name__}: {error}") from error


async def _only(items: AsyncGenerator[Any, None]) -> Any:
    async with contextlib.aclosing(items):
        return [item async for item in items][0]
