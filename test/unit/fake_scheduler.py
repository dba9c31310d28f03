"""A scheduler that does nothing by itself: tests hand out every token, ack and reply by hand.

`FakeScheduler` is the back end of a `TokenizerManager` in tests of the front's lifecycle. It records what the front
sends (through the real wire encoding), knows which requests it owes a terminal row and which adapter versions it has,
and refuses to break the wire's promises: one terminal row per request, none for a request it was never sent. It also
holds the front to its own: a request names only a version that is staged, a version id is staged once, and a version is
freed once, when no live request names it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sglang.srt.config import sections
from sglang.srt.config.model_config import ModelConfig
from sglang.srt.lora.adapter import Adapter, AdapterModule, Span
from sglang.srt.lora.lease import AdapterVersion, VersionState
from sglang.srt.managers.io_struct import (
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
    wire,
)
from sglang.srt.managers.io_struct.wire import BASE_VERSION, Finish, FinishInfo, RowLogprobs
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.parser.tokenizer import Tokenizer

WAITING_ABORT = {"type": "abort", "message": "Abort in waiting queue"}
RUNNING_ABORT = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}

EOS = 256
VOCAB_SIZE = 257
CONTEXT_LENGTH = 100


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and `<eos>` (id 256). Use `ids_of` for the ids of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<eos>"}, eos_token_ids=(EOS,))


def make_config(**overrides: Any) -> sections.Config:
    """A configuration of the smallest model; keyword arguments replace fields of any section by name."""

    def section(kind: type, **values: Any) -> Any:
        return kind(**values | {k: overrides.pop(k) for k in list(overrides) if k in kind.__struct_fields__})

    model = section(
        ModelConfig, architecture="LlamaForCausalLM", model_type="llama", vocab_size=VOCAB_SIZE, hidden_size=8,
        intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        rms_norm_eps=1e-5, rope_theta=1e4, context_length=CONTEXT_LENGTH, eos_token_ids=(EOS,),
    )  # fmt: skip
    schedule = section(
        sections.ScheduleSection, policy="fcfs", conservativeness=1.0, max_running_requests=4,
        max_queued_requests=None, chunked_prefill_size=None, max_prefill_tokens=1024, mixed_chunk=False,
        overlap=False, stream_interval=1,
    )  # fmt: skip
    server = section(
        sections.ServerSection, host="127.0.0.1", port=30000, api_key=None, admin_api_key=None,
        served_model_name="tiny", log_level="info", log_level_http="info", log_requests=False, log_requests_level=0,
        enable_metrics=False, incremental_streaming=False, allow_auto_truncate=False, skip_warmup=True,
        enable_cache_report=False, decode_log_interval=40, sampling_defaults={}, preferred_sampling_params={},
    )  # fmt: skip
    memory = section(
        sections.MemorySection, max_total_tokens=1000, mem_fraction_static=0.5, page_size=1,
        kv_cache_dtype="float32", disable_radix_cache=False,
    )  # fmt: skip
    load = section(sections.LoadSection, path="/nowhere", dtype="float32")
    device = section(sections.DeviceSection, device="cpu", gpu_id=0, attention_backend="torch_native")
    lora = section(sections.LoRASection)
    assert not overrides, f"unknown configuration fields: {sorted(overrides)}"
    return sections.Config(
        model=model, load=load, tokenizer=sections.TokenizerSection(path=None), memory=memory, schedule=schedule,
        device=device, server=server, lora=lora,
    )  # fmt: skip


@dataclass
class Row:
    """One request's part of a step; `logprobs` is as long as `tokens` or absent."""

    req_id: int
    tokens: Sequence[int] = ()
    finish: Finish = Finish.NONE
    info: FinishInfo | None = None
    logprobs: Sequence[float] | None = None
    extras: RowLogprobs | None = None
    cached_tokens: int | None = None


