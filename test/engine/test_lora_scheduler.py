"""Adapter versions through the scheduler, on the fake runner: its tokens depend on the version of every KV row read,
and it refuses a step that names a version without a slot."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
from engine.fake_runner import VOCAB, Bench, FakeChannel, expected, expected_spans
from engine.tiny_lora import Clock, tiny_adapter, tiny_lora, tiny_manager
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang.srt.lora.slots import PATIENCE
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish, PauseMode
from sglang.srt.managers.scheduler import STAGING_POLL_MS

DEPTHS = pytest.mark.parametrize("depth", [0, 1], ids=["sync", "overlap"])
PAUSES = pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * 7) % VOCAB for i in range(length)]


def assert_served(bench: Bench, req_id: int, ids: list[int], count: int, version: int) -> None:
    got = bench.received[req_id]
    assert got.finishes == [Finish.LENGTH]
    assert got.tokens == expected(ids, count, version)


def stage(bench: Bench, call_id: int, version: int, path: Path) -> wire.CallReply:
    """Stage and wait for the answer."""
    bench.channel.put(wire.StageAdapterCall(call_id, version, tiny_adapter(path, version)))
    bench.step()
    return wait_reply(bench, call_id)


def wait_reply(bench: Bench, call_id: int) -> wire.CallReply:
    deadline = time.monotonic() + 10
    while call_id not in bench.replies:
        assert time.monotonic() < deadline
        bench.step()
        time.sleep(0.001)
    return bench.replies[call_id]


# ---- slots ---------------------------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("state", ["running", "chunked", "admitted", "retracted"])
def test_b1_no_step_names_more_versions_than_slots(state: str, slots: int, mixed: bool, depth: int) -> None:
    """Whatever the first requests are doing when others arrive; the fake runner checks every step."""
    for versions in itertools.product(range(4), repeat=3):
        bench = Bench(chunked_prefill_size=8, mixed_chunk=mixed, depth=depth, **tiny_lora(3, slots))
        jobs = {i: (prompt(30 if state == "chunked" else 6, i), version) for i, version in enumerate(versions)}
        for i, (ids, version) in jobs.items():
            bench.submit(i, ids, 6, version_id=version)
            bench.step({"running": 2, "chunked": 1, "admitted": 0, "retracted": 2}[state])
        if state == "retracted":
            bench.call(wire.PauseCall(1, PauseMode.RETRACT))
            assert bench.planner.lora_slots.num_holds == 0
            bench.call(wire.ContinueCall(2))
        bench.run()
        for i, (ids, version) in jobs.items():
            assert_served(bench, i, ids, 6, version)
        bench.assert_clean()


def test_b4_a_request_without_a_slot_blocks_nobody_behind_it() -> None:
    bench = Bench(**tiny_lora(2, slots=1))
    bench.submit(0, prompt(5), 50, version_id=1)
    bench.step()
    bench.submit(1, prompt(5, 1), 2, version_id=2)
    bench.submit(2, prompt(5, 2), 2, version_id=1)
    bench.submit(3, prompt(5, 3), 2)
    bench.step(6)
    assert bench.received[2].finishes and bench.received[3].finishes and not bench.received[1].tokens
    bench.run()
    assert_served(bench, 1, prompt(5, 1), 2, 2)
    bench.assert_clean()


@DEPTHS
@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_b3_more_hot_versions_than_slots_stay_fair(depth: int, policy: str) -> None:
    """Three slots, six versions, clients that never stop: the wait of each is bounded."""
    clock = Clock()
    bench = Bench(depth=depth, slots=24, policy=policy, **tiny_lora(6, slots=3, clock=clock))
    submitted: dict[int, tuple[int, float]] = {}
    waits: dict[int, list[float]] = {version: [] for version in range(1, 7)}
    live: dict[int, int] = {}

    def submit(version: int) -> None:
        req_id = len(submitted)
        submitted[req_id] = (version, clock.now)
        live[req_id] = version
        bench.submit(req_id, prompt(6, req_id), 20, version_id=version)

    for version in (1, 2, 3, 4, 5, 6):
        for _ in range(3):
            submit(version)
    started: set[int] = set()
    for _ in range(1500):
        bench.step()
        clock.now += 0.02
        for req_id in list(live):
            if bench.received[req_id].tokens and req_id not in started:
                started.add(req_id)
                waits[live[req_id]].append(clock.now - submitted[req_id][1])
            if bench.received[req_id].finishes:
                submit(live.pop(req_id))
    # A request runs for 20 steps, 0.4 s.
    assert max(max(times) for times in waits.values()) < 2 * PATIENCE + 3 * 0.4 + 0.3
    assert max(len(times) for times in waits.values()) < 2 * min(len(times) for times in waits.values())


@DEPTHS
def test_b5_fifty_versions_over_two_slots_all_answer(depth: int) -> None:
    bench = Bench(depth=depth, slots=16, **tiny_lora(50, slots=2))
    for i in range(100):
        bench.submit(i, prompt(4, i), 3, version_id=1 + i % 50)
    bench.run(limit=5000)
    for i in range(100):
        assert_served(bench, i, prompt(4, i), 3, 1 + i % 50)
    stats = bench.call(wire.StatsCall(1)).stats
    assert stats.lora_evictions_total >= 48 and len(set(stats.lora_slots)) == 2
    assert stats.lora_bytes == bench.lora.nbytes > 0
    bench.assert_clean()


def test_d3_base_requests_run_while_every_slot_is_taken() -> None:
    bench = Bench(**tiny_lora(1, slots=1))
    bench.submit(0, prompt(5), 30, version_id=1)
    bench.submit(1, prompt(5), 30)
    bench.step(3)
    assert len(bench.received[0].tokens) == len(bench.received[1].tokens) == 3


# ---- stage and free ------------------------------------------------------------------------------------------------


@DEPTHS
def test_c27_decoding_goes_on_while_an_adapter_is_staged(depth: int, tmp_path: Path) -> None:
    bench = Bench(depth=depth, **tiny_lora(0))
    bench.submit(0, prompt(5), 100)
    bench.step(2)
    bench.lora.gate.clear()
    before = len(bench.received[0].tokens)
    bench.channel.put(wire.StageAdapterCall(1, 4, tiny_adapter(tmp_path / "a")))
    bench.step(20)
    assert len(bench.received[0].tokens) == before + 20
    assert 1 not in bench.replies and bench.lora.versions == set()
    bench.lora.gate.set()
    assert wait_reply(bench, 1).success
    bench.submit(1, prompt(5), 3, version_id=4)
    bench.run()
    assert_served(bench, 0, prompt(5), 100, 0)
    assert_served(bench, 1, prompt(5), 3, 4)
    bench.assert_clean()


def test_b14_the_payload_may_go_once_staging_is_answered(tmp_path: Path) -> None:
    bench = Bench(**tiny_lora(0))
    assert stage(bench, 1, 1, tmp_path / "a").success
    (tmp_path / "a").unlink()
    bench.submit(0, prompt(5), 3, version_id=1)
    bench.run()
    assert_served(bench, 0, prompt(5), 3, 1)


def test_c25_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(**tiny_lora(1))
    bench.lora.failure = MemoryError("no room")
    reply = stage(bench, 1, 2, tmp_path / "a")
    assert not reply.success and "no room" in reply.message
    bench.lora.failure = None
    adapter = tiny_adapter(tmp_path / "b")
    (tmp_path / "b").unlink()
    bench.channel.put(wire.StageAdapterCall(2, 2, adapter))
    assert "FileNotFoundError" in wait_reply(bench, 2).message
    assert bench.lora.versions == {1}
    bench.submit(0, prompt(5), 3, version_id=2)
    bench.run()
    assert bench.received[0].info.status_code == 400
    assert stage(bench, 3, 2, tmp_path / "c").success, "the version may be tried again"
    bench.assert_clean()


def test_e6_a_failed_stage_changes_no_live_version(tmp_path: Path) -> None:
    bench = Bench(**tiny_lora(1))
    before = bench.lora.nbytes
    bench.submit(0, prompt(5), 30, version_id=1)
    bench.step(3)
    bench.lora.failure = ValueError("tensor 7")
    assert not stage(bench, 1, 2, tmp_path / "a").success
    bench.run()
    assert_served(bench, 0, prompt(5), 30, 1)
    assert bench.lora.nbytes == before


def test_a_version_is_staged_once(tmp_path: Path) -> None:
    bench = Bench(**tiny_lora(1))
    assert "taken" in stage(bench, 1, 1, tmp_path / "a").message
    assert "taken" in stage(bench, 2, 0, tmp_path / "b").message
    bench.lora.gate.clear()
    bench.channel.put(wire.StageAdapterCall(3, 2, tiny_adapter(tmp_path / "c")))
    assert "taken" in stage(bench, 4, 2, tmp_path / "d").message
    bench.lora.gate.set()
    assert wait_reply(bench, 3).success


def test_c1_a_version_that_is_not_staged_is_refused() -> None:
    for bench in (Bench(**tiny_lora(1)), Bench()):
        bench.submit(0, prompt(5), 3, version_id=9)
        bench.submit(1, prompt(5), 3)
        bench.run()
        got = bench.received[0]
        assert got.finishes == [Finish.ABORT] and got.info.status_code == 400 and "9" in got.info.message
        assert_served(bench, 1, prompt(5), 3, 0)
        bench.assert_clean()


def test_without_lora_every_call_is_answered(tmp_path: Path) -> None:
    bench = Bench()
    assert "--enable-lora" in bench.call(wire.StageAdapterCall(1, 1, tiny_adapter(tmp_path / "a"))).message
    assert not bench.call(wire.FreeAdapterCall(2, 1)).success
    assert not bench.call(wire.SwitchVersionCall(3, 0, 1)).success
    assert bench.call(wire.StatsCall(4)).stats.lora_slots == ()


@DEPTHS
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_version_in_use_is_not_freed(depth: int, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """Waiting, just started, running: the front has lost count, so it is logged and counted."""
    bench = Bench(depth=depth, **tiny_lora(1))
    bench.submit(0, prompt(20), 10, version_id=1)
    bench.step(steps)
    reply = bench.call(wire.FreeAdapterCall(1, 1))
    assert not reply.success and "1 live" in reply.message
    assert "invariant violated" in caplog.text and reply.stats.invariant_violations_total == 1
    bench.run()
    assert_served(bench, 0, prompt(20), 10, 1)
    reply = bench.call(wire.FreeAdapterCall(2, 1))
    assert reply.success and reply.message.startswith("freed ") and reply.stats.lora_bytes == 0


def test_d9_free_says_how_much_and_forgets_the_version() -> None:
    bench = Bench(**tiny_lora(2))
    size = bench.lora.nbytes // 2
    reply = bench.call(wire.FreeAdapterCall(1, 1))
    assert reply.success and reply.message == f"freed {size} bytes"
    assert not bench.call(wire.FreeAdapterCall(2, 1)).success
    assert bench.lora.versions == {2}


@DEPTHS
def test_e2_free_drops_the_versions_pages_and_only_those(depth: int) -> None:
    bench = Bench(depth=depth, **tiny_lora(2))
    for i, fields in enumerate([{"version_id": 1}, {"version_id": 1, "extra_key": "x"}, {"version_id": 2}, {}]):
        bench.submit(i, prompt(20), 4, **fields)
    bench.run()
    cached = bench.kv.cache.evictable_pages
    assert bench.kv.cache.versions == {0, 1, 2}
    assert bench.call(wire.FreeAdapterCall(1, 1)).success
    assert bench.kv.cache.versions == {0, 2}
    assert bench.kv.cache.evictable_pages == cached // 2
    bench.assert_clean()


@DEPTHS
def test_e1_a_new_version_never_reads_the_old_ones_kv(depth: int, tmp_path: Path) -> None:
    """The same name published again is another version: same prompt, nothing cached, the new version's tokens."""
    bench = Bench(depth=depth, **tiny_lora(1))
    bench.submit(0, prompt(40), 3, version_id=1)
    bench.run()
    assert stage(bench, 1, 2, tmp_path / "a").success
    bench.submit(1, prompt(40), 3, version_id=2)
    bench.run()
    assert bench.call(wire.FreeAdapterCall(2, 1)).success
    bench.submit(2, prompt(40), 3, version_id=2)
    bench.run()
    assert [bench.received[i].cached for i in range(3)] == [0, 0, 39]
    assert_served(bench, 1, prompt(40), 3, 2)
    assert_served(bench, 2, prompt(40), 3, 2)
    bench.assert_clean()


