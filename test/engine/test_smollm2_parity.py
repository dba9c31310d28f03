"""SmolLM2 through `sglang.Engine` says what transformers says: 20 prompts, 64 greedy tokens, in float32.

Checked by teacher forcing: one transformers forward per prompt over prompt and output. When every output token is the
arg-max of the logits before it, the greedy texts are equal, by induction over the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import sglang

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a sentence about the sea.",
    "How many legs does a spider have?",
    "Explain gravity to a child.",
    "What is 7 + 5?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "What do bees make?",
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a small village",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics state that",
    "In 1969, Neil Armstrong",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing",
    "The mitochondrion is",
    "SELECT name FROM users WHERE",
    "Water boils at",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[sglang.Engine]:
    with sglang.Engine(model_path="smollm2", dtype="float32", device="cpu", max_total_tokens=16384) as engine:
        yield engine


def test_text_and_logprobs_equal_transformers(engine: sglang.Engine, smollm2_reference: torch.nn.Module) -> None:
    check_parity(engine, smollm2_reference, atol=1e-4)


@torch.inference_mode()
def check_parity(engine: sglang.Engine, reference: torch.nn.Module, *, atol: float) -> None:
    """Serve every prompt and compare text, output and prompt log-probabilities with one forward of transformers."""
    device = next(reference.parameters()).device
    tokenizer = engine.tokenizer_manager.tokenizer
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    replies = engine.generate(
        chats + TEXTS,
        {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
    )
    for text, reply in zip(chats + TEXTS, replies, strict=True):
        prompt, output = tokenizer.encode(text), reply["output_ids"]
        assert len(output) == 64
        want = reference(torch.tensor([prompt + output], device=device)).logits[0].log_softmax(-1).cpu().numpy()
        first = len(prompt) - 1
        assert output == want[first:-1].argmax(-1).tolist(), text
        assert reply["text"] == tokenizer.decode(output)
        meta = reply["meta_info"]
        got = [entry[0] for entry in meta["output_token_logprobs"]]
        np.testing.assert_allclose(got, want[np.arange(first, first + 64), output], atol=atol, rtol=0)
        scored = [entry[0] for entry in meta["input_token_logprobs"]]
        assert scored[0] is None
        np.testing.assert_allclose(scored[1:], want[np.arange(first), prompt[1:]], atol=atol, rtol=0)
