"""Which request runs next, on how many tokens: the waiting queue, the running set and the memory estimate between them.

Called by the scheduler: `next_step` before a launch, `commit` after it. The planner owns the three places a live
request can be (waiting, partial, running) and is the only caller of KVManager's open/reserve/close.

Order of a step: prompts first (chunked to a token budget), else one token for every running sequence; with
`mixed_chunk` both together. When decoding runs out of pages, the newest requests are retracted: the oldest one always
makes progress, so nothing starves. A request whose adapter version gets no slot is passed over (see lora/slots).
Invariant: a request holds a slot of its version exactly while it holds KV.
"""

from __future__ import annotations

import bisect

from sglang.srt.config.sections import ScheduleSection
from sglang.srt.lora.slots import SlotPool
from sglang.srt.managers.batch import Segment, StepPlan, build_step, plan_decode, plan_segment
from sglang.srt.managers.request import Request, Stage
from sglang.srt.mem_cache.kv_manager import KVManager
from sglang.srt.mem_cache.radix_cache import Match

LPM_MAX_QUEUE = 128
"""Beyond this many waiting requests, sorting them by matched prefix costs more than it saves."""
DEDUPE_TOKENS = 32
"""A prompt whose next this many tokens are being prefilled right now waits a step and finds them in the cache."""
ESTIMATE_CLIP = 4096
"""Output tokens of one request that the memory estimate counts at most."""
START_RATIO, MIN_RATIO, RATIO_STEPS = 0.7, 0.1, 600
"""Share of the remaining output budget set aside per running request: from the first to the second in so many steps."""

PrefixKey = tuple[int, bytes]
"""A cached prefix (its node) and the next DEDUPE_TOKENS tokens after it."""


