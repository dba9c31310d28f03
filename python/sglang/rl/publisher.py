"""The trainer's side of versioned adapter loads: one call brings a policy to every server, or to none.

    with Publisher(["http://host-a:30000", "http://host-b:30000"]) as publisher:
        for step in range(steps):
            ...
            version = publisher.publish(peft_model)      # or publish(state_dict, lora_config)
            ask(lora_path=version.name)                  # "policy": one name, whose meaning changes

Blocking; from a coroutine, `await publisher.publish_async(...)`. Every phase takes at most `timeout` seconds, whatever
servers do, and what goes wrong is a `PublishError` that names them.

A publication has two phases: every server stages the adapter under a name that goes on to mean what it means; when all
have, all commit. One that cannot stage leaves the whole fleet as it is. Modes:

- `live`: nothing is paused; requests that run finish on the version they began with.
- `switch`: nothing is paused; they go on with the new version from their next token.
- `pause`: everything that runs is aborted and what comes waits until all servers have committed and flushed their
  caches. What trainers do to servers that cannot do better; here for comparison.

An adapter is packed once, into the slab that servers keep it in (`publisher_slab`) if all of them keep it in the same
layout and `dtype` is that layout's; else its tensors are sent. `version.form` says which.
Adapters travel as files in shared memory to servers of this host, as bytes to others; or, with the transport
`broadcast`, to all versioned servers at once through a torch.distributed group of theirs and the trainer's: see
`broadcast` for what that asks of GPUs and the network. Stock SGLang servers take part
under names of their own kind, `lora_v{n}`: a name is loaded before anybody asks for it, so there is nothing to commit;
a fleet with one of them uses such names throughout, so that `version.name` means the same everywhere. `switch` needs
versioned servers.

Invariants: one publication at a time; the same bytes go to every server, and versioned servers must agree on what they
have read; what is repeated after a lost reply changes nothing; a paused server is resumed whatever happens.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.rl.publisher_package import DTYPES, DType, Package, gather
from sglang.rl.publisher_run import Publication
from sglang.rl.publisher_server import Server, Transport
from sglang.rl.publisher_version import MODES, PublishError, PublishMode, ServerReport, Settings, Version
from sglang.rl.transport import SHARED_MEMORY

if TYPE_CHECKING:
    from sglang.rl.broadcast import Broadcaster

__all__ = ["PublishError", "Publisher", "ServerReport", "Version", "gather"]

TRANSPORTS: tuple[Transport, ...] = ("auto", "shm", "bytes", "broadcast")


class Publisher:
    """See the module. Give a name to one publisher alone: two that publish under it at once undo each other's stages.

    Args:
        servers: one URL or several.
        name: what versioned servers know the policy by.
        mode: see the module; `publish` can be told another one.
        transport: `shm`, `bytes`, `broadcast`, or `auto` for shared memory where server and trainer are on one host and
            bytes elsewhere.
        keep_last: how many names of the kind `lora_v{n}` stay loaded; older ones are unloaded.
        timeout: seconds for each phase.
        grace: in mode pause, seconds that requests have to end, after the pause and again after an abort.
        api_key, admin_api_key: the servers'.
        dtype: of the numbers that are sent.
        directory: where adapters are written for servers that are given a path; another one than shared memory must be
            a file system that all servers read, and then all are given paths.
        versioned_name: how versions are named where stock servers take part; `{n}` is the number.

    Raises:
        ValueError: an argument that makes no sense.
    """

    def __init__(
        self,
        servers: str | Iterable[str],
        name: str = "policy",
        *,
        mode: PublishMode = "live",
        transport: Transport = "auto",
        keep_last: int = 2,
        timeout: float = 30.0,
        grace: float = 3.0,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        dtype: DType = "bfloat16",
        directory: str = SHARED_MEMORY,
        versioned_name: str = "lora_v{n}",
    ) -> None:
        for value, known in ((mode, MODES), (transport, TRANSPORTS), (dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        if timeout <= 0 or grace < 0 or keep_last < 1 or "{n}" not in versioned_name:
            raise ValueError(
                f"timeout {timeout:g} must be above 0, grace {grace:g} at least 0, keep_last {keep_last} at least 1, "
                f"and versioned_name {versioned_name!r} must have {{n}}"
            )
        self.mode = mode
        self.settings = Settings(name, transport, keep_last, timeout, grace, dtype, directory, versioned_name)
        self._keys = admin_api_key or api_key, api_key or admin_api_key
        self._servers: dict[str, Server] = {}
        self._number = 0
        self._current: Version | None = None
        self._followers: list[Callable[[Version], None]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._broadcaster = _broadcaster(name) if transport == "broadcast" else None
        for url in [servers] if isinstance(servers, str) else servers:
            self.add_server(url)
        if not self._servers:
            raise ValueError("there are no servers; give at least one URL")

    @property
    def current(self) -> Version | None:
        """The version that all servers serve; what evaluation on the same servers should ask for."""
        return self._current

    @property
    def servers(self) -> list[str]:
        """Their URLs."""
        return list(self._servers)

    def add_server(self, url: str) -> None:
        """Take part from the next publication on; publish the same again to bring it up to date before.

        Raises:
            ValueError: not a URL.
        """
        url = url.rstrip("/")
        key, info_key = self._keys
        shared = Path(self.settings.directory).is_relative_to(SHARED_MEMORY)
        self._servers.setdefault(url, Server(url, key, info_key, self.settings.transport, shared))

    def remove_server(self, url: str) -> None:
        """Take part no longer; unknown ones are ignored."""
        self._servers.pop(url.rstrip("/"), None)

    def follow(self, follower: Callable[[Version], None]) -> None:
        """Tell of every version once all servers serve it, in the publishing thread; its errors reach `publish`."""
        self._followers.append(follower)

    def publish(self, adapter: Any, config: Any = None, *, mode: PublishMode | None = None) -> Version:
        """Bring an adapter to every server.

        Args:
            adapter: a PeftModel, or tensors by PEFT's names. Of a sharded model give what
                `publisher_package.gather`, called on all ranks, has returned.
            config: LoraConfig or dict; a PeftModel has its own.
            mode: another one than the publisher's.

        Raises:
            PublishError: see its attributes. After any of them, publishing again is right: servers that have the
                version already keep it.
            ValueError, TypeError: the adapter cannot be sent as it is.
        """
        mode = self.mode if mode is None else mode
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        with self._lock:
            if self._closed:
                raise RuntimeError("the publisher is closed")
            started = time.perf_counter()
            pack = functools.partial(Package, *gather(adapter, config), self.settings.dtype)
            self._number += 1
            servers = dict(self._servers)
            publication = Publication(self.settings, pack, mode, self._number, servers, started, self._broadcaster)
            try:
                version = publication.run()
            finally:
                self._number = publication.number
            self._current = version
        for follower in self._followers:
            follower(version)
        return version

    async def publish_async(self, adapter: Any, config: Any = None, *, mode: PublishMode | None = None) -> Version:
        """`publish` in a thread of its own."""
        return await asyncio.to_thread(self.publish, adapter, config, mode=mode)

    def close(self) -> None:
        """Publish nothing any more, once a publication that is on has ended; servers keep what they serve."""
        with self._lock:
            self._closed = True
            if self._broadcaster is not None:
                self._broadcaster.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _broadcaster(name: str) -> Broadcaster:
    """Imported here alone: it needs torch, which other transports do without."""
    from sglang.rl.broadcast import Broadcaster

    return Broadcaster(f"publish-{name}")
