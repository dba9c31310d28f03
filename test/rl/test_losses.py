"""Losses: against the formulas written out token by token, and cut into micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.rl import metrics
from sglang.rl.batching import collate
from sglang.rl.config import LossSection
from sglang.rl.losses import WIDEST_HIGH, WIDEST_LOW, Bounds, LossStats, m2po_bounds, policy_loss
from sglang.rl.samples import Sample

GRPO = LossSection(algorithm="grpo")
M2PO = LossSection(algorithm="m2po", m2_threshold=0.04)
WIDE = Bounds(WIDEST_LOW, WIDEST_HIGH)


def batch_of(advantages, lengths=None):
    """One prompt token and then one output token per advantage, or `lengths` of them."""
    lengths = lengths or [1] * len(advantages)
    samples = [Sample([1], [2] * n, [-1.0] * n, [0] * n) for n in lengths]
    return collate(samples, advantages)


def noisy(seed, rows=12, spread=0.4):
    """A minibatch with new, old and reference log-probabilities, NaN wherever nothing may look."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (rows,), generator=generator).tolist()
    lengths[0] = 8
    batch = batch_of(torch.randn(rows, generator=generator).tolist(), lengths)
    old, new, ref = (
        torch.where(batch.loss_mask, -1 + spread * torch.randn(batch.loss_mask.shape, generator=generator), math.nan)
        for _ in range(3)
    )
    return batch, new, old, ref


def rows_of(batch, rows):
    return replace(batch, **{name: getattr(batch, name)[rows] for name in batch.__slots__})


def size(batch, section):
    mask = batch.loss_mask
    return float(mask.sum() if section.normalize == "token" else mask.any(1).sum())


def replace_section(section, **changes):
    return LossSection(**{**{f: getattr(section, f) for f in section.__struct_fields__}, **changes})


def ratios(*log_ratios):
    """[B, 2] log weights of `batch_of` with one output token each."""
    return torch.tensor([[0.0, value] for value in log_ratios])


# ---- the clip ------------------------------------------------------------------------------------------------------


def by_hand(batch, new, old, section, bounds, ref):
    """The loss in plain Python, as in the papers."""
    total = 0.0
    for b in range(len(new)):
        tokens = batch.loss_mask[b].nonzero().flatten().tolist()
        for t in tokens:
            ratio = math.exp(new[b, t] - old[b, t])
            advantage = batch.advantages[b, t].item()
            clipped = min(max(ratio, 1 - bounds.eps_low), 1 + bounds.eps_high)
            term = -min(ratio * advantage, clipped * advantage)
            if section.kl_coef:
                log_ratio = (ref[b, t] - new[b, t]).item()
                term += section.kl_coef * (math.exp(log_ratio) - 1 - log_ratio)
            total += term / (len(tokens) if section.normalize == "sequence" else 1)
    return total / size(batch, section)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "m2po"])
def test_the_loss_is_that_of_the_papers(algorithm, kl_coef, normalize):
    batch, new, old, ref = noisy(0)
    section = LossSection(algorithm=algorithm, kl_coef=kl_coef, normalize=normalize, eps_low=0.1, eps_high=0.3)
    bounds = m2po_bounds([(new - old, batch)], 0.04) if algorithm == "m2po" else None
    part = policy_loss(new, old, batch, section, size(batch, section), bounds, ref if kl_coef else None)
    expected = by_hand(batch, new, old, section, bounds or Bounds(0.1, 0.3), ref)
    assert part.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"),
    [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True), (1.0, 0.1, True), (0.0, 0.5, False)],
)
def test_only_steps_out_of_the_trust_region_lose_their_gradient(advantage, log_ratio, moves):
    batch = batch_of([advantage])
    new = ratios(log_ratio).requires_grad_()
    policy_loss(new, torch.zeros(1, 2), batch, GRPO, 1.0).loss.backward()
    expected = -advantage * math.exp(log_ratio) if moves else 0.0
    assert new.grad[0].tolist() == pytest.approx([0.0, expected])


def test_nothing_off_the_mask_has_influence():
    batch, new, old, ref = noisy(1)
    new.requires_grad_()
    policy_loss(new, old, batch, replace_section(GRPO, kl_coef=0.1), 10.0, None, ref).loss.backward()
    assert new.grad[~batch.loss_mask].eq(0).all()
    assert new.grad.isfinite().all()


def test_a_broken_token_does_not_overflow():
    batch = batch_of([-1.0, 1.0])
    new = ratios(500.0, -500.0).requires_grad_()
    part = policy_loss(new, torch.zeros(2, 2), batch, GRPO, 2.0)
    part.loss.backward()
    assert part.loss.isfinite()
    assert new.grad.eq(0).all()


