"""Pauses, and every interleaving of everything that can happen to requests in the front.

The state machine at the end steps an event loop by hand: clients, operators and the scheduler act in any order, with
any number of event-loop turns between, and whatever they do, nobody may wait for ever and nothing may be left.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from unit.fake_scheduler import EOS, WAITING_ABORT, Call, Front, Row, SlowTokenizer, clean_front, ids_of, settle

from sglang.srt.errors import RequestError, ServiceUnavailableError
from sglang.srt.managers.io_struct import PauseGenerationReqInput
from sglang.srt.managers.io_struct.wire import ContinueCall, Finish, FinishInfo, PauseCall, PauseMode
from sglang.srt.managers.request_state import RecordState
from sglang.srt.managers.response import OutputChunk
from sglang.srt.managers.tokenizer_manager import ServerStatus


@pytest_asyncio.fixture
async def front():
    async with clean_front() as front:
        yield front


async def test_pause_on_an_idle_server_returns_at_once(front):
    await front.manager.pause_generation()
    assert front.manager.paused is PauseMode.ABORT
    assert not front.scheduler.sent
    await front.manager.continue_generation()
    assert front.manager.paused is None
    assert not front.scheduler.sent


async def test_A24_abort_pause_returns_with_the_last_ack(front):
    calls = [await front.running(), front.call(stream=True), front.call(text=["a", "b"])]
    await settle()
    pauses = [asyncio.ensure_future(front.manager.pause_generation()) for _ in range(2)]
    await settle()
    assert len(front.scheduler.aborted) == 4, "each aborted once, however many pauses"
    first = front.only if len(front.scheduler.live) == 1 else min(front.scheduler.live)
    front.scheduler.finish(first)
    await settle()
    assert not any(pause.done() for pause in pauses)
    front.scheduler.ack()
    await asyncio.gather(*pauses, *(call.task for call in calls))
    assert not front.manager.records
    await front.manager.continue_generation()


async def test_abort_pause_takes_requests_of_the_same_turn_with_it(front):
    call = front.call()
    await settle(1)
    pause = asyncio.ensure_future(front.manager.pause_generation())
    await settle()
    assert front.scheduler.ack() == 1
    await asyncio.gather(pause, call.task)
    assert call.finish_reasons == [WAITING_ABORT]


async def test_requests_wait_for_continue_in_order(front):
    await front.manager.pause_generation()
    calls = [front.call(text=text) for text in ("a", "bb", "ccc")]
    await settle()
    assert not front.scheduler.sent
    await front.manager.continue_generation()
    await settle()
    assert front.scheduler.batches == [3]
    assert [len(request.input_ids) // 4 for request in front.scheduler.submitted] == [1, 2, 3]
    for req_id in list(front.scheduler.live):
        front.scheduler.finish(req_id)
    await asyncio.gather(*(call.task for call in calls))


async def test_continue_does_not_wait_for_a_draining_pause(front):
    old = await front.running()
    old_id = front.only
    pause = asyncio.ensure_future(front.manager.pause_generation())
    await settle()
    held = front.call()
    await front.manager.continue_generation()
    await settle()
    assert not pause.done()
    assert len(front.scheduler.live) == 2, "the gate is open"
    front.scheduler.ack()
    await asyncio.gather(pause, old.task)
    assert old_id not in front.scheduler.live
    front.scheduler.finish(front.only)
    await held.task


async def test_A34_abort_reaches_requests_that_wait_for_continue(front):
    await front.manager.pause_generation()
    aborted, kept = front.call(rid="a"), front.call(rid="b")
    await settle()
    assert front.manager.abort_request("a") == 1
    await aborted.task
    assert aborted.reply["meta_info"]["finish_reason"] == WAITING_ABORT
    await front.manager.continue_generation()
    await settle()
    assert len(front.scheduler.submitted) == 1
    front.scheduler.finish(front.only)
    await kept.task


async def test_A34_abort_reaches_requests_being_tokenised(front, monkeypatch):
    slow = SlowTokenizer(monkeypatch)
    call = front.call(text=["a", "b"], rid="r")
    await settle()
    assert front.manager.abort_request("r_0") == 1
    slow.go.set()
    await settle()
    assert len(front.scheduler.submitted) == 1
    front.scheduler.finish(front.only, "x")
    await call.task
    assert [body["meta_info"]["finish_reason"]["type"] for body in call.reply] == ["abort", "length"]


async def test_A34_abort_in_the_turn_of_the_submit_sends_nothing(front):
    call = front.call(rid="r")
    await settle(1)
    assert front.manager.abort_request("r") == 1
    await call.task
    assert not front.scheduler.sent
    assert call.finish_reasons == [WAITING_ABORT]


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
async def test_frozen_pause_round_trip(front, mode):
    call = await front.running()
    pause = asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=mode)))
    await settle()
    assert front.scheduler.calls == [PauseCall(1, mode)]
    assert not pause.done()
    front.scheduler.reply()
    await pause
    assert front.manager.paused is mode
    queued = front.call()
    await settle()
    assert len(front.scheduler.live) == 2, "new requests queue in the scheduler"
    resume = asyncio.ensure_future(front.manager.continue_generation())
    await settle()
    assert front.scheduler.calls == [ContinueCall(2)]
    front.scheduler.reply()
    await resume
    for req_id in list(front.scheduler.live):
        front.scheduler.finish(req_id)
    await asyncio.gather(call.task, queued.task)


async def pause(front: Front, mode: PauseMode) -> None:
    task = asyncio.ensure_future(front.manager.pause_generation(PauseGenerationReqInput(mode=mode)))
    await settle()
    if mode is not PauseMode.ABORT:
        front.scheduler.reply()
    await task


async def test_abort_pause_over_a_frozen_scheduler_ends(front):
    call = await front.running()
    await pause(front, PauseMode.IN_PLACE)
    drain = asyncio.ensure_future(front.manager.pause_generation())
    await settle()
    front.scheduler.ack()
    await asyncio.gather(drain, call.task)
    held = front.call()
    await settle()
    assert not front.scheduler.live, "in abort mode new requests wait in the front"
    resume = asyncio.ensure_future(front.manager.continue_generation())
    await settle()
    front.scheduler.reply()
    await resume
    assert not front.scheduler.paused
    await settle()
    front.scheduler.finish(front.only)
    await held.task


async def test_frozen_pause_after_an_abort_pause_sends_the_held_requests_behind_it(front):
    await front.manager.pause_generation()
    held = front.call()
    await settle()
    await pause(front, PauseMode.RETRACT)
    await settle()
    assert [type(message).__name__ for message in front.scheduler.sent] == ["PauseCall", "SubmitBatch"]
    resume = asyncio.ensure_future(front.manager.continue_generation())
    await settle()
    front.scheduler.reply()
    await resume
    front.scheduler.finish(front.only)
    await held.task


async def test_pause_whose_caller_leaves_stays_in_force(front):
    call = await front.running()
    drain = asyncio.ensure_future(front.manager.pause_generation())
    await settle()
    drain.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await drain
    held = front.call()
    await settle()
    front.scheduler.ack()
    await call.task
    assert not front.scheduler.live
    await front.manager.continue_generation()
    await settle()
    front.scheduler.finish(front.only)
    await held.task


async def test_bad_pause_mode_is_refused(front):
    with pytest.raises(RequestError, match="mode must be one of abort, retract, in_place, got 'hard'"):
        await front.manager.pause_generation(PauseGenerationReqInput(mode="hard"))
    assert front.manager.paused is None


# ---- every interleaving --------------------------------------------------------------------------------------------

STOP = ids_of("x")[0]
ENDS = [Finish.LENGTH, Finish.LENGTH, Finish.STOP, Finish.ABORT]
INFOS = {
    Finish.STOP: FinishInfo(matched=EOS),
    Finish.ABORT: FinishInfo(message="The request queue is full.", status_code=503),
}
RIDS = [None, None, None, "r", "rs", "s"]  # no hexadecimal letters: generated rids must not match by chance
turns = st.sampled_from([0, 1, 2, 3, 12])


class FrontMachine(RuleBasedStateMachine):
    """Clients, operators and a scheduler, in any order."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = 0.0  # time stands still unless a rule moves it: a run must be repeatable
        self.loop.time = lambda: self.clock
        self.loop_errors: list[dict] = []
        self.loop.set_exception_handler(lambda _, context: self.loop_errors.append(context))
        self.monkeypatch = pytest.MonkeyPatch()
        self.slow = SlowTokenizer(self.monkeypatch, longer_than=11)
        self.front = self.run(Front.start(max_queued_requests=40))
        self.scheduler, self.manager = self.front.scheduler, self.front.manager
        self.calls: list[tuple[Call, int]] = []
        self.control: list[asyncio.Task] = []
        self.dead = False

    def run(self, awaitable):
        return self.loop.run_until_complete(awaitable)

    def act(self, function, *args, **kwargs):
        """Run a synchronous action on the loop."""

        async def body():
            return function(*args, **kwargs)

        return self.run(body())

    def spawn(self, coroutine) -> None:
        self.control.append(self.act(lambda: self.loop.create_task(coroutine)))

    @rule(
        texts=st.lists(st.sampled_from(["hi", "long", "longer"]), min_size=1, max_size=3),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        stream=st.booleans(),
        chunks=st.booleans(),
        rid=st.sampled_from(RIDS),
        stop=st.booleans(),
        bad=st.sampled_from([False] * 9 + [True]),
        turns=turns,
    )
    def submit(self, texts, n, stream, chunks, rid, stop, bad, turns) -> None:
        params = {"n": n, "max_new_tokens": 200 if bad else 20} | ({"stop": "x"} if stop else {})
        text = texts if len(texts) > 1 else texts[0]
        fields = {"text": text, "rid": rid, "stream": stream, "sampling_params": params}
        call = self.act(lambda: Call(self.manager, chunks=chunks, **fields))
        self.calls.append((call, n * len(texts)))
        self.run(settle(turns))

    @rule(data=st.data(), how=st.sampled_from(["disconnect", "cancel"]), turns=turns)
    @precondition(lambda self: self.calls)
    def lose_client(self, data, how, turns) -> None:
        call, _ = data.draw(st.sampled_from(self.calls))
        self.act(call.client.disconnect if how == "disconnect" else call.task.cancel)
        self.run(settle(turns))

    @rule(
        rid=st.sampled_from(["r", "rs", "s", "r_0", "", None]),
        kind=st.sampled_from(["rid", "prefix", "all"]),
        turns=turns,
    )
    def abort(self, rid, kind, turns) -> None:
        self.act(self.manager.abort_request, rid, abort_all=kind == "all", prefix=kind == "prefix")
        self.run(settle(turns))

    @rule(mode=st.sampled_from(PauseMode), turns=turns)
    def pause(self, mode, turns) -> None:
        self.spawn(self.manager.pause_generation(PauseGenerationReqInput(mode=mode)))
        self.run(settle(turns))

    @rule(turns=turns)
    def resume(self, turns) -> None:
        self.spawn(self.manager.continue_generation())
        self.run(settle(turns))

    @rule(data=st.data())
    @precondition(lambda self: self.control)
    def forget_control_call(self, data) -> None:
        self.act(data.draw(st.sampled_from(self.control)).cancel)

    @rule(flush_timeout=st.sampled_from([None, 0.0, 5.0]), turns=turns)
    def ask(self, flush_timeout, turns) -> None:
        manager = self.manager
        self.spawn(manager.scheduler_stats() if flush_timeout is None else manager.flush_cache(flush_timeout))
        self.run(settle(turns))

    @rule(seconds=st.sampled_from([0.1, 6.0]))
    def time_passes(self, seconds) -> None:
        self.clock += seconds
        self.run(settle())

    @rule(turns=turns)
    def tokenise(self, turns) -> None:
        self.act(self.slow.go.set)
        self.run(settle(turns))
        self.slow.go.clear()

    @rule(
        tokens=st.lists(st.sampled_from([64, 65, STOP]), min_size=1, max_size=3), times=st.integers(1, 2), turns=turns
    )
    @precondition(lambda self: self.scheduler.live and not self.dead)
    def decode(self, tokens, times, turns) -> None:
        rows = [Row(req_id, tokens) for req_id in self.scheduler.live]
        self.act(lambda: [self.scheduler.step(*rows) for _ in range(times)])
        self.run(settle(turns))

    @rule(data=st.data(), turns=turns)
    @precondition(lambda self: self.scheduler.live and not self.dead)
    def finish_some(self, data, turns) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.scheduler.live)), unique=True, min_size=1, max_size=6))
        rows = []
        for req_id in chosen:
            finish = data.draw(st.sampled_from(ENDS))
            tokens = data.draw(st.lists(st.sampled_from([64, STOP]), max_size=2))
            rows.append(Row(req_id, tokens, finish, INFOS.get(finish)))
        self.act(self.scheduler.step, *rows)
        self.run(settle(turns))

    @rule(turns=turns)
    @precondition(lambda self: not self.dead)
    def ack(self, turns) -> None:
        self.act(self.scheduler.ack)
        self.run(settle(turns))

    @rule(success=st.booleans(), turns=turns)
    @precondition(lambda self: self.scheduler.calls and not self.dead)
    def reply(self, success, turns) -> None:
        flushing = type(self.scheduler.calls[0]).__name__ == "FlushCacheCall"
        self.act(self.scheduler.reply, success or not flushing)
        self.run(settle(turns))

    @rule(data=st.data())
    @precondition(lambda self: self.scheduler.terminal and not self.dead)
    def late_row(self, data) -> None:
        over = data.draw(st.sampled_from(self.scheduler.terminal))
        self.act(self.scheduler.late, Row(over, [64], Finish.LENGTH))

    @rule()
    @precondition(lambda self: len(self.calls) > 4 and not self.dead)
    def die(self) -> None:
        self.dead = True
        self.act(self.manager.back_died, "it was killed")

    @rule(timeout=st.sampled_from([0.0, 5.0]))
    @precondition(lambda self: len(self.calls) > 6 and not self.dead)
    def drain(self, timeout) -> None:
        self.spawn(self.manager.drain(timeout))
        self.run(settle())

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "manager"):
            return
        records = self.manager.records.values()
        assert self.manager.counters.double_closes == 0
        assert not [record for record in records if record.state is RecordState.CLOSED]
        owed = {record.req_id for record in records if record.state is RecordState.DISPATCHED}
        if self.dead:
            assert not records
        else:
            assert owed >= self.scheduler.live.keys()
            assert owed <= self.scheduler.live.keys() | set(self.scheduler.terminal)
        for record in self.manager.rid_to_state.values():
            assert record.finish_reason is None
        for call, sequences in self.calls:
            assert len(call.finish_reasons) <= sequences

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        try:
            self.wind_down()
            self.check_end()
        finally:
            self.monkeypatch.undo()
            self.run(self.manager.close())
            self.loop.close()

    def wind_down(self) -> None:
        """Let everything through that waits in the front; then a scheduler that does no more than ack must do."""
        self.spawn(self.manager.continue_generation())
        self.slow.go.set()
        self.answer_calls()
        unwanted = {record.req_id for record in self.manager.records.values() if not record.listening}
        assert unwanted <= self.scheduler.asked_to_end, "nobody waits for it, and it runs"
        if not self.dead:
            self.spawn(self.manager.pause_generation())
            self.run(settle())
            self.act(self.scheduler.ack)
            self.answer_calls()

    def answer_calls(self) -> None:
        self.time_passes(1.0)
        while self.scheduler.calls and not self.dead:
            self.act(self.scheduler.reply)
            self.run(settle())

    def check_end(self) -> None:
        assert not self.loop_errors
        assert [task for task in self.control if not task.done()] == [], "a pause, continue or call hangs"
        for task in self.control:
            if not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), ServiceUnavailableError), task.exception()
        for call, sequences in self.calls:
            assert call.done, "a client hangs"
            chunks = [item for item in call.items if isinstance(item, OutputChunk)]
            assert all(chunk.token_ids or chunk.finish_reason for chunk in chunks), "an event that says nothing"
            if call.task.cancelled():
                continue
            if call.error is None:
                assert len(call.finish_reasons) == sequences, "each sequence has exactly one end"
            else:
                assert isinstance(call.error, RequestError | ServiceUnavailableError), call.error
        assert not self.manager.records
        assert not self.manager.rid_to_state
        assert self.manager._control.num_pending == 0
        if not self.dead:
            assert sorted(self.scheduler.terminal) == sorted(request.req_id for request in self.scheduler.submitted)
            assert self.manager.status in (ServerStatus.UP, ServerStatus.DRAINING)


TestFrontMachine = FrontMachine.TestCase
TestFrontMachine.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
