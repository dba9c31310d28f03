"""What kernels must compute: batches, poisoned slabs, and float64 oracles that share no code with them.

Every `check_*` runs one operation on the device of its `Lora`, compares it with the oracle and with `reference`, and
sees to it that nothing else was written. Whatever an operation must not read is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_kernel import reference
from sgl_kernel.lora.batch import BatchShape, build_batch
from sgl_kernel.lora.layout import LoraGroup, LoraLayout, LoraSite
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF_ULP = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
"""The error of rounding, relative."""
SUM_ERROR = 2.0**-20
"""Of a float32 sum, relative to the sum of magnitudes."""
PADDING = 3
"""Rows behind the batch's tokens."""
SENTINEL = -7.0
EPS = 1e-5

RANKS = [(1, 3, 8), (16, 17, 64), (0, 33, 2), (8, 0, 0)]
"""Of the slices of every slot; slot 4 is never used and all NaN."""
SLOTS = {
    "one": [1] * 5,
    "single": [0],
    "base": [-1] * 4,
    "mixed": [2, 0, -1, 3, 1, 1, -1, 0, 2, 1, 3],
    "skewed": [0] * 21 + [2, -1] + [0] * 14 + [3],
    "nothing": [],
}
"""Slots of the token rows, by the kind of batch."""


