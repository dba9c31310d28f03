"""Who holds which adapter: the part of the patch that runs inside the server.

Stock counts the users of an adapter with a bare integer that is raised in one place and lowered in two, so whatever
ends a request elsewhere leaks a count, and a request that passes both lowers it twice. Here a use of an adapter is an
object, a `Lease`, and every lease has exactly one owner:

* the *scope* of a `generate_request` call owns what the call acquired, until the call has dispatched everything (its
  first output) or ends, however it ends;
* every *dispatched request id* owns one more from just before it is sent until the scheduler has said it is over.
  A client going away does not end it: the scheduler may still be computing with the adapter's weights.

Invariants:

1. `UsageCounter.value()` is the number of live leases plus anonymous uses, and is never negative.
2. Releasing a lease twice is the same as releasing it once.
3. Nothing here waits between looking an adapter up and counting its use, so no cancellation and no unload can fall
   between the two. (All of it runs on the event loop's thread; that is the lock.)
4. `lora_update_lock` is never held while requests end.

This file uses the standard library only and imports nothing of the package around it: `apply` copies it into the
patched tree, which then no longer depends on the patcher being installed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Method = Callable[..., Any]

TIMEOUT_VARIABLE = "SGLANG_LORA_PATCH_UNLOAD_TIMEOUT"
DEFAULT_TIMEOUT = 300.0
MARK = "__lora_patch__"


# ---- uses of one adapter ----------------------------------------------------------------------------------------


class Lease:
    """One counted use of an adapter, with one owner, given back once."""

    __slots__ = ("_counter",)

    def __init__(self, counter: UsageCounter) -> None:
        self._counter: UsageCounter | None = counter
        counter.leases += 1

    @property
    def live(self) -> bool:
        """Whether the adapter is still held."""
        return self._counter is not None

    def release(self) -> None:
        """Give the adapter back; later calls do nothing."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.leases -= 1
            counter.wake()


class UsageCounter:
    """The users of one adapter. Takes the place of stock's counter and answers the same calls.

    Uses without an owner (`increment` and `decrement`, for callers outside the patch) are counted apart: such a caller
    can give back what such callers took, never what a request holds.
    """

    def __init__(self, initial: int = 0) -> None:
        self.leases = 0
        self.anonymous = initial
        self._waiters: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<UsageCounter leases={self.leases} anonymous={self.anonymous}>"

    def value(self) -> int:
        """How many uses there are now."""
        return self.leases + self.anonymous

    async def increment(self, n: int = 1, notify_all: bool = True) -> None:
        """Count `n` uses without an owner. Does not suspend."""
        del notify_all
        self.anonymous += n
        self.wake()

    async def decrement(self, n: int = 1, notify_all: bool = True) -> None:
        """Give back up to `n` uses without an owner. Does not suspend."""
        del notify_all
        if n > self.anonymous:
            logger.debug("%d releases of uses nobody holds were ignored", n - self.anonymous)
        self.anonymous = max(0, self.anonymous - n)
        self.wake()

    def adopt(self) -> Lease:
        """Make one use without an owner into a lease."""
        if not self.anonymous:
            raise RuntimeError("there is no use without an owner")
        lease = Lease(self)
        self.anonymous -= 1
        return lease

    def wake(self) -> None:
        """Let every waiter look at the count again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_for(self, condition: Callable[[int], bool]) -> None:
        """Return once the count satisfies `condition`."""
        while not condition(self.value()):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    async def wait_for_zero(self) -> None:
        """Return once nobody uses the adapter."""
        await self.wait_for(lambda count: count == 0)


class InstantLock:
    """Takes the place of the registry's lock: what it guards never suspends, so nothing can come between anyway.

    The lock it replaces suspends on entry and on exit, and a cancellation on exit leaves it held for ever.
    """

    @property
    def reader_lock(self) -> InstantLock:
        """Nothing to wait for."""
        return self

    @property
    def writer_lock(self) -> InstantLock:
        """Nothing to wait for."""
        return self

    async def __aenter__(self) -> InstantLock:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


# ---- one generate_request call ----------------------------------------------------------------------------------

_SCOPE: ContextVar[Scope | None] = ContextVar("sglang_lora_patch_scope", default=None)


class Scope:
    """One `generate_request` call: the adapters it acquired and the request records it made."""

    def __init__(self) -> None:
        self.open = True
        self.uses_adapters = False
        self.records: dict[str, Any] = {}
        self.dispatched: set[str] = set()
        self._leases: dict[str, Lease] = {}

    @staticmethod
    def current() -> Scope | None:
        """The call that is running in this context, if it is not over."""
        scope = _SCOPE.get()
        return scope if scope is not None and scope.open else None

    async def take(self, registry: Any, name: str | None) -> str | None:
        """Acquire adapter `name` for this call, once however often it is asked for. Does not suspend."""
        if name is None:
            return None
        lora_id: str = await registry.acquire(name)
        lease = registry._counters[lora_id].adopt()
        self.uses_adapters = True
        if lora_id in self._leases:
            lease.release()
        else:
            self._leases[lora_id] = lease
        return lora_id

    def leave(self) -> None:
        """Give the call's own leases back; those of what it dispatched stay."""
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            lease.release()

    def close(self, manager: Any) -> None:
        """End the call: forget what was not sent, have the scheduler end what was, keep that until it answers."""
        self.open = False
        try:
            for rid, state in self.records.items():
                manager.rid_to_state.restore(rid, state)
                if manager.rid_to_state.get(rid) is state:
                    self._abandon(manager, rid)
        finally:
            self.records = {}
            self.leave()

    def _abandon(self, manager: Any, rid: str) -> None:
        if rid not in self.dispatched:
            del manager.rid_to_state[rid]
        elif self.uses_adapters:
            try:
                manager.abort_request(rid)
            except Exception:
                logger.exception("request %s could not be aborted", rid)


