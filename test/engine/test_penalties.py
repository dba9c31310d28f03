"""Penalties, biases and bans against the reference, through generations and retractions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sampling_cases import CPU, Case, make_spec, reference_logprobs, sample, stack, unpack

from sglang.srt.sampling.distribution import FLOAT_MAX
from sglang.srt.sampling.sampler import PenaltyState, Sampler

PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 0.75},
    {"presence_penalty": -1.0},
    {"repetition_penalty": 0.8, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"logit_bias": {"1": 3.0, "9": -2.0}, "repetition_penalty": 1.2},
    {"min_new_tokens": 3, "stop_token_ids": [4]},
    {},
]


def test_penalties_through_a_generation_and_after_a_retraction() -> None:
    vocab_size = 40
    rng = np.random.default_rng(4)
    cases = [
        Case(np.empty(0), params, seed, [], {"return_logprob": True, "top_logprobs_num": vocab_size})
        for seed, params in enumerate(PENALTIES)
    ]
    for case in cases:
        case.logits = np.zeros(vocab_size, np.float32)
    rows = [case.row() for case in cases]
    sampler = Sampler(vocab_size, CPU)
    for step in range(100):  # enough to outgrow the first buffers
        for case in cases:
            case.logits = np.round(rng.normal(0, 2, vocab_size), 1).astype(np.float32)
        if step == 50:
            rows = [case.row() for case in cases]
        for row in rows:
            row.position = step
        result = sampler.sample(stack(cases), rows).to_host()
        for i, case in enumerate(cases):
            _, ids, logprobs = unpack(result.top[i])
            np.testing.assert_allclose(
                logprobs, np.maximum(reference_logprobs(case), -FLOAT_MAX)[ids], rtol=1e-5, atol=2e-4
            )
            case.output.append(int(result.tokens[i]))


def test_stop_ids_are_banned_until_min_new_tokens() -> None:
    logits = np.zeros(10, np.float32)
    logits[[2, 4]] = 50.0
    params = {"temperature": 0, "min_new_tokens": 2, "stop_token_ids": [4]}
    tokens = [sample([Case(logits, params, output=[1] * p)]).tokens[0] for p in range(4)]
    assert tokens == [0, 0, 2, 2]


def test_only_rows_with_penalties_change() -> None:
    logits = torch.randn(3, 30)
    before = logits.clone()
    cases = [Case(np.zeros(30)), Case(np.zeros(30), {"logit_bias": {"7": 1.0}}), Case(np.zeros(30), {"top_k": 3})]
    Sampler(30, CPU).sample(logits, [case.row() for case in cases])
    before[1, 7] += 1.0
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5, "temperature": 0.1}, {"min_new_tokens": 4, "ignore_eos": True}])
def test_a_spec_without_penalties_has_no_state(params: dict[str, Any]) -> None:
    assert PenaltyState.create(make_spec(10, **params), [2], 10, CPU) is None