@dataclass
class Lora:
    """One site, adapters in its slots, and a batch of them."""

    slabs: LoraSlabs
    site: LoraSite
    batch: LoraBatch
    token_slots: list[int]
    dtype: torch.dtype
    modules: dict[tuple[int, int], tuple[float, Tensor, Tensor]]
    """(slot, slice): scale, A [r, K], B [out, r] in float64."""

    @property
    def ranks(self) -> np.ndarray:
        """Of the adapters, by slot: what `build_batch` takes."""
        return self.slabs.ranks

    @property
    def tokens(self) -> int:
        return len(self.token_slots)

    @property
    def rows(self) -> int:
        return self.tokens + PADDING

    @property
    def device(self) -> torch.device:
        return self.slabs.data.device

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return random(*shape, dtype=self.dtype, device=self.device, scale=scale)

    def rows_of(self, columns: int) -> Tensor:
        """[rows, columns], the padding NaN but for one row, with a row stride that is larger than `columns`."""
        wide = self.random(self.rows, columns + 8)
        wide[self.tokens + 1 :] = torch.nan
        return wide[:, :columns]

    def u(self, spread: bool = False) -> Tensor:
        """A u that is NaN wherever it does not count. With `spread`, u of all slots lies side by side."""
        width = self.site.u_width
        u = torch.full((self.rows, width * (self.slabs.num_slots if spread else 1)), torch.nan, dtype=self.dtype)
        for row, slot in enumerate(self.token_slots):
            for (owner, index), (_, a, _) in self.modules.items():
                if owner == slot:
                    start = spread * slot * width + index * self.site.rank_cap
                    u[row, start : start + len(a)] = random(len(a), dtype=self.dtype)
        return u.to(self.device)

    def delta(self, u: Tensor) -> LoraDelta:
        return LoraDelta(
            u, self.slabs, self.site, self.batch, 0 if u.shape[1] == self.site.u_width else self.site.u_width
        )

    def covered(self) -> Tensor:
        """bool [rows, u_width]: what shrink must write."""
        covered = torch.zeros(self.rows, self.site.u_width, dtype=torch.bool)
        for row, slot in enumerate(self.token_slots):
            for (owner, index), (_, a, _) in self.modules.items():
                start = index * self.site.rank_cap
                covered[row, start : start + len(a)] |= owner == slot
        return covered

    def unspecified(self) -> Tensor:
        """bool [rows, u_width]: where shrink may write anything: from the module's rank up to the adapter's."""
        reach = torch.zeros(self.rows, self.site.num_slices, self.site.rank_cap, dtype=torch.bool)
        for row, slot in enumerate(self.token_slots):
            if slot >= 0:
                reach[row, :, : self.ranks[slot]] = True
        return reach.view(self.rows, -1) & ~self.covered()

    def shrunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u and the sums of magnitudes, float64 [rows, u_width], 0 where nothing is written."""
        total = torch.zeros(2, self.rows, self.site.u_width, dtype=torch.float64)
        wide = x.double().cpu()
        for row, slot in enumerate(self.token_slots):
            for (owner, index), (_, a, _) in self.modules.items():
                if owner == slot:
                    start = index * self.site.rank_cap
                    total[0, row, start : start + len(a)] = a @ wide[row]
                    total[1, row, start : start + len(a)] = a.abs() @ wide[row].abs()
        return total[0], total[1]

    def term(self, u: Tensor) -> Tensor:
        """scale * B u, float64 [rows, N]."""
        total = torch.zeros(self.rows, self.site.total_out, dtype=torch.float64)
        wide, stride = u.double().cpu(), self.site.u_width if u.shape[1] > self.site.u_width else 0
        for row, slot in enumerate(self.token_slots):
            for (owner, index), (scale, a, b) in self.modules.items():
                if owner == slot:
                    first, start = slot * stride + index * self.site.rank_cap, sum(self.site.out_features[:index])
                    total[row, start : start + len(b)] = scale * (b @ wide[row, first : first + len(a)])
        return total


def random(*shape: int, dtype: torch.dtype = FP32, device: torch.device | str = "cpu", scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=FP32) * scale).to(dtype).to(device)


def make_lora(
    token_slots: list[int],
    in_features: int,
    out_features: tuple[int, ...],
    *,
    dtype: torch.dtype = BF16,
    tile: int = 16,
    ranks: list[tuple[int, ...]] = RANKS,
    device: str = "cpu",
    slab_bytes: int | None = None,
) -> Lora:
    """Adapters of these ranks (by slot, then slice; surplus slices are left out) in layer 1 of 2, and a batch."""
    torch.manual_seed(sum(token_slots) + in_features)
    max_rank = max(rank for slot in ranks for rank in slot)
    layout = LoraLayout([LoraGroup("g", in_features, out_features)], 2, max_rank)
    site, num_slots = layout.site(1, "g"), len(ranks) + 1
    data = torch.empty(num_slots, slab_bytes or layout.slab_bytes, dtype=torch.uint8, device=device)
    modules: dict[Any, Any] = {}
    own = [slot[: site.num_slices] for slot in ranks]
    for slot in range(num_slots):
        slab = torch.full((layout.slab_bytes,), 0xFF, dtype=torch.uint8)  # NaN as bf16 and as float32
        if slot < len(own):
            slab[:16] = 0
            slab[:4].view(torch.int32).fill_(max(own[slot]))
            for index, rank in enumerate(own[slot]):
                modules |= _put(slab, site, slot, index, rank, max(own[slot]))
        data[slot, : layout.slab_bytes] = slab.to(device)
    slabs = LoraSlabs(data, None, np.array([*map(max, own), 0], np.int32))
    shape = BatchShape(len(token_slots) + PADDING + 20, num_slots, tile)
    words = build_batch(np.array(token_slots, np.int32), slabs.ranks, shape)
    return Lora(slabs, site, LoraBatch.to_device(words, shape, device), token_slots, dtype, modules)


def _put(slab: Tensor, site: LoraSite, slot: int, index: int, rank: int, adapter_rank: int) -> dict[Any, Any]:
    """Write a module as README.md says; what was written, in float64."""
    entry = site.table_offset + 8 * index
    slab[entry : entry + 4].view(torch.int32).fill_(rank)
    if rank == 0:
        return {}
    scale, stride = 0.5 + slot, -(-adapter_rank // 8) * 8
    slab[entry + 4 : entry + 8].view(FP32).fill_(scale)
    start = site.a_offset + index * site.rank_cap * site.in_features * 2
    a = slab[start : start + rank * site.in_features * 2].view(BF16).view(rank, site.in_features)
    a.copy_(random(rank, site.in_features, scale=site.in_features**-0.5))
    out, start = site.out_features[index], site.b_offsets[index]
    whole = slab[start : start + out * stride * 2].view(BF16).view(out, stride)
    b = whole.zero_()[:, :rank]
    b.copy_(random(out, rank, scale=rank**-0.5))
    return {(slot, index): (scale, a.double(), b.double())}


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor | float, what: str = "") -> None:
    """`actual` is `exact`, float64, rounded once, but for the errors of float32 sums over terms of this magnitude."""
    error = (actual.double().cpu() - exact).abs()
    limit = HALF_ULP[actual.dtype] * 1.01 * exact.abs() + SUM_ERROR * magnitude + 1e-7 * (actual.dtype == FP16)
    assert (error <= limit).all(), f"{what}: off by {(error / limit).max():.2f} times what rounding explains"


def assert_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """The same bits, NaN and -0 included."""
    kind = torch.int32 if actual.dtype == FP32 else torch.int16
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind)), what


def agree(ops: ModuleType, call: Callable[[ModuleType, list[Tensor]], Any], tensors: list[Tensor]) -> list[Tensor]:
    """`call` on copies of `tensors`, by `ops` and by the reference, which must nearly agree; those of `ops`."""
    mine, theirs = ([_copy(t) for t in tensors] for _ in range(2))
    call(ops, mine)
    call(reference, theirs)
    for a, b in zip(mine, theirs, strict=True):
        # Each is rounded from nearly the same; a norm whose sums have been rounded otherwise differs a little more.
        limit = HALF_ULP[a.dtype]
        torch.testing.assert_close(a, b, rtol=8 * limit, atol=max(32 * limit, 1e-4), equal_nan=True)
    return mine


def _copy(tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def check_shrink(ops: ModuleType, lora: Lora) -> Tensor:
    x = lora.rows_of(lora.site.in_features)
    blank = torch.full((lora.rows, lora.site.u_width), SENTINEL, dtype=lora.dtype, device=lora.device)
    unspecified = lora.unspecified().to(lora.device)

    def shrink(backend: ModuleType, t: list[Tensor]) -> None:
        backend.lora_shrink(x, lora.slabs, lora.site, lora.batch, t[0])
        t[0][unspecified] = SENTINEL

    (u,) = agree(ops, shrink, [blank])
    exact, magnitude = lora.shrunk(x)
    covered = lora.covered()
    assert_close(torch.where(covered, u.cpu(), 0.0), exact, magnitude, "u")
    assert (u.cpu()[~covered] == SENTINEL).all()
    return u


def check_expand(ops: ModuleType, lora: Lora, spread: bool = False) -> Tensor:
    y, u = lora.rows_of(lora.site.total_out), lora.u(spread)
    y[::2, ::3] = -0.0
    (out,) = agree(ops, lambda o, t: o.lora_expand_add(t[0], lora.delta(u)), [y])
    term = lora.term(u)
    n = lora.tokens
    assert_close(out[:n], y[:n].double().cpu() + term[:n], term[:n].abs() + 8.0, "y")
    assert_bits(out[n:], y[n:], "rows behind the batch")
    start = 0
    for index, size in enumerate(lora.site.out_features):
        kept = [row for row, slot in enumerate(lora.token_slots) if (slot, index) not in lora.modules]
        assert_bits(out[kept, start : start + size], y[kept, start : start + size], "rows without this module")
        start += size
    return out


def check_silu(ops: ModuleType, lora: Lora, delta: bool = True) -> Tensor:
    inner = lora.site.out_features[0]
    x, u = lora.rows_of(2 * inner), lora.u()
    term = lora.delta(u) if delta else None
    blank = torch.full((lora.rows, inner), SENTINEL, dtype=lora.dtype, device=lora.device)
    (out,) = agree(ops, lambda o, t: o.silu_and_mul(x, t[0], term), [blank])
    n = lora.tokens
    gate, up = (x.double().cpu() + (lora.term(u) if delta else 0.0))[:n].chunk(2, dim=1)
    assert_close(out[:n], torch.nn.functional.silu(gate) * up, 4.0 * (1 + gate.abs()) * (1 + up.abs()), "silu")
    assert not delta or (out[n:] == SENTINEL).all()
    return out


def check_norm(ops: ModuleType, lora: Lora, delta: bool = True) -> Tensor:
    hidden = lora.site.total_out
    x, residual, u = lora.rows_of(hidden), lora.rows_of(hidden), lora.u()
    weight = lora.random(hidden)
    term = lora.delta(u) if delta else None
    out, total = agree(ops, lambda o, t: o.fused_add_rmsnorm(t[0], t[1], weight, EPS, term), [x, residual])
    n = lora.tokens
    exact = (x.double() + residual.double()).cpu() + (lora.term(u) if delta else 0.0)
    assert_close(total[:n], exact[:n], 8 + exact[:n].abs(), "residual")
    normed = _normed(total[:n].double().cpu(), weight.double().cpu())
    assert_close(out[:n], normed, 4 * normed.abs(), "norm")
    if delta:
        assert_bits(torch.cat([out[n:], total[n:]]), torch.cat([x[n:], residual[n:]]), "rows behind the batch")
    (plain,) = agree(ops, lambda o, t: o.rmsnorm(total, weight, EPS, t[0]), [x])
    assert_bits(plain[:n], out[:n], "rmsnorm of the sum")
    return out


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def check_rope(
    ops: ModuleType,
    lora: Lora,
    heads: tuple[int, int, int],
    *,
    delta: bool = True,
    norm: bool = True,
    bias: bool = False,
    pools: bool = True,
) -> Tensor:
    num_heads, num_kv_heads, dim = heads
    all_heads, n = num_heads + 2 * num_kv_heads, lora.tokens if delta else lora.rows
    qkv, u = lora.rows_of(all_heads * dim), lora.u()
    if not delta:
        qkv[lora.tokens :] = 1.0
    q_weight, k_weight = (lora.random(dim), lora.random(dim)) if norm else (None, None)
    bias_values = lora.random(all_heads * dim) if bias else None
    angles = torch.rand(99, dim // 2) * 7
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1).to(lora.device)
    positions = torch.randint(99, (lora.rows,), device=lora.device)
    locs = torch.randperm(lora.rows + 5, device=lora.device)[: lora.rows]
    stores = [torch.full((lora.rows + 5, num_kv_heads, dim), SENTINEL, dtype=lora.dtype, device=lora.device)] * 2

    def call(backend: ModuleType, t: list[Tensor]) -> None:
        cache = (t[1], t[2], locs) if pools else (None, None, None)
        term = lora.delta(u) if delta else None
        backend.qk_norm_rope(
            t[0], num_heads, num_kv_heads, dim, q_weight, k_weight, EPS, cos_sin, positions, bias_values, *cache, term
        )

    out, k_pool, v_pool = agree(ops, call, [qkv, *stores])
    wide = qkv.double().cpu()
    wide = wide if bias_values is None else wide + bias_values.double().cpu()
    wide = (wide + lora.term(u) if delta else wide)[:n].unflatten(1, (all_heads, dim))
    expected = [*wide.split([num_heads, num_kv_heads, num_kv_heads], dim=1)]
    for index, weight in enumerate((q_weight, k_weight)):
        x = expected[index] if weight is None else _normed(expected[index], weight.double().cpu())
        c, s = cos_sin.double().cpu()[positions.cpu()[:n]][:, None].chunk(2, dim=-1)
        low, high = x.chunk(2, dim=-1)
        expected[index] = torch.cat([low * c - high * s, high * c + low * s], dim=-1)
    exact = torch.cat(expected, dim=1)
    assert_close(out[:n].unflatten(1, (all_heads, dim)), exact, 16 + 4 * exact.abs().amax(-1, keepdim=True), "qkv")
    assert_bits(out[n:], qkv[n:], "rows behind the batch")
    for index, pool in enumerate((k_pool, v_pool)):
        want, first = stores[index].clone(), num_heads + index * num_kv_heads
        if pools:
            want[locs[:n]] = out[:n].unflatten(1, (all_heads, dim))[:, first : first + num_kv_heads]
        assert_bits(pool, want, "pool")
    return out


def check_gemm(ops: ModuleType, lora: Lora, out_features: int) -> Tensor:
    x, weight = lora.rows_of(lora.site.in_features), lora.random(out_features, lora.site.in_features + 8, scale=0.1)
    x[lora.tokens :] = 0.0
    weight = weight[:, : lora.site.in_features]
    blank = lora.rows_of(out_features)
    u = torch.full((lora.rows, lora.site.u_width), SENTINEL, dtype=lora.dtype, device=lora.device)
    unspecified = lora.unspecified().to(lora.device)

    def product(backend: ModuleType, t: list[Tensor]) -> None:
        backend.skinny_gemm(x, weight, t[0], (lora.slabs, lora.site, lora.batch, t[1]))
        t[1][unspecified] = SENTINEL

    out, u = agree(ops, product, [blank, u])
    wide, weights = x.double().cpu(), weight.double().cpu()
    assert_close(out, wide @ weights.t(), wide.abs() @ weights.t().abs(), "product")
    alone = lora.rows_of(out_features)  # which may be another kernel
    ops.skinny_gemm(x, weight, alone)
    assert_close(alone, wide @ weights.t(), wide.abs() @ weights.t().abs(), "product without adapters")
    exact, magnitude = lora.shrunk(x)
    covered = lora.covered()
    assert_close(torch.where(covered, u.cpu(), 0.0), exact, magnitude, "u")
    assert (u.cpu()[~covered] == SENTINEL).all()
    return out


def check_row_alone(ops: ModuleType, lora: Lora, dims: tuple[int, int, int], num_outputs: int = 4) -> None:
    """Every row of a batch gets the bits that it gets alone, through all operations of a site with three slices.

    `num_outputs` leaves out the product where another number of rows chooses another kernel.
    """
    x, qkv = lora.rows_of(lora.site.in_features), lora.rows_of(lora.site.total_out)
    whole = _pass(ops, lora, x, qkv, dims)
    for row in sorted({0, lora.tokens // 2, lora.tokens - 1}):
        shape = lora.batch.shape
        words = build_batch(np.array([lora.token_slots[row]], np.int32), lora.ranks, shape)
        alone = Lora(
            lora.slabs,
            lora.site,
            LoraBatch.to_device(words, shape, lora.device),
            [lora.token_slots[row]],
            lora.dtype,
            lora.modules,
        )
        part = _pass(ops, alone, x[row : row + 1], qkv[row : row + 1], dims)
        for name, (a, b) in enumerate(zip(whole[:num_outputs], part[:num_outputs], strict=True)):
            assert_bits(a[row : row + 1], b, f"row {row}, output {name}")


def _pass(ops: ModuleType, lora: Lora, x: Tensor, qkv: Tensor, dims: tuple[int, int, int]) -> list[Tensor]:
    rows = len(x)
    u = torch.full((rows, lora.site.u_width), torch.nan, dtype=lora.dtype, device=lora.device)
    ops.lora_shrink(x, lora.slabs, lora.site, lora.batch, u)
    added, roped = _copy(qkv), _copy(qkv)
    ops.lora_expand_add(added, lora.delta(u))
    angles = torch.linspace(-1, 1, dims[2], device=lora.device)[None].contiguous()
    zeros = torch.zeros(rows, dtype=torch.int64, device=lora.device)
    ops.qk_norm_rope(roped, *dims, None, None, EPS, angles, zeros, delta=lora.delta(u))
    product = torch.empty(rows, 48, dtype=lora.dtype, device=lora.device)
    weight = torch.linspace(-1, 1, 48 * x.shape[1]).view(48, -1).to(lora.dtype).to(lora.device)
    ops.skinny_gemm(x, weight, product)
    counts = lora.covered()[:rows].to(lora.device)
    return [u.masked_fill(~counts, 0.0), added, roped, product]