class StateTable(dict[str, Any]):
    """Takes the place of the dictionary from request id to request record.

    Besides that it knows which call made a record, and which lease a dispatched request id owns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[str, list[Lease]] = {}
        self._awaited: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._awaiting: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __setitem__(self, rid: str, state: Any) -> None:
        super().__setitem__(rid, state)
        scope = Scope.current()
        if scope is not None:
            scope.records[rid] = state

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add records one by one."""
        for rid, state in dict(*args, **kwargs).items():
            self[rid] = state

    def __missing__(self, rid: str) -> Any:
        """The record of a request that ended before its waiter began to wait: the answer is in there."""
        try:
            return self._awaited[rid]
        except KeyError:
            raise KeyError(rid) from None

    def keep_for(self, waiter: Any, rid: str) -> None:
        """Keep the record of `rid` within reach for as long as `waiter` exists."""
        state = self.get(rid)
        if state is not None:
            self._awaiting[waiter] = state
            self._awaited[rid] = state

    def restore(self, rid: str, state: Any) -> None:
        """Put back the record of a request the scheduler still has: some releases drop it when a call fails.

        Without it the request could not be aborted, and would run on for nobody.
        """
        if rid in self._owners and rid not in self and not getattr(state, "finished", True):
            super().__setitem__(rid, state)

    def own(self, rid: str, lease: Lease) -> None:
        """Make the dispatched request `rid` the owner of `lease`."""
        self._owners.setdefault(rid, []).append(lease)

    def disown(self, rid: str, lease: Lease) -> None:
        """Undo `own`, for a request that was not dispatched after all."""
        leases = self._owners.get(rid, [])
        if lease in leases:
            leases.remove(lease)
            lease.release()
        if not leases:
            self._owners.pop(rid, None)

    def finish(self, rid: str) -> None:
        """The scheduler is done with `rid`: its lease ends. A reused id ends in the order of its dispatches."""
        leases = self._owners.get(rid)
        if leases:
            leases.pop(0).release()
            if not leases:
                del self._owners[rid]


def _mark(wrapper: Method) -> Method:
    setattr(wrapper, MARK, True)
    return wrapper


