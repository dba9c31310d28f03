"""Batching: every attempt once, the same minibatches on any number of ranks, tensors that line up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang.rl.batching import NO_VERSION, collate, make_minibatches, plan_batches
from sglang.rl.samples import Sample

LENGTHS = st.lists(st.integers(1, 60), max_size=40)
COUNT = st.integers(1, 5)
MAX_TOKENS = st.integers(1, 200)
WORLD = st.integers(1, 5)
SEED = st.integers(0, 3)


def attempt(prompt, output, version=0):
    logprobs = [-0.5 - i for i in range(len(output))]
    return Sample(prompt, list(output), logprobs, [version + i for i in range(len(output))])


def flat(ranks):
    return [row for batches in ranks for rows in batches for row in rows]


@given(lengths=LENGTHS, count=COUNT, max_tokens=MAX_TOKENS, world=WORLD, seed=SEED)
def test_nothing_is_lost_or_doubled_and_every_rank_works_as_often(lengths, count, max_tokens, world, seed):
    plan = plan_batches(lengths, count=count, max_tokens=max_tokens, seed=seed, world_size=world)
    assert sorted(row for ranks in plan for row in flat(ranks)) == list(range(len(lengths)))
    assert len(plan) == min(count, len(lengths))
    sizes = [len(flat(ranks)) for ranks in plan]
    assert not sizes or (min(sizes) > 0 and max(sizes) - min(sizes) <= 1)
    for ranks in plan:
        assert len(ranks) == world
        assert len({len(batches) for batches in ranks}) == 1
        shares = [sum(map(len, batches)) for batches in ranks]
        assert max(shares) - min(shares) <= 1
        for rows in (rows for batches in ranks for rows in batches if len(rows) > 1):
            assert len(rows) * max(lengths[row] for row in rows) <= max_tokens


@given(lengths=LENGTHS, count=COUNT, max_tokens=MAX_TOKENS, world=WORLD, seed=SEED)
def test_a_minibatch_is_the_same_on_every_layout(lengths, count, max_tokens, world, seed):
    alone = plan_batches(lengths, count=count, max_tokens=max_tokens, seed=seed)
    spread = plan_batches(lengths, count=count, max_tokens=max_tokens, seed=seed, world_size=world)
    assert [sorted(flat(ranks)) for ranks in alone] == [sorted(flat(ranks)) for ranks in spread]
    assert spread == plan_batches(lengths, count=count, max_tokens=max_tokens, seed=seed, world_size=world)


@given(lengths=LENGTHS.filter(len), world=WORLD)
def test_tokens_are_dealt_out_evenly(lengths, world):
    (ranks,) = plan_batches(lengths, count=1, max_tokens=50, seed=0, world_size=world)
    tokens = [sum(lengths[row] for rows in batches for row in rows) for batches in ranks]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_no_rank_has_the_longer_of_every_pair():
    ((first, second),) = plan_batches([8, 7, 6, 5, 4, 3, 2, 1], count=1, max_tokens=1, seed=0, world_size=2)
    assert (first, second) == ([[0], [3], [4], [7]], [[1], [2], [5], [6]])


def test_seeds_shuffle():
    plans = [plan_batches([1] * 20, count=4, max_tokens=100, seed=seed) for seed in range(3)]
    assert plans[0] != plans[1] != plans[2]


def test_a_sample_that_is_too_long_is_alone():
    (((*batches,),),) = plan_batches([3, 99, 3], count=1, max_tokens=10, seed=0)
    assert batches == [[1], [0, 2]]


def test_tensors_line_up():
    batch = collate([attempt([1, 2], [3, 4, 5], 7), attempt([6], [8])], [0.5, -2.0], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 8, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.logprobs.tolist() == [[0, 0, -0.5, -1.5, -2.5], [0, -0.5, 0, 0, 0]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.5, 0.5], [0, -2, 0, 0, 0]]
    none = NO_VERSION
    assert batch.versions.tolist() == [[none, none, 7, 8, 9], [none, 0, none, none, none]]
    dtypes = [getattr(batch, name).dtype for name in ("input_ids", "attention_mask", "loss_mask", "logprobs")]
    assert dtypes == [torch.int64, torch.int64, torch.bool, torch.float32]
    assert torch.equal(batch.to("cpu").input_ids, batch.input_ids)


def test_ranks_share_a_minibatch_and_pad_with_empty_ones():
    samples = [attempt([i], [i] * 3) for i in range(5)]
    ranks = [
        make_minibatches(samples, [1.0] * 5, count=2, max_tokens=4, seed=1, rank=rank, world_size=2, pad_id=9)
        for rank in range(2)
    ]
    assert [len(batches) for batches in ranks[0]] == [len(batches) for batches in ranks[1]] == [2, 1]
    prompts = [
        batch.input_ids[0, 0].item() for each in ranks for batches in each for batch in batches if batch.loss_mask.any()
    ]
    assert sorted(prompts) == [0, 1, 2, 3, 4]
    empty = [b for each in ranks for batches in each for b in batches if not b.loss_mask.any()]
    assert [b.input_ids.tolist() for b in empty] == [[[9, 9]]]
    assert empty[0].attention_mask.tolist() == [[1, 1]]


def test_an_attempt_without_output_is_carried_along():
    batch = collate([attempt([1, 2], [])], [1.0])
    assert batch.input_ids.tolist() == [[1, 2]]
    assert not batch.loss_mask.any()


def test_nothing_to_train_on():
    assert make_minibatches([], [], count=2, max_tokens=10, seed=0) == []


def test_samples_that_do_not_line_up_are_refused():
    with pytest.raises(ValueError, match="no prompt"):
        collate([attempt([], [1])], [0.0])
    broken = Sample([1], [2, 3], [-1.0], [0, 0])
    with pytest.raises(ValueError, match="2 output tokens, 1 log-probabilities and 2 versions"):
        collate([broken], [0.0])
    with pytest.raises(ValueError, match="1 samples with 2 advantages"):
        make_minibatches([attempt([1], [2])], [0.0, 1.0], count=1, max_tokens=10, seed=0)
