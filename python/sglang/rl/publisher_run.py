"""One publication: its phases in their order, on all servers at once, and what is undone when one fails.

Made and run once by `publisher`. Invariants: no server commits before all have staged; a phase ends with its deadline;
what was paused is resumed; an error says what every server has been left with.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sglang.rl.publisher_package import Package
from sglang.rl.publisher_server import Refused, Server, Staged
from sglang.rl.publisher_version import PublishError, PublishMode, ServerReport, Settings, Version
from sglang.rl.transport import Deadline, Outcome, SharedFiles, fan_out
from sglang.srt.errors import SglangError

if TYPE_CHECKING:  # it imports torch, which other transports do without
    from sglang.rl.broadcast import Broadcaster

T = TypeVar("T")

CLEAN_UP_SECONDS = 5.0
"""Most that undoing, unloading and asking what servers serve may take; the trainer waits for none of them longer."""
_UNCHANGED = "Nothing was committed: every server goes on with what it served."


@dataclass
class Publication:
    """One call of `publish`; see the module.

    Fields:
        pack: makes the package, given the layout of the slabs that all servers take, or None.
        broadcaster: for the transport of its name.
        number: grows where servers have names of such numbers already.
        staged, committed_at, phases, warnings: by server.
    """

    settings: Settings
    pack: Callable[[Mapping[str, Any] | None], Package]
    mode: PublishMode
    number: int
    servers: dict[str, Server]
    started: float
    broadcaster: Broadcaster | None = None
    package: Package = field(init=False)
    name: str = ""
    staged: dict[str, Staged] = field(default_factory=dict)
    committed_at: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def run(self) -> Version:
        """Every phase in turn."""
        self._probe()
        with self._files() as path:
            if self.mode != "pause":
                self._stage(path)
                self._commit(path)
            elif self._has_stock:
                # A stock server makes room for a name by waiting for another one's users: there are none while paused.
                with self._paused():
                    self._stage(path)
                    self._commit(path)
            else:
                self._stage(path)
                with self._paused():
                    self._commit(path)
        self._unload_old()
        return self._version(self.servers)

    @property
    def _has_stock(self) -> bool:
        return any(server.kind == "stock" for server in self.servers.values())

    @property
    def _hold(self) -> float:
        """Seconds after which servers undo by themselves what a trainer that died has begun."""
        return 4 * self.settings.timeout + 2 * self.settings.grace

    @property
    def _clean_up(self) -> float:
        return min(CLEAN_UP_SECONDS, self.settings.timeout)

    # ---- phases --------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        names = self._require("probe", lambda server, deadline: server.probe(deadline))
        self.package = self.pack(_common_layout([server.slab_layout for server in self.servers.values()]))
        self.name = self.settings.name
        if not self._has_stock:
            return
        if self.mode == "switch":
            stock = {url: "a stock server" for url, server in self.servers.items() if server.kind == "stock"}
            raise PublishError("mode switch", stock, "Only versioned servers move running requests; use mode live.")
        if self.broadcaster is not None:
            stock = {url: "a stock server" for url, server in self.servers.items() if server.kind == "stock"}
            raise PublishError("transport broadcast", stock, "Only versioned servers take one; use transport auto.")
        self.package.check_finite()
        before, after = map(re.escape, self.settings.versioned_name.split("{n}", 1))
        pattern = re.compile(rf"{before}(\d+){after}")
        taken = [int(m[1]) for found in names.values() for n in found if (m := pattern.fullmatch(n))]
        self.number = max(self.number, *(n + 1 for n in taken), 1)
        self.name = self.settings.versioned_name.replace("{n}", str(self.number))

    @contextlib.contextmanager
    def _files(self) -> Iterator[str | None]:
        """The directory for servers that read files, if there are any; what else takes time to make is made here."""
        reads_files = self._require("probe", lambda server, _: server.reads_files())
        if any(self.servers[url].kind == "stock" and not reads for url, reads in reads_files.items()):
            self.package.make_pickle()
        if not any(reads_files.values()):
            yield None
            return
        try:
            files = SharedFiles(self.settings.directory, self.package.files())
        except OSError as error:
            if self.settings.transport != "auto":
                raise PublishError("writing", {self.settings.directory: str(error)}, _UNCHANGED) from error
            yield None
            return
        with files:
            yield files.path

    def _stage(self, path: str | None) -> None:
        def stage(server: Server, deadline: Deadline) -> Staged:
            return server.stage(self.package, self.name, path, self._hold, deadline)

        if self.broadcaster is None:
            outcomes = self._each("stage", stage)
        else:
            timeout = self.settings.timeout
            outcomes = self.broadcaster.stage(self._each, self.servers, self.package, self.name, self._hold, timeout)
        self.staged = {url: outcome.value for url, outcome in outcomes.items() if outcome.value is not None}
        failures = _failures(outcomes)
        digests = {url: staged.digest for url, staged in self.staged.items() if staged.digest is not None}
        if not failures and len(set(digests.values())) > 1:
            failures = {url: f"it has read content {digest}, others have not" for url, digest in digests.items()}
        if failures:
            self._undo()
            raise PublishError("stage", failures, _UNCHANGED)

    def _commit(self, path: str | None) -> None:
        def commit(server: Server, deadline: Deadline) -> None:
            self._commit_one(server, path, deadline)

        outcomes = self._each("commit", commit)
        failed = {url: outcome for url, outcome in outcomes.items() if outcome.error is not None}
        if failed:
            self._explain(_failures(failed))

    def _commit_one(self, server: Server, path: str | None, deadline: Deadline) -> None:
        mode: Literal["finish_old", "switch"] = "switch" if self.mode == "switch" else "finish_old"
        try:
            server.commit(self.name, self.staged[server.url], mode, deadline)
        except Refused as error:
            # It has started again since, or another publisher was there: others may have committed, so catch up.
            if error.code != "adapter_not_found":
                raise
            self.staged[server.url] = server.stage(self.package, self.name, path, self._hold, deadline)
            server.commit(self.name, self.staged[server.url], mode, deadline)
        if self._has_stock and self.name not in server.loaded:
            server.loaded.append(self.name)
        self.committed_at[server.url] = time.perf_counter() - self.started

    def _explain(self, failures: dict[str, str]) -> None:
        """Say who serves what. No error if they all serve the version: replies were lost."""
        answers = self._each("serving", lambda server, left: server.serving(self.name, left), self._clean_up)
        serving = {}
        for url, answer in answers.items():
            staged = self.staged[url]
            if staged.version_id is None:
                serving[url] = f"{self.name}, this version"
            elif answer.error is None and answer.value == (staged.version_id, staged.digest):
                failures.pop(url, None)
                self.committed_at.setdefault(url, time.perf_counter() - self.started)
                serving[url] = f"version {staged.version_id}, this one"
            elif answer.error is not None:
                serving[url] = f"what it did, or this one: it cannot be asked ({answer.error})"
            else:
                found = answer.value
                serving[url] = "nothing by this name" if found is None else f"version {found[0]}, not this one"
        if not failures:
            return
        if not self.committed_at:
            self._undo()
        version = self._version([url for url in self.servers if url in self.committed_at])
        outcome = "Publish again: servers that have this version keep it. Or remove_server those that are gone."
        raise PublishError("commit", failures, outcome, serving, version if version.servers else None)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Pause and drain; flush what has been committed; resume whatever happens."""
        grace, timeout = self.settings.grace, self.settings.timeout
        try:
            self._require("pause", lambda server, deadline: server.pause(self._hold, deadline))
            idle = self._require("drain", lambda server, left: server.drain(grace, left), timeout + 2 * grace)
            for url, is_idle in idle.items():
                if not is_idle:
                    self._warn(url, f"requests still ran {2 * grace:g} s after the pause")
            yield
            for url, outcome in self._each("flush", lambda server, deadline: server.flush(deadline)).items():
                if outcome.error is not None or outcome.value:
                    self._warn(url, f"the cache was not flushed: {outcome.error or outcome.value}")
        except BaseException as error:
            for url, text in _failures(self._resume()).items():
                error.args = (f"{error.args[0] if error.args else error}\n{url} could not be resumed: {text}",)
            raise
        failures = _failures(self._resume())
        if failures:
            version = self._version(self.servers)
            raise PublishError("resume", failures, "The version is published; these servers are paused.", {}, version)

    def _resume(self) -> dict[str, Outcome[None]]:
        return self._each("resume", lambda server, deadline: server.resume(deadline))

    def _undo(self) -> None:
        def undo(server: Server, deadline: Deadline) -> None:
            server.undo(self.name, self.staged.get(server.url), deadline)

        self._each("undo", undo, self._clean_up)  # what fails here goes by itself when its time is over

    def _unload_old(self) -> None:
        """Take away names beyond keep_last; a stock server that never answers is not asked again."""
        keep = self.settings.keep_last

        def unload(server: Server, deadline: Deadline) -> None:
            old = [name for name in server.loaded if name != self.name]
            for name in old[: max(0, len(server.loaded) - keep)] if server.stuck is None else ():
                server.unload(name, deadline)

        if not any(server.loaded for server in self.servers.values()):
            return
        for url, text in _failures(self._each("unload", unload, self._clean_up)).items():
            self._warn(url, f"an old version was not unloaded: {text}")

    # ---- the parts of a phase ------------------------------------------------------------------------------------

    def _each(
        self, phase: str, action: Callable[[Server, Deadline], T], seconds: float | None = None
    ) -> dict[str, Outcome[T]]:
        """Do it on all servers at once."""
        seconds = self.settings.timeout if seconds is None else seconds
        deadline = Deadline(seconds)

        def work(server: Server) -> Callable[[], T]:
            return lambda: action(server, deadline)

        works = {url: work(server) for url, server in self.servers.items()}
        outcomes = fan_out(works, seconds, lambda url: self.servers[url].http.interrupt())
        for url, outcome in outcomes.items():
            spent = self.phases.setdefault(url, {})
            spent[phase] = spent.get(phase, 0.0) + outcome.seconds
        return outcomes

    def _require(
        self, phase: str, action: Callable[[Server, Deadline], T], seconds: float | None = None
    ) -> dict[str, T]:
        """The same; all must succeed."""
        outcomes = self._each(phase, action, seconds)
        failures = _failures(outcomes)
        if failures:
            raise PublishError(phase, failures, _UNCHANGED)
        return {url: outcome.value for url, outcome in outcomes.items()}  # type: ignore[misc]

    def _warn(self, url: str, text: str) -> None:
        self.warnings.setdefault(url, []).append(text)

    def _version(self, urls: Iterable[str]) -> Version:
        reports = {}
        for url in urls:
            staged = self.staged[url]
            reports[url] = ServerReport(
                url=url,
                kind=self.servers[url].kind,
                version_id=staged.version_id,
                digest=staged.digest,
                transport=staged.transport,
                latency_s=self.committed_at[url],
                phases=self.phases[url],
                warnings=tuple(self.warnings.get(url, ())),
            )
        total = time.perf_counter() - self.started
        package = self.package
        return Version(self.name, self.number, package.digest, package.nbytes, total, reports, package.form)


def _common_layout(layouts: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """The layout that all servers have but for max_rank, with the smallest of these; None when there is none."""
    known = [layout for layout in layouts if layout is not None]
    alike = [{**layout, "max_rank": 0} for layout in known]
    if not known or len(known) < len(layouts) or any(layout != alike[0] for layout in alike):
        return None
    return {**alike[0], "max_rank": min(layout.get("max_rank", 0) for layout in known)}


def _failures(outcomes: Mapping[str, Outcome[T]]) -> dict[str, str]:
    """What servers did, of those that failed; errors of our own go through."""
    failures = {}
    for url, outcome in outcomes.items():
        if isinstance(outcome.error, SglangError):
            failures[url] = str(outcome.error)
        elif outcome.error is not None:
            raise outcome.error
    return failures