def owns_request(generate_request: Method) -> Method:
    """Decorate `TokenizerManager.generate_request`: every call is a scope that ends when the call does."""

    @functools.wraps(generate_request)
    async def wrapper(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        scope = Scope()
        outputs = generate_request(self, *args, **kwargs)
        try:
            while True:
                # Set and reset around every step: between two steps other requests run in this context.
                token = _SCOPE.set(scope)
                try:
                    output = await outputs.__anext__()
                except StopAsyncIteration:
                    break
                finally:
                    _SCOPE.reset(token)
                scope.leave()
                yield output
        finally:
            try:
                await outputs.aclose()
            finally:
                scope.close(self)

    return _mark(wrapper)


async def acquire(registry: Any, names: Any) -> Any:
    """What stands where stock acquired: the use belongs to the running call. Does not suspend."""
    scope = Scope.current()
    if scope is None:
        return await registry.acquire(names)
    if isinstance(names, str):
        return await scope.take(registry, names)
    return [await scope.take(registry, name) for name in names]


def _lease_for(manager: Any, tokenized: Any) -> Lease | None:
    """A new lease on the adapter of `tokenized`, which its scope holds at this moment."""
    lora_id = getattr(tokenized, "lora_id", None)
    counter = None if lora_id is None else manager.lora_registry._counters.get(lora_id)
    return None if counter is None else Lease(counter)


class _Dispatch:
    """The requests of one send: theirs before it, undone when it fails, noted by the call when it succeeds."""

    def __init__(self, manager: Any, requests: Iterable[Any]) -> None:
        self._table: StateTable = manager.rid_to_state
        self._rids = [request.rid for request in requests]
        self._owned: list[tuple[str, Lease]] = []
        for request in requests:
            lease = _lease_for(manager, request)
            if lease is not None:
                self._owned.append((request.rid, lease))

    def __enter__(self) -> None:
        for rid, lease in self._owned:
            self._table.own(rid, lease)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            for rid, lease in self._owned:
                self._table.disown(rid, lease)
            return
        scope = Scope.current()
        if scope is not None:
            scope.dispatched.update(self._rids)


def dispatches(send: Method) -> Method:
    """Decorate `_send_one_request` and `_send_batch_request`: what is sent owns its adapter from here on."""
    signature = inspect.signature(send)

    def dispatch(manager: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Dispatch:
        bound = signature.bind(manager, *args, **kwargs).arguments
        requests = bound["tokenized_objs"] if "tokenized_objs" in bound else [bound["tokenized_obj"]]
        return _Dispatch(manager, requests)

    if inspect.iscoroutinefunction(send):

        @functools.wraps(send)
        async def wrapper_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            with dispatch(self, args, kwargs):
                return await send(self, *args, **kwargs)

        return _mark(wrapper_async)

    @functools.wraps(send)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with dispatch(self, args, kwargs):
            return send(self, *args, **kwargs)

    return _mark(wrapper)


def keeps_record(wait_one: Method) -> Method:
    """Decorate `_wait_one_response`: a record that goes before the waiter's first step is still found by it."""
    if not inspect.isasyncgenfunction(wait_one):
        return _mark(wait_one)

    @functools.wraps(wait_one)
    def wrapper(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        waiter = wait_one(self, obj, *args, **kwargs)
        self.rid_to_state.keep_for(waiter, obj.rid)
        return waiter

    return _mark(wrapper)


def ends_batch(handle_batch_output: Method) -> Method:
    """Decorate `_handle_batch_output`: whatever the scheduler reports as finished gives its adapter back."""

    def finish(manager: Any, recv_obj: Any) -> None:
        for rid, reason in zip(recv_obj.rids, recv_obj.finished_reasons, strict=False):
            if reason is not None:
                manager.rid_to_state.finish(rid)

    if inspect.iscoroutinefunction(handle_batch_output):

        @functools.wraps(handle_batch_output)
        async def wrapper_async(self: Any, recv_obj: Any) -> Any:
            try:
                return await handle_batch_output(self, recv_obj)
            finally:
                finish(self, recv_obj)

        return _mark(wrapper_async)

    @functools.wraps(handle_batch_output)
    def wrapper(self: Any, recv_obj: Any) -> Any:
        try:
            return handle_batch_output(self, recv_obj)
        finally:
            finish(self, recv_obj)

    return _mark(wrapper)


def ends_aborted(handle_abort_req: Method) -> Method:
    """Decorate `_handle_abort_req`: a request the scheduler gave up is over, known to us or not."""

    @functools.wraps(handle_abort_req)
    def wrapper(self: Any, recv_obj: Any) -> Any:
        table: StateTable = self.rid_to_state
        state = table.get(recv_obj.rid)
        try:
            return None if state is None else handle_abort_req(self, recv_obj)
        finally:
            table.finish(recv_obj.rid)
            if state is not None and state.finished and table.get(recv_obj.rid) is state:
                del table[recv_obj.rid]

    return _mark(wrapper)


# ---- the registry -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Retired:
    """An adapter that takes no new requests and whose weights the back end still has."""

    ref: Any
    counter: UsageCounter
    # An evicted adapter comes back when a request names it; one that a client unloaded does not.
    evicted: bool = False
    unloading: bool = False
    task: asyncio.Task[Any] | None = None


def retired_of(registry: Any) -> dict[str, Retired]:
    """The retired adapters of `registry` by name."""
    table: dict[str, Retired] = registry.__dict__.setdefault("_lora_patch_retired", {})
    return table


def retire(registry: Any, name: str | None, *, evicted: bool) -> Retired | None:
    """Take `name` out of the registry without waiting for its users; None when it is not there."""
    table = retired_of(registry)
    if name is None or name in table:
        entry = None if name is None else table[name]
        if entry is not None and not evicted:
            entry.evicted = False
        return entry
    ref = registry._registry.pop(name, None)
    if ref is None:
        return None
    table[name] = Retired(ref, registry._counters.get(ref.lora_id) or UsageCounter(), evicted)
    return table[name]


def _revive(registry: Any, names: Iterable[str | None]) -> None:
    table = retired_of(registry)
    for name in names:
        entry = None if name is None else table.get(name)
        if entry is not None and entry.evicted and not entry.unloading and name not in registry._registry:
            registry._registry[name] = entry.ref
            del table[entry.ref.lora_name]


def counts_uses(acquire_stock: Method) -> Method:
    """Decorate `LoRARegistry.acquire`: a list is acquired as a whole or not at all."""

    @functools.wraps(acquire_stock)
    async def wrapper(self: Any, lora_name: Any) -> Any:
        if not isinstance(lora_name, list):
            return await acquire_stock(self, lora_name)
        ids: list[str | None] = []
        try:
            for name in lora_name:
                ids.append(None if name is None else await acquire_stock(self, name))
        except BaseException:
            await self.release([lora_id for lora_id in ids if lora_id is not None])
            raise
        return ids

    return _mark(wrapper)


def gives_back(release_stock: Method) -> Method:
    """Decorate `LoRARegistry.release`: ids that nobody holds, or that are gone, are no error."""

    @functools.wraps(release_stock)
    async def wrapper(self: Any, lora_id: Any) -> Any:
        if not isinstance(lora_id, (str, list)):
            return await release_stock(self, lora_id)
        for one in [lora_id] if isinstance(lora_id, str) else lora_id:
            counter = self._counters.get(one)
            if counter is not None:
                await counter.decrement()
        return None

    return _mark(wrapper)


def retires(unregister_stock: Method) -> Method:
    """Decorate `LoRARegistry.unregister`: what is retired already needs no second look-up."""

    @functools.wraps(unregister_stock)
    async def wrapper(self: Any, lora_name: Any) -> Any:
        entry = retire(self, lora_name, evicted=False)
        if entry is None:
            return await unregister_stock(self, lora_name)
        entry.unloading = True
        return entry.ref.lora_id

    return _mark(wrapper)


def waits_for_users(wait_stock: Method) -> Method:
    """Decorate `LoRARegistry.wait_for_unload`: may be called again for an adapter whose counter is gone."""

    @functools.wraps(wait_stock)
    async def wrapper(self: Any, lora_id: Any) -> None:
        counter = self._counters.get(lora_id)
        if counter is not None:
            await counter.wait_for_zero()
            self._counters.pop(lora_id, None)

    return _mark(wrapper)


def revives(get_unregistered: Method) -> Method:
    """Decorate `LoRARegistry.get_unregistered_loras`: an evicted adapter that is still in use is taken back."""

    @functools.wraps(get_unregistered)
    async def wrapper(self: Any, lora_name: Any) -> Any:
        _revive(self, lora_name)
        return await get_unregistered(self, lora_name)

    return _mark(wrapper)


# ---- load and unload --------------------------------------------------------------------------------------------

_TASKS: set[asyncio.Task[Any]] = set()


def _forget(task: asyncio.Task[Any]) -> None:
    _TASKS.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.debug("a background step of loading or unloading failed", exc_info=task.exception())


def _start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.get_running_loop().create_task(work)
    _TASKS.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(_forget)
    return task


async def _uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end even when the caller is cancelled: the back end's answer has to be taken in."""
    return await asyncio.shield(_start(work))


def unload_timeout() -> float | None:
    """How long to wait for the users of an adapter, in seconds; None (variable set to 0) is for ever."""
    seconds = float(os.environ.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT)
    return seconds if seconds > 0 else None


def _failure(message: str) -> Any:
    structs = importlib.import_module("sglang.srt.managers.io_struct")
    return structs.LoRAUpdateOutput(success=False, error_message=message)


def _success() -> Any:
    structs = importlib.import_module("sglang.srt.managers.io_struct")
    return structs.LoRAUpdateOutput(success=True, loaded_adapters={})


async def _finish_unload(manager: Any, name: str, entry: Retired, unload_locked: Method) -> Any:
    """Once nobody uses `entry` any more, have the back end drop it, unless a request took it back meanwhile."""
    structs = importlib.import_module("sglang.srt.managers.io_struct")
    await entry.counter.wait_for_zero()
    async with manager.lora_update_lock:
        if retired_of(manager.lora_registry).get(name) is not entry:
            return _success()
        return await unload_locked(manager, structs.UnloadLoRAAdapterReqInput(lora_name=name))


def _finish_later(manager: Any, name: str, entry: Retired) -> asyncio.Task[Any]:
    if entry.task is None or entry.task.done():
        locked = type(manager)._unload_lora_adapter_locked
        entry.task = _start(_finish_unload(manager, name, entry, locked))
    return entry.task


async def _within_timeout(wait: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> bool:
    try:
        await asyncio.wait_for(wait, unload_timeout())
    except asyncio.TimeoutError:
        return False
    return True


def _still_used(name: str) -> Any:
    return _failure(
        f"LoRA adapter {name!r} is still in use after {unload_timeout():g} s. "
        f"It takes no new requests and is unloaded when the last request with it ends."
    )


def evicts(unload_locked: Method) -> Method:
    """Decorate `_unload_lora_adapter_locked`: with the lock held, an adapter in use is set aside, not waited for."""

    @functools.wraps(unload_locked)
    async def wrapper(self: Any, obj: Any) -> Any:
        registry, name = self.lora_registry, obj.lora_name
        ref = registry._registry.get(name)
        if ref is not None and registry._counters[ref.lora_id].value():
            entry = retire(registry, name, evicted=True)
            if entry is not None:
                _finish_later(self, name, entry)
            return _success()
        result = await unload_locked(self, obj)
        if result.success:
            retired_of(registry).pop(name, None)
        return result

    return _mark(wrapper)


def unloads(unload: Method) -> Method:
    """Decorate `unload_lora_adapter`: wait for the users with a time limit and before taking the lock."""

    @functools.wraps(unload)
    async def wrapper(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, registry = obj.lora_name, self.lora_registry
        entry = retire(registry, name, evicted=False)
        if entry is None:
            return await _uninterrupted(unload(self, obj, *args, **kwargs))
        if entry.task is not None and not entry.task.done():
            if await _within_timeout(asyncio.shield(entry.task)):
                return entry.task.result()
            return _still_used(name)
        drained = False
        try:
            drained = await _within_timeout(entry.counter.wait_for_zero())
        finally:
            if not drained:
                _finish_later(self, name, entry)
        if not drained:
            return _still_used(name)
        return await _uninterrupted(unload(self, obj, *args, **kwargs))

    return _mark(wrapper)


def _hide_retired(registry: Any, result: Any) -> None:
    listed = getattr(result, "loaded_adapters", None) or {}
    for name in list(retired_of(registry)):
        if name not in registry._registry:
            listed.pop(name, None)


def loads(load: Method) -> Method:
    """Decorate the loads: the same name's previous owner leaves first, within the time limit and without the lock."""

    @functools.wraps(load)
    async def wrapper(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, registry = obj.lora_name, self.lora_registry
        entry = retired_of(registry).get(name)
        if entry is not None:
            leaving = entry.task is not None and not entry.task.done()
            wait = asyncio.shield(entry.task) if leaving and entry.task else entry.counter.wait_for_zero()
            if not await _within_timeout(wait):
                return _still_used(name)
        result = await _uninterrupted(load(self, obj, *args, **kwargs))
        if result.success:
            retired_of(registry).pop(name, None)
            _hide_retired(registry, result)
        return result

    return _mark(wrapper)


def patched_methods(cls: type) -> Iterator[str]:
    """The methods of `cls` that this module decorates."""
    for name in dir(cls):
        if getattr(getattr(cls, name, None), MARK, False):
            yield name