@PAUSES
def test_b6_b7_stage_and_free_are_answered_while_paused(mode: PauseMode, tmp_path: Path) -> None:
    bench = Bench(**tiny_lora(2))
    bench.submit(0, prompt(20), 12, version_id=1)
    bench.step(3)
    bench.call(wire.PauseCall(1, mode))
    assert stage(bench, 2, 3, tmp_path / "a").success
    assert bench.call(wire.FreeAdapterCall(3, 2)).success
    assert not bench.call(wire.FreeAdapterCall(4, 1)).success, "refused at once, not waited for"
    bench.scheduler.stats.violations = 0
    bench.submit(1, prompt(5), 3, version_id=3)
    bench.call(wire.ContinueCall(5))
    bench.run()
    assert_served(bench, 0, prompt(20), 12, 1)
    assert_served(bench, 1, prompt(5), 3, 3)
    bench.assert_clean()


class SleepyChannel(FakeChannel):
    """Sleeps as a socket without messages does, and notes for how long while an adapter is on its way."""

    bench: Bench

    def __init__(self) -> None:
        super().__init__()
        self.waits: set[int] = set()

    def receive(self, timeout_ms: int = 0) -> list[wire.ToBack]:
        if not self.inbox:
            time.sleep(timeout_ms / 1000)
            if self.bench.scheduler.control.lora.staging:
                self.waits.add(timeout_ms)
        return super().receive()


