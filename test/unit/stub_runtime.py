"""A runtime whose TokenizerManager is a script: the HTTP layer under test, nothing behind it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
from unit.tiny_models import CHATML, byte_level

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoadSection, LoRASection, ServerSection
from sglang.srt.entrypoints.http_server import create_app
from sglang.srt.entrypoints.model_names import settle_adapter
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.adapter_service import AdapterStats
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.managers.io_struct.wire import Ready, SchedulerStats
from sglang.srt.managers.request_state import LogprobExtras
from sglang.srt.managers.response import OutputChunk
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.observability.metrics import ServerMetrics
from sglang.srt.parser.chat_template import ChatTemplate
from sglang.srt.parser.tokenizer import Tokenizer
from sglang.srt.server_args import ServerArgs

CONTEXT_LENGTH = 128
STATS = SchedulerStats(
    num_running_reqs=3,
    num_waiting_reqs=2,
    num_retracted_reqs=1,
    num_used_tokens=25,
    max_total_num_tokens=100,
    max_running_requests=4,
    gen_throughput=12.5,
    cache_hit_rate=0.5,
    steps_total=7,
)
READY = Ready(
    pid=4242,
    max_total_num_tokens=100,
    max_req_input_len=99,
    max_running_requests=4,
    context_length=CONTEXT_LENGTH,
    device="cpu",
    dtype="float32",
    memory_usage={"weight": 0.5, "kvcache": 0.25},
    load_seconds=1.0,
)


def make_tokenizer() -> Tokenizer:
    special = {"eos_token": "<|im_end|>"}
    template = ChatTemplate({"default": CHATML}, special, "test")
    return Tokenizer(byte_level(), special_tokens=special, eos_token_ids=(2,), chat_template=template)


class StubManager:
    """Answers as told: `replies` (native bodies), `outputs` (OutputChunks) or `error`; notes what it was asked."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = make_tokenizer()
        self.status = ServerStatus.UP
        self.paused = None
        self.weight_version = "default"
        self.ready: Ready | None = READY
        self.stats = STATS
        self.replies: list[Any] = []
        self.outputs: list[OutputChunk] = []
        self.error: Exception | None = None
        self.stats_error: Exception | None = None
        self.flush_result = (True, "")
        self.requests: list[Any] = []
        self.calls: list[Any] = []
        self.closed_streams = 0
        self.disconnected = asyncio.Event()
        self.hang = False
        self.num_held = 0
        self.lora_registry = LoRARegistry()
        self.adapter_calls = SimpleNamespace(listing=lambda: {"adapters": []})
        self.records: dict[int, Any] = {}

    async def _serve(self, obj: Any, request: Any, items: list[Any]) -> Any:
        self.requests.append(obj)
        try:
            for item in items:
                yield item
            if self.error is not None:
                raise self.error
            if self.hang:
                await request.wait_disconnected()
                self.disconnected.set()
        finally:
            self.closed_streams += 1

    def generate_request(self, obj: Any, request: Any = None) -> Any:
        return self._serve(obj, request, self.replies)

    def stream_chunks(self, obj: Any, request: Any = None) -> Any:
        return self._serve(obj, request, self.outputs)

    async def scheduler_stats(self) -> SchedulerStats:
        if self.stats_error is not None:
            raise self.stats_error
        return self.stats

    async def pause_generation(self, obj: Any) -> None:
        self.calls.append(("pause", obj.mode.value))

    async def continue_generation(self, obj: Any) -> None:
        self.calls.append(("continue", obj.torch_empty_cache))

    async def flush_cache(self, timeout: float = 0.0) -> tuple[bool, str]:
        self.calls.append(("flush", timeout))
        return self.flush_result

    def abort_request(
        self, rid: str | None = None, abort_all: bool = False, prefix: bool = False, lora_name: str | None = None
    ) -> int:
        self.calls.append(("abort", rid, abort_all, prefix, lora_name))
        return 1

    async def load_lora_adapter(self, obj: Any) -> LoRAUpdateOutput:
        self.calls.append(("load", obj.lora_name))
        return LoRAUpdateOutput()

    load_lora_adapter_from_tensors = unload_lora_adapter = load_lora_adapter


class StubRuntime:
    """What routes see of a runtime."""

    def __init__(self, **server: Any) -> None:
        settings: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 30000,
            "api_key": None,
            "admin_api_key": None,
            "served_model_name": "tiny",
            "log_level": "info",
            "log_level_http": "info",
            "log_requests": False,
            "log_requests_level": 0,
            "enable_metrics": False,
            "incremental_streaming": False,
            "allow_auto_truncate": False,
            "skip_warmup": True,
            "enable_cache_report": False,
            "decode_log_interval": 40,
            "sampling_defaults": {},
            "preferred_sampling_params": {},
        }
        model = ModelConfig(
            architecture="LlamaForCausalLM",
            model_type="llama",
            vocab_size=270,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            context_length=CONTEXT_LENGTH,
        )
        self.server_args = ServerArgs(
            model_path="tiny", api_key=server.get("api_key"), admin_api_key=server.get("admin_api_key")
        )
        self.config: Any = SimpleNamespace(
            server=ServerSection(**{**settings, **server}),
            model=model,
            load=LoadSection(path="/models/tiny", dtype="float32"),
            lora=LoRASection(),
        )
        self.manager = StubManager()
        self.metrics: ServerMetrics | None = None
        if self.config.server.enable_metrics:
            self.metrics = ServerMetrics("tiny")
            self.metrics.watch(lambda: self.manager.stats, AdapterStats)

    def generate(self, obj: Any, client: Any = None) -> Any:
        settle_adapter(obj, self.config)
        return self.manager.generate_request(obj, client)

    def stream(self, obj: Any, client: Any = None) -> Any:
        settle_adapter(obj, self.config)
        return self.manager.stream_chunks(obj, client)

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(create_app(self), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


def native_reply(text: str = " the", ids: tuple[int, ...] = (261,), **meta: Any) -> dict[str, Any]:
    """One native reply body."""
    return {
        "text": text,
        "output_ids": list(ids),
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 5,
            "weight_version": "default",
            "num_retractions": 0,
            "completion_tokens": len(ids),
            "cached_tokens": 3,
            "e2e_latency": 0.25,
            **meta,
        },
    }


def output_chunk(
    text: str,
    ids: list[int],
    *,
    index: int = 0,
    finish: dict[str, Any] | None = None,
    logprobs: list[float] | None = None,
    top: list[list[tuple[float, int]]] | None = None,
    completion_tokens: int | None = None,
    prompt_ids: tuple[int, ...] = (1, 100, 101, 102, 103),
    extras: LogprobExtras | None = None,
) -> OutputChunk:
    """One delta of a stream."""
    record = SimpleNamespace(
        prompt_tokens=len(prompt_ids),
        completion_tokens=len(ids) if completion_tokens is None else completion_tokens,
        cached_tokens=3,
        extras=extras or LogprobExtras(),
        adapter_info=dict,
        prompt=SimpleNamespace(token_ids=list(prompt_ids)),
    )
    return OutputChunk(
        index=index,
        rid="r1",
        text=text,
        token_ids=ids,
        logprobs=logprobs or [],
        output_top=top,
        output_ids_logprobs=None,
        finish_reason=finish,
        record=record,
    )


def events(response: httpx.Response) -> list[str]:
    """Payloads of an event stream, `[DONE]` included."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]
