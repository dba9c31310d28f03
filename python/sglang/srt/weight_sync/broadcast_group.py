"""A group of one trainer and several servers, in which the trainer sends bytes to all servers at once.

The same class on both sides: `rl.broadcast`, rank 0, sends; `group_control` in the servers' back processes receives. It
stands on torch.distributed, with a store and a communicator of its own: no default process group is made or used.

Members first agree over the store, which is the trainer's, and only then enter a collective, which cannot be left:

    joined/{rank}               a member is there; all wait for all before they connect
    cancelled                   why they need not wait
    {broadcast}/{rank}          a receiver has its memory ready
    {broadcast}/go              the sender's word: empty to begin, else why it does not
    connection/…                torch's own

Invariants: a server that refuses costs the others no time and the group nothing; every call ends at its deadline (a
member that dies in the middle is found out at once by gloo, by the deadline with NCCL); a group whose collective has
failed, or whose store has gone, is broken for good.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sglang.srt.errors import SglangError

Backend = Literal["nccl", "gloo"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01
"""Between two looks, in seconds: at what others say, or at a collective that is on."""
_NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""torch would end the whole process when a member dies: a server must outlive its trainer. Here deadlines find out."""


class BroadcastError(SglangError):
    """Nothing was broadcast; the group is as good as before."""


class CancelledError(BroadcastError):
    """The trainer has said that there will be nothing, and why: another server has failed."""


class BrokenGroupError(BroadcastError):
    """The group can be used no more; all its members have to make another one."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A member's place.

    Fields:
        address, port: of the trainer's store.
        rank: 0 is the trainer; size: of the group, trainer included.
        backend: nccl sends from the memory of one GPU to that of others, gloo between hosts' memories.
    """

    name: str
    address: str
    port: int
    rank: int
    size: int
    backend: Backend