@pytest.mark.parametrize("paused", [False, True])
def test_a_sleeping_loop_notices_a_staged_adapter_at_once(paused: bool, tmp_path: Path) -> None:
    """An idle or paused loop sleeps for 100 ms at a time, but for 5 ms while an adapter is on its way."""
    channel = SleepyChannel()
    channel.bench = bench = Bench(channel=channel, **tiny_lora(0))
    if paused:
        bench.submit(0, prompt(5), 5)
        bench.step()
        bench.call(wire.PauseCall(1, PauseMode.IN_PLACE))
    bench.lora.gate.clear()
    channel.put(wire.StageAdapterCall(2, 1, tiny_adapter(tmp_path / "a")))
    stopping = threading.Event()
    loop = threading.Thread(target=bench.scheduler.run, args=(stopping,))
    loop.start()
    time.sleep(0.05)
    bench.lora.gate.set()
    deadline = time.monotonic() + 10
    while not any(isinstance(m, wire.CallReply) for m in channel.sent) and time.monotonic() < deadline:
        time.sleep(0.001)
    stopping.set()
    loop.join()
    assert any(isinstance(m, wire.CallReply) and m.success for m in channel.sent)
    assert channel.waits == {STAGING_POLL_MS}


# ---- switch --------------------------------------------------------------------------------------------------------


