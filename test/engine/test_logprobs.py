"""Log-probabilities of outputs and prompts: their definition, and their packing for the wire."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sampling_cases import CPU, Case, make_spec, sample, stack, unpack

from sglang.srt.managers.io_struct import wire
from sglang.srt.sampling.distribution import Workspace
from sglang.srt.sampling.logprobs import HostScore, concat_scores, pack_positions
from sglang.srt.sampling.sampler import Sampler

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
