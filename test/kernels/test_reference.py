"""The torch reference against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sgl_kernel import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RANKS = [1, 3, 5, 8, 17, 64, 256]
MIXED = [2, 0, -1, 1, 1, -1, 2, 0]
"""Slots of token rows; slot 1 has no module in the second slice."""
MIXED_RANKS = [(8, 3, 1), (5, 0, 17), (1, 1, 0)]
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def _assert_rounded(got, expected, size=0.0):
    """`got` is `expected`, rounded once, but for float32 sums of terms whose absolute values add up to `size`."""
    expected = np.asarray(expected)
    error = np.abs(got.double().numpy() - expected)
    tiny = float(torch.finfo(got.dtype).tiny) * 2**-8
    bound = ROUNDOFF[got.dtype] * 1.01 * np.abs(expected) + 4e-7 * (size + np.abs(expected)) + tiny
    assert not np.isnan(error).any() and (error <= bound).all(), f"{(error / bound).max():.3f} of the bound"


def _strided(rows, columns, dtype, extra=8):
    """A matrix whose rows are farther apart than it is wide, with NaN between them."""
    whole = torch.full((rows, columns + extra), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns)
    return whole[:, :columns]


def _bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).clone()


def _minus_zeros(y, token_slots):
    for token, slot in enumerate(token_slots):
        if slot < 0:
            y[token, ::2] = -0.0
    return y


# ---- shrink and expand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab_dtype", ["bfloat16", "float16", "float32"])
def test_shrink_of_mixed_ranks(make_case, dtype, slab_dtype):
    case = make_case(MIXED, MIXED_RANKS, max_tokens=12, dtype=slab_dtype)
    x = _strided(len(MIXED) + 2, 24, dtype)
    x[len(MIXED) :] = float("nan")
    out = torch.full((len(x), case.site.u_width), 7.0, dtype=dtype)
    reference.lora_shrink(x, case.slabs, case.site, case.batch, out)
    untouched = torch.ones_like(out, dtype=torch.bool)
    for token, slot in enumerate(MIXED):
        for index in range(3):
            if (slot, index) in case.factors:
                _, a, _ = case.factors[slot, index]
                start = index * case.site.rank_cap
                part = slice(start, start + len(a))
                row = x[token].double().numpy()
                _assert_rounded(out[token, part], a @ row, np.abs(a) @ np.abs(row))
                untouched[token, part] = False
    assert (out[untouched] == 7).all(), "padding, rows of the base model and rows beyond the batch"


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank(make_case, rank):
    case = make_case([0, -1, 0], [(rank,)], outputs=(12,))
    x = torch.randn(3, 24).bfloat16()
    u = torch.full((3, case.site.u_width), float("nan")).bfloat16()
    reference.lora_shrink(x, case.slabs, case.site, case.batch, u)
    scale, a, b = case.factors[0, 0]
    _assert_rounded(u[0, :rank], a @ x[0].double().numpy(), np.abs(a) @ np.abs(x[0].double().numpy()))
    y = torch.randn(3, 12).bfloat16()
    term, size = case.term(u)
    expected = y.double().numpy() + term
    before = _bits(y[1])
    reference.lora_expand_add(y, case.delta(u))
    _assert_rounded(y, expected, size)
    assert torch.equal(_bits(y[1]), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_expand_of_mixed_ranks(make_case, dtype, slab_dtype, side_by_side):
    case = make_case(MIXED, MIXED_RANKS, max_tokens=12, dtype=slab_dtype)
    stride = case.site.u_width if side_by_side else 0
    y = _minus_zeros(_strided(len(MIXED) + 2, 32, dtype), MIXED)
    y[len(MIXED) :] = -0.0
    y[3, 16:24] = -0.0  # slot 1 has nothing for the second slice
    u = case.random_u(len(y), dtype, stride)
    term, size = case.term(u, stride)
    expected, before = y.double().numpy() + term, _bits(y)
    assert reference.lora_expand_add(y, case.delta(u, stride)) is y
    _assert_rounded(y, expected, size)
    same = torch.tensor([slot < 0 for slot in MIXED] + [True, True])
    assert torch.equal(_bits(y)[same], before[same]) and torch.equal(_bits(y)[3, 16:24], before[3, 16:24])


def test_an_empty_batch_and_an_empty_slot_add_nothing(make_case):
    for slots, ranks in (([], [(3,)]), ([0, 0], [(0,)]), ([-1, -1], [(3,)])):
        case = make_case(slots, ranks, outputs=(8,), max_tokens=2)
        y = torch.full((2, 8), -0.0)
        reference.lora_expand_add(y, case.delta(torch.full((2, case.site.u_width), float("nan"))))
        assert torch.equal(_bits(y), _bits(torch.full((2, 8), -0.0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_skinny_gemm(make_case, dtype):
    case = make_case(MIXED, MIXED_RANKS)
    x, weight = _strided(8, 24, dtype), _strided(20, 24, dtype)
    u = torch.full((8, case.site.u_width), 7.0, dtype=dtype)
    again = u.clone()
    out = torch.empty(8, 24, dtype=dtype)[:, :20]
    reference.skinny_gemm(x, weight, out, (case.slabs, case.site, case.batch, u))
    wide_x, wide_w = x.double().numpy(), weight.double().numpy()
    _assert_rounded(out, wide_x @ wide_w.T, np.abs(wide_x) @ np.abs(wide_w.T))
    reference.lora_shrink(x, case.slabs, case.site, case.batch, again)
    assert torch.equal(u, again)
    assert torch.equal(reference.skinny_gemm(x, weight, torch.empty(8, 20, dtype=dtype)), out)


# ---- norms and activations -------------------------------------------------------------------------------------------


def _norm(row, weight, eps):
    mean = sum(float(v) ** 2 for v in row) / len(row)
    return np.array([float(v) / math.sqrt(mean + eps) * float(w) for v, w in zip(row, weight, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm(make_case, dtype):
    x, weight = _strided(5, 24, dtype), torch.randn(24).to(dtype)
    x[1], x[2] = 0, x[2] * 1e-3
    out = torch.empty(5, 24, dtype=dtype)
    expected = np.stack([_norm(row, weight, 1e-5) for row in x])
    assert reference.rmsnorm(x, weight, 1e-5, out) is out
    _assert_rounded(out, expected)
    _assert_rounded(reference.rmsnorm(x, weight, 1e-5, x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [False, True])
def test_fused_add_rmsnorm(make_case, dtype, with_delta):
    case = make_case(MIXED, [(r[0],) for r in MIXED_RANKS], outputs=(24,), max_tokens=12)
    x, residual, weight = _strided(10, 24, dtype), _strided(10, 24, dtype), torch.randn(24).to(dtype)
    u = case.random_u(10, dtype)
    term, size = case.term(u)
    before_x, before_r = _bits(x), _bits(residual)
    rows = 8 if with_delta else 10
    total = x.double().numpy() + residual.double().numpy() + (term if with_delta else 0)
    reference.fused_add_rmsnorm(x, residual, weight, 1e-6, case.delta(u) if with_delta else None)
    _assert_rounded(residual[:rows], total[:rows], size[:rows] + np.abs(total[:rows]))
    _assert_rounded(x[:rows], np.stack([_norm(row, weight, 1e-6) for row in residual[:rows]]))
    assert torch.equal(_bits(x)[rows:], before_x[rows:]) and torch.equal(_bits(residual)[rows:], before_r[rows:])


def test_rows_of_the_base_model_are_the_same_with_and_without_a_delta(make_case):
    case = make_case(MIXED, [(r[0],) for r in MIXED_RANKS], outputs=(24,))
    x, residual, weight = torch.randn(8, 24), torch.randn(8, 24), torch.randn(24)
    x, residual = _minus_zeros(x, MIXED), _minus_zeros(residual, MIXED)
    plain, with_delta = [x.clone(), residual.clone()], [x.clone(), residual.clone()]
    reference.fused_add_rmsnorm(*plain, weight, 1e-6)
    reference.fused_add_rmsnorm(*with_delta, weight, 1e-6, case.delta(case.random_u(8, torch.float32)))
    base = torch.tensor([slot < 0 for slot in MIXED])
    for one, other in zip(plain, with_delta, strict=True):
        assert torch.equal(_bits(one)[base], _bits(other)[base])
        assert not torch.equal(one[~base], other[~base])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [False, True])
def test_silu_and_mul(make_case, dtype, with_delta):
    case = make_case(MIXED, [(8, 3), (5, 0), (1, 17)], outputs=(12, 12), max_tokens=12)
    x, out = _strided(10, 24, dtype), torch.full((10, 12), 7.0, dtype=dtype)
    u = case.random_u(10, dtype)
    term, size = case.term(u)
    kept = _bits(x)
    rows = 8 if with_delta else 10
    wide = x.double().numpy() + (term if with_delta else 0)
    assert reference.silu_and_mul(x, out, case.delta(u) if with_delta else None) is out
    gate, up = wide[:rows, :12], wide[:rows, 12:]
    size = (np.abs(gate) + size[:rows, :12]) * (np.abs(up) + size[:rows, 12:]) + np.abs(up) + size[:rows, 12:]
    _assert_rounded(out[:rows], gate / (1 + np.exp(-gate)) * up, size)
    assert (out[rows:] == 7).all()
    assert torch.equal(_bits(x), kept), "the input is only read"


# ---- attention -------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, DIM = 2, 1, 8


def _angles(positions=20):
    angles = torch.arange(positions).double()[:, None] / 100 ** (torch.arange(DIM // 2).double() / (DIM // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def _rope_row(row, q_weight, k_weight, eps, angles):
    """One token's qkv in float64, head by head."""
    out = []
    for head in range(HEADS + 2 * KV_HEADS):
        values = row[head * DIM : (head + 1) * DIM]
        is_q, is_k = head < HEADS, HEADS <= head < HEADS + KV_HEADS
        weight = q_weight if is_q else k_weight if is_k else None
        if weight is not None:
            values = _norm(values, weight, eps)
        if is_q or is_k:
            turned = list(values)
            for i in range(DIM // 2):
                cos, sin = float(angles[i]), float(angles[i + DIM // 2])
                turned[i] = values[i] * cos - values[i + DIM // 2] * sin
                turned[i + DIM // 2] = values[i + DIM // 2] * cos + values[i] * sin
            values = turned
        out.extend(values)
    return np.array(out, dtype=np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("with_bias", "with_delta", "with_pool"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0)])
def test_qk_norm_rope(make_case, dtype, norm, with_bias, with_delta, with_pool):
    case = make_case(MIXED, MIXED_RANKS, outputs=(16, 8, 8), max_tokens=12)
    qkv, angles = _strided(10, 32, dtype), _angles()
    positions = torch.tensor([0, 3, 19, 7, 7, 1, 2, 5, 4, 4])
    locs = torch.tensor([5, 2, 9, 0, 1, 3, 4, 6, 7, 8])
    weights = [torch.randn(DIM).to(dtype) if norm else None for _ in "qk"]
    bias = torch.randn(32).to(dtype) if with_bias else None
    pools = [torch.full((11, KV_HEADS, DIM), 7.0, dtype=dtype) if with_pool else None for _ in "kv"]
    u = case.random_u(10, dtype)
    term, size = case.term(u)
    rows, before = (8 if with_delta else 10), _bits(qkv)
    wide = qkv.double().numpy() + (bias.double().numpy() if with_bias else 0) + (term if with_delta else 0)
    expected = np.stack([_rope_row(wide[t], *weights, 1e-6, angles[positions[t]]) for t in range(rows)])
    reference.qk_norm_rope(
        *(qkv, HEADS, KV_HEADS, DIM, *weights, 1e-6, angles, positions, bias, *pools),
        locs if with_pool else None,
        case.delta(u) if with_delta else None,
    )
    # A norm passes an error of one number of a head on to all of them.
    size = (size + np.abs(wide)).reshape(10, -1, DIM).max(axis=2).repeat(DIM, axis=1)[:rows] * 4
    factor = np.abs(expected).max() / np.abs(wide).max() + 4
    _assert_rounded(qkv[:rows], expected, size * factor)
    assert torch.equal(_bits(qkv)[rows:], before[rows:])
    for pool, start in zip(pools, (16, 24), strict=True):
        if pool is not None:
            assert torch.equal(pool[locs[:rows], 0], qkv[:rows, start : start + DIM])
            free = torch.ones(11, dtype=torch.bool).index_fill(0, locs[:rows], False)
            assert (pool[free] == 7).all()


def test_values_without_addition_keep_their_bits(make_case):
    case = make_case(MIXED, MIXED_RANKS, outputs=(16, 8, 8))
    qkv = _minus_zeros(torch.randn(8, 32).bfloat16(), MIXED)
    before = _bits(qkv)
    positions = torch.arange(8)
    reference.qk_norm_rope(
        *(qkv, HEADS, KV_HEADS, DIM, None, None, 1e-6, _angles(), positions),
        delta=case.delta(case.random_u(8, torch.bfloat16)),
    )
    for token, slot in enumerate(MIXED):
        if slot in (-1, 2):  # slot 2 has no module in the third slice
            assert torch.equal(_bits(qkv)[token, 24:], before[token, 24:])
