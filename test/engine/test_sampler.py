"""The sampler against a plain per-row reference in float64, and against itself: a row must not notice its neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling import device_draw, host_draw
from sglang.srt.sampling.distribution import BLOCK, FLOAT_MAX, Workspace, uniforms
from sglang.srt.sampling.logprobs import HostScore, concat_scores, pack_positions
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
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> SamplingSpec:
        return make_spec(len(self.logits), self.seed, **self.params)

    def row(self) -> SamplingRow:
        penalties = PenaltyState.create(self.spec, self.prompt, self.output, len(self.logits), CPU)
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


# ---- the reference: one row, float64, as the documentation says -----------------------------------------------------


def penalized(case: Case) -> np.ndarray:
    spec, x = case.spec, case.logits.astype(np.float64).copy()
    for token in range(len(x)):
        count = case.output.count(token)
        x[token] -= spec.presence_penalty * (count > 0) + spec.frequency_penalty * count
        if token in case.prompt or count:
            x[token] = x[token] * spec.repetition_penalty if x[token] < 0 else x[token] / spec.repetition_penalty
        x[token] += spec.logit_bias.get(token, 0.0)
    if len(case.output) < spec.min_new_tokens:
        x[list(spec.stop_token_ids)] = -np.inf
    return x


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def reference_logprobs(case: Case) -> np.ndarray:
    x = penalized(case)
    return log_softmax((x - x.max()) / case.spec.temperature)


def survivors(probs: np.ndarray, spec: SamplingSpec, slack: float) -> list[int]:
    """Tokens that may be drawn, in the order of the inverse CDF; `slack` moves every threshold a little."""
    if spec.top_k >= len(probs) and spec.top_p >= 1.0 and spec.min_p <= 0.0:
        return list(range(len(probs)))
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
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
    probs = np.exp(reference_logprobs(case))
    u = float(uniforms(np.array([spec.seed], np.uint64), np.array([len(case.output)], np.uint64))[0])
    allowed: set[int] = set()
    for slack in (-1e-6, 0.0, 1e-6):
        kept = survivors(probs, spec, slack)
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
        prompt=rng.integers(vocab_size, size=rng.integers(8)).tolist(),
        output=rng.integers(vocab_size, size=rng.integers(6)).tolist(),
        extras={
            "return_logprob": bool(rng.random() < 0.5),
            "top_logprobs_num": int(rng.choice([0, 0, 1, 3, 7])),
            "token_ids_logprob": tuple(rng.integers(vocab_size, size=rng.choice([0, 0, 1, 4])).tolist()),
        },
    )


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_tokens_and_logprobs_of_random_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([9, BLOCK, 700, 1000]))
    cases = [random_case(rng, vocab_size) for _ in range(int(rng.integers(1, 9)))]
    result = sample(cases)
    for i, case in enumerate(cases):
        if not np.isfinite(penalized(case)).any():
            assert result.bad_rows[i]
            continue
        assert not result.bad_rows[i]
        assert int(result.tokens[i]) in allowed_tokens(case), (i, case.params)
        if case.row().wants_logprob:
            expected = np.maximum(reference_logprobs(case), -FLOAT_MAX)
            assert result.logprobs is not None
            np.testing.assert_allclose(result.logprobs[i], expected[result.tokens[i]], rtol=2e-6, atol=2e-5)
            check_alternatives(result, i, case, expected)


def check_alternatives(result: HostSample, i: int, case: Case, expected: np.ndarray) -> None:
    assert (i in result.top) == (case.extras["top_logprobs_num"] > 0)
    assert (i in result.ids) == bool(case.extras["token_ids_logprob"])
    if i in result.top:
        count, ids, logprobs = unpack(result.top[i])
        assert count == [case.extras["top_logprobs_num"]]
        order = sorted(range(len(expected)), key=lambda token: (-penalized(case).astype(np.float32)[token], token))
        assert ids == order[: len(ids)]
        np.testing.assert_allclose(logprobs, expected[ids], rtol=2e-6, atol=2e-5)
    if i in result.ids:
        count, ids, logprobs = unpack(result.ids[i])
        assert (count, tuple(ids)) == ([len(ids)], case.extras["token_ids_logprob"])
        np.testing.assert_allclose(logprobs, expected[ids], rtol=2e-6, atol=2e-5)


def unpack(positions: wire.Positions) -> tuple[list[int], list[int], list[float]]:
    return (
        wire.unpack(positions.counts, "<i4").tolist(),
        wire.unpack(positions.ids, "<i4").tolist(),
        wire.unpack(positions.logprobs, "<f4").tolist(),
    )


def test_every_top_k_draws_from_exactly_the_k_largest() -> None:
    vocab_size = 600
    logits = np.random.default_rng(0).permutation(vocab_size).astype(np.float32) / 1e4
    ranks = np.argsort(-logits)
    for k in (1, 2, 3, 10, 299, 300, 301, 599, 600):
        cases = [Case(logits, {"top_k": k}, seed) for seed in range(4 * k + 40)]
        drawn = set(sample(cases).tokens.tolist())
        assert drawn <= set(ranks[:k].tolist())
        assert len(drawn) > 0.9 * k


def test_equal_logits_rank_by_id() -> None:
    logits = np.zeros(300, np.float32)
    logits[[250, 40, 7]] = 5.0
    assert set(sample([Case(logits, {"top_k": 2}, s) for s in range(60)]).tokens.tolist()) == {7, 40}
    assert set(sample([Case(logits, {"top_k": 4}, s) for s in range(400)]).tokens.tolist()) == {0, 7, 40, 250}
    assert set(sample([Case(logits, {"top_p": 1e-9}, s) for s in range(40)]).tokens.tolist()) == {7}
    assert set(sample([Case(logits, {"min_p": 1.0}, s) for s in range(90)]).tokens.tolist()) == {7, 40, 250}
    assert sample([Case(logits, {"temperature": 0})]).tokens.tolist() == [7]


def test_top_p_keeps_the_token_that_crosses_the_limit() -> None:
    logits = np.full(BLOCK, -np.inf, np.float32)
    logits[:4] = np.log([0.5, 0.25, 0.15, 0.1])

    def drawn(top_p: float) -> set[int]:
        return set(sample([Case(logits, {"top_p": top_p}, seed) for seed in range(300)]).tokens.tolist())

    assert drawn(0.4) == {0}
    assert drawn(0.6) == {0, 1}
    assert drawn(0.8) == {0, 1, 2}
    assert drawn(0.95) == {0, 1, 2, 3}


def test_top_k_and_top_p_both_look_at_the_whole_distribution() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    drawn = sample([Case(logits, {"top_k": 2, "top_p": 0.5}, seed) for seed in range(300)]).tokens
    # Were top_p applied to the two survivors of top_k, 0.4 / 0.7 > 0.5 would leave token 0 alone.
    assert set(drawn.tolist()) == {0, 1}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 7, "top_p": 0.9, "min_p": 0.01, "temperature": 2.0},
    ],
)
def test_samples_follow_the_distribution(params: dict[str, Any]) -> None:
    vocab_size, draws = 520, 6000
    logits = np.full(vocab_size, -30.0, np.float32)
    logits[np.arange(0, vocab_size, 52)] = np.linspace(0.0, 4.0, 10)
    case = Case(logits, params)
    sampler = Sampler(vocab_size, CPU)
    batch = torch.from_numpy(np.tile(logits, (500, 1)))
    counts = np.zeros(vocab_size)
    for position in range(draws // 500):
        rows = [SamplingRow(make_spec(vocab_size, seed, **params), position) for seed in range(500)]
        counts += np.bincount(sampler.sample(batch, rows).to_host().tokens, minlength=vocab_size)
    probs = np.exp(reference_logprobs(case))
    kept = survivors(probs, case.spec, 0.0)
    expected = np.zeros(vocab_size)
    expected[kept] = probs[kept] / probs[kept].sum() * draws
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom), (chi_square, freedom)


# ---- a row does not notice its neighbours ---------------------------------------------------------------------------


def row_of(result: HostSample, i: int) -> tuple[Any, ...]:
    """Everything a row got, as bits."""
    logprob = None if result.logprobs is None else np.float32(result.logprobs[i]).tobytes()
    return int(result.tokens[i]), bool(result.bad_rows[i]), logprob, result.top.get(i), result.ids.get(i)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([7, BLOCK, 1000, 2 * BLOCK]),
    size=st.integers(2, 9),
    bad=st.booleans(),
)
def test_a_row_alone_and_in_any_batch(seed: int, vocab_size: int, size: int, bad: bool) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, vocab_size)
    case.extras["return_logprob"] = True
    alone = row_of(sample([case]), 0)
    others = [random_case(rng, vocab_size) for _ in range(size - 1)]
    if bad:
        others[0].logits[rng.integers(vocab_size)] = np.nan
    for place in {0, size // 2, size - 1}:
        assert row_of(sample([*others[:place], case, *others[place:]]), place) == alone


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def large_cases(vocab_size: int) -> list[Case]:
    rng = np.random.default_rng(3)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7},
        {"top_p": 0.95},
        {"top_k": 50},
        {"min_p": 0.02, "temperature": 3.0},
        {"temperature": 0},
    ]
    extras = {"return_logprob": True, "top_logprobs_num": 4}
    return [
        Case(rng.normal(0, 3, vocab_size).astype(np.float32), kind, seed, extras=extras)
        for seed, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("vocab_size", [49152, 50257])
def test_large_rows_are_the_same_alone_batched_and_reversed(vocab_size: int) -> None:
    cases = large_cases(vocab_size)
    together, backwards = sample(cases), sample(cases[::-1])
    for i, case in enumerate(cases):
        assert row_of(together, i) == row_of(sample([case]), 0) == row_of(backwards, len(cases) - 1 - i)


def test_threads_do_not_matter(two_threads: None) -> None:
    cases = large_cases(49152)
    parallel = sample(cases)
    torch.set_num_threads(1)
    serial = sample(cases)
    assert [row_of(parallel, i) for i in range(len(cases))] == [row_of(serial, i) for i in range(len(cases))]


def test_a_seed_and_a_position_give_the_token_again() -> None:
    logits = np.zeros(1000, np.float32)
    draws = [[sample([Case(logits, {}, seed, output=[1] * p)]).tokens[0] for p in range(12)] for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 6


def test_a_sampler_used_before_gives_what_a_new_one_gives() -> None:
    rng = np.random.default_rng(8)
    sampler = Sampler(700, CPU)
    for size in (5, 1, 3, 8, 2):
        cases = [random_case(rng, 700) for _ in range(size)]
        again = sampler.sample(stack(cases), [case.row() for case in cases]).to_host()
        fresh = sample(cases)
        assert [row_of(again, i) for i in range(size)] == [row_of(fresh, i) for i in range(size)]


def test_a_plan_serves_a_batch_until_a_parameter_changes() -> None:
    sampler = Sampler(50, CPU)
    rows = [Case(np.zeros(50), {"top_k": 3}).row(), Case(np.zeros(50)).row()]
    logits = torch.zeros(2, 50)
    first = sampler.sample(logits, rows)
    rows[0].position = 7
    assert sampler.sample(logits, rows).plan is first.plan
    rows[1].top_logprobs_num = 2
    assert sampler.sample(logits, rows).to_host().top.keys() == {1}
    assert sampler.sample(logits, rows[::-1]).to_host().top.keys() == {0}


# ---- both implementations of the draws ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_host_and_device_draws_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1000 + seed)
    vocab_size = int(rng.choice([9, BLOCK, 1000, 5000]))
    cases = [random_case(rng, vocab_size) for _ in range(6)]
    cases[seed % 6].logits[seed % vocab_size] = np.nan
    host = sample(cases)
    monkeypatch.setattr("sglang.srt.sampling.sampler.host_draw", device_draw)
    device = sample(cases)
    assert [row_of(host, i)[:3] for i in range(6)] == [row_of(device, i)[:3] for i in range(6)]
    for i in set(range(6)) - {seed % 6}:
        assert row_of(host, i) == row_of(device, i)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 1000, 2000])
def test_top_entries_of_both(count: int) -> None:
    rng = np.random.default_rng(count)
    logits = np.round(rng.normal(0, 3, (4, 1000))).astype(np.float32)
    logits[1, ::2] = -0.0
    logits[2] = -np.inf
    logits[3, 5] = np.inf
    for module in (host_draw, device_draw):
        values, ids = module.top_entries(torch.from_numpy(logits), count)
        for row, (got_values, got_ids) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
            wanted = sorted(range(1000), key=lambda t, row=row: (-logits[row, t], t))[:count]
            assert got_ids == wanted
            assert got_values == logits[row, wanted].tolist()


def test_arg_max_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    for module in (host_draw, device_draw):
        assert module.argmax_rows(logits).tolist() == [1, 0]


@pytest.mark.parametrize("module", [host_draw, device_draw])
def test_the_ends_of_the_unit_interval_stay_inside_the_distribution(module: Any) -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, [10, 300, 590]] = 0.0
    weights = Workspace(600, CPU).weights(logits, None)
    numbers = np.array([0.0, 0.5, 1.0 - 2.0**-53])
    assert module.draw(weights, None, numbers).tolist() == [10, 300, 590]


# ---- random numbers -------------------------------------------------------------------------------------------------


def chi_square_of_buckets(numbers: np.ndarray, buckets: int = 64) -> float:
    counts = np.bincount((numbers * buckets).astype(int), minlength=buckets)
    expected = len(numbers) / buckets
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("base", [0, 12345, 2**63 - 5000])
def test_uniforms_are_uniform_along_positions_and_along_seeds(base: int) -> None:
    many = np.arange(4096, dtype=np.uint64)
    along_positions = uniforms(np.full(4096, base, np.uint64), many)
    along_seeds = uniforms(np.uint64(base) + many, np.full(4096, 3, np.uint64))
    for numbers in (along_positions, along_seeds):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        assert chi_square_of_buckets(numbers) < 63 + 4 * np.sqrt(126)
        # Pairs of neighbours fill the square: no correlation from one step or one seed to the next.
        pairs = (numbers[:-1] * 8).astype(int) / 8 + (numbers[1:] * 8).astype(int) / 64
        assert chi_square_of_buckets(pairs + 1e-9) < 63 + 4 * np.sqrt(126)
    assert len(np.unique(np.concatenate([along_positions, along_seeds]))) >= 8191


def test_uniforms_are_frozen() -> None:
    numbers = uniforms(np.array([0, 1, 2**63 - 1], np.uint64), np.array([0, 1, 70000], np.uint64))
    assert numbers.tolist() == [FROZEN]


# ---- penalties ------------------------------------------------------------------------------------------------------

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
    vocab_size, prompt = 40, [3, 3, 5, 9]
    rng = np.random.default_rng(4)
    cases = [
        Case(np.empty(0), params, seed, prompt, [], {"return_logprob": True, "top_logprobs_num": vocab_size})
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
    assert PenaltyState.create(make_spec(10, **params), [1], [2], 10, CPU) is None


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def test_no_logprobs_unless_asked_for() -> None:
    result = sample([Case(np.zeros(20)), Case(np.zeros(20), {"temperature": 0})])
    assert result.logprobs is None
    assert not result.top
    assert not result.ids


def test_greedy_batches_without_logprobs_need_no_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("softmax of a greedy batch")

    monkeypatch.setattr(Workspace, "weights", fail)
    logits = np.arange(20, dtype=np.float32)
    assert sample([Case(logits, {"temperature": 0}), Case(-logits, {"top_k": 1})]).tokens.tolist() == [19, 0]


def test_rows_that_did_not_ask_report_zero() -> None:
    asked = {"return_logprob": True}
    result = sample([Case(np.zeros(20)), Case(np.zeros(20), extras=asked), Case(np.zeros(20), {"temperature": 0})])
    assert result.logprobs is not None
    np.testing.assert_allclose(result.logprobs, [0.0, -np.log(20), 0.0], rtol=1e-6)


def test_filters_do_not_touch_logprobs() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 300).astype(np.float32)
    params = {"temperature": 0.6, "top_p": 0.3, "top_k": 4, "min_p": 0.2}
    result = sample([Case(logits, params, extras={"return_logprob": True})])
    assert result.logprobs is not None
    expected = torch.log_softmax(torch.from_numpy(logits) / 0.6, -1)[result.tokens[0]]
    assert result.logprobs[0] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_original_logprobs_are_those_of_the_raw_logits(temperature: float) -> None:
    rng = np.random.default_rng(2)
    extras = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": (4, 8)}
    params = {"temperature": temperature, "logit_bias": {"4": 5.0}}
    cases = [
        Case(rng.normal(0, 2, 300).astype(np.float32), params, 1, extras=extras),
        Case(rng.normal(0, 2, 300).astype(np.float32), {"temperature": temperature}, 2),
        Case(rng.normal(0, 2, 300).astype(np.float32), {"temperature": temperature}, 3, extras=extras),
    ]
    result, scaled = sample(cases, return_original_logprob=True), sample(cases)
    assert result.tokens.tolist() == scaled.tokens.tolist()
    assert result.logprobs is not None
    raw = torch.log_softmax(stack(cases), -1).numpy()
    for i in (0, 2):
        assert result.logprobs[i] == pytest.approx(raw[i, result.tokens[i]], abs=1e-5)
        _, ids, logprobs = unpack(result.top[i])
        assert ids == np.argsort(-raw[i])[:3].tolist()
        np.testing.assert_allclose(logprobs, raw[i, ids], atol=1e-5)
        np.testing.assert_allclose(unpack(result.ids[i])[2], raw[i, [4, 8]], atol=1e-5)


def test_tail_logprobs_keep_their_precision() -> None:
    logits = np.zeros(300, np.float32)
    logits[0] = 200.0
    result = sample([Case(logits, extras={"return_logprob": True, "token_ids_logprob": (0, 1)})])
    np.testing.assert_allclose(unpack(result.ids[0])[2], [0.0, -200.0], atol=1e-5)


# ---- rows that are not numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0}])
@pytest.mark.parametrize("poison", [np.nan, -np.inf])
@pytest.mark.parametrize("asks", [False, True])
def test_bad_rows_are_reported_and_alone(params: dict[str, Any], poison: float, asks: bool) -> None:
    rng = np.random.default_rng(6)
    extras = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": (1,)} if asks else {}
    cases = [Case(rng.normal(0, 1, 500).astype(np.float32), params, i, extras=extras) for i in range(4)]
    healthy = sample(cases)
    if np.isnan(poison):
        cases[1].logits[499] = poison
    else:
        cases[1].logits[:] = poison
    result = sample(cases)
    assert result.bad_rows.tolist() == [False, True, False, False]
    assert result.tokens[1] == 0
    for i in (0, 2, 3):
        assert row_of(result, i) == row_of(healthy, i)
    if asks:
        assert result.logprobs is not None
        assert np.isnan(result.logprobs[1])


@pytest.mark.parametrize("params", [{}, {"temperature": 0.3}, {"top_p": 0.9}, {"top_k": 5}, {"temperature": 0}])
def test_infinite_logits_share_everything(params: dict[str, Any]) -> None:
    logits = np.zeros(400, np.float32)
    logits[[50, 390]] = np.inf
    logits[60] = -np.inf
    extras = {"return_logprob": True, "token_ids_logprob": (50, 60)}
    result = sample([Case(logits, params, seed, extras=extras) for seed in range(30)])
    assert not result.bad_rows.any()
    greedy = params.get("temperature") == 0
    assert set(result.tokens.tolist()) == ({50} if greedy else {50, 390})
    assert result.logprobs is not None
    np.testing.assert_allclose(result.logprobs, np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(unpack(result.ids[0])[2], [np.log(0.5), -FLOAT_MAX], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.linspace(0, 1, 400).astype(np.float32)
    logits[7] = -np.inf
    result = sample([Case(logits, {"temperature": temperature}, seed) for seed in range(50)])
    assert not result.bad_rows.any()
    assert 7 not in result.tokens
    assert (set(result.tokens.tolist()) == {399}) == (temperature < 1)


# ---- scores of prompt tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_logprobs_after_temperature(temperature: float) -> None:
    logits = torch.randn(150, 300) * 3  # more rows than are in memory at once
    targets = torch.randint(300, (150,))
    score = Sampler(300, CPU).score(logits, targets, make_spec(300, temperature=temperature), 4, (3, 8)).to_host()
    expected = torch.log_softmax(logits / temperature, -1)
    np.testing.assert_allclose(score.logprobs, expected.gather(1, targets[:, None]).squeeze(1), atol=2e-5)
    values, ids = expected.topk(4, -1)
    np.testing.assert_array_equal(score.top_ids, ids)
    np.testing.assert_allclose(score.top_logprobs, values, atol=2e-5)
    np.testing.assert_array_equal(score.token_ids, [3, 8])
    np.testing.assert_allclose(score.ids_logprobs, expected[:, [3, 8]], atol=2e-5)


def test_scores_do_not_depend_on_the_slicing() -> None:
    logits, targets = torch.randn(130, 500), torch.randint(500, (130,))
    sampler, spec = Sampler(500, CPU), make_spec(500, temperature=0.7)
    whole = concat_scores([[sampler.score(logits, targets, spec, 2, (9,)).to_host()]], missing_first=False)
    for cuts in ([1], [64], [5, 70], [129]):
        ends = itertools.pairwise([0, *cuts, 130])
        parts = [[sampler.score(logits[a:b], targets[a:b], spec, 2, (9,)).to_host()] for a, b in ends]
        assert concat_scores(parts, missing_first=False) == whole


def test_scores_and_samples_agree() -> None:
    rng = np.random.default_rng(5)
    case = Case(rng.normal(0, 3, 700).astype(np.float32), {"temperature": 0.8}, extras={"return_logprob": True})
    result = sample([case])
    score = Sampler(700, CPU).score(stack([case]), torch.from_numpy(result.tokens), case.spec).to_host()
    assert result.logprobs is not None
    assert score.logprobs.tobytes() == result.logprobs.tobytes()


def test_original_scores_ignore_the_temperature() -> None:
    logits, targets = torch.randn(3, 50), torch.tensor([1, 2, 3])
    score = Sampler(50, CPU, return_original_logprob=True).score(logits, targets, make_spec(50, temperature=0.1))
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    np.testing.assert_allclose(score.to_host().logprobs, expected, atol=1e-5)


def test_scoring_leaves_the_logits_alone() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    Sampler(50, CPU).score(logits, torch.tensor([1, 2, 3]), make_spec(50, temperature=0.1), 2)
    assert torch.equal(logits, before)


def test_greedy_prompt_scores_are_the_plain_log_softmax() -> None:
    logits, targets = torch.randn(3, 50), torch.tensor([1, 2, 3])
    score = Sampler(50, CPU).score(logits, targets, make_spec(50, temperature=0)).to_host()
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert score.top_ids is None
    assert score.ids_logprobs is None


# ---- packing --------------------------------------------------------------------------------------------------------


def test_pack_positions() -> None:
    packed = pack_positions([None, (np.array([4, 5]), np.array([-1.0, -2.0])), (np.array([6]), np.array([-0.5]))])
    assert unpack(packed) == ([0, 2, 1], [4, 5, 6], [-1.0, -2.0, -0.5])


def test_concat_scores_puts_the_missing_position_first() -> None:
    parts = [
        [HostScore(np.array([-1.0], "f4"), np.array([[3, 4]], "i4"), np.array([[-0.5, -1.5]], "f4"))],
        [HostScore(np.array([-2.0], "f4"), np.array([[5, 6]], "i4"), np.array([[-0.25, -3.0]], "f4"))],
    ]
    packed = concat_scores(parts, missing_first=True)
    np.testing.assert_array_equal(wire.unpack(packed.logprobs, "<f4"), [np.nan, -1.0, -2.0])
    assert packed.top is not None
    assert unpack(packed.top) == ([0, 2, 2], [3, 4, 5, 6], [-0.5, -1.5, -0.25, -3.0])
    assert packed.ids is None


def test_concat_scores_of_token_ids() -> None:
    score = HostScore(
        np.array([-1.0, -2.0], "f4"),
        token_ids=np.array([7, 9], "i4"),
        ids_logprobs=np.array([[-1.0, -2.0], [-3.0, -4.0]], "f4"),
    )
    packed = concat_scores([[score]], missing_first=False)
    assert packed.ids is not None
    assert unpack(packed.ids) == ([2, 2], [7, 9, 7, 9], [-1.0, -2.0, -3.0, -4.0])


def test_concat_scores_of_a_one_token_prompt() -> None:
    packed = concat_scores([], missing_first=True, wants_top=True)
    assert np.isnan(wire.unpack(packed.logprobs, "<f4")).tolist() == [True]
    assert packed.top is not None
    assert unpack(packed.top) == ([0], [], [])
    assert packed.ids is None
    assert concat_scores([], missing_first=False) == (b"", None, None)