def test_an_empty_micro_batch_has_a_gradient_of_zeros():
    batch = collate([], [])
    new = torch.full((1, 2), -3.0, requires_grad=True)
    part = policy_loss(new, torch.zeros(1, 2), batch, M2PO, 5.0, WIDE)
    part.loss.backward()
    assert part.loss.item() == 0.0
    assert new.grad.tolist() == [[0.0, 0.0]]


def test_what_is_missing_is_said():
    batch = batch_of([1.0])
    with pytest.raises(ValueError, match="m2po needs bounds"):
        policy_loss(ratios(0.0), ratios(0.0), batch, M2PO, 1.0)
    with pytest.raises(ValueError, match=r"kl_coef is 0\.1"):
        policy_loss(ratios(0.0), ratios(0.0), batch, replace_section(GRPO, kl_coef=0.1), 1.0)


# ---- one large batch or many small ones ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "m2po"])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), cuts=st.sets(st.integers(1, 11)))
def test_micro_batches_add_up_to_the_minibatch(algorithm, normalize, seed, cuts):
    batch, new, old, ref = noisy(seed)
    section = LossSection(algorithm=algorithm, normalize=normalize, kl_coef=0.1)
    denominator = size(batch, section)

    def run(parts):
        leaf = new.clone().requires_grad_()
        bounds = None
        if algorithm == "m2po":
            bounds = m2po_bounds([((new - old)[rows], rows_of(batch, rows)) for rows in parts], 0.04)
        stats, loss = LossStats(), 0.0
        for rows in parts:
            part = policy_loss(leaf[rows], old[rows], rows_of(batch, rows), section, denominator, bounds, ref[rows])
            part.loss.backward()
            loss += part.loss.item()
            stats.add(part)
        return loss, leaf.grad, stats.reduce()

    edges = [0, *sorted(cuts), len(new)]
    one = run([slice(None)])
    many = run([slice(a, b) for a, b in zip(edges, edges[1:], strict=False)])
    assert one[0] == pytest.approx(many[0], rel=1e-5, abs=1e-6)
    # Every token's gradient is its own: not one bit may depend on its neighbours.
    assert torch.equal(one[1], many[1])
    assert one[2] == pytest.approx(many[2], rel=1e-5, abs=1e-6)


# ---- the second moment ---------------------------------------------------------------------------------------------


def test_bounds_are_the_widest_while_the_moment_is_small():
    batch = batch_of([1.0, -1.0, 1.0])
    for log_ratio in (ratios(0.0, 0.0, 0.0), ratios(0.1, -0.1, 0.1), ratios(-5.0, 5.0, -5.0)):
        bounds = m2po_bounds([(log_ratio, batch)], 0.0101)
        assert (bounds.eps_low, bounds.eps_high, bounds.cut) == (0.95, 20.0, math.inf)


def test_the_largest_are_dropped_until_the_mean_is_below_the_threshold():
    batch = batch_of([1.0, -1.0, 1.0, 1.0, -1.0, 0.0])
    # Outward: 0.1, 0.2, 0.6; the fourth and fifth pull back, the last has no advantage.
    log_ratio = ratios(0.1, -0.2, 0.6, -3.0, 3.0, 3.0)
    bounds = m2po_bounds([(log_ratio, batch)], 0.04)
    assert bounds.cut == pytest.approx(0.2)
    assert bounds.eps_low == pytest.approx(1 - math.exp(-0.2))
    assert bounds.eps_high == pytest.approx(math.exp(0.2) - 1)
    assert bounds.moment == pytest.approx((0.01 + 0.04 + 0.36) / 3)
    assert bounds.kept_moment == pytest.approx(0.025)


def test_bounds_are_no_wider_than_the_widest():
    batch = batch_of([1.0] * 3)
    bounds = m2po_bounds([(ratios(3.5, 3.6, 9.0), batch)], 13.0)
    assert bounds.cut == pytest.approx(3.6)
    assert (bounds.eps_low, bounds.eps_high) == (0.95, 20.0)


def test_all_are_dropped_when_each_is_too_far():
    batch = batch_of([1.0, -1.0])
    bounds = m2po_bounds([(ratios(0.5, -0.7), batch)], 0.04)
    assert (bounds.eps_low, bounds.eps_high, bounds.cut) == (0.0, 0.0, 0.0)


def test_equals_of_a_dropped_token_are_dropped():
    batch = batch_of([1.0] * 4)
    bounds = m2po_bounds([(ratios(0.1, 0.3, 0.3, 0.3), batch)], 0.05)
    assert bounds.cut == pytest.approx(0.1)


