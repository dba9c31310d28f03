"""The scheduler on a fake model whose output depends on every KV row it reads: whatever is batched, chunked, shared,
retracted or overlapped, each request gets its own tokens and exactly one terminal row, and nothing is left behind."""

from __future__ import annotations

import itertools

import pytest
from engine.fake_runner import VOCAB, Bench, expected
from engine.tiny_lora import tiny_lora
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish, PauseMode

DEPTHS = pytest.mark.parametrize("depth", [0, 1], ids=["sync", "overlap"])


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * 7) % VOCAB for i in range(length)]


def assert_served(bench: Bench, req_id: int, ids: list[int], count: int) -> None:
    got = bench.received[req_id]
    assert got.finishes == [Finish.LENGTH]
    assert got.tokens == expected(ids, count)


@DEPTHS
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("chunk", [None, 8])
def test_every_mix_of_lengths_is_served(depth: int, page_size: int, mixed: bool, chunk: int | None) -> None:
    bench = Bench(depth=depth, page_size=page_size, mixed_chunk=mixed, chunked_prefill_size=chunk)
    jobs = {i: (prompt(3 + 7 * i, i), 1 + 3 * i % 10) for i in range(12)}
    for i, (ids, count) in jobs.items():
        bench.submit(i, ids, count)
        bench.step(i % 3)
    bench.run()
    for i, (ids, count) in jobs.items():
        assert_served(bench, i, ids, count)
    bench.assert_clean()


@DEPTHS
def test_retraction_changes_nothing_but_time(depth: int) -> None:
    bench = Bench(depth=depth, pages=60, conservativeness=0.01)
    for i in range(4):
        bench.submit(i, prompt(8, i), 30)
    bench.run()
    for i in range(4):
        assert_served(bench, i, prompt(8, i), 30)
    assert bench.planner.num_retractions > 0
    assert sum(bench.received[i].info.num_retractions for i in range(4)) == bench.planner.num_retractions
    bench.assert_clean()


@DEPTHS
def test_prefix_hits_are_counted_and_exact(depth: int) -> None:
    bench = Bench(depth=depth)
    shared = prompt(40)
    bench.submit(0, shared, 5)
    bench.run()
    bench.submit(1, shared + [7, 8], 5)
    bench.submit(2, shared, 5)
    bench.run()
    assert_served(bench, 1, shared + [7, 8], 5)
    assert_served(bench, 2, shared, 5)
    assert (bench.received[0].cached, bench.received[1].cached, bench.received[2].cached) == (0, 40, 39)


@DEPTHS
def test_equal_prompts_that_arrive_together_are_prefilled_once(depth: int) -> None:
    bench = Bench(depth=depth)
    ids = prompt(100)
    for i in range(8):
        bench.submit(i, ids, 3)
    bench.run()
    computed = sum(len(step.input_ids) - len(step.decode_rows) for step in bench.runner.steps)
    assert computed == 100 + 7
    for i in range(8):
        assert_served(bench, i, ids, 3)


def test_a_namespace_never_reads_anothers_kv() -> None:
    bench = Bench(**tiny_lora(1))
    for i, fields in enumerate([{}, {"version_id": 1}, {"extra_key": "salt"}, {"version_id": 1}]):
        bench.submit(i, prompt(20), 2, **fields)
        bench.run()
    assert [bench.received[i].cached for i in range(4)] == [0, 0, 0, 19]


def test_chunks_of_a_long_prompt_respect_the_budget() -> None:
    bench = Bench(chunked_prefill_size=16)
    bench.submit(0, prompt(70), 2)
    bench.run()
    sizes = [len(step.input_ids) for step in bench.runner.steps]
    assert sizes == [16, 16, 16, 16, 6, 1]


def test_mixed_chunk_keeps_decoding_while_a_prompt_is_read() -> None:
    bench = Bench(chunked_prefill_size=16, mixed_chunk=True)
    bench.submit(0, prompt(4), 20)
    bench.step(2)
    bench.submit(1, prompt(60, 1), 2)
    before = len(bench.received[0].tokens)
    bench.step(3)
    assert len(bench.received[0].tokens) == before + 3
    bench.run()
    assert_served(bench, 0, prompt(4), 20)
    assert_served(bench, 1, prompt(60, 1), 2)


