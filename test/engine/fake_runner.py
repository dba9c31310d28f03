"""A model runner without a model: the next token is a hash of the tokens whose KV the page table leads to.

Any mistake in paging, prefix sharing, chunking, retraction or overlap changes the output, because what is hashed is
what the pool's rows hold, not what the request says. A row also holds the adapter version it was computed with.
`expected` is the same function on plain lists.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang.srt.config.sections import ScheduleSection
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.slots import SlotPool
from sglang.srt.managers import invariants
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import BASE_VERSION, Finish
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


def expected(prompt: list[int], count: int, version: int = 0) -> list[int]:
    """What the fake model generates."""
    return expected_spans(prompt, [(version, count)])


def expected_spans(prompt: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """The same when a request is switched: (version, tokens drawn with it), in order; KV is kept."""
    rows = [coded(token, spans[0][0]) for token in prompt]
    output: list[int] = []
    for version, count in spans:
        for _ in range(count):
            # A drawn token's KV is computed by the step that draws the next one.
            rows += [coded(token, version) for token in output[len(rows) - len(prompt) :]]
            output.append(next_token(rows))
    return output


def coded(token: int, version: int) -> int:
    """What a KV row holds."""
    return token + VOCAB * version


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

    def __init__(self, kv: KVManager, lora: LoRAManager | None = None) -> None:
        self.kv = kv
        self.lora = lora
        self.pool = np.full((kv.capacity, 2), -1, dtype=np.int64)
        self.last = np.full(len(kv.table.host), -1, dtype=np.int64)
        self.nan_slots: set[int] = set()
        self.steps: list[StepInput] = []

    def launch(self, step: StepInput) -> FakeResult:
        self.steps.append(step)
        self._check_versions(step)
        input_ids = step.input_ids.copy()
        input_ids[step.decode_rows] = self.last[step.decode_slots]
        versions = np.repeat(step.versions, step.shape.query_lens)
        self.pool[step.out_locs] = np.stack([coded(input_ids, versions), step.positions], axis=1)
        contexts = [self._context(int(s), int(n)) for s, n in zip(step.slots, step.shape.kv_lens, strict=True)]
        ends = (np.cumsum(step.shape.query_lens) - 1).tolist()
        sampled = [ends.index(row) for row in step.sample_rows.tolist()]
        tokens = [next_token(contexts[b]) for b in sampled]
        assert step.slots[sampled].tolist() == step.sample_slots.tolist()
        self.last[step.sample_slots] = tokens
        return FakeResult(tokens, [int(s) in self.nan_slots for s in step.sample_slots])

    def _check_versions(self, step: StepInput) -> None:
        """B1: a step never names a version that has no slot, or no weights."""
        named = set(step.versions.tolist()) - {BASE_VERSION}
        assert named <= set(step.lora_slots)
        assert not named or (self.lora is not None and named <= self.lora.versions)

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
    """A scheduler on a fake runner and channel, driven step by step.

    Args:
        lora: adapter versions, perhaps some staged already; None serves the base model only.
        lora_slots: which of them may run together.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        *,
        pages: int = 256,
        page_size: int = 1,
        slots: int = 8,
        depth: int = 0,
        lora: LoRAManager | None = None,
        lora_slots: SlotPool | None = None,
        channel: FakeChannel | None = None,
        **schedule,
    ) -> None:
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
        self.lora = lora
        self.runner = FakeRunner(self.kv, lora)
        self.channel = channel or FakeChannel()
        self.planner = Planner(ScheduleSection(**{**options, **schedule}), self.kv, lora_slots)
        self.scheduler = Scheduler(self.channel, self.runner, self.planner, VOCAB, depth, lora)  # type: ignore[arg-type]
        self.received: dict[int, Received] = {}
        self.replies: dict[int, wire.CallReply] = {}
        self.tokens_at_reply: dict[int, dict[int, int]] = {}

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

    def assert_clean(self) -> None:
        """An idle scheduler holds nothing."""
        versions = self.lora.versions if self.lora else frozenset()
        assert invariants.violations(self.planner, len(self.scheduler.control.requests), versions) == []
        assert self.scheduler.stats.violations == 0

    def _collect(self) -> None:
        sent, self.channel.sent = self.channel.sent, []
        for message in sent:
            if isinstance(message, wire.CallReply):
                self.replies[message.call_id] = message
                self.tokens_at_reply[message.call_id] = {i: len(got.tokens) for i, got in self.received.items()}
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
