"""Loads, publishes, replaces, evicts and unloads adapters: everything about them that takes time.

Owned by TokenizerManager; endpoints and the launcher call `load` and `unload`. The registry decides what a name means,
the reader makes bytes into an `Adapter` in a worker thread, the back stages it; only then is the name published.
Invariants: loads of one name run one after the other, loads of different names beside each other, and none of them
waits for a request; a load that has begun ends on its own, whoever asked for it may leave; a failed load leaves nothing
in either process; a retired version is freed by the end of its last lease and by nothing else.

A load may also be taken apart, so that several servers change over together: `stage` brings a version into memory that
no name means, `commit` publishes it, `drop` or the end of its time retires it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sglang.srt import environ
from sglang.srt.config.sections import LoRASection
from sglang.srt.errors import AdapterError, ServiceUnavailableError
from sglang.srt.lora.adapter import Adapter
from sglang.srt.lora.lease import AdapterInfo, AdapterVersion, LoRARef, VersionState
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.adapter_staging import StagedVersions
from sglang.srt.managers.control_client import ControlClient
from sglang.srt.managers.io_struct.wire import CallReply

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """For metrics.

    Fields:
        versions: how many are in each state; evictions, double_releases, free_failures: since start, the last two
            bug traps; oldest_lease: age in seconds, 0 without leases.
    """

    leases: int = 0
    oldest_lease: float = 0.0
    versions: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    double_releases: int = 0
    free_failures: int = 0


Mode = Literal["finish_old", "switch"]

MAX_LISTED = 10
"""Holders that a message names."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9._@/+-]{1,256}")
_FAMILY = re.compile(r"(.*\D)\d+")


