"""The protocol of adapter versions and leases as a small abstract model that imports nothing of the code.

One name, a few versions of it, a few requests, a front and a back joined by two channels. Each channel is first in,
first out; how far the two ends have read is up to the explorer, so every order in which messages can cross is there.
A state is a tuple; `Model.steps` gives every step that can follow. What a step finds broken it raises as `Violation`.

How it maps to the code:
    begin_load, `staged`     AdapterService._load, _publish: a version is published when the back has answered
    `switched`               AdapterService._switch, RequestLifecycle.switch: leases move while the answer is read
    submit                   LoRARegistry.lease: look-up and count in one step, the message behind it
    abort, disconnect        RequestLifecycle.abort, abandon: a mark and a message, nothing else
    `end`                    RequestLifecycle._close: the only release
    retire, free             LoRARegistry.retire, lease_ended
    unload, evict            AdapterService.unload (every version of the name), _evict (the one that is serving)
    crash                    TokenizerManager.back_died
    the back                 LoRAControl and SchedulerControl: stage, free, switch, submit, abort in order of arrival

Steps are split into progress (messages are read, the back stages, decodes and ends what it has) and choices (of
clients, trainers, operators and fate). Choices may stop at any time, progress may not: that is the fairness under which
everything retired must be freed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

NONE, STAGING, SERVING, RETIRING, FREEING, GONE = range(6)
"""States of a version in the front; NONE is a version that has not been loaded yet."""

NOBODY = -1
Message = tuple[Any, ...]


class Violation(Exception):
    """The protocol has broken a promise."""


class Phase(Enum):
    """Of a request, as the front sees it."""

    NEW = "new"
    LOOKED_UP = "looked up"
    SENT = "sent"
    CLOSED = "closed"


class Request(NamedTuple):
    """Fields: `version` it holds; `ending` once the front wants it ended; `held` while its lease counts."""

    phase: Phase = Phase.NEW
    version: int = NOBODY
    ending: bool = False
    held: bool = False


class State(NamedTuple):
    """Both processes and what is between them.

    Fields:
        versions: states, by id; name: the version it means; ledger: holders of each version.
        load: (version, mode) of the load in progress; switching: (old, new) of a switch that has not been answered.
        staged, staging: versions the back has, and those it is copying; live: version each request runs on.
        tokens: how many more each request may produce.
        unloads, evictions, crashes: how many more there may be; down: the back is dead.
        to_back, to_front: the channels.
    """

    versions: tuple[int, ...]
    name: int
    ledger: tuple[int, ...]
    requests: tuple[Request, ...]
    load: tuple[int, str] | None
    switching: tuple[int, int] | None
    switch_applied: bool
    staged: frozenset[int]
    staging: frozenset[int]
    seen: frozenset[int]
    live: tuple[int, ...]
    tokens: tuple[int, ...]
    unloads: int
    evictions: int
    crashes: int
    down: bool
    to_back: tuple[Message, ...]
    to_front: tuple[Message, ...]


def put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    """The tuple with one entry replaced."""
    return (*values[:place], value, *values[place + 1 :])


class Model:
    """The protocol.

    Args:
        broken: names of promises that the front shall not keep; see BROKEN.
    """

    def __init__(
        self, versions: int = 2, requests: int = 2, tokens: int = 1, unloads: int = 1, evictions: int = 1,
        crashes: int = 1, broken: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.broken = broken
        self.initial = State(
            versions=(NONE,) * versions, name=NOBODY, ledger=(0,) * versions, requests=(Request(),) * requests,
            load=None, switching=None, switch_applied=False, staged=frozenset(), staging=frozenset(), seen=frozenset(),
            live=(NOBODY,) * requests, tokens=(tokens,) * requests, unloads=unloads, evictions=evictions,
            crashes=crashes, down=False, to_back=(), to_front=(),
        )  # fmt: skip

    # ---- the front's transitions -----------------------------------------------------------------------------------

    def send(self, s: State, *message: Any) -> State:
        return s if s.down else s._replace(to_back=(*s.to_back, message))

    def free_if_unheld(self, s: State, v: int) -> State:
        """LoRARegistry.lease_ended."""
        held = s.ledger[v] or (s.switching is not None and s.switching[1] == v and "no hold" not in self.broken)
        if s.versions[v] != RETIRING or (held and "free at retire" not in self.broken):
            return s
        if s.down:
            return s._replace(versions=put(s.versions, v, GONE))
        return self.send(s._replace(versions=put(s.versions, v, FREEING)), "free", v)

    def retire(self, s: State, v: int) -> State:
        if s.versions[v] != SERVING:
            return s
        name = NOBODY if s.name == v else s.name
        return self.free_if_unheld(s._replace(versions=put(s.versions, v, RETIRING), name=name), v)

    def release(self, s: State, r: int) -> State:
        request = s.requests[r]
        if not request.held:
            raise Violation(f"request {r} is released twice")
        v = request.version
        s = s._replace(
            requests=put(s.requests, r, request._replace(held=False)), ledger=put(s.ledger, v, s.ledger[v] - 1)
        )
        return self.free_if_unheld(s, v)

    def close(self, s: State, r: int) -> State:
        """RequestLifecycle._close."""
        request = s.requests[r]
        if request.phase is not Phase.SENT:
            return s
        s = s._replace(requests=put(s.requests, r, request._replace(phase=Phase.CLOSED)))
        forgets = "no release after abort" in self.broken and request.ending
        return s if forgets or not (request.held or "release at abort" in self.broken) else self.release(s, r)

    def publish(self, s: State, v: int, mode: str) -> State:
        previous = s.name
        s = s._replace(versions=put(s.versions, v, SERVING), name=v)
        if previous in (NOBODY, v):
            return s._replace(load=None)
        if mode == "switch" and s.ledger[previous]:
            return self.send(s._replace(switching=(previous, v)), "switch", previous, v)
        return self.retire(s._replace(load=None), previous)

    def move(self, s: State) -> State:
        """RequestLifecycle.switch, and what follows it in the service."""
        assert s.switching is not None
        old, new = s.switching
        if "leases do not move" not in self.broken:
            for r, request in enumerate(s.requests):
                if request.held and request.version == old:
                    s = s._replace(requests=put(s.requests, r, request._replace(version=new)))
                    ledger = put(s.ledger, old, s.ledger[old] - 1)
                    s = s._replace(ledger=put(ledger, new, ledger[new] + 1))
        return s

    def after_switch(self, s: State) -> State:
        assert s.switching is not None
        old, new = s.switching
        s = self.retire(s._replace(switching=None, switch_applied=False, load=None), old)
        return self.free_if_unheld(self.free_if_unheld(s, old), new)

    # ---- what the front reads --------------------------------------------------------------------------------------

    def read_front(self, s: State) -> State:
        message, *rest = s.to_front
        s = s._replace(to_front=tuple(rest))
        kind, *args = message
        if kind == "staged":
            v, success = args
            assert s.load is not None
            if success:
                return self.publish(s, v, s.load[1])
            return s._replace(versions=put(s.versions, v, GONE), load=None)
        if kind == "switched":
            if "switch applied later" in self.broken and args[0]:
                return s._replace(switch_applied=True)
            return self.after_switch(self.move(s) if args[0] else s)
        if kind == "freed":
            return s._replace(versions=put(s.versions, args[0], GONE))
        r, made_by = args
        request = s.requests[r]
        if request.phase is Phase.SENT and not request.ending and request.version != made_by:
            raise Violation(f"a token of version {made_by} is told to be of version {request.version}")
        return self.close(s, r) if kind == "end" else s

    # ---- what the back reads ---------------------------------------------------------------------------------------

    def read_back(self, s: State) -> Iterator[State]:
        message, *rest = s.to_back
        s = s._replace(to_back=tuple(rest))
        kind, *args = message
        if kind == "stage":
            (v,) = args
            if v in s.seen:
                raise Violation(f"version id {v} is used twice")
            yield s._replace(staging=s.staging | {v}, seen=s.seen | {v})
        elif kind == "submit":
            r, v = args
            if v not in s.staged:
                raise Violation(f"request {r} names version {v}, which is not staged")
            yield s._replace(live=put(s.live, r, v))
        elif kind == "abort":
            yield self.end(s, args[0])
            if s.live[args[0]] != NOBODY:
                yield s  # its step is still running: it ends later
        elif kind == "free":
            (v,) = args
            if v not in s.staged:
                raise Violation(f"version {v} is freed twice")
            if v in s.live:
                raise Violation(f"version {v} is freed under a live request")
            yield s._replace(staged=s.staged - {v}, to_front=(*s.to_front, ("freed", v)))
        else:
            old, new = args
            if not {old, new} <= s.staged:
                raise Violation(f"a switch from {old} to {new}, of which one is not staged")
            moved = tuple(new if v == old else v for v in s.live)
            yield s._replace(live=moved, to_front=(*s.to_front, ("switched", True)))
            yield s._replace(to_front=(*s.to_front, ("switched", False)))

    def end(self, s: State, r: int) -> State:
        if s.live[r] == NOBODY:
            return s
        return s._replace(live=put(s.live, r, NOBODY), to_front=(*s.to_front, ("end", r, s.live[r])))

    # ---- steps -----------------------------------------------------------------------------------------------------

    def progress(self, s: State) -> Iterator[State]:
        """What happens by itself, sooner or later."""
        if s.down:
            return
        if s.to_back:
            yield from self.read_back(s)
        if s.to_front:
            yield self.read_front(s)
        if s.switch_applied:
            yield self.after_switch(self.move(s))
        for v in s.staging:
            for success in (True, False):
                staged = s.staged | {v} if success else s.staged
                answer = ("staged", v, success)
                yield s._replace(staging=s.staging - {v}, staged=staged, to_front=(*s.to_front, answer))
        for r, request in enumerate(s.requests):
            if s.live[r] != NOBODY:
                yield self.end(s, r)
            if request.phase is Phase.LOOKED_UP:
                yield self.count(s, r, request.version)

    def choices(self, s: State) -> Iterator[State]:
        """What somebody may do, or not."""
        if s.unloads:
            after = s._replace(unloads=s.unloads - 1)
            for v in range(len(s.versions)):
                after = self.retire(after, v)
            yield after
        if s.evictions and s.name != NOBODY:
            yield self.retire(s._replace(evictions=s.evictions - 1), s.name)
        if s.down:
            return
        if s.load is None:
            yield from self.begin_load(s)
        for r, request in enumerate(s.requests):
            if request.phase is Phase.NEW and s.name != NOBODY:
                if "look-up and count apart" in self.broken:
                    looked_up = request._replace(phase=Phase.LOOKED_UP, version=s.name)
                    yield s._replace(requests=put(s.requests, r, looked_up))
                else:
                    yield self.count(s, r, s.name)
            elif request.phase is Phase.SENT and not request.ending:
                yield self.abort(s, r)
            if s.live[r] != NOBODY and s.tokens[r]:
                row = ("row", r, s.live[r])
                yield s._replace(tokens=put(s.tokens, r, s.tokens[r] - 1), to_front=(*s.to_front, row))
        if s.crashes:
            yield self.crash(s)

    def begin_load(self, s: State) -> Iterator[State]:
        for v, state in enumerate(s.versions):
            if state == NONE or (state == GONE and "ids are reused" in self.broken):
                for mode in ("finish old", "switch"):
                    begun = s._replace(versions=put(s.versions, v, STAGING), load=(v, mode))
                    if "publish before staged" in self.broken:
                        begun = begun._replace(name=v)
                    yield self.send(begun, "stage", v)
                return

    def count(self, s: State, r: int, v: int) -> State:
        request = s.requests[r]._replace(phase=Phase.SENT, version=v, held=True)
        s = s._replace(requests=put(s.requests, r, request), ledger=put(s.ledger, v, s.ledger[v] + 1))
        return self.send(s, "submit", r, v)

    def abort(self, s: State, r: int) -> State:
        """By the client, or for a client that has gone: the same."""
        s = self.send(s._replace(requests=put(s.requests, r, s.requests[r]._replace(ending=True))), "abort", r)
        return self.release(s, r) if self.broken & {"release at disconnect", "release at abort"} else s

    def crash(self, s: State) -> State:
        """Every record closes, and what is not serving is gone with the back."""
        s = s._replace(
            crashes=s.crashes - 1, down=True, to_back=(), to_front=(), staging=frozenset(), staged=frozenset(),
            live=(NOBODY,) * len(s.live), switch_applied=False,
            requests=tuple(r._replace(phase=Phase.CLOSED) if r.phase is Phase.LOOKED_UP else r for r in s.requests),
        )  # fmt: skip
        for r in range(len(s.requests)):
            s = self.close(s, r)
        if s.switching is not None:
            s = self.after_switch(s)
        s = s._replace(load=None)
        return s._replace(versions=tuple(GONE if v in (STAGING, FREEING) else v for v in s.versions))

    # ---- promises --------------------------------------------------------------------------------------------------

    def check(self, s: State) -> None:
        """What holds in every state."""
        for v, count in enumerate(s.ledger):
            holders = sum(request.held and request.version == v for request in s.requests)
            if count != holders:
                raise Violation(f"the ledger of version {v} says {count}, and {holders} requests hold it")
            if s.versions[v] in (SERVING, RETIRING) and v not in s.staged and not s.down:
                raise Violation(f"version {v} serves and is not staged")
            if s.versions[v] == RETIRING and not count and (s.switching is None or v not in s.switching):
                raise Violation(f"version {v} is retired, unheld, and stays")
        if s.name != NOBODY and s.versions[s.name] != SERVING:
            raise Violation("the name means a version that does not serve")

    def check_end(self, s: State) -> None:
        """What holds where nothing happens by itself any more."""
        if s.load or s.switching or s.to_back or s.to_front:
            raise Violation("a load hangs, or a message that nobody reads")
        if any(request.phase in (Phase.SENT, Phase.LOOKED_UP) for request in s.requests):
            raise Violation("a client hangs")
        if any(s.ledger):
            raise Violation("a lease has leaked")
        if any(state in (STAGING, RETIRING, FREEING) for state in s.versions):
            raise Violation("an unload hangs")
        serving = {v for v, state in enumerate(s.versions) if state == SERVING}
        if serving - {s.name} or (s.staged != serving and not s.down):
            raise Violation("the back keeps what nobody can use")


BROKEN = [
    "release at disconnect", "release at abort", "no release after abort", "publish before staged", "free at retire",
    "ids are reused", "switch applied later", "leases do not move", "no hold", "look-up and count apart",
]  # fmt: skip
"""Ways to break the protocol, each seen in a real system or found in this one."""


class Explored(NamedTuple):
    """Fields: states, steps, and ends: states in which nothing happens by itself any more."""

    states: int
    steps: int
    ends: int


def explore(model: Model) -> Explored:
    """Visit every reachable state, breadth first, and hold it to the promises.

    Liveness: progress has no cycles (asserted), so whatever the order, it comes to an end, and `check_end` holds there.
    """
    number: dict[State, int] = {model.initial: 0}
    frontier = deque([model.initial])
    progress: list[list[int]] = []
    steps = ends = 0
    while frontier:
        state = frontier.popleft()
        model.check(state)
        edges: list[int] = []
        for edge, following in [(True, s) for s in model.progress(state)] + [(False, s) for s in model.choices(state)]:
            steps += 1
            if following not in number:
                number[following] = len(number)
                frontier.append(following)
            if edge:
                edges.append(number[following])
        if not edges:
            ends += 1
            model.check_end(state)
        progress.append(edges)
    assert len(progress) == len(number)
    assert not has_cycle(progress), "progress without an end"
    return Explored(len(number), steps, ends)


def has_cycle(edges: list[list[int]]) -> bool:
    """Whether a directed graph, as lists of successors, has a cycle."""
    incoming = [0] * len(edges)
    for successors in edges:
        for place in successors:
            incoming[place] += 1
    ready = [place for place, count in enumerate(incoming) if not count]
    for place in ready:
        for successor in edges[place]:
            incoming[successor] -= 1
            if not incoming[successor]:
                ready.append(successor)
    return len(ready) < len(edges)
