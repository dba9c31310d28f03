"""Rows to sample, and what a plain reference in float64 makes of them, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling.distribution import uniforms
from sglang.srt.sampling.sampler import HostSample, PenaltyState, Sampler, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams, SamplingSpec

CPU = torch.device("cpu")
EOS = (2,)


@dataclass
class Case:
    """One row: logits, what the client asked for, and the tokens so far."""

    logits: np.ndarray
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    output: list[int] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> SamplingSpec:
        return make_spec(len(self.logits), self.seed, **self.params)

    def row(self) -> SamplingRow:
        penalties = PenaltyState.create(self.spec, self.output, len(self.logits), CPU)
        return SamplingRow(self.spec, len(self.output), penalties, **self.extras)


def make_spec(vocab_size: int, seed: int = 0, **params: Any) -> SamplingSpec:
    parsed = SamplingParams.from_dict(params)
    parsed.verify(vocab_size)
    return parsed.resolve(vocab_size=vocab_size, eos_ids=EOS, max_new_tokens=128, seed=seed)


def stack(cases: list[Case]) -> torch.Tensor:
    return torch.from_numpy(np.stack([case.logits for case in cases]).astype(np.float32))


def sample(cases: list[Case], **options: Any) -> HostSample:
    sampler = Sampler(len(cases[0].logits), CPU, **options)
    return sampler.sample(stack(cases), [case.row() for case in cases]).to_host()


def unpack(positions: wire.Positions) -> tuple[list[int], list[int], list[float]]:
    return (
        wire.unpack(positions.counts, "<i4").tolist(),
        wire.unpack(positions.ids, "<i4").tolist(),
        wire.unpack(positions.logprobs, "<f4").tolist(),
    )


def row_of(result: HostSample, i: int) -> tuple[Any, ...]:
    """Everything a row got, as bits."""
    logprob = None if result.logprobs is None else np.float32(result.logprobs[i]).tobytes()
    return int(result.tokens[i]), bool(result.bad_rows[i]), logprob, result.top.get(i), result.ids.get(i)


# ---- the reference: one row, float64, as the documentation says -----------------------------------------------------


def penalized(case: Case) -> np.ndarray:
    """In float32, one rounding per step as in the sampler: penalties may make or break ties."""
    spec, x = case.spec, case.logits.astype(np.float32).copy()
    for token in set(case.output):
        x[token] -= np.float32(spec.presence_penalty)
        for _ in range(case.output.count(token)):
            x[token] -= np.float32(spec.frequency_penalty)
    factor = np.float32(spec.repetition_penalty)
    for token in set(case.output):
        x[token] = x[token] * factor if x[token] < 0 else x[token] / factor
    for token, bias in spec.logit_bias.items():
        x[token] += np.float32(bias)
    if len(case.output) < spec.min_new_tokens:
        x[list(spec.stop_token_ids)] = -np.inf
    return x.astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def reference_logprobs(case: Case) -> np.ndarray:
    x = penalized(case)
    return log_softmax((x - x.max()) / case.spec.temperature)


def survivors(logprobs: np.ndarray, spec: SamplingSpec, slack: float) -> list[int]:
    """Tokens that may be drawn, in the order of the inverse CDF; `slack` moves every threshold a little."""
    probs = np.exp(logprobs)
    if spec.top_k >= len(probs) and spec.top_p >= 1.0 and spec.min_p <= 0.0:
        return list(range(len(probs)))
    order = np.argsort(-logprobs, kind="stable").tolist()
    kept, above = [], 0.0
    for rank, token in enumerate(order):
        likely = probs[token] >= spec.min_p * probs[order[0]] * (1.0 - slack)
        if rank == 0 or (rank < spec.top_k and (spec.top_p >= 1.0 or above <= spec.top_p + slack) and likely):
            kept.append(token)
        above += probs[token]
    return kept


def allowed_tokens(case: Case) -> set[int]:
    """The reference's choice, and its neighbours when a rounding error of 1e-6 could decide between them."""
    spec, x = case.spec, penalized(case)
    if spec.is_greedy:
        return {int(np.argmax(x.astype(np.float32)))}
    logprobs = reference_logprobs(case)
    probs = np.exp(logprobs)
    u = float(uniforms(np.array([spec.seed], np.uint64), np.array([len(case.output)], np.uint64))[0])
    allowed: set[int] = set()
    for slack in (-1e-6, 0.0, 1e-6):
        kept = survivors(logprobs, spec, slack)
        ends = np.cumsum(probs[kept])
        near = (ends - probs[kept] <= u * ends[-1] + 1e-6) & (ends >= u * ends[-1] - 1e-6) & (probs[kept] > 0)
        allowed |= {kept[i] for i in np.flatnonzero(near)}
    return allowed


def random_params(rng: np.random.Generator, vocab_size: int) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": float(rng.choice([0.0, 1e-5, 0.3, 0.7, 1.0, 1.0, 2.0, 5.0, 1e5]))}
    options: dict[str, list[Any]] = {
        "top_k": [1, 2, 5, 50, vocab_size // 2, vocab_size - 1, vocab_size, 10**8],
        "top_p": [1e-9, 0.01, 0.5, 0.9, 0.95, 0.999, 1.0],
        "min_p": [0.0, 1e-4, 0.05, 0.5, 1.0],
        "frequency_penalty": [-2.0, 0.5, 2.0],
        "presence_penalty": [-2.0, 1.0],
        "repetition_penalty": [0.5, 1.1, 2.0],
        "logit_bias": [{"3": 4.0, "5": -100.0}, {str(vocab_size - 1): 30.0}],
        "min_new_tokens": [1, 4],
    }
    for name, values in options.items():
        if rng.random() < 0.35:
            params[name] = values[rng.integers(len(values))]
    return params


def random_logits(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
    kind = rng.integers(5)
    if kind == 0:
        logits = rng.normal(0, 3, vocab_size)
    elif kind == 1:  # a language model's: a few likely tokens
        logits = rng.permutation(15 - 1.5 * np.log(np.arange(1, vocab_size + 1)))
    elif kind == 2:  # many ties, as bfloat16 logits have
        logits = np.round(rng.normal(0, 2, vocab_size))
    elif kind == 3:  # all equal
        logits = np.full(vocab_size, rng.normal())
    else:  # a mask with one to a few tokens left
        logits = np.full(vocab_size, -np.inf)
        logits[rng.integers(vocab_size, size=3)] = rng.normal(0, 1, 3)
    return logits.astype(np.float32)


def random_case(rng: np.random.Generator, vocab_size: int) -> Case:
    return Case(
        logits=random_logits(rng, vocab_size),
        params=random_params(rng, vocab_size),
        seed=int(rng.integers(2**63)),
        output=rng.integers(vocab_size, size=rng.integers(6)).tolist(),
        extras={
            "return_logprob": bool(rng.random() < 0.5),
            "top_logprobs_num": int(rng.choice([0, 0, 1, 3, 7])),
            "token_ids_logprob": tuple(rng.integers(vocab_size, size=rng.choice([0, 0, 1, 4])).tolist()),
        },
    )
