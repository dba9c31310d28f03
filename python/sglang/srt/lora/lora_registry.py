"""Which adapter names exist, which version each one means, and when a version's memory may go back.

Owned by TokenizerManager, on the event-loop thread; `adapter_service` publishes and retires, request records hold
leases. The synchronous methods are the protocol; the coroutines at the end are upstream's public names over it.
Invariants: a name means at most one SERVING version; looking a name up and counting the holder are one step; a version
is handed to `on_free` once, when it is retired and its last lease has ended; a `version_id` is never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from sglang.srt.errors import AdapterError
from sglang.srt.lora.lease import (
    TENSOR_SOURCE,
    AdapterInfo,
    AdapterVersion,
    Lease,
    LeaseOwner,
    LoRARef,
    VersionState,
)

__all__ = ["LoRARef", "LoRARegistry"]

_UNKNOWN_INFO = AdapterInfo(digest="", nbytes=0, num_tensors=0, rank=0, source="")


class LoRARegistry(LeaseOwner):
    """Names, versions, leases.

    Args:
        lora_paths: adapters to register at once (upstream's argument).
        on_free: told of every version that nobody can use any more; calls `freed` when its memory is back.
    """

    def __init__(
        self, lora_paths: list[LoRARef] | None = None, on_free: Callable[[AdapterVersion], None] | None = None
    ) -> None:
        self.double_releases = 0
        self.versions: dict[int, AdapterVersion] = {}
        self._names: dict[str, AdapterVersion] = {}
        self._by_id: dict[str, AdapterVersion] = {}
        self._own: dict[str, list[Lease]] = {}
        self._version_ids = itertools.count(1)
        self._holders = itertools.count(-1, -1)
        self._clock = itertools.count(1)
        self._gone: dict[int, list[asyncio.Future[None]]] = {}
        self._on_free = on_free or self.freed
        for ref in lora_paths or []:
            self.publish(self.new_version(ref, _UNKNOWN_INFO))

    # ---- versions --------------------------------------------------------------------------------------------------

    def new_version(self, ref: LoRARef, info: AdapterInfo) -> AdapterVersion:
        """A version that no name means yet."""
        version = AdapterVersion(next(self._version_ids), ref, info)
        self.versions[version.version_id] = version
        self._by_id[ref.lora_id] = version
        return version

    def publish(self, version: AdapterVersion) -> AdapterVersion | None:
        """Make its name mean this version.

        Returns:
            The version that the name meant before, which takes no new requests any more; the caller retires it.
        """
        assert version.state is VersionState.STAGING
        previous = self._names.pop(version.name, None)
        version.state = VersionState.SERVING
        version.published = version.last_used = next(self._clock)
        self._names[version.name] = version
        return previous

    def retire(self, version: AdapterVersion) -> None:
        """Take no new requests; when the last holder ends (perhaps now), the memory goes back. Idempotent."""
        if version.state >= VersionState.RETIRING:
            return
        if self._names.get(version.name) is version:
            del self._names[version.name]
        version.state = VersionState.RETIRING
        self.lease_ended(version)

    def lease_ended(self, version: AdapterVersion) -> None:
        """Free a retired version that nobody holds."""
        if version.state is VersionState.RETIRING and not version.leases:
            version.state = VersionState.FREEING
            self._on_free(version)

    def freed(self, version: AdapterVersion) -> None:
        """Its memory is back (or it was never staged): forget it."""
        version.state = VersionState.GONE
        self.versions.pop(version.version_id, None)
        self._by_id.pop(version.ref.lora_id, None)
        for future in self._gone.pop(version.version_id, []):
            if not future.done():
                future.set_result(None)

    async def wait_gone(self, versions: Iterable[AdapterVersion], timeout: float | None = None) -> bool:
        """Wait until these retired versions are out of memory; False when `timeout` seconds were not enough."""
        waiting = [v for v in versions if v.state is not VersionState.GONE]
        if not waiting:
            return True
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in waiting]
        for version, future in zip(waiting, futures, strict=True):
            self._gone.setdefault(version.version_id, []).append(future)
        try:
            _, pending = await asyncio.wait(futures, timeout=timeout)
        finally:
            for version, future in zip(waiting, futures, strict=True):
                if not future.done():
                    self._gone[version.version_id].remove(future)
        return not pending

    # ---- names -----------------------------------------------------------------------------------------------------

    def get(self, name: str) -> AdapterVersion | None:
        """What a name means now."""
        return self._names.get(name)

    def named(self, name: str) -> list[AdapterVersion]:
        """Every version in memory that was loaded under a name, oldest first."""
        return [version for version in self.versions.values() if version.name == name]

    def serving(self) -> list[AdapterVersion]:
        """Versions that a name means, in order of publication."""
        return sorted(self._names.values(), key=lambda v: v.published)

    def name_of(self, wanted: str) -> str:
        """The name of what a request asks for: for the exact path of loaded adapters, that of the newest of them."""
        if wanted in self._names or wanted == TENSOR_SOURCE:
            return wanted
        return next((v.name for v in reversed(self.serving()) if v.ref.lora_path == wanted), wanted)

    def resolve(self, wanted: str) -> AdapterVersion:
        """The version that a name, or the exact path of a loaded adapter, means.

        Raises:
            AdapterError: adapter_not_found.
        """
        version = self._names.get(self.name_of(wanted))
        if version is None:
            raise AdapterError(
                "adapter_not_found",
                f"Got LoRA adapter that has never been loaded or is not loaded any more: {wanted}\n"
                f"All loaded adapters: {sorted(self._names)}.",
            )
        return version

    # ---- leases ----------------------------------------------------------------------------------------------------

    def lease(self, wanted: Sequence[tuple[str, Sequence[int]]]) -> list[Lease]:
        """Leases for (name, keys of the sequences that share it) pairs: all of them, or none and an error.

        Raises:
            AdapterError: a name is unknown; nothing has been counted.
        """
        versions = [self.resolve(name) for name, _ in wanted]
        now = next(self._clock)
        for version in versions:
            version.last_used = now
        return [Lease(self, version, holders) for version, (_, holders) in zip(versions, wanted, strict=True)]

    @contextlib.contextmanager
    def hold(self, version: AdapterVersion) -> Iterator[None]:
        """Keep a version in memory for as long as the block runs."""
        key = next(self._holders)
        lease = Lease(self, version, [key])
        try:
            yield
        finally:
            lease.release(key)

    def switch(self, old: AdapterVersion, new: AdapterVersion) -> None:
        """Move every lease of one version to another."""
        for lease in list(old.leases):
            lease.move(new)

    @property
    def num_leases(self) -> int:
        """Logical requests that hold a version."""
        return sum(len(version.leases) for version in self.versions.values())

    @property
    def oldest_lease(self) -> float | None:
        """When the oldest lease was acquired (monotonic seconds); None without leases."""
        return min((lease.acquired_at for v in self.versions.values() for lease in v.leases), default=None)

    # ---- upstream's public methods ---------------------------------------------------------------------------------

    @property
    def num_registered_loras(self) -> int:
        """Names that mean an adapter."""
        return len(self._names)

    def get_all_adapters(self) -> dict[str, LoRARef]:
        """name -> reference of every loaded adapter."""
        return {version.name: version.ref for version in self.serving()}

    async def register(self, lora_ref: LoRARef) -> None:
        """Make `lora_ref.lora_name` mean this adapter.

        Raises:
            ValueError: the name is taken.
        """
        if lora_ref.lora_name in self._names:
            raise ValueError(f"LoRA adapter {lora_ref.lora_name} is already registered; unload it first.")
        self.publish(self.new_version(lora_ref, _UNKNOWN_INFO))

    async def unregister(self, lora_name: str) -> str:
        """Take no new requests for a name.

        Returns:
            The id to wait for with `wait_for_unload`.

        Raises:
            ValueError: no adapter has this name.
        """
        version = self._names.get(lora_name)
        if version is None:
            raise ValueError(f"LoRA with name {lora_name} does not exist. Loaded LoRAs: {sorted(self._names)}")
        self.retire(version)
        return version.ref.lora_id

    async def acquire(self, lora_name: str | list[str | None]) -> str | list[str | None]:
        """Count one user of each name; None stands for the base model. All of them, or none and an error.

        Returns:
            The id, or ids, that `release` takes.
        """
        if isinstance(lora_name, str):
            (lease,) = self.lease([(lora_name, [next(self._holders)])])
            return self._keep(lease)
        wanted = [(name, [next(self._holders)]) for name in lora_name if name is not None]
        leases = iter(self.lease(wanted))
        return [None if name is None else self._keep(next(leases)) for name in lora_name]

    async def release(self, lora_id: str | list[str | None] | None) -> None:
        """Undo one `acquire`. Releasing what is not held changes nothing and is counted in `double_releases`."""
        for one in lora_id if isinstance(lora_id, list) else [lora_id]:
            if one is None:
                continue
            held = self._own.get(one)
            if not held:
                self.double_releases += 1
                continue
            lease = held.pop()
            if not held:
                del self._own[one]
            for holder in list(lease.holders):
                lease.release(holder)

    async def wait_for_unload(self, lora_id: str) -> None:
        """Return when an unregistered adapter is out of memory; at once for one that is not known."""
        version = self._by_id.get(lora_id)
        if version is not None:
            await self.wait_gone([version])

    def _keep(self, lease: Lease) -> str:
        lora_id = lease.version.ref.lora_id
        self._own.setdefault(lora_id, []).append(lease)
        return lora_id