@DEPTHS
def test_b13_tokens_after_the_reply_are_the_new_versions(depth: int) -> None:
    bench = Bench(depth=depth, **tiny_lora(2))
    for i in range(3):
        bench.submit(i, prompt(10, i), 20, version_id=1)
    bench.submit(3, prompt(10, 3), 20)
    bench.step(5)
    assert bench.call(wire.SwitchVersionCall(1, 1, 2)).success
    # The step that handled the call went on with the new version; the rows before the reply say where the border is.
    counts = {i: bench.tokens_at_reply[1][i] for i in range(3)}
    assert all(4 <= count <= 6 for count in counts.values())
    bench.run()
    for i, count in counts.items():
        assert bench.received[i].tokens == expected_spans(prompt(10, i), [(1, count), (2, 20 - count)])
    assert_served(bench, 3, prompt(10, 3), 20, 0)
    bench.assert_clean()


@DEPTHS
def test_b13_mixed_kv_is_never_shared(depth: int) -> None:
    """What a switched request leaves behind is the old version's prompt; its later tokens are nobody's prefix."""
    bench = Bench(depth=depth, **tiny_lora(2))
    bench.submit(0, prompt(10), 20, version_id=1)
    bench.step(5)
    bench.call(wire.SwitchVersionCall(1, 1, 2))
    bench.run()
    text = prompt(10) + bench.received[0].tokens
    bench.submit(1, text, 2, version_id=2)
    bench.submit(2, text, 2, version_id=1)
    bench.run()
    assert bench.received[1].cached == 0
    assert bench.received[2].cached == 10
    assert_served(bench, 1, text, 2, 2)
    assert_served(bench, 2, text, 2, 1)
    bench.assert_clean()


