"""Causal attention over paged KV as Triton kernels. `layers.attention.triton` plans steps and calls the two launches.

Decoding: a program has one KV head of one sequence and a part ("split") of its tokens; the query heads of that KV head
are the rows of its products, so K and V are read once. The last split to finish merges what all of them found, always
in the order of the splits, so there is one launch and the same bits every time. Prefill: a program has a block of
queries of one sequence and one KV head, the group's query heads side by side in its rows, and goes over the keys as
flash attention does.

Launched early (`sgl_kernel.programmatic_launch`), decoding reads page table, slots and lengths before the kernel ahead
of it is done, and lets the next one read its weights meanwhile.

Invariants: sums are float32. Scores are kept times log2(e), so that exp2 serves. A token that a program must not see
is replaced by one that it may see before its row is read, and masked after: what other rows of the pool hold, be it
NaN, never enters a product. Counters are zero between launches; launches that share them follow each other on a stream.

Shape legend: T tokens of the step, B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dimension, N rows
of the KV pool, S splits.
"""

# Device functions are Triton's language, not Python's: no types to give, and no `and` of what is known when.
# ruff: noqa: ANN001, ANN202, SIM108
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang.srt.ops.launch import launches_early

_NEVER = tl.constexpr(-1.0e30)
"""Score of what is masked. Finite: what a row counted before it saw its first token is scaled by 0 afterwards."""
_LOG2_E = math.log2(math.e)
_OPTIONS = {"enable_fp_fusion": True}
_MERGE_VALUES = 8192
"""Partial outputs a program reads at once when it merges: 64 registers a thread with four warps."""
_PROGRAMS_PER_SM = 4
"""Decode programs that a multiprocessor should have, so that enough loads are on their way."""
_MAX_SPLITS = 64
_LONG_TOKENS = 2048
"""Tokens of a part when the device is full without parts."""
_MAX_LONG_SPLITS = 8
_ROOMY_BYTES = 160 << 10
"""Shared memory of a block from which on the larger prefill tiles fit: sm_80, sm_90, sm_100."""
BLOCK_FIELDS = 4
"""Fields of a block of queries, see `prefill`."""


class PagedKV(NamedTuple):
    """Where K and V of a layer are.

    Attributes:
        k, v: [N, Hkv, D], contiguous.
        pages: int32 [max_slots, max_pages]: token t of slot s is at row pages[s, t // page_size] * page_size +
            t % page_size.
        page_size: a power of two.
    """

    k: Tensor
    v: Tensor
    pages: Tensor
    page_size: int


class Decodes(NamedTuple):
    """Sequences with one new token.

    Attributes:
        slots: int64 [B], rows of the page table; kv_lens: int64 [B], tokens to attend to. Read when the kernel runs.
        places: int64 [size, 2], (index into slots and kv_lens, token row of the step) of each; None when all B are
            meant and sequence b has row b.
        size: how many there are.
    """

    slots: Tensor
    kv_lens: Tensor
    places: Tensor | None
    size: int


class Splits(NamedTuple):
    """How the tokens of a sequence are divided.

    Attributes:
        parts: at most so many, all of which have a program.
        min_tokens: a part has at least so many tokens; programs beyond the parts this leaves end at once.
    """

    parts: int
    min_tokens: int


class DecodeTiles(NamedTuple):
    """Block of keys, warps and pipeline stages of the decode kernel."""

    block_n: int
    num_warps: int
    num_stages: int


