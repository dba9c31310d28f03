"""Every operation in plain torch: what the kernels are tested against, and what runs where there is no kernel.

Called by `ops`, which has checked the arguments, allocated the outputs and made everything two-dimensional. The other
backends have functions of the same names and signatures.
Invariants: sums are taken in float32 and every output is rounded once; values beyond a module's own rank, rows beyond
the batch's `tokens` and, of u, rows of slot -1 are neither read nor written. (Kernels may write to u up to the
adapter's rank; what they write there means nothing.) Slabs may be of any dtype that layouts have.

Shape legend: T token rows, K inputs, N outputs of a group, n slices, H width, I inner width of the MLP, D width of a
head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgl_kernel.lora.batch import HEADER_WORDS, LIVE_SLOTS, LIVE_WORDS, TOKENS
from sgl_kernel.lora.layout import RANK_STEP, TABLE_ENTRY, LoraSite, round_up
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Of slabs, by a site's dtype."""
Shrink = tuple[LoraSlabs, LoraSite, LoraBatch, Tensor]
"""slabs, site, batch and u: the shrink that a product takes along."""


class Slice(NamedTuple):
    """One module of an adapter: its number in the site, A float32 [r, K], B float32 [out, r]."""

    number: int
    rank: int
    scale: float
    a: Tensor
    b: Tensor


def lora_shrink(x: Tensor, slabs: LoraSlabs, site: LoraSite, batch: LoraBatch, out: Tensor) -> Tensor:
    """u = A x of every row with an adapter: out [T, u_width] from x [T, K]."""
    for slot, rank, rows in _groups(batch):
        own = x[rows].float()
        for part in _slices(slabs, site, slot, rank):
            start = part.number * site.rank_cap
            out[rows, start : start + part.rank] = (own @ part.a.t()).to(out.dtype)
    return out


def lora_expand_add(y: Tensor, delta: LoraDelta) -> Tensor:
    """y += scale B u of every row with an adapter, in place: y [T, N]."""
    for rows, columns, term in _terms(delta):
        y[rows, columns] = (y[rows, columns].float() + term).to(y.dtype)
    return y


def skinny_gemm(x: Tensor, weight: Tensor, out: Tensor, shrink: Shrink | None = None) -> Tensor:
    """out [M, N] = x [M, K] weight^T, and u of the same rows."""
    out.copy_(x.float() @ weight.float().t())
    if shrink is not None:
        slabs, site, batch, u = shrink
        lora_shrink(x, slabs, site, batch, u)
    return out


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out [T, H] = x / sqrt(mean(x^2) + eps) * weight."""
    return out.copy_(_normalise(x.float(), weight, eps))


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, delta: LoraDelta | None = None) -> None:
    """residual [T, H] += x + delta; x = rmsnorm(residual). Both in place."""
    rows = _live_rows(x, delta)
    residual[:rows] = (_widen(x[:rows], delta) + residual[:rows].float()).to(residual.dtype)
    x[:rows] = _normalise(residual[:rows].float(), weight, eps).to(x.dtype)


def silu_and_mul(x: Tensor, out: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """out [T, I] = silu(gate) * up, of x + delta [T, 2 I], gate first."""
    rows = _live_rows(x, delta)
    gate, up = _widen(x[:rows], delta).chunk(2, dim=1)
    out[:rows] = (gate * torch.sigmoid(gate) * up).to(out.dtype)
    return out


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    k_pool: Tensor | None = None,
    v_pool: Tensor | None = None,
    locs: Tensor | None = None,
    delta: LoraDelta | None = None,
) -> Tensor:
    """Add bias and delta, normalise and rotate q and k by head, in place; k and v also to rows `locs` of the pools."""
    rows = _live_rows(qkv, delta)
    work = _widen(qkv[:rows], delta, bias).view(rows, num_heads + 2 * num_kv_heads, head_dim)
    k_start, v_start = num_heads, num_heads + num_kv_heads
    q, k, v = work[:, :k_start], work[:, k_start:v_start], work[:, v_start:]
    cos, sin = cos_sin[positions[:rows]][:, None].chunk(2, dim=-1)
    q = _rotate(q if q_weight is None else _normalise(q, q_weight, eps), cos, sin)
    k = _rotate(k if k_weight is None else _normalise(k, k_weight, eps), cos, sin)
    done = torch.cat([q, k, v], dim=1).to(qkv.dtype)
    qkv[:rows] = done.view(rows, qkv.shape[1])
    if k_pool is not None and v_pool is not None and locs is not None:
        k_pool[locs[:rows]] = done[:, k_start:v_start]
        v_pool[locs[:rows]] = done[:, v_start:]
    return qkv


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 in and out, over the last dimension."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [T, heads, D] by the angles of cos, sin [T, 1, D/2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _live_rows(x: Tensor, delta: LoraDelta | None) -> int:
    """Rows to be processed: those of the batch, or all where there is none."""
    return len(x) if delta is None else min(int(delta.batch.words[TOKENS]), len(x))


def _widen(x: Tensor, delta: LoraDelta | None, bias: Tensor | None = None) -> Tensor:
    """x + bias + delta in float32, a tensor of its own. Where nothing is added, -0.0 stays what it is."""
    work = x.float() if bias is None else x.float() + bias.float()
    if delta is None:
        return work
    work = work.clone() if work.data_ptr() == x.data_ptr() else work
    for rows, columns, term in _terms(delta):
        work[rows, columns] += term
    return work


def _terms(delta: LoraDelta) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """(rows, columns of the output, what is to be added there in float32) of every module of every adapter."""
    site, stride = delta.site, delta.u_slot_stride
    for slot, rank, rows in _groups(delta.batch):
        for part in _slices(delta.slabs, site, slot, rank):
            first = slot * stride + part.number * site.rank_cap
            u = delta.u[rows, first : first + part.rank].float()
            start = sum(site.out_features[: part.number])
            yield rows, slice(start, start + len(part.b)), (u @ part.b.t()).mul_(part.scale)


def _groups(batch: LoraBatch) -> Iterator[tuple[int, int, Tensor]]:
    """(slot, its adapter's rank, its token rows int64 on the device) of every adapter of the batch."""
    words, shape = batch.words, batch.shape
    header = words[:HEADER_WORDS].tolist()
    slots = words[shape.token_slot : shape.token_slot + header[TOKENS]]
    live = words[shape.live : shape.live + LIVE_WORDS * header[LIVE_SLOTS]]
    for slot, rank in live.view(-1, LIVE_WORDS).tolist():
        yield slot, rank, (slots == slot).nonzero()[:, 0]


def _slices(slabs: LoraSlabs, site: LoraSite, slot: int, adapter_rank: int) -> Iterator[Slice]:
    """The modules of a site that the adapter in a slot has."""
    slab, stride = slabs.data[slot], round_up(adapter_rank, RANK_STEP)
    table = slab[site.table_offset : site.table_offset + TABLE_ENTRY * site.num_slices].clone()
    ranks, scales = table.view(torch.int32)[::2].tolist(), table.view(torch.float32)[1::2].tolist()
    for index, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        if rank:
            a = _matrix(slab, site, site.a_start(index), rank, site.in_features)
            b = _matrix(slab, site, site.b_offsets[index], site.out_features[index], stride)
            yield Slice(index, rank, scale, a.float(), b[:, :rank].float())


def _matrix(slab: Tensor, site: LoraSite, start: int, rows: int, columns: int) -> Tensor:
    dtype = _DTYPES[site.dtype]
    return slab[start : start + rows * columns * site.item_bytes].view(dtype).view(rows, columns)
