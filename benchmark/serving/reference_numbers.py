"""The figures our own are read beside: stock SGLang's, the limit of the GPU, and our goals. One table, with its source.

Used by `gpu_tables` and `plot_gpu`. Milliseconds and seconds as `gpu.py` reports them; concurrency is the key.
"""

from __future__ import annotations

SOURCE = (
    "stock SGLang 0.5.12 with its own defaults (FA3, CUDA graphs, csgmv), measured by us on one NVIDIA H200 "
    "(driver 580.159, CUDA 13.0, torch 2.11.0, 16 host cores): Qwen3-1.7B's exact shape, random weights, LoRA rank 16 "
    "on q, k, v, o, gate, up, down; 256 prompt and 512 output tokens, closed loop, not streamed. A range is given by "
    "its middle. The limit is arithmetic: bytes and FLOPs of a step at 512 tokens of context, 4.3 TB/s, 790 TFLOP/s."
)
MEASURED_ON = "stock SGLang 0.5.12 and goals, Qwen3-1.7B on an H200"

DECODE_MS: dict[str, dict[int, float]] = {
    "stock, LoRA off": {1: 2.12, 16: 2.53, 64: 3.71, 256: 8.7},
    "stock, LoRA on, base traffic": {1: 2.57, 16: 3.08, 64: 4.64, 256: 10.7},
    "stock, one adapter": {1: 3.64, 16: 4.24, 64: 5.86, 256: 12.95},
    "stock, 4 adapters": {256: 13.05},
    "mini-sglang, no LoRA": {1: 2.19, 16: 2.45, 64: 3.48, 256: 7.95},
    "limit": {1: 0.82, 16: 1.04, 64: 1.72, 256: 4.62},
    "gate, one adapter": {1: 1.75, 16: 1.95, 64: 2.80, 256: 6.50},
    "goal, one adapter": {1: 1.10, 16: 1.40, 64: 2.20, 256: 5.80},
}
"""Milliseconds per token and request."""

PREFILL_S: dict[str, float] = {
    "stock, LoRA off": 0.835,
    "stock, one adapter": 1.37,
    "mini-sglang, no LoRA": 0.76,
    "limit": 0.50,
    "goal, one adapter": 0.70,
}
"""Seconds for 64 prompts of 2048 tokens at once."""

TOKENS_PER_S: dict[str, float] = {
    "stock, LoRA off": 28_750.0,
    "stock, LoRA off, streamed": 18_500.0,
    "stock, one adapter": 19_500.0,
    "goal, one adapter": 42_000.0,
}
"""At 256 concurrent requests."""

STREAMED_RATIO: dict[str, float] = {"stock": 0.64, "goal": 0.95}
"""Tokens/s of 256 streamed requests over the same not streamed."""

SYNC: dict[str, dict[str, float]] = {
    "stock": {"aborted": 64, "first_token_ms": 1088.0, "pause_load_flush_continue_ms": 1043.0},
    "goal": {"aborted": 0, "first_token_ms": 60.0, "gap_growth_ms": 20.0, "pause_load_flush_continue_ms": 60.0},
}
"""Publishing an adapter under 64 streams; stock pauses with abort, the goal is a publish without a pause."""

STARTUP_S: dict[str, dict[str, float]] = {
    "stock": {"import": 17.0, "ready": 88.0},
    "goal": {"import": 3.0, "ready": 15.0},
}
"""Seconds to import the server, and until /health answers."""
