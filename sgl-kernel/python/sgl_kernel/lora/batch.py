"""Which adapter each token row of a step has, as the one int32 buffer that kernels read.

Called once a step by whoever schedules it; `types.LoraBatch` brings the words to the device. Imports numpy alone.
Invariants: the offsets of a `BatchShape` never change, so a CUDA graph can keep them; rows of one slot stay in their
order; every token row is in exactly one tile. A tile and a live slot carry the adapter's rank, so that a kernel knows
where the factors' rows lie, and can ask for them, before it has read anything of the slab.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sgl_kernel.lora.layout import MAX_RANK, round_up

HEADER_WORDS = 8
LORA_TILES, TILES, TOKENS, LIVE_SLOTS, TILE_TOKENS = range(5)
"""Words of the header."""
TILE_WORDS = 4
"""start in perm, count, slot, rank of the adapter in the slot: one vector of 16 bytes."""
LIVE_WORDS = 2
"""slot, rank."""
TILE_SIZES = (16, 64)
MAX_SLOTS = 65534
"""Slots are sorted as uint16, and the base model is 65535."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Capacities of a batch, and where its parts start, in words of the buffer.

    Attributes:
        max_tokens: token rows that a step may have.
        num_slots: adapters that the device holds.
        tile_tokens: token rows of a tile, 16 for decoding and 64 for prompts.
        perm, token_slot, tiles, live: where the parts start; tiles at a multiple of 4 words and live at one of 2, so
            that in a buffer that is aligned to 16 bytes an entry of either is one vector.
        max_tiles: the most tiles that any batch can have: every slot and the base model can leave one partial tile.
        words: size of the buffer.

    Raises:
        ValueError: a capacity is out of range.
    """

    max_tokens: int
    num_slots: int
    tile_tokens: int
    perm: int = field(init=False, repr=False)
    token_slot: int = field(init=False, repr=False)
    tiles: int = field(init=False, repr=False)
    live: int = field(init=False, repr=False)
    max_tiles: int = field(init=False, repr=False)
    words: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 1 <= self.num_slots <= MAX_SLOTS:
            raise ValueError(f"num_slots is {self.num_slots}; it must be 1 to {MAX_SLOTS}")
        if self.tile_tokens not in TILE_SIZES:
            raise ValueError(f"tile_tokens is {self.tile_tokens}; it must be one of {TILE_SIZES}")
        runs = min(self.num_slots + 1, self.max_tokens)
        max_tiles = (self.max_tokens + runs * (self.tile_tokens - 1)) // self.tile_tokens
        token_slot = HEADER_WORDS + self.max_tokens
        tiles = round_up(token_slot + self.max_tokens, TILE_WORDS)
        live = tiles + TILE_WORDS * max_tiles
        for name, value in (
            ("perm", HEADER_WORDS),
            ("token_slot", token_slot),
            ("tiles", tiles),
            ("live", live),
            ("max_tiles", max_tiles),
            ("words", live + LIVE_WORDS * self.num_slots),
        ):
            object.__setattr__(self, name, value)


def build_batch(
    token_slots: NDArray[np.int32],
    ranks: NDArray[np.int32],
    shape: BatchShape,
    out: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """The buffer of one step.

    Args:
        token_slots: int32 [tokens], the slot of every token row, -1 for the base model.
        ranks: int32 [num_slots], the rank of the adapter in every slot, 0 for an empty one: `LoraSlabs.ranks`.
        shape: capacities.
        out: int32 [shape.words] to fill, e.g. a pinned buffer; None makes one.

    Returns:
        `out`. Words that no count covers are 0, except that slots which are not there are -1: in `token_slot`, from
        `tokens` up to the first tile, and in `live`.

    Raises:
        ValueError: more tokens than `max_tokens`, a slot that is not -1 to num_slots - 1, a rank that is not 0 to 256,
            or an unfit `out`.
    """
    tokens = len(token_slots)
    shifted = _check(token_slots, ranks, shape)
    if out is None:
        out = np.zeros(shape.words, np.int32)
    elif out.shape != (shape.words,) or out.dtype != np.int32:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; it must be int32 [{shape.words}]")
    else:
        out.fill(0)
    # counts[0] is the base model's; as uint16 it sorts last, and numpy sorts 16-bit integers by radix.
    counts = np.bincount(shifted, minlength=shape.num_slots + 1)
    live = counts[1:].nonzero()[0]
    out[shape.perm : shape.perm + tokens] = token_slots.astype(np.uint16).argsort(kind="stable")
    out[shape.token_slot : shape.token_slot + tokens] = token_slots
    out[shape.token_slot + tokens : shape.tiles] = -1
    pairs = out[shape.live :].reshape(shape.num_slots, LIVE_WORDS)
    pairs[: len(live), 0] = live
    pairs[: len(live), 1] = ranks[live]
    pairs[len(live) :, 0] = -1
    lora_tiles, tiles = _write_tiles(out, shape, counts, live, pairs)
    out[:5] = (lora_tiles, tiles, tokens, len(live), shape.tile_tokens)
    return out


def _write_tiles(
    out: NDArray[np.int32],
    shape: BatchShape,
    counts: NDArray[np.intp],
    live: NDArray[np.intp],
    pairs: NDArray[np.int32],
) -> tuple[int, int]:
    """Cut the run of every live slot, and of the base model, into tiles; (tiles of slots, all tiles)."""
    size, runs = shape.tile_tokens, len(live)
    lengths = np.empty(runs + 1, np.intp)
    lengths[:runs], lengths[runs] = counts[1:][live], counts[0]
    owners = np.empty((runs + 1, LIVE_WORDS), np.int32)
    owners[:runs], owners[runs] = pairs[:runs], (-1, 0)
    ends = lengths.cumsum()
    tiles_of = (lengths + (size - 1)) >> (size.bit_length() - 1)  # sizes are powers of two
    last_tiles = tiles_of.cumsum()
    total = int(last_tiles[runs])
    if total:
        run = np.arange(runs + 1).repeat(tiles_of)
        # A tile's start, if every earlier run filled its tiles, less what they left empty.
        starts = np.arange(0, total * size, size) - ((last_tiles - tiles_of) * size - ends + lengths)[run]
        parts = out[shape.tiles : shape.tiles + TILE_WORDS * total].reshape(total, TILE_WORDS)
        parts[:, 0] = starts
        parts[:, 1] = np.minimum(ends[run] - starts, size)
        parts[:, 2:] = owners.take(run, axis=0)
    return total - int(tiles_of[runs]), total


def _check(token_slots: NDArray[np.int32], ranks: NDArray[np.int32], shape: BatchShape) -> NDArray[np.int32]:
    """Every slot plus 1."""
    if token_slots.dtype != np.int32 or token_slots.ndim != 1:
        raise ValueError(f"token_slots is {token_slots.dtype} {list(token_slots.shape)}; it must be int32 [tokens]")
    if len(token_slots) > shape.max_tokens:
        raise ValueError(f"{len(token_slots)} tokens, room for {shape.max_tokens}; raise max_tokens or split the step")
    shifted: NDArray[np.int32] = token_slots + np.int32(1)
    # As unsigned numbers negative ones are large: one pass finds both kinds. This reduction is half as long as `max`.
    if np.maximum.reduce(shifted.view(np.uint32), initial=0) > shape.num_slots:
        slot = token_slots[shifted.view(np.uint32).argmax()]
        raise ValueError(f"slot {slot} does not exist; slots are 0 to {shape.num_slots - 1}, -1 is the base")
    if ranks.dtype != np.int32 or ranks.shape != (shape.num_slots,):
        raise ValueError(
            f"ranks are {ranks.dtype} {list(ranks.shape)}; they must be int32 [{shape.num_slots}], one for every slot"
        )
    if np.maximum.reduce(ranks.view(np.uint32)) > MAX_RANK:
        slot = ranks.view(np.uint32).argmax()
        raise ValueError(f"slot {slot} has rank {ranks[slot]}; it must be 0 to {MAX_RANK}, as in LoraSlabs.ranks")
    return shifted