def step_output(rows: Sequence[Row]) -> wire.StepOutput:
    """The wire message for some rows."""
    logprobs: list[float] = []
    if any(row.logprobs is not None for row in rows):
        logprobs = [p for row in rows for p in (row.logprobs or [0.0] * len(row.tokens))]
    return wire.StepOutput(
        req_ids=wire.pack([row.req_id for row in rows], "<i8"),
        finish=bytes(row.finish for row in rows),
        num_tokens=wire.pack([len(row.tokens) for row in rows], "<i4"),
        tokens=wire.pack([t for row in rows for t in row.tokens], "<i4"),
        logprobs=wire.pack(logprobs, "<f4"),
        cached_tokens={i: r.cached_tokens for i, r in enumerate(rows) if r.cached_tokens is not None},
        finish_info={i: row.info or FinishInfo() for i, row in enumerate(rows) if row.finish},
        extras={i: row.extras for i, row in enumerate(rows) if row.extras is not None},
    )


@dataclass
class FakeScheduler:
    """A `FrontChannel` whose other end is the test.

    Fields:
        live: requests that were submitted and have not had their terminal row.
        aborted, stopped: of those, the ones the front wants ended, in order.
        calls: control calls without a reply, oldest first.
        batches: how many requests each SubmitBatch held.
        asked_to_end: every request the front has ever wanted ended.
        staged: the adapter versions it has; seen_versions: every id it was ever sent; freed: in order.
        auto_free: answer FreeAdapterCall at once.
        made_by: for every token of a request, the version that made it.
        refuse_submits: how many of the next SubmitBatches cannot be sent.
        violations: promises the front has broken; it may survive them, a test must not.
    """

    live: dict[int, wire.SubmitRequest] = field(default_factory=dict)
    submitted: list[wire.SubmitRequest] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    sent: list[wire.ToBack] = field(default_factory=list)
    terminal: list[int] = field(default_factory=list)
    started: set[int] = field(default_factory=set)
    asked_to_end: set[int] = field(default_factory=set)
    staged: dict[int, Adapter] = field(default_factory=dict)
    seen_versions: set[int] = field(default_factory=set)
    freed: list[int] = field(default_factory=list)
    auto_free: bool = True
    made_by: dict[int, list[int]] = field(default_factory=dict)
    refuse_submits: int = 0
    violations: list[str] = field(default_factory=list)
    paused: bool = False
    dead: bool = False
    _inbox: asyncio.Queue[wire.ToFront] = field(default_factory=asyncio.Queue)

    def send(self, message: wire.ToBack) -> None:
        """What the front calls."""
        message = wire.to_back_decoder.decode(wire.encoder.encode(message))
        if self.refuse_submits and isinstance(message, wire.SubmitBatch):
            self.refuse_submits -= 1
            raise OSError("no buffer space")
        self.sent.append(message)
        try:
            self._take(message)
        except AssertionError as error:
            self.violations.append(str(error))
            raise

    def _take(self, message: wire.ToBack) -> None:
        if isinstance(message, wire.SubmitBatch):
            self._submit(message)
        elif isinstance(message, wire.AbortRequests):
            self._end(self.aborted, message.req_ids)
        elif isinstance(message, wire.StopRequests):
            self._end(self.stopped, message.req_ids)
        elif isinstance(message, wire.FreeAdapterCall):
            self._free(message)
        else:
            if isinstance(message, wire.StageAdapterCall):
                assert message.version_id not in self.seen_versions, "a version id is staged once"
                self.seen_versions.add(message.version_id)
            elif isinstance(message, wire.SwitchVersionCall):
                assert {message.old_version_id, message.new_version_id} <= self.staged.keys(), "switch of the unstaged"
            self.calls.append(message)

    async def messages(self) -> AsyncIterator[wire.ToFront]:
        """What the front reads."""
        while True:
            yield await self._inbox.get()

    def close(self) -> None:
        """Nothing to free."""

    def ready(self, **overrides: Any) -> None:
        """Say that the model is loaded."""
        fields: dict[str, Any] = {"pid": 1, "max_total_num_tokens": 1000, "max_req_input_len": CONTEXT_LENGTH}
        fields |= {"max_running_requests": 4, "context_length": CONTEXT_LENGTH, "device": "cpu", "dtype": "float32"}
        self.push(wire.Ready(**(fields | {"memory_usage": {}, "load_seconds": 0.0} | overrides)))

    def push(self, message: wire.ToFront) -> None:
        """Say anything."""
        self._inbox.put_nowait(wire.to_front_decoder.decode(wire.encoder.encode(message)))

    def step(self, *rows: Row) -> None:
        """Send one step; terminal rows must be of live requests."""
        for row in rows:
            if row.req_id in self.live:
                self.made_by.setdefault(row.req_id, []).extend([self.live[row.req_id].version_id] * len(row.tokens))
            if row.finish:
                assert row.req_id in self.live, f"second terminal row of {row.req_id}"
                del self.live[row.req_id]
                self.terminal.append(row.req_id)
            self.started.add(row.req_id)
        self.push(step_output(rows))

    def late(self, *rows: Row) -> None:
        """Send a step about requests that are over."""
        self.push(step_output(rows))

    def emit(self, req_id: int, tokens: str | Sequence[int], finish: Finish = Finish.NONE, **fields: Any) -> None:
        """Send one row; a text stands for its bytes' tokens."""
        self.step(Row(req_id, ids_of(tokens) if isinstance(tokens, str) else tokens, finish, **fields))

    def finish(self, req_id: int, tokens: str | Sequence[int] = "") -> None:
        """Send a row that ends at the length limit."""
        self.emit(req_id, tokens, Finish.LENGTH)

    def ack(self) -> int:
        """End everything the front wants ended, as the real scheduler does; returns how many."""
        rows = []
        for req_id in dict.fromkeys(self.aborted + self.stopped):
            if req_id not in self.live:
                continue
            running = req_id in self.started
            message = "Aborted" if running else "Abort in waiting queue"
            info = FinishInfo(message=message, was_running=running)
            aborted = req_id in self.aborted
            rows.append(Row(req_id, (), Finish.ABORT if aborted else Finish.STOP, info if aborted else None))
        self.aborted.clear()
        self.stopped.clear()
        if rows:
            self.step(*rows)
        return len(rows)

    def reply(
        self, success: bool = True, message: str = "", stats: wire.SchedulerStats | None = None, *, place: int = 0
    ) -> None:
        """Answer a control call, the oldest one unless told otherwise; what it asked for is done now."""
        call = self.calls.pop(place)
        if isinstance(call, wire.PauseCall | wire.ContinueCall):
            self.paused = isinstance(call, wire.PauseCall)
        elif success and isinstance(call, wire.StageAdapterCall):
            self.staged[call.version_id] = call.adapter
        elif success and isinstance(call, wire.SwitchVersionCall):
            for request in list(self.live.values()):
                if request.version_id == call.old_version_id:
                    self.live[request.req_id] = msgspec.structs.replace(request, version_id=call.new_version_id)
        self.push(wire.CallReply(call.call_id, success, message, stats))

    def _submit(self, message: wire.SubmitBatch) -> None:
        self.batches.append(len(message.requests))
        for request in message.requests:
            assert request.req_id not in {r.req_id for r in self.submitted}, "req_id used twice"
            assert request.version_id == BASE_VERSION or request.version_id in self.staged, "names what is not staged"
            self.live[request.req_id] = request
            self.submitted.append(request)

    def _free(self, message: wire.FreeAdapterCall) -> None:
        version_id = message.version_id
        assert version_id in self.staged, "freed twice, or never staged"
        assert version_id not in {request.version_id for request in self.live.values()}, "freed under a live request"
        del self.staged[version_id]
        self.freed.append(version_id)
        if self.auto_free:
            self.push(wire.CallReply(message.call_id, True))
        else:
            self.calls.append(message)

    def _end(self, wanted: list[int], req_ids: list[int]) -> None:
        self.asked_to_end.update(req_ids)
        known = {request.req_id for request in self.submitted}
        assert known.issuperset(req_ids), "ended before it was submitted"
        assert len(set(req_ids)) == len(req_ids)
        wanted.extend(req_ids)


