"""Attempts for a training step, generated while the step before is trained, and never older than the recipe allows.

Owned by `train` on one rank, whose thread calls it; everything else happens on an event loop in a thread of its own,
and rewards are computed in a few more.

    rollout = Rollout(urls, recipe.rollout, task, tokenizer, adapter_name=lambda: name_of(publisher.current))
    publisher.follow(rollout.published)
    while ...:
        groups = rollout.collect(recipe.rollout.groups, current_version)
        ...train, publish...

All attempts at a problem are sent to one server together, so that they share its prompt cache, and make a group.
Groups end in any order. Before a step takes them there are at most the step's own and `max_staleness` further steps'
groups, so that each is used in time; a step waits for those that the next one could not use any more, because taking
only quick ones would teach the model to be brief.

Invariants: a group that `collect` returns is complete, and none of its tokens is more than `max_staleness` versions
older than the version it was asked for; what is too old is dropped, counted, and its problem begun again; every
problem is used or counted once, also across `snapshot` and `restore`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sglang.rl.config import RolloutSection
from sglang.rl.generation import UNKNOWN, Attempt, Fleet, Published, Rejected, Sampling
from sglang.rl.publisher_version import Version
from sglang.rl.samples import Group, Problem
from sglang.rl.tasks.base import PromptTokenizer, Task
from sglang.srt.errors import SglangError

logger = logging.getLogger(__name__)

T = TypeVar("T")

REFUSALS = 8
"""Problems refused in a row, after which something other than the problems is wrong."""
SCORERS = 8
WATCH_SECONDS = 1.0
_NOT_A_PROBLEM = (401, 403, 404, 405)


class RolloutError(SglangError):
    """Generation cannot go on; the message says why."""


@dataclass(eq=False, slots=True)
class _Run:
    """A group on its way.

    Fields:
        order: among all; index: of the problem in the seed's sequence, None for an evaluation.
        began: event-loop time.
        group: set when it has ended; error: why an attempt ran out of time.
    """

    order: int
    index: int | None
    problem: Problem
    sampling: Sampling
    samples: int
    started_at: int = 0
    began: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    group: Group | None = None
    error: str = ""

    @property
    def oldest(self) -> int:
        """Version of its oldest token; while it runs, of the oldest that it may have."""
        versions = [min(a.sample.versions, default=self.started_at) for a in self.attempts]
        oldest = min(versions, default=self.started_at)
        return self.started_at if oldest == UNKNOWN else oldest

    def resolve(self, published: Published) -> None:
        """Fill in versions that have been announced."""
        for attempt in self.attempts:
            attempt.resolve(published)

    def result(self, counts: Counter[str]) -> Group:
        """The group, to be handed out."""
        assert self.group is not None
        # Whatever was not announced was served after the group was begun.
        counts["tokens_unknown_version"] += sum(attempt.settle(self.started_at) for attempt in self.attempts)
        return self.group

    def cancel(self) -> None:
        """Give it up, if it runs."""
        if self.task is not None:
            self.task.cancel()


class _ProblemOrder:
    """Which problems of the sequence come next: `again` first, then all from `next` on."""

    def __init__(self) -> None:
        self.next = 0
        self.again: list[int] = []

    def take(self) -> int:
        """The next one."""
        if self.again:
            first = min(self.again)
            self.again.remove(first)
            return first
        self.next += 1
        return self.next - 1


class _Worker:
    """Turns a run into a group: tokenizes, has the attempts made, computes rewards in threads of its own."""

    def __init__(self, fleet: Fleet, task: Task, tokenizer: PromptTokenizer, timeout: float) -> None:
        self._fleet, self._task, self._tokenizer, self._timeout = fleet, task, tokenizer, timeout
        self._scorers = concurrent.futures.ThreadPoolExecutor(SCORERS, thread_name_prefix="score")

    async def work(self, run: _Run) -> None:
        """Set `attempts`, then `group`, or `error` for a group of training that has no end in time.

        Raises:
            Rejected: the servers refuse the problem.
        """
        ids = self._tokenizer.encode(run.problem.prompt, add_special_tokens=False)
        server = self._fleet.choose()
        starts = [self._fleet.start(ids, run.sampling, server, self._timeout) for _ in range(run.samples)]
        try:
            run.attempts = list(await asyncio.gather(*starts))
        finally:
            for start in starts:
                start.cancel()
        run.error = next((a.error for a in run.attempts if a.sample.finish == "abort"), "")
        if run.error and run.index is not None:
            return
        group = Group(run.problem, [attempt.sample for attempt in run.attempts], run.started_at)
        await asyncio.get_running_loop().run_in_executor(self._scorers, self._score, group)
        run.group = group

    def close(self) -> None:
        """Free the threads; from outside the event loop."""
        self._scorers.shutdown(cancel_futures=True)

    def _score(self, group: Group) -> None:
        for sample in group.samples:
            sample.text = self._tokenizer.decode(sample.output_ids, skip_special_tokens=True)
            sample.reward = self._task.score(group.problem, sample.text, sample.finish)


class _Schedule:
    """What runs, what waits, what is used: on the event loop, between two awaits always consistent."""

    def __init__(
        self,
        section: RolloutSection,
        worker: _Worker,
        fleet: Fleet,
        problem_of: Callable[[int], Problem],
        published: Published,
        counts: Counter[str],
    ) -> None:
        self._section, self._worker, self._fleet, self._problem_of = section, worker, fleet, problem_of
        self._sampling = Sampling(
            section.max_new_tokens, section.temperature, section.top_p, section.top_k, section.partial_rollouts
        )
        self._published, self._counts = published, counts
        self.order = _ProblemOrder()
        self.runs: list[_Run] = []
        self.open = False
        self._evaluations: list[_Run] = []
        self._orders = itertools.count()
        self._in_flight = self._wanted = self._version = self._refusals = 0
        self._error: RolloutError | None = None
        self._changed = asyncio.Event()

    async def collect(self, count: int, version: int) -> list[Group]:
        """See `Rollout`."""
        self.open, self._wanted = True, count
        self.advance(version)
        try:
            while (chosen := self._choose(count)) is None:
                self._fill()
                await self._change()
        finally:
            self._wanted = 0
        self.runs = [run for run in self.runs if run not in chosen]
        self._counts["groups_used"] += count
        self._fill()
        return [run.result(self._counts) for run in chosen]

    async def evaluate(self, problems: Sequence[Problem], samples: int, sampling: Sampling) -> list[Group]:
        """See `Rollout`."""
        runs = [_Run(next(self._orders), None, problem, sampling, samples) for problem in problems]
        self._evaluations += runs
        try:
            self._fill()
            while not all(run.group for run in runs):
                await self._change()
        except BaseException:
            self._evaluations = [run for run in self._evaluations if run not in runs]
            for run in runs:
                run.cancel()
            raise
        return [run.result(self._counts) for run in runs]

    def advance(self, version: int) -> None:
        """The trainer's policy is this version now; what is too old for it is dropped, and its problem comes again."""
        self._version = version
        for run in list(self.runs):
            self._check_age(run)

    # ---- what to use, what to begin ----------------------------------------------------------------------------------

    def _choose(self, count: int) -> list[_Run] | None:
        """Groups for a step, oldest first; None while there are too few, or while one runs that only it can use."""
        last_chance = self._version - self._section.max_staleness
        ready = sorted((run for run in self.runs if run.group), key=lambda run: (run.oldest, run.order))
        if len(ready) < count:
            return None
        urgent = sum(run.oldest <= last_chance for run in ready)
        if urgent < count and any(run.group is None and run.oldest <= last_chance for run in self.runs):
            return None
        return ready[:count]

    def _fill(self) -> None:
        """Begin what there is room for: evaluations, then problems, as many as will be used in time."""
        section = self._section
        while self._evaluations and self._has_room(self._evaluations[0].samples):
            self._begin(self._evaluations.pop(0))
        while self.open and not self._evaluations and self._has_room(section.samples):
            if len(self.runs) >= self._wanted + section.max_staleness * section.groups or self._error is not None:
                return
            try:
                index = self.order.take()
                problem = self._problem_of(index)
            except Exception as error:  # of a task: for the trainer's thread to see, whoever called
                self._fail(f"the task has no problem {index}: {type(error).__name__}: {error}", error)
                return
            run = _Run(next(self._orders), index, problem, self._sampling, section.samples)
            self.runs.append(run)
            self._counts["groups_started"] += 1
            self._begin(run)

    def _has_room(self, samples: int) -> bool:
        """A group is not split; one that is larger than the limit runs alone."""
        return not self._in_flight or self._in_flight + samples <= self._section.max_concurrent

    def _begin(self, run: _Run) -> None:
        loop = asyncio.get_running_loop()
        run.began, run.started_at = loop.time(), self._version
        self._in_flight += run.samples
        run.task = loop.create_task(self._worker.work(run))
        run.task.add_done_callback(lambda task: self._ended(run, task))

    # ---- how groups end ----------------------------------------------------------------------------------------------

    async def _change(self) -> None:
        """Wait until a group has ended.

        Raises:
            RolloutError: it cannot go on.
        """
        self._changed.clear()
        if self._error is None:
            await self._changed.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _ended(self, run: _Run, task: asyncio.Task[None]) -> None:
        self._in_flight -= run.samples
        dropped = run.index is not None and run not in self.runs
        if not task.cancelled() and not dropped:
            error = task.exception()
            if isinstance(error, Rejected):
                self._refused(run, error)
            elif error is not None:
                self._drop(run, "groups_failed")
                self._fail(f"{run.problem.key}: {type(error).__name__}: {error}", error)
            elif run.error:
                self._timed_out(run)
            else:
                self._refusals = 0
                self._check_age(run)
        self._fill()
        self._changed.set()

    def _check_age(self, run: _Run) -> None:
        run.resolve(self._published)
        if run.index is None or self._version - run.oldest <= self._section.max_staleness:
            return
        run.cancel()
        self._drop(run, "groups_stale")
        self.order.again.append(run.index)
        logger.info("%s is too old: version %d at version %d", run.problem.key, run.oldest, self._version)

    def _refused(self, run: _Run, error: Rejected) -> None:
        """A prompt that is too long must not end a run; a key that is wrong must."""
        self._drop(run, "groups_rejected")
        self._refusals += 1
        if run.index is None or error.status in _NOT_A_PROBLEM or self._refusals >= REFUSALS:
            self._fail(str(error), error)
        else:
            logger.warning("%s is left out: %s", run.problem.key, error)

    def _timed_out(self, run: _Run) -> None:
        """An evaluation takes what there is; a group of training cannot be used."""
        if run.index is not None:
            self._drop(run, "groups_failed")
        if self._fleet.last_answer < run.began:
            self._fail(f"no server has answered since {run.problem.key} was begun: {run.error}", None)
        else:
            logger.warning("%s: an attempt had %s", run.problem.key, run.error)

    def _drop(self, run: _Run, name: str) -> None:
        self.runs = [other for other in self.runs if other is not run]
        self._counts[name] += 1

    def _fail(self, message: str, cause: BaseException | None) -> None:
        self._error = RolloutError(message)
        self._error.__cause__ = cause