@DEPTHS
def test_b13_the_old_version_can_be_freed_under_switched_requests(depth: int) -> None:
    """They still read its prompt pages; those go when the last of them ends."""
    bench = Bench(depth=depth, **tiny_lora(2))
    bench.submit(0, prompt(10), 20, version_id=1)
    bench.submit(1, prompt(10), 10, version_id=1)
    bench.step(5)
    bench.call(wire.SwitchVersionCall(1, 1, 2))
    assert bench.call(wire.FreeAdapterCall(2, 1)).success
    assert bench.kv.cache.num_condemned == 1
    count = bench.tokens_at_reply[1][0]
    bench.run()
    assert bench.received[0].tokens == expected_spans(prompt(10), [(1, count), (2, 20 - count)])
    assert bench.kv.cache.num_condemned == 0 and bench.kv.cache.versions <= {2}
    bench.assert_clean()


@PAUSES
def test_b11_a_retracted_request_starts_again_under_its_own_version(mode: PauseMode, tmp_path: Path) -> None:
    """A publish in between changes nothing for it; a switch re-reads all of it under the new version."""
    bench = Bench(**tiny_lora(1))
    bench.submit(0, prompt(10), 12, version_id=1)
    bench.submit(1, prompt(10, 1), 12)
    bench.step(4)
    bench.call(wire.PauseCall(1, mode))
    assert stage(bench, 2, 2, tmp_path / "a").success
    bench.call(wire.ContinueCall(3))
    bench.step(2)
    bench.call(wire.PauseCall(4, PauseMode.RETRACT))
    assert bench.call(wire.SwitchVersionCall(5, 1, 2)).success
    count = len(bench.received[0].tokens)
    bench.call(wire.ContinueCall(6))
    bench.run()
    tokens = bench.received[0].tokens
    assert tokens[:count] == expected(prompt(10), count, 1)
    assert tokens[count:] == expected(prompt(10) + tokens[:count], 12 - count, 2)
    assert_served(bench, 1, prompt(10, 1), 12, 0)
    bench.assert_clean()


def test_b13_a_later_retraction_reads_everything_again() -> None:
    bench = Bench(**tiny_lora(2))
    bench.submit(0, prompt(10), 12, version_id=1)
    bench.step(4)
    bench.call(wire.SwitchVersionCall(1, 1, 2))
    bench.call(wire.PauseCall(2, PauseMode.RETRACT))
    count = len(bench.received[0].tokens)
    bench.call(wire.ContinueCall(3))
    bench.run()
    tokens = bench.received[0].tokens
    assert tokens[count:] == expected(prompt(10) + tokens[:count], 12 - count, 2)
    bench.assert_clean()


@DEPTHS
def test_switch_reaches_waiting_and_half_read_requests(depth: int) -> None:
    bench = Bench(depth=depth, chunked_prefill_size=8, slots=2, **tiny_lora(2, slots=1))
    for i in range(4):
        bench.submit(i, prompt(20, i), 4, version_id=1)
    bench.step(2)
    assert bench.planner.partial is not None and bench.planner.waiting
    assert bench.call(wire.SwitchVersionCall(1, 1, 2)).success
    assert bench.planner.lora_slots.versions == [2]
    bench.run()
    for i in (1, 2, 3):
        assert_served(bench, i, prompt(20, i), 4, 2)
    assert len(bench.received[0].tokens) == 4
    bench.assert_clean()


def test_switching_the_base_without_a_free_slot_starts_again() -> None:
    bench = Bench(**tiny_lora(2, slots=1))
    bench.submit(0, prompt(6), 12)
    bench.submit(1, prompt(6, 1), 12, version_id=1)
    bench.step(3)
    assert bench.call(wire.SwitchVersionCall(1, 0, 2)).success
    count = len(bench.received[0].tokens)
    bench.run()
    tokens = bench.received[0].tokens
    assert tokens == expected(prompt(6), count) + expected(prompt(6) + tokens[:count], 12 - count, 2)
    assert_served(bench, 1, prompt(6, 1), 12, 1)
    bench.assert_clean()


