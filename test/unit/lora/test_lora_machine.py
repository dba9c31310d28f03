"""Everything that can happen to adapters and requests, in any order, with the books checked after every event.

Clients, trainers, operators and a scheduler act on one TokenizerManager; between two events the event loop runs for a
few turns or for none. Hypothesis draws a run as bytes (four an event), so a failing run shrinks; an event that makes no
sense in the present state does nothing and is not counted. Time stands still unless an event moves it.

What a reply must say is known here independently: the fake scheduler writes down which version made each token, and
this file which version a name has meant at the earliest when a request was made. Earlier and later are counted in
publications: a version that was staged may be published after one that has a larger number.

SGLANG_LORA_MACHINE_RUNS=20000 runs longer than the suite does, and then with new runs every time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from unit.fake_scheduler import EOS, Call, FakeThreads, Front, Row, ids_of, settle

from sglang.srt.errors import AdapterError, RequestError, ServiceUnavailableError
from sglang.srt.lora.lease import VersionState
from sglang.srt.managers.io_struct import (
    CommitLoRAAdapterReqInput,
    ContinueGenerationReqInput,
    DropLoRAAdapterReqInput,
    PauseGenerationReqInput,
    StageLoRAAdapterReqInput,
)
from sglang.srt.managers.io_struct.wire import Finish, FinishInfo, PauseMode, StageAdapterCall
from sglang.srt.managers.request_state import RecordState
from sglang.srt.managers.response import OutputChunk

RUNS = int(os.environ.get("SGLANG_LORA_MACHINE_RUNS", "0"))
SUITE_RUNS = 1300
EVENTS_A_RUN = 160
MIN_STEPS = 100_000

LOADED_FIRST = ["p-v1", "solo"]
NAMES = ["p-v1", "p-v2", "p-v3", "solo"]
WANTED = ["p-v1"] * 4 + ["solo"] * 4 + ["/solo", "/p-v1", "p-v2", "p-v3", None, None, None, "unknown"]
RIDS = [None, None, None, "r", "rs", "s"]
TEXTS = ["hi", "long", "a text that is tokenised in a thread"]
CONFIGS = [
    {},
    {"max_loaded_loras": 2, "max_loras_per_batch": 2},
    {"keep_last": 1},
    {"max_loaded_loras": 2, "eviction_policy": "fifo", "keep_last": 2, "max_loras_per_batch": 3},
]
STOP = ids_of("x")[0]
ENDS = [
    (Finish.LENGTH, None),
    (Finish.STOP, FinishInfo(matched=EOS)),
    (Finish.ABORT, FinishInfo(message="The request queue is full.", status_code=503)),
    (Finish.ABORT, FinishInfo(message="bad", status_code=400, err_type="BadRequestError")),
    (Finish.ABORT, FinishInfo(message="broken", status_code=500)),
]
TURNS = [0, 1, 2, 3, 5, 12]


@dataclass
class Client:
    """A call, and what is known about it from outside.

    Fields:
        wanted: adapter name (or None) per prompt; n: samples per prompt.
        at_least: per name, the oldest publication it may run on; req_ids: its sequences, once they have been seen.
    """

    call: Call
    wanted: list[str | None]
    n: int
    at_least: dict[str, int]
    req_ids: list[int] = field(default_factory=list)
    checked: bool = False


@dataclass
class Admin:
    """A control call."""

    kind: str
    task: asyncio.Task
    name: str = ""
    floor: int = 0


class Machine:
    """One run."""

    def __init__(self, front: Front, threads: FakeThreads, set_clock: Callable[[float], None]) -> None:
        self.front, self.threads = front, threads
        self.manager, self.scheduler = front.manager, front.scheduler
        self.registry = self.manager.lora_registry
        self.set_clock = set_clock
        self.clock = 0.0
        self.clients: dict[str, Client] = {}
        self.admin: list[Admin] = []
        self.loaded = dict.fromkeys(NAMES, 0)  # by a load that was answered
        self.at_least = dict.fromkeys(NAMES, 0)  # by that, and not by what an unload that was answered has taken away
        self.order: dict[int, int] = {}  # version id -> when it was published
        self._publish, self.registry.publish = self.registry.publish, self._published
        self.order |= {version.version_id: version.published for version in self.registry.serving()}
        self.max_pinned = self.manager.config.lora.max_loras_per_batch - 1
        self.num_submitted = 0
        self.num_clients = 0
        self.dead = False

    def _published(self, version):
        previous = self._publish(version)
        self.order[version.version_id] = version.published
        return previous

    # ---- clients ---------------------------------------------------------------------------------------------------

    def submit(self, a: int, b: int) -> bool:
        """Single, batch or n > 1; streamed, in chunks or whole; sometimes invalid, too long, or impossible to send."""
        if len(self.clients) >= 8:
            return False
        batch, n = [(1, 1), (1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (1, 2), (1, 1)][a & 7]
        names = [WANTED[(b + i * (a >> 3)) & 15] for i in range(batch)]
        params = {"n": n, "max_new_tokens": 20} | ({"stop": "x"} if a & 16 else {})
        if a & 0xE0 == 0xE0:
            params["max_new_tokens"] = 1000
        texts = [TEXTS[(b >> 3) % 3]] * batch
        if a & 0xE0 == 0xC0:
            texts[-1] = "\udc80"  # cannot be tokenised
        stream = bool(b & 0x40)
        key = f"c{self.num_clients}"
        self.num_clients += 1
        call = Call(
            self.manager,
            chunks=stream and bool(b & 0x80),
            text=texts if batch > 1 else texts[0],
            lora_path=names if batch > 1 else names[0],
            rid=RIDS[(b >> 4) % len(RIDS)],
            stream=stream,
            sampling_params=params,
            extra_key=key,
        )
        self.clients[key] = Client(call, [n and n.strip("/") for n in names], n, dict(self.at_least))
        return True

    def lose_client(self, a: int, b: int) -> bool:
        """The client disconnects, or whoever reads its reply is cancelled."""
        waiting = [client for client in self.clients.values() if not client.call.done]
        if not waiting:
            return False
        call = waiting[a % len(waiting)].call
        (call.client.disconnect if b & 1 else call.task.cancel)()
        return True

    def abort(self, a: int, b: int) -> bool:
        """By rid, by prefix, by adapter; all of them seldom."""
        if not self.manager.records:
            return False
        if b & 3 == 0:
            self.manager.abort_request(lora_name=NAMES[a % len(NAMES)])
        elif b == 255:
            self.manager.abort_request(abort_all=True)
        else:
            rid = ["r", "rs", "s", "r_0", "s_1", ""][a % 6]
            self.manager.abort_request(rid, prefix=b & 3 == 1)
        return True

    def cannot_send(self, a: int, b: int) -> bool:
        """The next batch of requests does not reach the scheduler."""
        self.scheduler.refuse_submits = 1
        return True

    # ---- scheduler -------------------------------------------------------------------------------------------------

    def decode(self, a: int, b: int) -> bool:
        """A step or two of everything that runs."""
        if not self.scheduler.live or self.dead or self.scheduler.paused:
            return False
        for _ in range(1 + (a & 1)):
            tokens = [64, STOP if b & 7 == 7 else 65][: 1 + (a >> 1 & 1)]
            self.scheduler.step(*(Row(req_id, tokens) for req_id in self.scheduler.live))
        return True

    def finish(self, a: int, b: int) -> bool:
        """Some requests end, each in a way of its own."""
        if not self.scheduler.live or self.dead:
            return False
        live = list(self.scheduler.live)
        rows = []
        for i, req_id in enumerate(live):
            if a >> (i & 7) & 1:
                how, info = ENDS[(b + i) % len(ENDS) if b & 0x80 else 0]
                rows.append(Row(req_id, [64] * (b & 1), how, info))
        if rows:
            self.scheduler.step(*rows)
        return bool(rows)

    def ack(self, a: int, b: int) -> bool:
        """The scheduler ends what the front wants ended."""
        return not self.dead and bool(self.scheduler.ack())

    def late_row(self, a: int, b: int) -> bool:
        """A second terminal row."""
        if not self.scheduler.terminal or self.dead:
            return False
        over = self.scheduler.terminal[a % len(self.scheduler.terminal)]
        self.scheduler.late(Row(over, [64], Finish.LENGTH))
        return True

    def reply(self, a: int, b: int) -> bool:
        """The scheduler answers a control call: in order, except that staging takes as long as it takes.

        Behind the answer to a switch there may be rows already, for the front to read in one go.
        """
        if not self.scheduler.calls or self.dead:
            return False
        stages = [isinstance(call, StageAdapterCall) for call in self.scheduler.calls]
        places = [i for i, stage in enumerate(stages) if stage or False not in stages[:i]]
        place = places[a % len(places)]
        kind = type(self.scheduler.calls[place]).__name__
        may_fail = kind in ("StageAdapterCall", "SwitchVersionCall")
        self.scheduler.reply(success=not (may_fail and b % 5 == 4), message="refused", place=place)
        if kind == "SwitchVersionCall" and b & 1:
            self.decode(a, b)
        return True

    def work(self, a: int, b: int) -> bool:
        """A thread has done its work: a text is tokenised, or an adapter read."""
        if not self.threads.waiting:
            return False
        self.threads.go(a % len(self.threads.waiting))
        return True

    def die(self, a: int, b: int) -> bool:
        """The back is killed; what follows happens to a dead server."""
        if self.dead or a > 24:
            return False
        self.dead = True
        self.manager.back_died("it was killed")
        return True

    # ---- admin -----------------------------------------------------------------------------------------------------

    def begin(self, kind: str, coroutine, name: str = "") -> bool:
        self.admin.append(Admin(kind, asyncio.ensure_future(coroutine), name))
        return True

    def load(self, a: int, b: int) -> bool:
        """Load or upsert (either mode), by path or as tensors; a path may not be readable."""
        if len(self.admin) >= 8:
            return False
        name = NAMES[a & 3] if a & 0x80 else LOADED_FIRST[a & 1]
        fields = {"upsert": bool(a & 6), "mode": "switch" if a & 8 else "finish_old", "pinned": a & 0x70 == 0x70}
        if b & 15 == 15:
            task = self.front.loading_tensors(name, f"t{b >> 4 & 3}", **fields)
        else:
            path = f"/{name}"
            self.front.reader.errors.clear()
            if b & 15 == 14:
                self.front.reader.errors[path] = AdapterError("path_unreadable", "not yet")
            task = self.front.loading(name, path, **fields)
        self.admin.append(Admin("load", task, name))
        return True

    def stage(self, a: int, b: int) -> bool:
        """Stage a version, of one of few contents, for a shorter or longer time."""
        if len(self.admin) >= 8:
            return False
        name = NAMES[a & 3] if a & 0x80 else LOADED_FIRST[a & 1]
        self.front.reader.errors.clear()
        obj = StageLoRAAdapterReqInput(
            lora_name=name, lora_path=f"/{name}{b & 1}", pinned=a & 0x70 == 0x70, timeout=[3.0, 30.0][b >> 1 & 1]
        )
        return self.begin("stage", self.manager.adapter_calls.stage(obj), name)

    def commit(self, a: int, b: int) -> bool:
        """Commit, or drop, what is staged, or something that is not."""
        if len(self.admin) >= 8:
            return False
        staging = [v for v in self.registry.versions.values() if v.state is VersionState.STAGING]
        version = staging[a % len(staging)] if staging and b & 15 else None
        name, number = (version.name, version.version_id) if version else (NAMES[a & 3], 1 + (b >> 4))
        if b & 7 == 7:
            obj = DropLoRAAdapterReqInput(lora_name=name, lora_version=number)
            return self.begin("drop", self.manager.adapter_calls.drop(obj), name)
        mode = "switch" if b & 8 else "finish_old"
        call = CommitLoRAAdapterReqInput(lora_name=name, lora_version=number, mode=mode)
        return self.begin("commit", self.manager.adapter_calls.commit(call), name)

    def unload(self, a: int, b: int) -> bool:
        """Unload: waiting, with a timeout, or aborting the holders."""
        if len(self.admin) >= 8:
            return False
        name = NAMES[a & 3]
        task = self.front.unloading(name, timeout=[None, 0.0, 5.0, None][b & 3], abort=b & 12 == 12)
        self.admin.append(Admin("unload", task, name, self.loaded[name] + 1))
        return True

    def pause(self, a: int, b: int) -> bool:
        """Of everything in any mode, or of one adapter; with and without owner and deadline."""
        if len(self.admin) >= 8:
            return False
        mode = list(PauseMode)[a % 3]
        name = NAMES[b & 3] if a & 0x40 and mode is PauseMode.ABORT else None
        owner, timeout = ["t", "e", None, None][b >> 2 & 3], [0.0, 5.0, 50.0, None][b >> 4 & 3]
        obj = PauseGenerationReqInput(mode=mode, lora_name=name, owner=owner, timeout=timeout)
        return self.begin("drain" if mode is PauseMode.ABORT else "pause", self.manager.pause_generation(obj))

    def resume(self, a: int, b: int) -> bool:
        """By somebody, of everything or one adapter."""
        if len(self.admin) >= 10:
            return False
        name = NAMES[b & 3] if a & 0x40 else None
        obj = ContinueGenerationReqInput(lora_name=name, owner=["t", "e", None, None][b >> 2 & 3])
        return self.begin("resume", self.manager.continue_generation(obj))

    def forget(self, a: int, b: int) -> bool:
        """Whoever made a control call hangs up."""
        pending = [admin.task for admin in self.admin if not admin.task.done()]
        if not pending:
            return False
        pending[a % len(pending)].cancel()
        return True

    def time_passes(self, a: int, b: int) -> bool:
        """Deadlines pass."""
        self.clock += [0.1, 6.0, 60.0][a % 3]
        self.set_clock(self.clock)
        return True

    def collect(self, a: int, b: int) -> bool:
        """Nothing may hang on what only the collector ends."""
        gc.collect(a % 3)
        return True

    async def answer_everything(self) -> None:
        """Threads and the scheduler's answers are all it takes for a load to end; an unload may wait for holders."""
        slow, self.threads.slow = self.threads.slow, False
        while True:
            await settle(12 * (2 + len(self.admin)))  # loads of one name run one after the other
            if self.threads.waiting:
                self.threads.go()
            elif self.scheduler.calls and not self.dead:
                self.scheduler.reply()
            else:
                break
        self.threads.slow = slow
        for admin in self.admin:
            if admin.task.done():
                continue
            assert admin.kind in ("unload", "drain"), f"{admin.kind} waits for a request"
            if admin.kind == "unload":
                assert any(version.leases for version in self.registry.named(admin.name)), "waits for nobody"

    # ---- the books -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The invariants, from the state alone."""
        manager, registry, scheduler = self.manager, self.registry, self.scheduler
        assert not scheduler.violations, scheduler.violations
        assert registry.double_releases == 0, "a lease was released twice"
        assert manager.counters.double_closes == 0
        assert manager.adapters.free_failures == 0
        by_version: dict[int, set[int]] = {}
        for record in manager.records.values():
            assert record.state is not RecordState.CLOSED
            if record.lease is not None:
                by_version.setdefault(record.lease.version.version_id, set()).add(record.req_id)
                assert record.lease in record.lease.version.leases
        serving = 0
        for version_id, version in registry.versions.items():
            held = {holder for lease in version.leases for holder in lease.holders if holder > 0}
            assert held == by_version.pop(version_id, set()), "the ledger and the records disagree"
            assert all(lease.holders for lease in version.leases), "a lease that nobody holds"
            if version.state in (VersionState.SERVING, VersionState.RETIRING):
                assert version_id in scheduler.staged or self.dead, "serves what the scheduler does not have"
                serving += 1
            elif version.state is VersionState.FREEING:
                assert not version.leases
                assert version_id not in scheduler.staged
            if version.state is VersionState.RETIRING:
                assert version.leases, "nobody holds it, and it stays"
        for version in registry.versions.values():
            waits = version in manager.adapters._staged
            assert not waits or version.state is VersionState.STAGING, "it was committed or retired, and waits for it"
        assert all(manager.adapters._staged.of(name) in (None, *registry.named(name)) for name in NAMES)
        assert sum(version.pinned for version in registry.serving()) <= self.max_pinned
        assert not by_version, "a record holds a version that is gone"
        if not self.dead:
            staging = sum(version.state is VersionState.STAGING for version in registry.versions.values())
            assert serving <= len(scheduler.staged) <= serving + staging, "the scheduler has what nobody knows"
            for request in scheduler.live.values():
                assert request.version_id == 0 or request.version_id in scheduler.staged
        elif self.dead:
            assert not manager.records
        assert not manager._lifecycle._held or manager._lifecycle._closed_adapters or not manager._lifecycle._gate_open

    def observe(self) -> None:
        """New submissions, new replies."""
        for record in self.manager.records.values():
            client = self.clients.get(record.prompt.extra_key)
            if client is not None and record.req_id not in client.req_ids:
                client.req_ids.append(record.req_id)
        for request in self.scheduler.submitted[self.num_submitted :]:
            client = self.clients[request.extra_key]
            if request.req_id in client.req_ids:
                name = client.wanted[client.req_ids.index(request.req_id) // client.n]
                assert (name is None) == (request.version_id == 0), "base model and adapter mixed up"
                latest = client.at_least[name] if name else 0
                assert self.order.get(request.version_id, 0) >= latest, "an older policy than was published"
        self.num_submitted = len(self.scheduler.submitted)
        for key, client in list(self.clients.items()):
            if client.call.done:
                check_reply(client, self.scheduler.made_by)
                if not any(record.prompt.extra_key == key for record in self.manager.records.values()):
                    del self.clients[key]
        for admin in list(self.admin):
            if admin.task.done():
                self.admin.remove(admin)
                self.check_admin(admin)

    def check_admin(self, admin: Admin) -> None:
        if admin.task.cancelled():
            return
        error = admin.task.exception()
        if error is not None:
            expected = (AdapterError, ServiceUnavailableError) if self.dead else AdapterError
            assert isinstance(error, expected), error
        elif admin.kind in ("load", "commit") and admin.task.result().success:
            published = self.order[admin.task.result().lora_version]
            self.loaded[admin.name] = max(self.loaded[admin.name], published)
            self.at_least[admin.name] = max(self.at_least[admin.name], self.loaded[admin.name])
        elif admin.kind == "unload" and admin.task.result().success:
            self.at_least[admin.name] = max(self.at_least[admin.name], admin.floor)

    # ---- a run -----------------------------------------------------------------------------------------------------

    async def wind_down(self) -> None:
        """With the gates open, answers and acks are all it takes until nothing is left."""
        self.begin("resume", self.manager.continue_generation())
        self.threads.go_all()
        await settle()
        await self.answer_everything()
        unwanted = {record.req_id for record in self.manager.records.values() if not record.listening}
        assert unwanted <= self.scheduler.asked_to_end, "nobody waits for it, and it runs"
        self.manager.abort_request(abort_all=True)
        await settle()
        if not self.dead:
            self.scheduler.ack()
        await settle()
        await self.answer_everything()
        self.check()
        self.observe()
        assert not self.admin, [admin.kind for admin in self.admin]
        assert not self.clients, "a client hangs"
        assert not self.manager.records
        assert not self.manager.rid_to_state
        assert self.registry.num_leases == 0
        assert self.registry.num_registered_loras <= (self.manager.config.lora.max_loaded_loras or len(NAMES))
        assert self.manager._control.num_pending == 0
        for version in list(self.registry.versions.values()):
            if version.state is VersionState.STAGING:
                assert self.manager.adapters.drop(version.name, version.version_id), "staged, and nobody knows"
        await self.answer_everything()
        assert set(self.registry.versions) == set(self.front.names.values())
        self.admin += [Admin("unload", self.front.unloading(name), name) for name in self.front.names]
        await settle()
        await self.answer_everything()
        assert not self.registry.versions
        assert self.dead or not self.scheduler.staged
        assert self.front.reader.all_closed
        assert all(admin.task.done() for admin in self.admin)


def check_reply(client: Client, made_by: dict[int, list[int]]) -> None:
    """Exactly one end for each sequence, and every token by the policy that the reply says."""
    call = client.call
    if client.checked:
        return
    client.checked = True
    if call.task.cancelled():
        return
    if call.error is not None:
        assert isinstance(call.error, RequestError | ServiceUnavailableError), call.error
        return
    sequences = client.n * len(client.wanted)
    assert len(call.finish_reasons) == sequences, "each sequence has exactly one end"
    bodies = [body for item in call.items for body in (item if isinstance(item, list) else [item])]
    for place, body in enumerate(bodies):
        if isinstance(body, OutputChunk):
            if body.finish_reason is None:
                continue
            index, meta, tokens = body.index, body.record.meta_info(), body.record.output_ids
        else:
            index, meta, tokens = (
                body.get("index", 0 if sequences == 1 else place),
                body["meta_info"],
                body["output_ids"],
            )
        if len(client.req_ids) != sequences:
            continue  # it was over before it could be seen
        produced = made_by.get(client.req_ids[index], [])[: len(tokens)]
        assert len(produced) == len(tokens)
        if client.wanted[index // client.n] is None:
            assert "lora_version" not in meta
            continue
        if "lora_version" not in meta:
            assert not tokens, "no word of who made these"
            continue
        spans = meta.get("lora_version_spans", [[0, meta["lora_version"]]])
        told = [max(span for span in spans if span[0] <= i)[1] for i in range(len(tokens))]
        assert told == produced, "tokens of one policy in another's name"


WEIGHTS: list[tuple[str, int]] = [
    ("submit", 36), ("reply", 44), ("load", 26), ("work", 28), ("decode", 30), ("finish", 16), ("ack", 16),
    ("lose_client", 10), ("unload", 6), ("abort", 6), ("pause", 4), ("resume", 10), ("forget", 3), ("time_passes", 4),
    ("late_row", 2), ("cannot_send", 1), ("collect", 1), ("die", 1), ("stage", 6), ("commit", 5),
]  # fmt: skip
EVENTS = [name for name, weight in WEIGHTS for _ in range(weight)]


class Runner:
    """One event loop for all runs."""

    def __init__(self) -> None:
        self.steps = 0
        self.counts: dict[str, int] = {}
        self.clock = 0.0
        self.errors: list[dict] = []
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.clock  # type: ignore[method-assign]
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.patch = pytest.MonkeyPatch()
        self.threads = FakeThreads(self.patch, longer_than=8)

    def close(self) -> None:
        self.patch.undo()
        self.loop.close()

    def set_clock(self, now: float) -> None:
        self.clock = now

    def run(self, blob: bytes) -> None:
        self.loop.run_until_complete(self._run(blob))

    async def _run(self, blob: bytes) -> None:
        self.clock = 0.0
        self.errors.clear()
        self.threads.waiting.clear()
        self.threads.slow = False
        front = await Front.start(lora=True, **CONFIGS[blob[0] % len(CONFIGS)])
        for name in LOADED_FIRST:
            await front.load(name, f"/{name}")
        self.threads.slow = True
        front.scheduler.auto_free = False
        machine = Machine(front, self.threads, self.set_clock)
        try:
            for place in range(1, len(blob) - 3, 4):
                await self._event(machine, *blob[place : place + 4])
            await machine.wind_down()
            assert not self.errors, self.errors
        finally:
            self.threads.go_all()
            await front.manager.close()
            for task in [c.call.task for c in machine.clients.values()] + [a.task for a in machine.admin]:
                task.cancel()
            await settle()

    async def _event(self, machine: Machine, code: int, a: int, b: int, turns: int) -> None:
        name = EVENTS[code - 1] if 0 < code <= len(EVENTS) else ""
        if not name or not getattr(machine, name)(a, b):
            return  # a zero is no event, which is what a failing run shrinks to
        self.steps += 1
        self.counts[name] = self.counts.get(name, 0) + 1
        note(f"{name} {a} {b}, then {TURNS[turns % len(TURNS)]} turns")
        machine.check()
        for _ in range(TURNS[turns % len(TURNS)]):
            await asyncio.sleep(0)
        machine.check()
        machine.observe()
        if turns > 247:
            note("answer everything")
            await machine.answer_everything()
            machine.check()
            machine.observe()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The collector looks at what a run makes, not at everything the test session holds; nothing is logged."""
    logging.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)


class Run(bytes):
    """The choices of a run; the notes say what they mean."""

    def __repr__(self) -> str:
        return "Run(...)"


@pytest.mark.slow
def test_every_interleaving_keeps_the_books():
    runner = Runner()
    size = 1 + 4 * EVENTS_A_RUN

    @settings(
        max_examples=RUNS or SUITE_RUNS,
        derandomize=not RUNS,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=size, max_size=size).map(Run))
    def run(blob: Run) -> None:
        runner.run(blob)

    try:
        with quiet():
            run()
    finally:
        runner.close()
    assert runner.steps >= MIN_STEPS or RUNS
    assert set(runner.counts) == {name for name, _ in WEIGHTS}, "an event that never happens"