def test_mixed_chunk_reads_a_page_of_a_prompt_whatever_decodes() -> None:
    """Decodes may leave less than a page of the budget: the prompt would wait until they have ended."""
    bench = Bench(chunked_prefill_size=16, page_size=16, mixed_chunk=True, slots=8)
    for i in range(3):
        bench.submit(i, prompt(4, i), 40)
    bench.step(4)
    bench.submit(3, prompt(40, 3), 2)
    bench.step(8)
    assert bench.received[3].finishes and not any(bench.received[i].finishes for i in range(3))
    bench.run()
    for i in range(3):
        assert_served(bench, i, prompt(4, i), 40)
    assert_served(bench, 3, prompt(40, 3), 2)


def test_lpm_runs_the_longest_match_first() -> None:
    bench = Bench(slots=1, policy="lpm")
    bench.submit(0, prompt(50), 1)
    bench.run()
    bench.submit(1, prompt(50, 1), 1)
    bench.submit(2, prompt(50) + [1], 1)
    bench.step()
    assert bench.received[2].finishes and not bench.received[1].finishes


def test_priority_goes_before_arrival() -> None:
    bench = Bench(slots=1, enable_priority=True)
    bench.submit(0, prompt(5), 1)
    bench.submit(1, prompt(5, 1), 1, priority=3)
    bench.step()
    assert bench.received[1].finishes and not bench.received[0].finishes


@DEPTHS
def test_stop_ids_end_a_sequence_after_min_new_tokens(depth: int) -> None:
    ids = prompt(6)
    third = expected(ids, 3)[2]
    bench = Bench(depth=depth)
    bench.submit(0, ids, 10, stop_token_ids=[third])
    bench.submit(1, ids, 10, stop_token_ids=[third], min_new_tokens=5)
    bench.run()
    assert bench.received[0].tokens == expected(ids, 3)
    assert bench.received[0].finishes == [Finish.STOP] and bench.received[0].info.matched == third
    assert bench.received[1].tokens == expected(ids, 10)
    bench.assert_clean()


@DEPTHS
def test_no_new_tokens_means_prefill_only(depth: int) -> None:
    bench = Bench(depth=depth)
    bench.submit(0, prompt(6), 0)
    bench.run()
    assert bench.received[0].tokens == [] and bench.received[0].finishes == [Finish.LENGTH]
    bench.assert_clean()


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    bench = Bench(pages=16)
    bench.submit(0, prompt(20), 4)
    bench.submit(1, prompt(6), 4)
    bench.run()
    assert bench.received[0].info.status_code == 400 and "16 tokens" in bench.received[0].info.message
    assert_served(bench, 1, prompt(6), 4)
    bench.assert_clean()


def test_output_is_cut_at_what_the_pool_holds() -> None:
    bench = Bench(pages=16)
    bench.submit(0, prompt(6), 400)
    bench.run()
    assert_served(bench, 0, prompt(6), 10)


@DEPTHS
@pytest.mark.parametrize("steps", range(6))
def test_abort_finds_a_request_wherever_it_is(depth: int, steps: int) -> None:
    """A14: waiting, half prefilled, in flight, running, retracted."""
    bench = Bench(depth=depth, chunked_prefill_size=8, slots=2)
    for i in range(4):
        bench.submit(i, prompt(20, i), 50)
    bench.step(steps)
    bench.channel.put(wire.AbortRequests([0, 1, 2, 3, 99]))
    bench.step()
    for i in range(4):
        got = bench.received[i]
        assert got.finishes == [Finish.ABORT]
        assert got.info.message == ("Aborted" if got.info.was_running else "Abort in waiting queue")
        assert got.tokens == expected(prompt(20, i), len(got.tokens))
    bench.run()
    bench.assert_clean()


@DEPTHS
def test_the_front_may_stop_a_request(depth: int) -> None:
    bench = Bench(depth=depth)
    bench.submit(0, prompt(5), 50)
    bench.step(5)
    bench.channel.put(wire.StopRequests([0]))
    bench.step()
    assert bench.received[0].finishes == [Finish.STOP]
    bench.run()
    bench.assert_clean()


@DEPTHS
@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
def test_pause_freezes_and_continue_resumes(depth: int, mode: PauseMode) -> None:
    bench = Bench(depth=depth, chunked_prefill_size=8)
    for i in range(3):
        bench.submit(i, prompt(20, i), 12)
    bench.step(6)
    reply = bench.call(wire.PauseCall(1, mode))
    assert reply.success and reply.stats.paused
    count = [len(bench.received[i].tokens) for i in range(3)]
    bench.submit(3, prompt(4, 3), 2)
    bench.step(5)
    assert [len(bench.received[i].tokens) for i in range(3)] == count
    assert (bench.kv.used == 0) == (mode is PauseMode.RETRACT)
    assert bench.call(wire.ContinueCall(2)).success
    bench.run()
    for i in range(3):
        assert_served(bench, i, prompt(20, i), 12)
    assert_served(bench, 3, prompt(4, 3), 2)
    bench.assert_clean()


