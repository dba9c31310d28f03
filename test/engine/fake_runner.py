"""A model runner without a model: the next token is a hash of the tokens whose KV the page table leads to.

Any mistake in paging, prefix sharing, chunking, retraction or overlap changes the output, because what is hashed is
what the pool's rows hold, not what the request says. `expected` is the same function on plain lists.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang.srt.config.sections import ScheduleSection
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.kv_manager import KVManager
from sglang.srt.model_executor.model_runner import StepInput
from sglang.srt.sampling.sampler import HostSample
from sglang.srt.sampling.sampling_params import SamplingParams

VOCAB = 1000


def next_token(tokens: list[int]) -> int:
    """The fake model."""
    return zlib.crc32(np.array(tokens, dtype="<i8").tobytes()) % VOCAB


def expected(prompt: list[int], count: int) -> list[int]:
    """What the fake model generates."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class FakeResult:
    tokens: list[int]
    bad: list[bool]

    def read(self):  # type: ignore[no-untyped-def]
        rows = len(self.tokens)
        sample = HostSample(
            tokens=np.array(self.tokens, dtype=np.int64),
            logprobs=np.full(rows, -0.5, dtype=np.float32),
            bad_rows=np.array(self.bad, dtype=bool),
            top={},
            ids={},
        )
        return sample, []


class FakeRunner:
    """Stands in for ModelRunner; `launch` runs at once, as a device stream would in order."""

    device = torch.device("cpu")

    def __init__(self, kv: KVManager) -> None:
        self.kv = kv
        self.pool = np.full((kv.capacity, 2), -1, dtype=np.int64)
        self.last = np.full(len(kv.table.host), -1, dtype=np.int64)
        self.nan_slots: set[int] = set()
        self.steps: list[StepInput] = []

    def launch(self, step: StepInput) -> FakeResult:
        self.steps.append(step)
        input_ids = step.input_ids.copy()
        input_ids[step.decode_rows] = self.last[step.decode_slots]
        self.pool[step.out_locs] = np.stack([input_ids, step.positions], axis=1)
        contexts = [self._context(int(s), int(n)) for s, n in zip(step.slots, step.shape.kv_lens, strict=True)]
        ends = (np.cumsum(step.shape.query_lens) - 1).tolist()
        sampled = [ends.index(row) for row in step.sample_rows.tolist()]
        tokens = [next_token(contexts[b]) for b in sampled]
        assert step.slots[sampled].tolist() == step.sample_slots.tolist()
        self.last[step.sample_slots] = tokens
        return FakeResult(tokens, [int(s) in self.nan_slots for s in step.sample_slots])

    def _context(self, slot: int, length: int) -> list[int]:
        size = self.kv.page_size
        rows = [int(self.kv.table.host[slot, i // size]) * size + i % size for i in range(length)]
        held = self.pool[rows]
        assert held[:, 1].tolist() == list(range(length)), "KV rows are not this sequence's"
        return held[:, 0].tolist()


class FakeChannel:
    """The back's end of a channel, with lists for sockets; every message goes through the wire format."""

    def __init__(self) -> None:
        self.inbox: list[wire.ToBack] = []
        self.sent: list[wire.ToFront] = []

    def put(self, message: wire.ToBack) -> None:
        self.inbox.append(wire.to_back_decoder.decode(wire.encoder.encode(message)))

    def receive(self, timeout_ms: int = 0) -> list[wire.ToBack]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: wire.ToFront) -> None:
        self.sent.append(wire.to_front_decoder.decode(wire.encoder.encode(message)))


@dataclass
class Received:
    """What the front has got for one request."""

    tokens: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    info: wire.FinishInfo | None = None
    cached: int | None = None


class Bench:
    """A scheduler on a fake runner and channel, driven step by step."""

    def __init__(self, *, pages: int = 256, page_size: int = 1, slots: int = 8, depth: int = 0, **schedule) -> None:  # type: ignore[no-untyped-def]
        options = {
            "policy": "fcfs",
            "conservativeness": 1.0,
            "max_running_requests": slots,
            "max_queued_requests": None,
            "chunked_prefill_size": None,
            "max_prefill_tokens": 4096,
            "mixed_chunk": False,
            "overlap": depth > 0,
            "stream_interval": 1,
        }
        enable_cache = schedule.pop("enable_cache", True)
        self.kv = KVManager(pages, page_size, slots, 512, FakeRunner.device, enable_cache)
        self.runner = FakeRunner(self.kv)
        self.channel = FakeChannel()
        self.planner = Planner(ScheduleSection(**{**options, **schedule}), self.kv)
        self.scheduler = Scheduler(self.channel, self.runner, self.planner, VOCAB, depth)  # type: ignore[arg-type]
        self.received: dict[int, Received] = {}
        self.replies: dict[int, wire.CallReply] = {}

    def submit(self, req_id: int, prompt: list[int], max_new_tokens: int = 4, **options) -> None:  # type: ignore[no-untyped-def]
        fields = {k: options.pop(k) for k in ("version_id", "extra_key", "priority", "return_logprob") if k in options}
        params = SamplingParams.from_dict({"temperature": 0, "max_new_tokens": max_new_tokens, **options})
        spec = params.resolve(vocab_size=VOCAB, eos_ids=(), max_new_tokens=max_new_tokens, seed=0)
        request = wire.SubmitRequest(req_id, wire.pack(prompt, "<i4"), spec, **fields)
        self.received[req_id] = Received()
        self.channel.put(wire.SubmitBatch([request]))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()
            self._collect()

    def run(self, limit: int = 2000) -> None:
        """Step until idle."""
        self.step()
        while self.scheduler.busy or self.channel.inbox:
            self.step()
            limit -= 1
            assert limit, "the scheduler makes no progress"

    def call(self, message: wire.ToBack) -> wire.CallReply:
        self.channel.put(message)
        self.step()
        return self.replies[message.call_id]  # type: ignore[union-attr]

    def _collect(self) -> None:
        sent, self.channel.sent = self.channel.sent, []
        for message in sent:
            if isinstance(message, wire.CallReply):
                self.replies[message.call_id] = message
            if isinstance(message, wire.StepOutput):
                self._collect_rows(message)

    def _collect_rows(self, message: wire.StepOutput) -> None:
        tokens = iter(wire.unpack(message.tokens, "<i4").tolist())
        counts = wire.unpack(message.num_tokens, "<i4").tolist()
        finishes = wire.unpack(message.finish, "u1").tolist()
        for row, req_id in enumerate(wire.unpack(message.req_ids, "<i8").tolist()):
            got = self.received[req_id]
            assert not got.finishes, f"request {req_id} got a row after its terminal one"
            got.tokens += [next(tokens) for _ in range(counts[row])]
            got.cached = message.cached_tokens.get(row, got.cached)
            if finishes[row]:
                got.finishes.append(Finish(finishes[row]))
                got.info = message.finish_info[row]