class ReadAdapter(Protocol):
    """A validated adapter in host memory, which `close` gives back."""

    adapter: Adapter
    digest: str
    num_tensors: int

    @property
    def nbytes(self) -> int:
        """Host memory."""

    @property
    def max_rank(self) -> int:
        """Largest rank of its modules."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One load.

    Fields:
        source: path, or how the tensors came; part of what makes two loads the same.
        read: makes the bytes an adapter; runs in a worker thread.
        identity: what else makes two loads the same, when the source does not tell (tensors in a request).
        upsert: publish over a name that is taken; `mode` says whether running requests stay on the old version.
    """

    name: str
    source: str
    read: Callable[[], ReadAdapter]
    identity: object = None
    pinned: bool = False
    upsert: bool = False
    mode: Mode = "finish_old"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for loads that ask for the same."""
        return self.source, self.identity, self.pinned, self.upsert, self.mode


class AdapterService:
    """See the module.

    Args:
        abort_holders: aborts every request that holds a version; holders: their rids.
        on_switch: told when the requests of a version (first) have moved to another (second).
        on_publish: told how many seconds a load took.
    """

    def __init__(
        self,
        lora: LoRASection,
        control: ControlClient,
        abort_holders: Callable[[AdapterVersion], object],
        holders: Callable[[AdapterVersion], list[str]],
        on_switch: Callable[[AdapterVersion, AdapterVersion], None],
        on_publish: Callable[[float], None] | None = None,
    ) -> None:
        self.registry = LoRARegistry(on_free=self._free)
        self.evictions = 0
        self.free_failures = 0
        self._lora = lora
        self._control = control
        self._abort_holders = abort_holders
        self._holders = holders
        self._on_switch = on_switch
        self._on_publish = on_publish
        self._staged = StagedVersions(self.registry.retire)
        self._loading: dict[str, tuple[tuple[object, ...], asyncio.Task[AdapterVersion]]] = {}

    def require_enabled(self) -> None:
        """Refuse when the server was started without adapters.

        Raises:
            AdapterError: not_enabled.
        """
        if not self._lora.enabled:
            raise AdapterError("not_enabled", "LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")

    def stats(self) -> AdapterStats:
        """State now."""
        registry = self.registry
        oldest = registry.oldest_lease
        counts = {state.name.lower(): 0 for state in VersionState if state is not VersionState.GONE}
        for version in registry.versions.values():
            counts[version.state.name.lower()] += 1
        return AdapterStats(
            leases=registry.num_leases,
            oldest_lease=0.0 if oldest is None else time.monotonic() - oldest,
            versions=counts,
            evictions=self.evictions,
            double_releases=registry.double_releases,
            free_failures=self.free_failures,
        )

    async def load(self, request: LoadRequest) -> AdapterVersion:
        """Read, stage and publish an adapter. A load that asks for what one in progress asks for joins it, except with
        upsert: what lies at its path may be newer than what the other one has read.

        Raises:
            AdapterError: the name is taken (and upsert was not asked for), the adapter is invalid, or no room.
            ServiceUnavailableError: the back is dead.
        """
        self.require_enabled()
        _check_name(request.name)
        before = self._loading.get(request.name)
        if before is not None and not before[1].done() and before[0] == request.key and not request.upsert:
            return await asyncio.shield(before[1])
        return await self._in_turn(request.name, lambda: self._load(request), request.key)

    async def stage(self, request: LoadRequest, seconds: float) -> AdapterVersion:
        """Read and stage an adapter under a name that goes on to mean what it means. A name has one staged version: the
        next one takes its place.

        Args:
            request: one with upsert.
            seconds: how long it waits for its commit before it is dropped.

        Returns:
            The version; the one that is staged, or served, under this name already if its content is the same.

        Raises:
            As `load`.
        """
        self.require_enabled()
        _check_name(request.name)
        return await self._in_turn(request.name, lambda: self._stage(request, seconds))

    async def commit(
        self, name: str, version_id: int, digest: str | None = None, mode: Mode = "finish_old"
    ) -> AdapterVersion:
        """Publish a staged version; one that is published already is left as it is.

        Args:
            digest: refuse a version of other content.

        Raises:
            AdapterError: adapter_not_found (never staged, dropped, or replaced since), or no room.
        """
        self.require_enabled()
        return await self._in_turn(name, lambda: self._commit(name, version_id, digest, mode))

    def drop(self, name: str, version_id: int) -> bool:
        """Forget a staged version; False when there is none of that number, for whatever reason."""
        self.require_enabled()
        return self._staged.drop(name, version_id)

    async def unload(self, name: str, timeout: float | None = None, *, abort: bool = False) -> list[AdapterVersion]:
        """Take no new requests for a name, and wait until every version loaded under it is out of memory.

        Args:
            timeout: seconds to wait; the versions are retired all the same, and go when their holders end.
            abort: end the requests that hold them.

        Returns:
            The versions that were freed.

        Raises:
            AdapterError: no such adapter; or (busy) `timeout` was not enough: the message says who holds on.
        """
        self.require_enabled()
        versions = [v for v in self.registry.named(name) if v.state is not VersionState.STAGING]
        if not versions:
            loaded = sorted(self.registry.get_all_adapters())
            raise AdapterError("adapter_not_found", f"LoRA with name {name} does not exist. Loaded LoRAs: {loaded}")
        for version in versions:
            self.registry.retire(version)
            if abort:
                self._abort_holders(version)
        if not await self.registry.wait_gone(versions, timeout):
            rids = [rid for version in versions for rid in self._holders(version)]
            shown = ", ".join(rids[:MAX_LISTED]) + ", …" * (len(rids) > MAX_LISTED)
            raise AdapterError(
                "busy",
                f"LoRA adapter {name} takes no new requests, but {len(rids)} running ones ({shown}) still hold it "
                f"after {timeout:g} s; it is freed when they end. Ask again, or with abort=true.",
            )
        return versions

    async def _in_turn(
        self, name: str, work: Callable[[], Awaitable[AdapterVersion]], key: tuple[object, ...] = ()
    ) -> AdapterVersion:
        """Do it when what has begun for this name has ended, and to its end, whoever waits for it."""
        before = self._loading.get(name)

        async def run() -> AdapterVersion:
            if before is not None:
                await asyncio.wait([before[1]])
            return await work()

        task = asyncio.create_task(run())
        self._loading[name] = key, task
        task.add_done_callback(lambda _: self._ended(name, task))
        return await asyncio.shield(task)

    async def _load(self, request: LoadRequest) -> AdapterVersion:
        started = time.perf_counter()
        version = await self._bring(request)
        try:
            self._check_room(request.name, request.pinned, request.upsert)  # others have been published meanwhile
        except AdapterError:
            self.registry.retire(version)
            raise
        await self._publish(version, request.mode, started)
        return version

    async def _stage(self, request: LoadRequest, seconds: float) -> AdapterVersion:
        started = time.perf_counter()
        version = await self._bring(request, reuse=True)
        if version.state is VersionState.STAGING:
            self._staged.add(version, seconds, started)
        return version

    async def _commit(self, name: str, version_id: int, digest: str | None, mode: Mode) -> AdapterVersion:
        version = self.registry.versions.get(version_id)
        known = version is not None and version.name == name and digest in (None, version.info.digest)
        if version is not None and known and version.state is VersionState.SERVING:
            return version
        if version is None or not known or version not in self._staged:
            raise AdapterError(
                "adapter_not_found",
                f"LoRA adapter {name} has no staged version {version_id}{f' of digest {digest}' if digest else ''}: it "
                "was never staged here, its time was over, or another one has taken its place. Stage it again.",
            )
        self._check_room(name, version.pinned, upsert=True)
        await self._publish(version, mode, self._staged.take(version))
        return version

    async def _bring(self, request: LoadRequest, *, reuse: bool = False) -> AdapterVersion:
        """Read an adapter and stage it in the back; with `reuse`, not when the same is there already."""
        self._check_room(request.name, request.pinned, request.upsert)
        read = await _read(request)
        info = AdapterInfo(read.digest, read.nbytes, read.num_tensors, read.max_rank, request.source)
        ref = LoRARef(lora_name=request.name, lora_path=request.source, pinned=request.pinned)
        if reuse and (same := self._same(ref, info)) is not None:
            read.close()
            return same
        version = self.registry.new_version(ref, info)
        try:
            reply = await self._control.stage_adapter(version.version_id, read.adapter)
            if not reply.success:
                raise AdapterError("invalid_adapter", f"Failed to load LoRA adapter {request.name}: {reply.message}")
        except BaseException:
            self.registry.freed(version)
            raise
        finally:
            read.close()
        return version

    def _same(self, ref: LoRARef, info: AdapterInfo) -> AdapterVersion | None:
        """What the name means, or has staged, if it is no different."""
        for version in (self._staged.of(ref.lora_name or ""), self.registry.get(ref.lora_name or "")):
            if version is not None and version.info.digest == info.digest and version.pinned == bool(ref.pinned):
                return version
        return None

    def _check_room(self, name: str, pinned: bool, upsert: bool) -> None:
        current = self.registry.get(name)
        if current is not None and not upsert:
            raise AdapterError(
                "already_loaded",
                f"Failed to load LoRA adapter {name} because it is already loaded. Unload it first, or load "
                "with upsert=true to publish a new version.",
            )
        others = [v for v in self.registry.serving() if v is not current]
        num_pinned = sum(v.pinned for v in others)
        if pinned and num_pinned >= self._lora.max_loras_per_batch - 1:
            raise AdapterError(
                "capacity",
                f"Failed to load LoRA adapter {name} as a pinned adapter: {num_pinned} are pinned already, and "
                f"--max-loras-per-batch {self._lora.max_loras_per_batch} must leave one slot for the others.",
            )
        limit = self._lora.max_loaded_loras
        if limit is not None and len(others) >= limit and num_pinned >= limit:
            raise AdapterError(
                "capacity",
                f"Failed to load LoRA adapter {name}: all {num_pinned} of --max-loaded-loras {limit} are pinned.",
            )

    async def _publish(self, version: AdapterVersion, mode: Mode, started: float) -> None:
        previous = self.registry.publish(version)
        if previous is not None:
            try:
                if mode == "switch" and previous.leases:
                    await self._switch(previous, version)
            finally:
                self.registry.retire(previous)
        self._enforce_limits(version)
        if self._on_publish is not None:
            self._on_publish(time.perf_counter() - started)

    async def _switch(self, old: AdapterVersion, new: AdapterVersion) -> None:
        # Held meanwhile: an unload in between must not free what the back moves requests to.
        with self.registry.hold(new):
            reply = await self._control.switch_version(
                old.version_id, new.version_id, lambda: self._on_switch(old, new)
            )
        if not reply.success:
            logger.error("running requests of %s stay on version %d: %s", old.name, old.version_id, reply.message)

    def _enforce_limits(self, newest: AdapterVersion) -> None:
        """Retire what --lora-keep-last and --max-loaded-loras leave no place for; never what has just come."""
        keep, limit = self._lora.keep_last, self._lora.max_loaded_loras
        family = _family(newest.name)
        if keep is not None and family is not None:
            members = [v for v in self.registry.serving() if _family(v.name) == family and not v.pinned]
            for version in members[:-keep]:
                self._evict(version)
        while limit is not None and self.registry.num_registered_loras > limit:
            candidates = [v for v in self.registry.serving() if not v.pinned and v is not newest]
            if not candidates:
                return
            # Clients may be about to name the one published last, though nobody holds it yet.
            self._evict(min(candidates[:-1] or candidates, key=self._eviction_order))

    def _eviction_order(self, version: AdapterVersion) -> tuple[bool, int]:
        """Idle ones first: nobody is surprised, and memory comes back at once."""
        age = version.published if self._lora.eviction_policy == "fifo" else version.last_used
        return bool(version.leases), age

    def _evict(self, version: AdapterVersion) -> None:
        self.evictions += 1
        self.registry.retire(version)

    def _free(self, version: AdapterVersion) -> None:
        """Nobody can use the version any more: tell the back."""
        try:
            reply = self._control.free_adapter(version.version_id)
        except ServiceUnavailableError:  # its memory went with the back
            self.registry.freed(version)
            return
        except Exception:  # whoever ended the last lease has no part in this
            self.free_failures += 1
            logger.exception("version %d could not be freed", version.version_id)
            self.registry.freed(version)
            return
        reply.add_done_callback(lambda future: self._freed(version, future))

    def _freed(self, version: AdapterVersion, future: asyncio.Future[CallReply]) -> None:
        if not future.cancelled() and future.exception() is None and not future.result().success:
            self.free_failures += 1
            logger.error("version %d could not be freed: %s", version.version_id, future.result().message)
        self.registry.freed(version)

    def _ended(self, name: str, task: asyncio.Task[AdapterVersion]) -> None:
        if name in self._loading and self._loading[name][1] is task:
            del self._loading[name]
        if not task.cancelled() and task.exception() is not None:
            logger.warning("adapter %s was not loaded: %s", name, task.exception())


async def _read(request: LoadRequest) -> ReadAdapter:
    """Read in a worker thread, for a limited time: a thread cannot be stopped, but nobody waits for it for ever."""
    seconds = environ.SGLANG_LORA_READ_TIMEOUT.get()
    work = asyncio.ensure_future(asyncio.to_thread(request.read))
    try:
        await asyncio.wait([work], timeout=seconds)
    finally:
        if not work.done():
            work.add_done_callback(_discard)
    if not work.done():
        raise AdapterError("path_unreadable", f"{request.source} could not be read within {seconds:g} s.")
    return work.result()


def _discard(work: asyncio.Future[ReadAdapter]) -> None:
    """What has been read came too late."""
    if not work.cancelled() and work.exception() is None:
        work.result().close()


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise AdapterError(
            "invalid_adapter", f"lora_name {name!r} must be 1 to 256 letters, digits or ._@/+- characters."
        )


def _family(name: str) -> str | None:
    """What names of successive policies have in common (``policy-v`` of ``policy-v7``); None for other names."""
    match = _FAMILY.fullmatch(name)
    return match[1] if match else None