class FakeClient:
    """The other end of an HTTP request, until the test calls `disconnect`."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()

    def disconnect(self) -> None:
        """Hang up."""
        self._gone.set()

    async def wait_disconnected(self) -> None:
        """What the front waits for."""
        await self._gone.wait()


class Call:
    """One client: runs a request in a task and keeps what it is given.

    Args:
        chunks: call `stream_chunks` instead of `generate_request`.
        fields: of the GenerateReqInput; `text="hi"` unless a prompt is given.
    """

    def __init__(self, manager: TokenizerManager, *, chunks: bool = False, **fields: Any) -> None:
        if "text" not in fields and "input_ids" not in fields:
            fields["text"] = "hi"
        self.client = FakeClient()
        self.items: list[Any] = []
        serve = manager.stream_chunks if chunks else manager.generate_request
        self.generator = serve(GenerateReqInput(**fields), self.client)
        self.task = asyncio.get_running_loop().create_task(self._collect())
        # A test need not ask for the error, which asyncio would report whenever the task is collected.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def done(self) -> bool:
        """Whether the client has its terminal result: the whole reply, or an error."""
        return self.task.done()

    @property
    def error(self) -> BaseException | None:
        """The error it got, if any; only when done."""
        return self.task.exception()

    @property
    def reply(self) -> Any:
        """The only item of a call that is not streamed."""
        assert len(self.items) == 1, self.items
        return self.items[0]

    @property
    def finish_reasons(self) -> list[dict[str, Any]]:
        """Every finish reason it has been told, in order of arrival."""
        bodies = [body for item in self.items for body in (item if isinstance(item, list) else [item])]
        reasons = [b["meta_info"]["finish_reason"] if isinstance(b, dict) else b.finish_reason for b in bodies]
        return [reason for reason in reasons if reason is not None]

    async def _collect(self) -> None:
        async with contextlib.aclosing(self.generator) as items:
            async for item in items:
                self.items.append(item)


class SlowTokenizer:
    """Holds every call in its tokenising await until the test sets `go`. Undone with the monkeypatch.

    Args:
        longer_than: texts up to this many characters are tokenised at once, as ever.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, longer_than: int = 0) -> None:
        self.go = asyncio.Event()
        monkeypatch.setattr("sglang.srt.managers.request_builder.OFF_LOOP_CHARACTERS", longer_than)
        monkeypatch.setattr(asyncio, "to_thread", self._later)

    async def _later(self, function: Callable[..., Any], *args: Any) -> Any:
        await self.go.wait()
        return function(*args)