class PrefillTiles(NamedTuple):
    """Rows (queries x heads of a group), block of keys, warps and pipeline stages of the prefill kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def queries(self, group: int) -> int:
        """Queries of a program when a KV head has `group` query heads."""
        return self.block_m // group


def decode_tiles(head_dim: int, dtype: torch.dtype) -> DecodeTiles:
    """Tiles of the decode kernel for heads of `head_dim` values of `dtype`."""
    if dtype.itemsize > 2:
        return DecodeTiles(32, 4, 1)
    return DecodeTiles(64 if head_dim <= 128 else 32, 2, 2)


def prefill_tiles(head_dim: int, group: int, dtype: torch.dtype, device: torch.device) -> PrefillTiles:
    """Tiles of the prefill kernel for `group` query heads a KV head: what fits into the device's shared memory."""
    if dtype.itemsize > 2:
        # Such products take no matrix instructions, but registers for whole rows of both factors.
        tiles = PrefillTiles(32, 32, 4, 1) if head_dim <= 128 else PrefillTiles(16, 16, 4, 1)
    elif _shared_bytes(device) < _ROOMY_BYTES:
        tiles = PrefillTiles(64, 32, 4, 2)
    else:
        tiles = PrefillTiles(128, 64, 4, 3) if head_dim <= 128 else PrefillTiles(64, 64, 4, 2)
    return tiles._replace(block_m=max(tiles.block_m, int(triton.next_power_of_2(group))))