class Rollout:
    """See the module.

    Args:
        urls: of the servers.
        seed: of the task's sequence of problems.
        adapter_name: what requests ask for, called for each; None is the base model.
        api_key: the servers'.
        watch: called about once a second by the thread that waits in `collect` or `evaluate`, for a trainer that looks
            after its servers; may call `published` and `restarted`, and what it raises reaches the caller.
    """

    def __init__(
        self,
        urls: Sequence[str],
        section: RolloutSection,
        task: Task,
        tokenizer: PromptTokenizer,
        *,
        adapter_name: Callable[[], str | None],
        api_key: str | None = None,
        seed: int = 0,
        watch: Callable[[], None] | None = None,
    ) -> None:
        if not urls:
            raise ValueError("there are no servers; give at least one URL")
        self._section, self._seed, self._watch = section, seed, watch
        self._counts: Counter[str] = Counter()
        self._published = Published()
        self._fleet = fleet = Fleet(urls, adapter_name, self._published, self._counts, api_key)
        self._worker = _Worker(fleet, task, tokenizer, section.timeout)
        self._schedule = _Schedule(
            section, self._worker, fleet, lambda index: task.problem(seed, index), self._published, self._counts
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()

    def collect(self, count: int, current_version: int) -> list[Group]:
        """Groups for a step, with rewards; waits for them. From the first call on, problems are worked on ahead.

        Args:
            current_version: number of the publish that the trainer's policy is; 0 before the first.

        Raises:
            RolloutError: no server answers, or all problems are refused.
        """
        return self._call(self._schedule.collect(count, current_version), self._watch)

    def evaluate(
        self, problems: Sequence[Problem], samples: int, temperature: float, max_new_tokens: int | None = None
    ) -> list[Group]:
        """Attempts at these problems, in their order, ahead of any that are for training.

        An attempt that no server has ended in time has finish ``abort`` and the tokens that it has.

        Raises:
            RolloutError: as `collect`.
        """
        section = self._section
        sampling = Sampling(max_new_tokens or section.max_new_tokens, temperature, section.top_p, section.top_k)
        return self._call(self._schedule.evaluate(problems, samples, sampling), self._watch)

    def published(self, version: Version, number: int | None = None) -> None:
        """All servers serve this version (a follower of `Publisher`); before `collect` is asked for groups of it.

        Args:
            number: what it counts as, if not as the publisher's own number: the same weights that had to be published
                again keep theirs, and a resumed run counts on where a new publisher begins with 1.
        """
        number = version.number if number is None else number
        self._published.add(version, number)
        self._loop.call_soon_threadsafe(self._schedule.advance, number)

    def restarted(self, url: str) -> None:
        """This server has been started again and has forgotten its adapters: its numbers begin from 1 again."""
        self._published.forget(url)

    def counters(self) -> dict[str, int]:
        """Sums since the start, those above 0.

        Names: groups_started, groups_used, groups_stale, groups_failed, groups_rejected; continuations of attempts that
        were cut off, retries of requests that failed, tokens, tokens_discarded, tokens_unknown_version.
        """
        return {name: count for name, count in self._counts.items() if count}

    def snapshot(self) -> dict[str, Any]:
        """Which problems come next, as JSON: those that are worked on or wait to be used, then the rest."""
        return self._call(self._snapshot())

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a snapshot was taken; before the first `collect`.

        Raises:
            ValueError: the snapshot is of another seed.
        """
        if state["seed"] != self._seed:
            raise ValueError(f"the snapshot is of seed {state['seed']}, this run of {self._seed}")
        assert not self._schedule.open, "restore comes before the first collect"
        self._schedule.order.next, self._schedule.order.again = state["next"], list(state["again"])

    def close(self) -> None:
        """Give up everything that is on its way; servers see their clients leave."""
        if not self._thread.is_alive():
            return
        self._call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._worker.close()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _snapshot(self) -> dict[str, Any]:
        schedule = self._schedule
        unused = [run.index for run in schedule.runs if run.index is not None]
        return {"seed": self._seed, "next": schedule.order.next, "again": sorted(unused + schedule.order.again)}

    async def _shut_down(self) -> None:
        self._schedule.open = False
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fleet.close()

    def _call(self, work: Coroutine[Any, Any, T], watch: Callable[[], None] | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while watch is not None and not future.done():
                concurrent.futures.wait([future], WATCH_SECONDS)
                if not future.done():
                    watch()
            return future.result()
        except BaseException:
            future.cancel()
            raise