def test_switch_to_a_version_that_is_not_staged_changes_nothing() -> None:
    bench = Bench(**tiny_lora(1))
    bench.submit(0, prompt(6), 12, version_id=1)
    bench.step(3)
    assert not bench.call(wire.SwitchVersionCall(1, 1, 7)).success
    assert not bench.call(wire.SwitchVersionCall(2, 7, 1)).success
    bench.run()
    assert_served(bench, 0, prompt(6), 12, 1)
    bench.assert_clean()


# ---- everything at once --------------------------------------------------------------------------------------------


class AdapterMachine(RuleBasedStateMachine):
    """Versions come, go and replace one another under load, on two slots and a pool that retracts all the time."""

    depth, mixed = 0, False

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(
            depth=self.depth,
            mixed_chunk=self.mixed,
            pages=48,
            slots=4,
            chunked_prefill_size=8,
            conservativeness=0.05,
            **tiny_lora(2, slots=2),
        )
        self.jobs: dict[int, tuple[list[int], int, int]] = {}
        self.switched: set[int] = set()
        self.staged = 2
        self.calls = itertools.count()

    @rule(length=st.integers(1, 30), seed=st.integers(0, 1), count=st.integers(0, 14), version=st.integers(0, 5))
    def submit(self, length: int, seed: int, count: int, version: int) -> None:
        req_id = len(self.jobs)
        self.jobs[req_id] = (prompt(length, seed), count, version)
        self.bench.submit(req_id, prompt(length, seed), count, version_id=version)
        self.bench.step()
        known = version == 0 or version in self.bench.lora.versions
        got = self.bench.received[req_id]
        assert known or (got.finishes == [Finish.ABORT] and got.info.status_code == 400)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        self.bench.step(count)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.bench.channel.put(wire.AbortRequests([data.draw(st.integers(0, len(self.jobs) - 1))]))

    @rule()
    def stage(self) -> None:
        self.staged += 1
        self.bench.lora.commit(self.staged, tiny_manager(1)._host[1])

    @rule(version=st.integers(1, 6))
    def free(self, version: int) -> None:
        requests = self.bench.scheduler.control.requests.values()
        self.bench.step()
        known, used = version in self.bench.lora.versions, any(r.version_id == version for r in requests)
        assert self.bench.call(wire.FreeAdapterCall(next(self.calls), version)).success == (known and not used)
        self.bench.scheduler.stats.violations = 0

    @rule(old=st.integers(0, 5), new=st.integers(0, 6))
    def switch(self, old: int, new: int) -> None:
        requests = dict(self.bench.scheduler.control.requests)
        self.bench.step()
        moved = {i for i, request in requests.items() if request.version_id == old and not request.finished}
        if self.bench.call(wire.SwitchVersionCall(next(self.calls), old, new)).success and old != new:
            self.switched |= moved

    @rule(mode=st.sampled_from([PauseMode.IN_PLACE, PauseMode.RETRACT]))
    def pause(self, mode: PauseMode) -> None:
        self.bench.call(wire.PauseCall(next(self.calls), mode))

    @rule()
    def resume(self) -> None:
        self.bench.call(wire.ContinueCall(next(self.calls)))

    @invariant()
    def tokens_are_right(self) -> None:
        for req_id, (ids, count, version) in self.jobs.items():
            got = self.bench.received[req_id]
            if req_id not in self.switched:
                assert got.tokens == expected(ids, len(got.tokens), version)
            if got.finishes == [Finish.LENGTH]:
                assert len(got.tokens) == count

    @invariant()
    def holds_are_live_requests(self) -> None:
        planner = self.bench.planner
        live = [r.version_id for r in planner.live if r.version_id]
        assert planner.lora_slots.num_holds == len(live)
        assert set(live) <= set(planner.lora_slots.versions)

    def teardown(self) -> None:
        self.resume()
        self.bench.run()
        assert all(len(got.finishes) == 1 for got in self.bench.received.values())
        self.bench.assert_clean()


def machine(name: str, **attributes: object) -> type:
    case = type(name, (AdapterMachine,), attributes).TestCase  # type: ignore[attr-defined]
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    return case


TestAdapters = machine("Adapters")
TestAdaptersOverlap = machine("AdaptersOverlap", depth=1, mixed=True)
