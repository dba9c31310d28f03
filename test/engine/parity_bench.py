"""Runs a real engine (scheduler, KV cache, model, sampler) in this process and compares it with transformers.

Every position is compared over the whole vocabulary: requests ask for as many top log-probabilities as there are
tokens.
Used on CPU by test_parity, on a GPU by test/gpu.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from engine.fake_runner import FakeChannel

from sglang.srt.config.resolve import resolve
from sglang.srt.config.sections import LoRASection
from sglang.srt.lora.adapter import Adapter
from sglang.srt.lora.slots import SlotPool
from sglang.srt.managers.io_struct import wire
from sglang.srt.managers.io_struct.wire import Finish
from sglang.srt.managers.planner import Planner
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.setup import build_engine
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_yarn_bias": ("Llama", {"rope_parameters": YARN_ROPE, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_wide_heads": ("Qwen3", {"head_dim": 64}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("Mistral", {"sliding_window": 12}),
}


def make_checkpoint(family: str, path: Path, **save: Any) -> torch.nn.Module:
    """A random 2-layer model of the family, saved to `path`; returns transformers' model in float32."""
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(path, **save)
    return model


@dataclass
class Result:
    """What came back for one request: ids, and [positions, VOCAB] log-probabilities (NaN rows where not asked)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    output_table: list[np.ndarray] = field(default_factory=list)
    input_table: list[np.ndarray] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    finish: Finish = Finish.NONE
    info: wire.FinishInfo | None = None
    cached: int = 0


def table(positions: wire.Positions | None) -> list[np.ndarray]:
    """One [VOCAB] array per position that has alternatives."""
    if positions is None:
        return []
    ids, values = wire.unpack(positions.ids, "<i4"), wire.unpack(positions.logprobs, "<f4")
    rows, start = [], 0
    for count in wire.unpack(positions.counts, "<i4").tolist():
        row = np.full(VOCAB, np.nan, np.float32)
        row[ids[start : start + count]] = values[start : start + count]
        rows.append(row)
        start += count
    return rows


class RealBench:
    """An engine on `path`, driven step by step. Keyword arguments are launch flags.

    Args:
        lora_slots: adapter versions that may run together; 0 serves the base model only.
    """

    def __init__(self, path: Path, depth: int = 0, lora_slots: int = 0, **flags: Any) -> None:
        args = ServerArgs(model_path=str(path), skip_tokenizer_init=True, random_seed=0, **flags)
        lora = LoRASection(enabled=lora_slots > 0, max_loras_per_batch=lora_slots)
        self.config = msgspec.structs.replace(resolve(args), lora=lora)
        self.engine = build_engine(self.config)
        self.channel = FakeChannel()
        self.planner = Planner(self.config.schedule, self.engine.kv, SlotPool(lora_slots))
        self.scheduler = Scheduler(self.channel, self.engine.runner, self.planner, VOCAB, depth, self.engine.lora)
        self.results: dict[int, Result] = {}
        self.replies: dict[int, wire.CallReply] = {}

    def stage(self, version_id: int, adapter: Adapter) -> None:
        """Make a version known, at once."""
        assert self.engine.lora is not None
        self.engine.lora.commit(version_id, self.engine.lora.stage(adapter))

    def call(self, message: wire.Call) -> wire.CallReply:
        self.channel.put(message)
        self.step()
        return self.replies[message.call_id]

    def submit(
        self,
        req_id: int,
        prompt: list[int],
        count: int,
        *,
        score_prompt: bool,
        version_id: int = 0,
        top: int = VOCAB,
        **params: Any,
    ) -> None:
        sampling = SamplingParams.from_dict({"max_new_tokens": count, "ignore_eos": True, **params})
        spec = sampling.resolve(vocab_size=VOCAB, eos_ids=(), max_new_tokens=count, seed=req_id)
        request = wire.SubmitRequest(
            req_id,
            wire.pack(prompt, "<i4"),
            spec,
            version_id=version_id,
            return_logprob=True,
            logprob_start=0 if score_prompt else len(prompt),
            top_logprobs_num=top,
        )
        self.results[req_id] = Result()
        self.channel.put(wire.SubmitBatch([request]))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.step()
            sent, self.channel.sent = self.channel.sent, []
            for message in sent:
                if isinstance(message, wire.StepOutput):
                    self._collect(message)
                if isinstance(message, wire.CallReply):
                    self.replies[message.call_id] = message

    def run(self) -> None:
        self.step()
        while self.scheduler.busy:
            self.step()

    def _collect(self, message: wire.StepOutput) -> None:
        tokens = iter(wire.unpack(message.tokens, "<i4").tolist())
        logprobs = iter(wire.unpack(message.logprobs, "<f4").tolist())
        counts = wire.unpack(message.num_tokens, "<i4").tolist()
        for row, req_id in enumerate(wire.unpack(message.req_ids, "<i8").tolist()):
            result = self.results[req_id]
            result.tokens += [next(tokens) for _ in range(counts[row])]
            result.logprobs += [next(logprobs) for _ in range(counts[row])]
            result.finish = Finish(message.finish[row])
            result.info = message.finish_info.get(row)
            result.cached = message.cached_tokens.get(row, result.cached)
            extras = message.extras.get(row)
            if extras is not None:
                result.output_table += table(extras.output_top)
                result.input_table += table(extras.input_top)
                if extras.input_logprobs is not None:
                    result.input_logprobs = wire.unpack(extras.input_logprobs, "<f4").tolist()


@torch.inference_mode()
def assert_parity(
    model: torch.nn.Module,
    prompt: list[int],
    result: Result,
    *,
    temperature: float,
    atol: float,
    greedy: bool,
    rounded: torch.nn.Module | None,
) -> None:
    """Compare every position of one request with transformers' logits on the same tokens.

    With `rounded`, the same model in a lower precision, ours may be off by twice what transformers' is.
    """
    want = _logprobs(model, prompt + result.tokens, temperature)
    if rounded is not None:
        atol = max(atol, 2 * float(np.abs(_logprobs(rounded, prompt + result.tokens, temperature) - want).max()))
    first = len(prompt) - 1
    got = np.stack(result.output_table)
    np.testing.assert_allclose(got, want[first : first + len(result.tokens)], atol=atol, rtol=0)
    chosen = want[np.arange(first, first + len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.logprobs, chosen, atol=atol, rtol=0)
    if greedy:
        assert result.tokens == want[first : first + len(result.tokens)].argmax(-1).tolist()
    if result.input_table:
        assert np.isnan(result.input_table[0]).all() and np.isnan(result.input_logprobs[0])
        np.testing.assert_allclose(np.stack(result.input_table[1:]), want[:first], atol=atol, rtol=0)
        scored = want[np.arange(first), prompt[1:]]
        np.testing.assert_allclose(result.input_logprobs[1:], scored, atol=atol, rtol=0)


def _logprobs(model: torch.nn.Module, ids: list[int], temperature: float) -> np.ndarray:
    logits = model(torch.tensor([ids], device=next(model.parameters()).device)).logits[0]
    return (logits.float().cpu() / temperature).log_softmax(-1).numpy()


MODES: dict[str, dict[str, Any]] = {
    "plain": {"chunked_prefill_size": -1, "max_total_tokens": 2048},
    "chunked": {"chunked_prefill_size": 16, "max_total_tokens": 2048, "page_size": 4},
    "mixed": {"chunked_prefill_size": 16, "max_total_tokens": 2048, "enable_mixed_chunk": True},
    "retracting": {
        "chunked_prefill_size": 16,
        "max_total_tokens": 112,
        "page_size": 1,
        "enable_mixed_chunk": True,
        "schedule_conservativeness": 0.05,
        "depth": 1,
    },
    "no_cache": {"chunked_prefill_size": 24, "max_total_tokens": 1024, "disable_radix_cache": True, "depth": 1},
}


def check_mode(
    path: Path,
    model: torch.nn.Module,
    mode: str,
    *,
    atol: float,
    rounded: torch.nn.Module | None = None,
    **flags: Any,
) -> None:
    """Serve a mixed load in one mode and compare all of it."""
    rng = np.random.default_rng(3)
    bench = RealBench(path, max_running_requests=6, **{**MODES[mode], **flags})
    shared = rng.integers(2, VOCAB, size=40).tolist()
    jobs: dict[int, tuple[list[int], float, bool]] = {}
    for req_id in range(10):
        tail = rng.integers(2, VOCAB, size=int(rng.integers(1, 30))).tolist()
        prompt = (shared[: int(rng.integers(1, 41))] if req_id % 2 else []) + tail
        temperature = [0.0, 0.7, 1.0][req_id % 3]
        jobs[req_id] = (prompt, temperature, req_id % 4 == 0)
        bench.submit(req_id, prompt, 12 + 2 * req_id, score_prompt=jobs[req_id][2], temperature=temperature)
        bench.step(req_id % 3)
    bench.run()
    again = max(jobs) + 1
    jobs[again] = (jobs[1][0] + [5, 6], 0.0, False)
    bench.submit(again, jobs[again][0], 4, score_prompt=False, temperature=0.0)
    bench.run()
    for req_id, (prompt, temperature, _) in jobs.items():
        result = bench.results[req_id]
        assert result.finish is Finish.LENGTH, (req_id, result.info)
        assert_parity(
            model,
            prompt,
            result,
            temperature=temperature or 1.0,
            atol=atol,
            greedy=temperature == 0.0 and rounded is None,
            rounded=rounded,
        )
    assert (bench.planner.num_retractions > 0) == (mode == "retracting")
    assert (bench.results[again].cached > 0) == (mode != "no_cache")