class BroadcastGroup:
    """One end of a group; use it from one thread at a time, except for `close`.

    Args:
        device: where the bytes are sent from, or land before they reach the host: a GPU for nccl.
        seconds: that joining may take.
        refused: rank 0's: asked again and again while others are waited for; text that is not empty calls it off.

    Raises:
        CancelledError: it was called off. BrokenGroupError: it was not made, in time or at all.
    """

    def __init__(
        self, spec: GroupSpec, device: torch.device, seconds: float, refused: Callable[[], str] = lambda: ""
    ) -> None:
        self.spec = spec
        self._device = device if spec.backend == "nccl" else torch.device("cpu")
        self._stream = torch.cuda.Stream(device) if spec.backend == "nccl" else None  # type: ignore[no-untyped-call]
        self._closed = False
        self._backend: Any = None
        try:
            with self._breaking():
                self._join(time.monotonic() + seconds, refused)
        except BroadcastError:
            self.close()
            raise

    def send(self, broadcast: str, image: Tensor, seconds: float, refused: Callable[[], str]) -> None:
        """Rank 0: send uint8 [n], on the group's device, once all others are ready for it.

        Args:
            broadcast: its name, never used before.
            refused: as in the class: that a server will not be ready.

        Raises:
            BroadcastError: it was called off, or one was not ready in time. BrokenGroupError: it has failed.
        """
        end = time.monotonic() + seconds
        with self._breaking():
            try:
                for rank in range(1, self.spec.size):
                    late = f"server {rank} of the group was not ready for the broadcast within {seconds:.1f} s"
                    self._wait(f"{broadcast}/{rank}", end, late, refused)
            except BroadcastError as error:
                self._store.set(f"{broadcast}/go", str(error))
                raise
            self._store.set(f"{broadcast}/go", "")
            self._broadcast(image, end)
            for key in (*range(1, self.spec.size), "go"):
                self._store.delete_key(f"{broadcast}/{key}")

    def receive(self, broadcast: str, memory: Tensor, seconds: float) -> None:
        """Any other rank: fill uint8 [n] of the host's memory with what rank 0 sends.

        Raises:
            BroadcastError: it was called off, or did not come in time. BrokenGroupError: it has failed.
        """
        end = time.monotonic() + seconds
        with self._breaking(), torch.cuda.stream(self._stream):
            landing = memory if self._stream is None else torch.empty_like(memory, device=self._device)
            self._store.set(f"{broadcast}/{self.spec.rank}", "")
            late = f"broadcast {broadcast!r} did not come within {seconds:.1f} s"
            reason = self._wait(f"{broadcast}/go", end, late)
            if reason:
                raise CancelledError(f"the trainer has called the broadcast off: {reason}")
            self._broadcast(landing, end)
            if landing is not memory:
                memory.copy_(landing)

    def close(self) -> None:
        """Leave at once; who waits in it, here or elsewhere, fails. From any thread, any number of times."""
        self._closed = True
        if self.spec.backend == "nccl" and self._backend is not None:  # gloo's collectives end by themselves
            # In a thread of its own: it may take long, and whoever forgets a group cannot wait.
            threading.Thread(target=_abort, args=(self._backend,), name="abort group", daemon=True).start()

    def _join(self, end: float, refused: Callable[[], str]) -> None:
        left = timedelta(seconds=max(end - time.monotonic(), 1e-3))
        store = dist.TCPStore(self.spec.address, self.spec.port, None, False, left)  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(self.spec.name, store)  # type: ignore[attr-defined]
        self._store.set(f"joined/{self.spec.rank}", "")
        for rank in range(self.spec.size):
            self._wait_joined(rank, end, refused)
        addresses = dist.PrefixStore("connection", self._store)  # type: ignore[attr-defined]
        self._backend = _connect(self.spec, addresses, max(end - time.monotonic(), 1e-3))
        # NCCL connects when it is first used: here, where a failure is one of joining.
        self._broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device), end)

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """What torch raises means that the group is broken."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            text = str(error).partition("\n")[0]
            raise BrokenGroupError(f"group {self.spec.name!r} is broken: {type(error).__name__}: {text}") from error

    def _wait_joined(self, rank: int, end: float, refused: Callable[[], str]) -> None:
        """Wait for a member, or for the trainer to call it off."""
        late = f"group {self.spec.name!r} was not joined in time by its member {rank} of {self.spec.size}"

        def cancelled() -> str:
            if self.spec.rank > 0 and self._store.check(["cancelled"]):
                return self._store.get("cancelled").decode()
            return refused()

        try:
            self._wait(f"joined/{rank}", end, late, cancelled)
        except BroadcastError as error:
            if self.spec.rank == 0:
                self._store.set("cancelled", str(error))
            if isinstance(error, CancelledError):
                raise
            raise BrokenGroupError(str(error)) from error

    def _wait(self, key: str, end: float, late: str, cancelled: Callable[[], str] = lambda: "") -> str:
        """What somebody says under a key. By looking: torch's own wait can be neither cut short nor kept quiet."""
        pause = _FIRST_PAUSE
        while not self._store.check([key]):
            reason = cancelled()
            if reason:
                raise CancelledError(reason)
            self._check(end, late)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._store.get(key).decode()

    def _broadcast(self, tensor: Tensor, end: float) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=max(end - time.monotonic(), 1e-3))
        with torch.cuda.stream(self._stream):
            work = self._backend.broadcast([tensor], options)
            while not work.is_completed():
                try:
                    self._check(end, f"group {self.spec.name!r} is broken: a broadcast did not end in time")
                except BroadcastError as error:
                    raise BrokenGroupError(str(error)) from error
                time.sleep(_FIRST_PAUSE)
            # Without its watchdog NCCL keeps an error to itself; gloo's comes with wait.
            if self._stream is not None and work.exception() is not None:
                raise RuntimeError(str(work.exception()))
            work.wait()

    def _check(self, end: float, late: str) -> None:
        if self._closed:
            raise BrokenGroupError(f"group {self.spec.name!r} was closed or replaced")
        if time.monotonic() > end:
            raise BroadcastError(late)


def _abort(backend: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it may have gone down by itself
        backend.abort()


def _connect(spec: GroupSpec, store: Any, seconds: float) -> Any:
    """A communicator outside of torch's registry of groups."""
    if spec.backend == "gloo":
        return dist.ProcessGroupGloo(store, spec.rank, spec.size, timedelta(seconds=seconds))
    before = {name: os.environ.get(name) for name in _NCCL_SETTINGS}
    os.environ.update(_NCCL_SETTINGS)
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=1)  # ours are shorter, and do not end the process
        return dist.ProcessGroupNCCL(store, spec.rank, spec.size, options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def open_store() -> Any:
    """The trainer's store, on a free port of all interfaces; it goes, and the group with it, when it is deleted."""
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]
