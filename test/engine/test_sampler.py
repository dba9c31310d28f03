"""The sampler against a plain per-row reference in float64, and against itself: rows do not notice their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import (
    CPU,
    Case,
    allowed_tokens,
    make_spec,
    penalized,
    random_case,
    reference_logprobs,
    row_of,
    sample,
    stack,
    survivors,
    unpack,
)

from sglang.srt.sampling import device_draw, host_draw
from sglang.srt.sampling.distribution import BLOCK, FLOAT_MAX, Workspace, uniforms
from sglang.srt.sampling.sampler import HostSample, Sampler, SamplingRow

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
        assert ids == np.argsort(-penalized(case), kind="stable")[: len(ids)].tolist()
        np.testing.assert_allclose(logprobs, expected[ids], rtol=2e-6, atol=2e-5)
    if i in result.ids:
        count, ids, logprobs = unpack(result.ids[i])
        assert (count, tuple(ids)) == ([len(ids)], case.extras["token_ids_logprob"])
        np.testing.assert_allclose(logprobs, expected[ids], rtol=2e-6, atol=2e-5)


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
    logprobs = reference_logprobs(case)
    probs, kept = np.exp(logprobs), survivors(logprobs, case.spec, 0.0)
    expected = np.zeros(vocab_size)
    expected[kept] = probs[kept] / probs[kept].sum() * draws
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom), (chi_square, freedom)


def test_filters_rank_by_logit_where_probabilities_round_to_equality() -> None:
    logits = np.random.default_rng(0).permutation(600).astype(np.float32) / 1e4
    best = np.argsort(-logits)
    for params, kept in (({"top_k": 3}, 3), ({"top_p": 1e-9}, 1), ({"top_k": 3, "min_p": 0.5}, 3)):
        drawn = sample([Case(logits, {"temperature": 1e5, **params}, seed) for seed in range(60)]).tokens
        assert set(drawn.tolist()) == set(best[:kept].tolist())


# ---- a row does not notice its neighbours ---------------------------------------------------------------------------


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
    assert numbers.tolist() == [0.28176129772258496, 0.36818951565166946, 0.7458264530255675]


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