class FakeThreads:
    """`asyncio.to_thread` on the loop's own turns: work is done in the next turn, or when the test lets it. Undone with
    the monkeypatch.

    Attributes:
        slow: work waits for `go`; waiting: the work that does, oldest first.

    Args:
        longer_than: texts of more characters than this are tokenised in a thread.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, longer_than: int | None = None) -> None:
        self.slow = False
        self.waiting: list[asyncio.Future[None]] = []
        monkeypatch.setattr(asyncio, "to_thread", self._later)
        if longer_than is not None:
            monkeypatch.setattr("sglang.srt.managers.request_builder.OFF_LOOP_CHARACTERS", longer_than)

    def go(self, place: int = 0) -> None:
        """Let one piece of work through."""
        future = self.waiting.pop(place)
        if not future.done():
            future.set_result(None)

    def go_all(self) -> None:
        """Let everything through, from here on."""
        self.slow = False
        while self.waiting:
            self.go()

    async def _later(self, function: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        if self.slow:
            future = asyncio.get_running_loop().create_future()
            self.waiting.append(future)
            await future
        return function(*args)


@dataclass
class FakeAdapter:
    """What a reader returns; `closed` counts."""

    adapter: Adapter
    digest: str
    num_tensors: int = 2
    nbytes: int = 64
    max_rank: int = 1
    closed: int = 0

    def close(self) -> None:
        """Give the memory back."""
        self.closed += 1


@dataclass
class FakeReader:
    """Makes adapters out of nothing.

    Fields:
        contents: path -> what lies there (the path itself, when the test says nothing).
        errors: path -> what reading it raises.
        reads: everything that was read, in order; made: what came of it.
    """

    contents: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    made: list[FakeAdapter] = field(default_factory=list)

    def read_directory(self, path: str) -> FakeAdapter:
        """From a directory that need not exist."""
        self.reads.append(path)
        if path in self.errors:
            raise self.errors[path]
        span = Span("float32", (1, 8), 0)
        module = AdapterModule("model.layers.0.self_attn.q_proj", 1.0, span, Span("float32", (8, 1), 32))
        self.made.append(FakeAdapter(Adapter(path, 64, (module,)), digest=self.contents.get(path, path)))
        return self.made[-1]

    def read_tensors(
        self,
        config_dict: dict[str, Any],
        payload: Any,
        load_format: str | None,
        expected_checksums: Any = None,
        added_tokens: dict[str, Any] | None = None,
    ) -> FakeAdapter:
        """From tensors: whatever the payload is."""
        return self.read_directory(f"{payload}:{sorted(config_dict.items())}")

    @property
    def all_closed(self) -> bool:
        """Whether everything that was made has been closed once."""
        return all(made.closed == 1 for made in self.made)


_TOKENIZER = byte_tokenizer()


def ids_of(text: str) -> list[int]:
    """Token ids of a text under `byte_tokenizer`."""
    return _TOKENIZER.encode(text)


def make_manager(
    scheduler: FakeScheduler,
    *,
    with_tokenizer: bool = True,
    metrics: Any = None,
    lora: bool = False,
    reader: FakeReader | None = None,
    on_publish: Callable[[float], None] | None = None,
    **overrides: Any,
) -> TokenizerManager:
    """A TokenizerManager on a fake scheduler; keyword arguments change the configuration.

    With `lora`, use it under FakeThreads (as `clean_front` does).
    """
    args: Any = SimpleNamespace(enable_lora=lora)
    tokenizer = _TOKENIZER if with_tokenizer else None
    config = make_config(enabled=lora, **overrides)
    reader = reader or (FakeReader() if lora else None)
    return TokenizerManager(config, args, scheduler, tokenizer, metrics, reader, on_publish)


async def settle(turns: int = 12) -> None:
    """Let everything that can run now run: a bounded number of event-loop turns, no time."""
    for _ in range(turns):
        await asyncio.sleep(0)


@dataclass
class Front:
    """A manager, the scheduler behind it, and shorthands for tests.

    Fields:
        reader, threads: with `lora` only.
    """

    manager: TokenizerManager
    scheduler: FakeScheduler
    reader: FakeReader = field(default_factory=FakeReader)
    threads: FakeThreads | None = None

    @classmethod
    async def start(cls, **options: Any) -> Front:
        """A front that is up; the options are those of `make_manager`."""
        scheduler, reader = FakeScheduler(), FakeReader()
        if options.get("lora"):
            options["reader"] = reader
        manager = make_manager(scheduler, **options)
        await manager.start()
        scheduler.ready()
        await manager.wait_ready(1.0)
        return cls(manager, scheduler, reader)

    def call(self, **fields: Any) -> Call:
        """A client that asks for something."""
        return Call(self.manager, **fields)

    async def running(self, **fields: Any) -> Call:
        """A call whose requests are with the scheduler and have a token each."""
        known = set(self.scheduler.live)
        call = self.call(**fields)
        await settle()
        for req_id in self.scheduler.live.keys() - known:
            self.scheduler.emit(req_id, "a")
        await settle()
        return call

    @property
    def only(self) -> int:
        """The only request the scheduler has."""
        (req_id,) = self.scheduler.live
        return req_id

    # ---- adapters --------------------------------------------------------------------------------------------------

    def loading(self, name: str, path: str | None = None, **fields: Any) -> asyncio.Task[LoRAUpdateOutput]:
        """A load in progress; the scheduler does not answer by itself."""
        obj = LoadLoRAAdapterReqInput(lora_name=name, lora_path=path or f"/adapters/{name}", **fields)
        return asyncio.ensure_future(self.manager.load_lora_adapter(obj))

    def loading_tensors(self, name: str, tensors: str, **fields: Any) -> asyncio.Task[LoRAUpdateOutput]:
        """The same for an adapter that comes in the request."""
        fields = {"config_dict": {}} | fields
        obj = LoadLoRAAdapterFromTensorsReqInput(lora_name=name, serialized_tensors=tensors, **fields)
        return asyncio.ensure_future(self.manager.load_lora_adapter_from_tensors(obj))

    def unloading(self, name: str, **fields: Any) -> asyncio.Task[LoRAUpdateOutput]:
        """An unload in progress."""
        return asyncio.ensure_future(
            self.manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name, **fields))
        )

    async def answered(self, task: asyncio.Task[Any]) -> Any:
        """What comes of it when the scheduler answers every call."""
        await settle()
        while self.scheduler.calls:
            self.scheduler.reply()
            await settle()
        assert task.done(), "it waits for something else than the scheduler's answers"
        return task.result()

    async def load(self, name: str, path: str | None = None, **fields: Any) -> AdapterVersion:
        """Load an adapter; it must succeed."""
        reply = await self.answered(self.loading(name, path, **fields))
        assert reply.success, reply.error_message
        return self.manager.lora_registry.versions[reply.lora_version]

    async def load_refused(self, name: str, path: str | None = None, **fields: Any) -> LoRAUpdateOutput:
        """Load an adapter; it must fail."""
        reply = await self.answered(self.loading(name, path, **fields))
        assert not reply.success
        return reply

    @property
    def names(self) -> dict[str, int]:
        """What each adapter name means."""
        return {version.name: version.version_id for version in self.manager.lora_registry.serving()}

    async def check_clean(self) -> None:
        """Nothing is left: what a quiet server must look like."""
        await settle()
        assert not self.scheduler.live
        assert not self.manager.records
        assert not self.manager.rid_to_state
        assert self.manager.counters.double_closes == 0
        assert len(self.scheduler.terminal) == len(set(self.scheduler.terminal))
        assert not self.scheduler.violations
        registry = self.manager.lora_registry
        assert registry.num_leases == 0
        assert registry.double_releases == 0
        assert self.manager.adapters.free_failures == 0
        assert all(version.state is VersionState.SERVING for version in registry.versions.values())
        assert set(registry.versions) == set(self.names.values())
        assert set(registry.versions) == set(self.scheduler.staged)
        assert self.reader.all_closed


@contextlib.asynccontextmanager
async def open_front(**options: Any) -> AsyncIterator[Front]:
    """A front in which no event-loop callback may fail; with `lora`, under FakeThreads."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    with pytest.MonkeyPatch.context() as patch:
        threads = FakeThreads(patch) if options.get("lora") else None
        front = await Front.start(**options)
        front.threads = threads
        yield front
        await front.manager.close()
        await settle()
    assert not errors, f"an exception in an event-loop callback: {errors}"


@contextlib.asynccontextmanager
async def clean_front(**options: Any) -> AsyncIterator[Front]:
    """A front that must be clean at the end."""
    async with open_front(**options) as front:
        yield front
        await front.check_clean()