@DEPTHS
def test_requests_can_be_aborted_while_frozen(depth: int) -> None:
    bench = Bench(depth=depth)
    bench.submit(0, prompt(20), 12)
    bench.step(3)
    bench.call(wire.PauseCall(1, PauseMode.IN_PLACE))
    bench.channel.put(wire.AbortRequests([0]))
    bench.step()
    assert bench.received[0].finishes == [Finish.ABORT]
    bench.assert_clean()


def test_flush_needs_pages_that_nobody_owns() -> None:
    bench = Bench()
    bench.submit(0, prompt(20), 12)
    bench.step(3)
    assert not bench.call(wire.FlushCacheCall(1)).success
    bench.call(wire.PauseCall(2, PauseMode.RETRACT))
    assert bench.call(wire.FlushCacheCall(3)).success, "after retract no request owns KV"
    assert bench.kv.allocator.num_free == 256
    bench.call(wire.ContinueCall(4))
    bench.run()
    assert_served(bench, 0, prompt(20), 12)


def test_a_row_of_nans_ends_one_request() -> None:
    bench = Bench()
    bench.submit(0, prompt(5), 5)
    bench.submit(1, prompt(5, 1), 5)
    bench.step(2)
    bench.runner.nan_slots.add(bench.scheduler.control.requests[0].kv.slot)
    bench.run()
    assert bench.received[0].finishes == [Finish.STOP] and bench.received[0].info.message == "NaN happened"
    assert_served(bench, 1, prompt(5, 1), 5)
    bench.assert_clean()


def test_stats_count_tokens() -> None:
    bench = Bench()
    bench.submit(0, prompt(30), 6)
    bench.run()
    bench.submit(1, prompt(30), 6)
    bench.run()
    stats = bench.call(wire.StatsCall(1)).stats
    assert (stats.prompt_tokens_total, stats.cached_tokens_total, stats.generation_tokens_total) == (60, 29, 12)
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_used_tokens) == (0, 0, 0)


class SchedulerMachine(RuleBasedStateMachine):
    """Everything at once, on a pool so small that it retracts and evicts all the time."""

    depth, page_size, mixed = 0, 1, False

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(
            depth=self.depth,
            page_size=self.page_size,
            mixed_chunk=self.mixed,
            pages=48 // self.page_size,
            slots=4,
            chunked_prefill_size=8,
            conservativeness=0.05,
            **tiny_lora(1),
        )
        self.jobs: dict[int, tuple[list[int], int, int]] = {}
        self.calls = itertools.count()

    @rule(length=st.integers(1, 30), seed=st.integers(0, 2), count=st.integers(0, 14), version=st.integers(0, 1))
    def submit(self, length: int, seed: int, count: int, version: int) -> None:
        req_id = len(self.jobs)
        self.jobs[req_id] = (prompt(length, seed), count, version)
        self.bench.submit(req_id, prompt(length, seed), count, version_id=version)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        self.bench.step(count)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, len(self.jobs) - 1), min_size=1, max_size=3))
        self.bench.channel.put(wire.AbortRequests(ids))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.bench.channel.put(wire.StopRequests([data.draw(st.integers(0, len(self.jobs) - 1))]))

    @rule(mode=st.sampled_from([PauseMode.IN_PLACE, PauseMode.RETRACT]))
    def pause(self, mode: PauseMode) -> None:
        self.bench.call(wire.PauseCall(next(self.calls), mode))

    @rule()
    def resume(self) -> None:
        self.bench.call(wire.ContinueCall(next(self.calls)))

    @rule()
    def flush(self) -> None:
        self.bench.call(wire.FlushCacheCall(next(self.calls)))

    @invariant()
    def tokens_are_right(self) -> None:
        for req_id, (ids, count, version) in self.jobs.items():
            got = self.bench.received[req_id]
            assert got.tokens == expected(ids, len(got.tokens), version)
            if got.finishes == [Finish.LENGTH]:
                assert len(got.tokens) == count

    def teardown(self) -> None:
        self.resume()
        self.bench.run()
        assert all(len(got.finishes) == 1 for got in self.bench.received.values())
        self.bench.assert_clean()


def machine(name: str, **attributes: object) -> type:
    case = type(name, (SchedulerMachine,), attributes).TestCase  # type: ignore[attr-defined]
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    return case


TestSync = machine("Sync")
TestOverlapPaged = machine("OverlapPaged", depth=1, page_size=4)
TestOverlapMixed = machine("OverlapMixed", depth=1, mixed=True)