class Planner:
    """Chooses steps.

    Args:
        kv: memory of every sequence; nobody else opens or closes sequences in it. Its slots bound the running set.
        lora_slots: which adapter versions may run together; None when every request runs on the base model.
    """

    def __init__(self, schedule: ScheduleSection, kv: KVManager, lora_slots: SlotPool | None = None) -> None:
        self.schedule = schedule
        self.kv = kv
        self.lora_slots = lora_slots or SlotPool(0)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.partial: Request | None = None
        self.num_retractions = 0
        self._start_ratio = min(1.0, START_RATIO * schedule.conservativeness)
        self._ratio = self._start_ratio

    @property
    def live(self) -> list[Request]:
        """Requests that hold KV."""
        return self.running if self.partial is None else [*self.running, self.partial]

    def add(self, request: Request) -> None:
        """Queue a request in order of arrival (a retracted one returns to its old place)."""
        bisect.insort(self.waiting, request, key=lambda r: r.arrival)

    def next_step(self, in_flight: bool) -> StepPlan | None:
        """The next step, or None: nothing to do, or (only when `in_flight`) results must be read first."""
        mixed = self.schedule.mixed_chunk
        decodes = self._decodes(in_flight) if mixed else []
        if decodes is None:
            return None
        segments = decodes + self._prefills(len(decodes))
        if not segments and not mixed:
            segments = self._decodes(in_flight) or []
        return build_step(segments, self.kv, tuple(self.lora_slots.versions)) if segments else None

    def commit(self, plan: StepPlan) -> None:
        """Account for a step that has been launched: its KV may be shared with every later step from now on."""
        for segment in plan.segments:
            request = segment.request
            request.num_computed = segment.end
            request.num_scheduled_outputs += segment.samples
            if segment.is_decode:
                continue
            assert request.kv is not None
            self.kv.share(request.kv, request.computed_tokens)
            if segment.end == request.num_known:
                request.stage = Stage.RUNNING
                self.running.append(request)
                if request is self.partial:
                    self.partial = None
            else:
                self.partial = request

    def remove(self, request: Request) -> None:
        """Take a finished or aborted request out, wherever it is, and free its memory (full pages stay cached)."""
        if request.stage is Stage.WAITING:
            self.waiting.remove(request)
        elif request is self.partial:
            self.partial = None
        else:
            self.running.remove(request)
        self._close(request)
        request.stage = Stage.FINISHED

    def retract_all(self) -> None:
        """Send every request back to the queue; no step may be in flight."""
        for request in list(self.live):
            self._retract(request)

    def switch(self, old: int, new: int) -> None:
        """Move every request of one version to another; no step may be in flight.

        Those that hold KV go on with it. They start again when there is no slot for the new version, or when prompt
        positions that the old version has scored have not been sent: a prompt is scored by one version.
        """
        moving = [r for r in self.live if r.version_id == old]
        for request in [r for r in moving if r.stage is Stage.PREFILLING and r.wants_input_scores]:
            self._retract(request)
            moving.remove(request)
        if not self.lora_slots.move(old, new, len(moving)):
            for request in moving:
                self._retract(request)
        for request in [*self.live, *self.waiting]:
            if request.version_id == old:
                request.switch(new)

    def forget_version(self, version_id: int) -> None:
        """Give back the slot and the cached prefixes of a version that no request names."""
        self.lora_slots.drop(version_id)
        self.kv.drop_version(version_id)

    def _close(self, request: Request) -> None:
        if request.kv is not None:
            self.kv.close(request.kv, request.computed_tokens)
            request.kv = None
            self.lora_slots.release(request.version_id)

    def _retract(self, request: Request) -> None:
        if request is self.partial:
            self.partial = None
        else:
            self.running.remove(request)
        self._close(request)
        request.retract()
        self.num_retractions += 1
        self.add(request)

    # ---- decode ----------------------------------------------------------------------------------------------------

    def _decodes(self, in_flight: bool) -> list[Segment] | None:
        """One token for every running sequence that may grow; None when results must be read before retracting."""
        decay = (self._start_ratio - MIN_RATIO) / RATIO_STEPS
        self._ratio = max(min(MIN_RATIO, self._start_ratio), self._ratio - decay)
        segments = []
        for request in sorted(self.running, key=lambda r: r.arrival):
            if request.stage is not Stage.RUNNING or request.remaining_outputs <= 0:
                continue
            assert request.kv is not None
            while not self.kv.reserve(request.kv, request.num_computed + 1):
                if in_flight:
                    return None
                self._ratio = self._start_ratio
                victim = max(self.live, key=lambda r: r.arrival)
                self._retract(victim)
                if victim is request:
                    break
            if request.stage is Stage.RUNNING:
                segments.append(plan_decode(request))
        return segments

    # ---- prefill ---------------------------------------------------------------------------------------------------

    def _prefills(self, num_decodes: int) -> list[Segment]:
        """Prompt chunks within the token budget: the partial request first, then the queue in policy order."""
        budget = self.schedule.max_prefill_tokens
        if self.schedule.chunked_prefill_size is not None:
            budget = min(budget, self.schedule.chunked_prefill_size)
        # At least a page, or decodes could keep prompts away for as long as they run.
        budget = max(budget - num_decodes, self.kv.page_size)
        segments: list[Segment] = []
        in_progress: set[PrefixKey] = set()
        if self.partial is not None:
            in_progress.add(self._next_tokens(self.partial))
            segment = self._extend(self.partial, budget)
            if segment is None or segment.end < self.partial.num_known:
                return [segment] if segment else []
            segments.append(segment)
            budget -= segment.end - segment.start
        self.lora_slots.age((r.passed_over_at, r.version_id) for r in self.waiting if r.passed_over_at is not None)
        for request in self._ordered_queue():
            if budget <= 0 or not self.kv.table.num_free:
                break
            if not self._has_lora_slot(request):
                continue
            match = self._match(request)
            key = self._new_tokens(request, match)
            if key in in_progress:
                continue
            segment = self._admit(request, match, budget, segments)
            if segment is None:
                break
            segments.append(segment)
            in_progress.add(key)
            budget -= segment.end - segment.start
            if segment.end < request.num_known:
                break
        if segments:
            self.waiting = [r for r in self.waiting if r.stage is Stage.WAITING]
        return segments

    def _has_lora_slot(self, request: Request) -> bool:
        """Whether the request's version may run; notes when it was first passed over."""
        admitted = self.lora_slots.admits(request.version_id)
        if not admitted and request.passed_over_at is None:
            request.passed_over_at = self.lora_slots.clock()
        return admitted

    def _ordered_queue(self) -> list[Request]:
        queue = self.waiting
        if self.schedule.policy == "lpm" and 1 < len(queue) <= LPM_MAX_QUEUE:
            matched = {r.req_id: len(self._match(r).pages) for r in queue}
            queue = sorted(queue, key=lambda r: -matched[r.req_id])
        if self.schedule.enable_priority:
            queue = sorted(queue, key=lambda r: -r.priority)
        return list(queue)

    def _match(self, request: Request) -> Match:
        return self.kv.match(request.namespace, request.known_tokens[: request.match_limit])

    def _extend(self, request: Request, budget: int) -> Segment | None:
        """The partial request's next chunk, or None when there is no room for it yet."""
        assert request.kv is not None
        end = self._chunk_end(request, request.num_computed, budget)
        if end is None or not self.kv.reserve(request.kv, end):
            return None
        return plan_segment(request, end)

    def _admit(self, request: Request, match: Match, budget: int, segments: list[Segment]) -> Segment | None:
        """Start a waiting request with its first chunk; None when there is no room for it yet."""
        matched = len(match.pages) * self.kv.page_size
        end = self._chunk_end(request, matched, budget, alone=not segments)
        if end is None:
            return None
        kv = self.kv.open(request.namespace, match)
        assert kv is not None
        request.kv, request.num_computed = kv, matched
        if not self._fits(request, segments) or not self.kv.reserve(kv, end):
            self.kv.close(kv, request.computed_tokens)
            request.kv, request.num_computed = None, 0
            return None
        self.lora_slots.take(request.version_id)
        request.stage, request.passed_over_at = Stage.PREFILLING, None
        if not request.num_retractions:
            request.cached_tokens = matched
        return plan_segment(request, end)

    def _chunk_end(self, request: Request, start: int, budget: int, alone: bool = True) -> int | None:
        """Where a chunk that starts at `start` ends; None when nothing can be done within the budget."""
        total = request.num_known
        if total - start <= budget:
            return total
        if self.schedule.chunked_prefill_size is None:
            return total if alone else None
        end = (start + budget) // self.kv.page_size * self.kv.page_size
        return end if end > start else None

    def _fits(self, request: Request, segments: list[Segment]) -> bool:
        """Whether the whole request, and what the others are expected to need, fit; the first one always may try."""
        others = [*self.live, *(s.request for s in segments if s.request is not self.partial)]
        if not others:
            return True
        needed = self._still_needed(request) + sum(self._still_needed(other) for other in others)
        return needed <= self.kv.available

    def _still_needed(self, request: Request) -> float:
        """Tokens a request is expected to allocate from now on."""
        assert request.kv is not None
        prompt = max(0, request.num_known - request.kv.num_pages * self.kv.page_size)
        return prompt + min(max(request.remaining_outputs, 0), ESTIMATE_CLIP) * self._ratio + self.kv.page_size

    def _next_tokens(self, request: Request) -> PrefixKey:
        """What a partial request computes next; nothing waits for it when it will not be shared."""
        assert request.kv is not None
        if request.kv.private:
            return request.req_id, b""
        start = request.kv.num_shared * self.kv.page_size
        return id(request.kv.node), request.known_tokens[start : start + DEDUPE_TOKENS].tobytes()

    def _new_tokens(self, request: Request, match: Match) -> PrefixKey:
        """What a waiting request would compute next; nothing equals it when that is too short to be worth a wait."""
        start = len(match.pages) * self.kv.page_size
        if not self.kv.cache.enabled or request.num_known - start <= DEDUPE_TOKENS:
            return request.req_id, b""
        return id(match.node), request.known_tokens[start : start + DEDUPE_TOKENS].tobytes()