def choose_splits(count: int, num_kv_heads: int, longest: int, device: torch.device) -> Splits:
    """How to split `count` sequences of which none has more than `longest` tokens.

    Few of them: as many parts as give every multiprocessor some. Many: only long sequences, so that none runs on alone
    at the end; to merge parts costs a step of short ones more than it gains.
    """
    share = _PROGRAMS_PER_SM * _multiprocessors(device) // (count * num_kv_heads)
    if share >= 2:
        return Splits(min(1 << share.bit_length() - 1, _MAX_SPLITS), 64 if share >= 16 else 128)
    return Splits(min(_MAX_LONG_SPLITS, -(-longest // _LONG_TOKENS)), _LONG_TOKENS)


def decode(
    q: Tensor,
    out: Tensor,
    kv: PagedKV,
    decodes: Decodes,
    splits: Splits,
    counters: Tensor,
    scale: float,
    window: int | None = None,
    tiles: DecodeTiles | None = None,
) -> None:
    """Attention of sequences with one new token, whose K and V are in the pool already.

    Args:
        q: [T, Hq, D], the last two dimensions dense, rows of any stride.
        out: [T, Hq * D], contiguous; the rows of these sequences are written, zeros where kv_lens is 0.
        counters: int32 [>= decodes.size * Hkv], zeros, and zeros again when the kernel is done.
        scale: positive; scores are q k scale.
        window: tokens that a position sees, itself included; None for all before it.
    """
    (_, heads, dim), kv_heads = q.shape, kv.k.shape[1]
    group = heads // kv_heads
    tiles = tiles or decode_tiles(dim, q.dtype)
    partials, sums = None, None
    if splits.parts > 1:
        shape = (decodes.size, kv_heads, splits.parts)
        partials = torch.empty(*shape, group, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(*shape, 2, group, dtype=torch.float32, device=q.device)
        assert counters.numel() >= decodes.size * kv_heads, "more sequences than there are counters"
    padded_dim, padded_group = _padded(dim), triton.next_power_of_2(group)
    early = launches_early(q.device)
    _decode[kv_heads, decodes.size, splits.parts](
        q,
        q.stride(0),
        out,
        kv.k,
        kv.v,
        kv.pages,
        kv.pages.stride(0),
        decodes.slots,
        decodes.kv_lens,
        decodes.places,
        partials,
        sums,
        counters,
        scale * _LOG2_E,
        splits.parts,
        max(1, splits.min_tokens // tiles.block_n),
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        DIM=dim,
        PADDED_DIM=padded_dim,
        ROWS=max(16, padded_group),
        BLOCK_N=tiles.block_n,
        PAGE_BITS=_page_bits(kv.page_size),
        WINDOW=window or 0,
        CHUNK=max(1, min(32, _MERGE_VALUES // (padded_group * padded_dim))),
        EARLY=early,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **({"launch_pdl": True} if early else {}),
        **_OPTIONS,
    )


def prefill(
    q: Tensor,
    out: Tensor,
    kv: PagedKV,
    slots: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    tiles: PrefillTiles,
) -> None:
    """Attention of blocks of queries, whose K and V are in the pool already.

    Args:
        q, out, scale, window: see `decode`.
        slots: int64 [B].
        blocks: int64 [blocks, BLOCK_FIELDS]: index into slots, first row of the step, number of queries (at most
            `tiles.queries(G)`), position of the first in its sequence. The longest come first, so that the end of the
            launch is short work.
    """
    (_, heads, dim), kv_heads = q.shape, kv.k.shape[1]
    _prefill[kv_heads, blocks.shape[0]](
        q,
        q.stride(0),
        out,
        kv.k,
        kv.v,
        kv.pages,
        kv.pages.stride(0),
        slots,
        blocks,
        scale * _LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        PADDED_DIM=_padded(dim),
        ROWS=tiles.block_m,
        BLOCK_N=tiles.block_n,
        PAGE_BITS=_page_bits(kv.page_size),
        WINDOW=window or 0,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_OPTIONS,
    )


def _padded(dim: int) -> int:
    """Width of the tiles: what is beyond the head dimension is not loaded and counts as 0."""
    return int(max(16, triton.next_power_of_2(dim)))


def _page_bits(page_size: int) -> int:
    bits = page_size.bit_length() - 1
    assert page_size == 1 << bits, page_size
    return bits


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _shared_bytes(device: torch.device) -> int:
    """What a block may have; what the smallest GPUs have where torch does not say."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return int(getattr(properties, "shared_memory_per_block_optin", 64 << 10))


@triton.jit(
    do_not_specialize=["pages_stride", "max_splits", "min_blocks"],
    do_not_specialize_on_alignment=["slots", "kv_lens", "places"],
)
def _decode(
    q,
    q_stride,
    out,
    k_pool,
    v_pool,
    pages,
    pages_stride,
    slots,
    kv_lens,
    places,
    partials,
    sums,
    counters,
    scale,
    max_splits,
    min_blocks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: KV heads, sequences, splits. Heads of the same tokens are neighbours; splits that may be empty, last."""
    if EARLY:
        gdc_launch_dependents()
    head, member, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, row = member, member
    if places is not None:
        sequence, row = tl.load(places + 2 * member), tl.load(places + 2 * member + 1)
    end = tl.load(kv_lens + sequence).to(tl.int32)
    slot = tl.load(slots + sequence).to(tl.int64)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(end - WINDOW, 0)
    low_block = first // BLOCK_N
    num_blocks = (end + BLOCK_N - 1) // BLOCK_N - low_block
    splits = tl.minimum(tl.maximum(num_blocks // min_blocks, 1), max_splits)
    if EARLY:  # q, k and v of the new token; all that was read before comes with the step
        gdc_wait()
    if split >= splits:
        return

    lanes, columns = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    inside = (lanes < GROUP)[:, None] & (columns < DIM)[None, :]
    place = (head * GROUP + lanes)[:, None] * DIM + columns[None, :]
    q_tile = tl.load(q + row.to(tl.int64) * q_stride + place, mask=inside, other=0.0)
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    top = tl.full((ROWS,), _NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc, top, total = _attend(
        q_tile,
        acc,
        top,
        total,
        k_pool + head * DIM,
        v_pool + head * DIM,
        pages + slot * pages_stride,
        low_block + num_blocks * split // splits,
        low_block + num_blocks * (split + 1) // splits,
        first,
        end,
        tl.full((ROWS,), end - 1, tl.int32),
        scale,
        KV_HEADS * DIM,
        DIM,
        BLOCK_N,
        PAGE_BITS,
        WINDOW,
        True,
    )

    out_row = out + row.to(tl.int64) * (KV_HEADS * GROUP * DIM)
    if splits == 1:
        _store(out_row + place, acc, total[:, None], inside)
    elif partials is not None:
        pair = member.to(tl.int64) * KV_HEADS + head
        pair_partials = partials + pair * max_splits * (GROUP * DIM)
        pair_sums = sums + pair * max_splits * (2 * GROUP)
        own = pair_partials + split * (GROUP * DIM) + lanes[:, None] * DIM + columns[None, :]
        own_sums = pair_sums + split * (2 * GROUP) + lanes
        tl.store(own, acc, mask=inside)
        tl.store(own_sums, top, mask=lanes < GROUP)
        tl.store(own_sums + GROUP, total, mask=lanes < GROUP)
        # All threads have stored before one of them releases it; the one that acquires speaks for all of its block.
        tl.debug_barrier()
        finished = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if finished == splits - 1:
            tl.store(counters + pair, 0)
            head_out = out_row + head * (GROUP * DIM)
            _merge(head_out, pair_partials, pair_sums, splits, GROUP, PADDED_GROUP, DIM, PADDED_DIM, CHUNK)


@triton.jit
def _merge(
    target,
    partials,
    sums,
    splits,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the splits of one KV head of one sequence, CHUNK at a time. Other multiprocessors wrote: not from L1."""
    lanes, columns = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    place = lanes[:, None] * DIM + columns[None, :]
    inside = (lanes < GROUP)[:, None] & (columns < DIM)[None, :]
    acc = tl.zeros((PADDED_GROUP, PADDED_DIM), tl.float32)
    top = tl.full((PADDED_GROUP,), _NEVER, tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    for start in range(0, splits, CHUNK):
        parts = start + tl.arange(0, CHUNK)
        present = (parts < splits)[:, None] & (lanes < GROUP)[None, :]
        entry = sums + parts[:, None] * (2 * GROUP) + lanes[None, :]
        tops = tl.load(entry, mask=present, other=_NEVER, cache_modifier=".cg")
        totals = tl.load(entry + GROUP, mask=present, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partials + parts[:, None, None] * (GROUP * DIM) + place[None, :, :],
            mask=(parts < splits)[:, None, None] & inside[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new[None, :])
        before = tl.exp2(top - new)
        total = total * before + tl.sum(totals * weights, 0)
        acc = acc * before[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new
    _store(target + place, acc, total[:, None], inside)


@triton.jit(do_not_specialize=["pages_stride"], do_not_specialize_on_alignment=["slots", "blocks"])
def _prefill(
    q,
    q_stride,
    out,
    k_pool,
    v_pool,
    pages,
    pages_stride,
    slots,
    blocks,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Grid: KV heads, blocks of queries."""
    head = tl.program_id(0)
    block = blocks + 4 * tl.program_id(1)
    slot = tl.load(slots + tl.load(block))
    row = tl.load(block + 1)
    count, position = tl.load(block + 2).to(tl.int32), tl.load(block + 3).to(tl.int32)
    # Lanes without a query repeat the last one, so that there is nothing to mask but the store.
    lanes, columns = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    query = tl.minimum(lanes // GROUP, count - 1)
    column_inside = (columns < DIM)[None, :]
    place = (head * GROUP + lanes % GROUP)[:, None] * DIM + columns[None, :]
    q_tile = tl.load(q + ((row + query) * q_stride)[:, None] + place, mask=column_inside, other=0.0)

    end, limit = position + count, position + query
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    # Blocks of keys: those at the window's edge, those that every query sees in full, those at the diagonal.
    low, high = first // BLOCK_N, (end + BLOCK_N - 1) // BLOCK_N
    full, diagonal = low, (position + 1) // BLOCK_N
    if WINDOW > 0:
        full = tl.minimum((tl.maximum(end - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N, high)
        diagonal = tl.maximum(diagonal, full)
    k_pool += head * DIM
    v_pool += head * DIM
    row_pages = pages + slot * pages_stride
    ROW: tl.constexpr = KV_HEADS * DIM
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    top = tl.full((ROWS,), _NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if WINDOW > 0:
        acc, top, total = _attend(
            q_tile, acc, top, total, k_pool, v_pool, row_pages, low, full, first, end, limit, scale,
            ROW, DIM, BLOCK_N, PAGE_BITS, WINDOW, True,
        )  # fmt: skip
    acc, top, total = _attend(
        q_tile, acc, top, total, k_pool, v_pool, row_pages, full, diagonal, first, end, limit, scale,
        ROW, DIM, BLOCK_N, PAGE_BITS, WINDOW, False,
    )  # fmt: skip
    acc, top, total = _attend(
        q_tile, acc, top, total, k_pool, v_pool, row_pages, diagonal, high, first, end, limit, scale,
        ROW, DIM, BLOCK_N, PAGE_BITS, WINDOW, True,
    )  # fmt: skip
    target = out + ((row + query) * (KV_HEADS * GROUP * DIM))[:, None] + place
    _store(target, acc, total[:, None], (lanes < count * GROUP)[:, None] & column_inside)


@triton.jit
def _attend(
    q_tile,
    acc,
    top,
    total,
    k_pool,
    v_pool,
    row_pages,
    begin,
    stop,
    first,
    end,
    limit,
    scale,
    ROW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go on with the blocks of keys [begin, stop).

    Args:
        q_tile: [ROWS, D]; acc: float32 [ROWS, D], sum of p v; top, total: float32 [ROWS], greatest score and sum of p.
        k_pool, v_pool: pointers to the head's values of row 0; ROW values further are those of row 1.
        row_pages: pointer to the slot's pages.
        first, end: tokens that some query of the program sees; every block has one of them.
        limit: int32 [ROWS], the last token that each row sees.
        MASKED: whether some row does not see some token of these blocks.

    Returns:
        acc, top, total
    """
    columns = tl.arange(0, q_tile.shape[1])[None, :]
    for block in range(begin, stop):
        rows = _pool_rows(row_pages, block, first, end, BLOCK_N, PAGE_BITS, MASKED)
        place = (rows.to(tl.int64) * ROW)[:, None] + columns
        keys = _load(k_pool + place, columns, DIM).to(q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(keys), input_precision="ieee")
        if MASKED:
            tokens = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            seen = tokens <= limit[:, None]
            if WINDOW > 0:
                seen = seen & (tokens > limit[:, None] - WINDOW)
            # Masked after the scale: of _NEVER * scale - new, rounded once, there would be a rest of 1e22 to exp2.
            scores = tl.where(seen, scores * scale, _NEVER)
            new = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new[:, None])
        else:
            new = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new[:, None])
        before = tl.exp2(top - new)
        total = total * before + tl.sum(weights, 1)
        acc = acc * before[:, None]
        values = _load(v_pool + place, columns, DIM).to(q_tile.dtype)
        acc = tl.dot(weights.to(q_tile.dtype), values, acc, input_precision="ieee")
        top = new
    return acc, top, total


@triton.jit
def _pool_rows(row_pages, block, first, end, BLOCK_N: tl.constexpr, PAGE_BITS: tl.constexpr, CLAMPED: tl.constexpr):
    """Rows of the pool of a block of tokens, int32 [BLOCK_N]. CLAMPED: with one of [first, end) in place of others."""
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if CLAMPED:
        tokens = tl.minimum(tl.maximum(tokens, first), end - 1)
    PAGE: tl.constexpr = 1 << PAGE_BITS
    if PAGE == 1:
        rows = tl.load(row_pages + tokens)
    elif PAGE % BLOCK_N == 0:  # a block lies within a page
        rows = (tl.load(row_pages + (block * BLOCK_N >> PAGE_BITS)) << PAGE_BITS) + (tokens & (PAGE - 1))
    else:
        rows = (tl.load(row_pages + (tokens >> PAGE_BITS)) << PAGE_BITS) + (tokens & (PAGE - 1))
    return rows


@triton.jit
def _load(pointers, columns, DIM: tl.constexpr):
    """A tile; 0 in the columns that heads do not have."""
    if columns.shape[1] == DIM:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=columns < DIM, other=0.0)
    return tile


@triton.jit
def _store(target, acc, total, inside):
    """acc / total, 0 where nothing was counted."""
    result = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(target, result.to(target.dtype.element_ty), mask=inside)