@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.sampled_from([-1.0, 0.0, 1.0])), min_size=1, max_size=30))
@settings(deadline=None)
def test_the_clip_takes_the_gradient_of_exactly_the_dropped_tokens(tokens):
    log_ratio, batch = ratios(*(x for x, _ in tokens)), batch_of([a for _, a in tokens])
    bounds = m2po_bounds([(log_ratio, batch)], 0.04)
    new = log_ratio.clone().requires_grad_()
    part = policy_loss(new, torch.zeros_like(new), batch, M2PO, 1.0, bounds)
    part.loss.backward()
    moved = {abs(x) for (x, a), g in zip(tokens, new.grad[:, 1].tolist(), strict=True) if a * x > 0 and g}
    assert bounds.kept_moment < 0.04 or bounds.cut == math.inf
    if bounds.cut < math.inf:
        assert all(x <= bounds.cut for x in moved)
        assert max(moved, default=0.0) == bounds.cut
        # As few are dropped as possible: with the next larger ones the mean would be too large.
        more = sorted({abs(x) for x, a in tokens if a * x > 0 and abs(x) > bounds.cut})
        with_next = [abs(x) for x, a in tokens if a * x > 0 and abs(x) <= more[0]]
        assert sum(x * x for x in with_next) / len(with_next) >= 0.04 * (1 - 1e-6)


def test_rounding_does_not_clip_the_token_that_the_bounds_come_from():
    batch = batch_of([1.0, -1.0, 1.0])
    for cut in torch.linspace(0.05, 0.19, 300).tolist():
        new = ratios(cut, -cut, 3.0).requires_grad_()
        bounds = m2po_bounds([(new.detach(), batch)], 0.04)
        policy_loss(new, torch.zeros(3, 2), batch, M2PO, 1.0, bounds).loss.backward()
        assert new.grad[:, 1].ne(0).tolist() == [True, True, False]


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_statistics_are_means_over_tokens():
    batch = batch_of([1.0, 1.0, -1.0, -1.0])
    log_ratio = ratios(0.5, 0.1, 0.5, -0.1)
    bounds = Bounds(0.2, 0.2, cut=0.3)
    stats = LossStats()
    stats.add(policy_loss(log_ratio, torch.zeros(4, 2), batch, M2PO, 4.0, bounds))
    stats.add_gap(batch, torch.tensor([[9.0, -1.5], [9.0, -1.0], [9.0, -1.0], [9.0, -1.0]]), version=0)
    found = stats.reduce()
    values = [0.5, 0.1, 0.5, -0.1]
    assert found[metrics.RATIO_MEAN] == pytest.approx(sum(map(math.exp, values)) / 4)
    assert found[metrics.RATIO_MAX] == pytest.approx(math.exp(0.5))
    assert found[metrics.CLIP_SHARE] == found[metrics.MASK_SHARE] == 0.25
    assert found[metrics.M2] == pytest.approx((0.25 + 0.01 + 0.25 + 0.01) / 4)
    assert found[metrics.KL] == pytest.approx(sum(math.exp(x) - 1 - x for x in values) / 4, rel=1e-5)
    assert found[metrics.LOSS] == pytest.approx((-1.2 - math.exp(0.1) + math.exp(0.5) + math.exp(-0.1)) / 4)
    assert found[metrics.LOGP_GAP_MEAN] == pytest.approx(0.125)
    assert found[metrics.LOGP_GAP_MAX] == pytest.approx(0.5)
    assert metrics.KL_REFERENCE not in found


def test_the_gap_is_of_tokens_by_the_trainers_version():
    batch, stats = batch_of([1.0, 1.0]), LossStats()
    stats.add_gap(batch, torch.tensor([[9.0, -1.5], [9.0, -1.0]]), version=7)
    assert all(math.isnan(value) for value in stats.reduce().values())


def test_statistics_of_nothing():
    assert LossStats().reduce() == {}
    stats = LossStats()
    stats.add(policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), collate([], []), GRPO, 1.0))
    assert math.isnan(stats.reduce()[metrics.RATIO_MEAN])


# ---- ranks ---------------------------------------------------------------------------------------------------------


def share(rank, path, found):
    """A rank: half of the minibatch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    batch, new, old, _ = noisy(5)
    found[rank] = bounds_and_stats(batch, new, old, slice(0, 3) if rank == 0 else slice(3, None))
    dist.destroy_process_group()


def bounds_and_stats(batch, new, old, rows):
    part = rows_of(batch, rows)
    bounds = m2po_bounds([((new - old)[rows], part)], 0.04)
    stats = LossStats()
    loss = policy_loss(new[rows], old[rows], part, M2PO, size(batch, M2PO), bounds)
    stats.add(loss)
    return bounds, loss.loss.item(), stats.reduce()


def test_ranks_agree_with_one_process(tmp_path):
    bounds, loss, stats = bounds_and_stats(*noisy(5)[:3], slice(None))
    assert bounds.cut < math.inf
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(share, args=(tmp_path / "store", found), nprocs=2)
        ranks = [found[0], found[1]]
    assert ranks[0][0] == ranks[1][0] == bounds
    assert ranks[0][1] + ranks[1][1] == pytest.approx(loss, rel=1e-5)
    assert ranks[0][2] == ranks[1][2] == pytest.approx(stats)
