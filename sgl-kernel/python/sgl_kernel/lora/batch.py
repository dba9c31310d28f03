"""Which adapter each token row of a step has, as the one int32 buffer that kernels read.

Called once a step by whoever schedules it; `types.LoraBatch` brings the words to the device. Imports numpy alone.
Invariants: the offsets of a `BatchShape` never change, so a CUDA graph can keep them; rows of one slot stay in their
order; every token row is in exactly one tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

HEADER_WORDS = 8
LORA_TILES, TILES, TOKENS, LIVE_SLOTS, TILE_TOKENS = range(5)
"""Words of the header."""
TILE_WORDS = 4
"""start in perm, count, slot, 0."""
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
        perm, token_slot, tiles, live: where the parts start.
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
        tiles = token_slot + self.max_tokens
        live = tiles + TILE_WORDS * max_tiles
        for name, value in (
            ("perm", HEADER_WORDS),
            ("token_slot", token_slot),
            ("tiles", tiles),
            ("live", live),
            ("max_tiles", max_tiles),
            ("words", live + self.num_slots),
        ):
            object.__setattr__(self, name, value)


def build_batch(
    token_slots: NDArray[np.int32], shape: BatchShape, out: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """The buffer of one step.

    Args:
        token_slots: int32 [tokens], the slot of every token row, -1 for the base model.
        shape: capacities.
        out: int32 [shape.words] to fill, e.g. a pinned buffer; None makes one.

    Returns:
        `out`. Words that no count covers are 0, except that `token_slot` is -1 from `tokens` on.

    Raises:
        ValueError: more tokens than `max_tokens`, a slot that is not -1 to num_slots - 1, or an unfit `out`.
    """
    tokens = len(token_slots)
    _check(token_slots, shape)
    if out is None:
        out = np.zeros(shape.words, np.int32)
    elif out.shape != (shape.words,) or out.dtype != np.int32:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; it must be int32 [{shape.words}]")
    else:
        out.fill(0)
    # counts[0] is the base model's; as uint16 it sorts last, and numpy sorts 16-bit integers by radix.
    counts = np.bincount(token_slots + 1, minlength=shape.num_slots + 1)
    live = counts[1:].nonzero()[0]
    out[shape.perm : shape.perm + tokens] = token_slots.astype(np.uint16).argsort(kind="stable")
    out[shape.token_slot : shape.token_slot + tokens] = token_slots
    out[shape.token_slot + tokens : shape.tiles] = -1
    out[shape.live : shape.live + len(live)] = live
    lora_tiles, tiles = _write_tiles(out, shape, counts, live)
    out[:5] = (lora_tiles, tiles, tokens, len(live), shape.tile_tokens)
    return out


def _write_tiles(
    out: NDArray[np.int32], shape: BatchShape, counts: NDArray[np.intp], live: NDArray[np.intp]
) -> tuple[int, int]:
    """Cut the run of every live slot, and of the base model, into tiles; (tiles of slots, all tiles)."""
    size = shape.tile_tokens
    slots = np.append(live, -1)
    lengths = counts[slots + 1]
    ends = lengths.cumsum()
    tiles_of = (lengths + (size - 1)) // size
    last_tiles = tiles_of.cumsum()
    total = int(last_tiles[-1])
    if total:
        run = np.arange(len(slots)).repeat(tiles_of)
        # A tile's start, if every earlier run filled its tiles, less what they left empty.
        starts = np.arange(0, total * size, size) - (last_tiles * size - tiles_of * size - ends + lengths)[run]
        parts = out[shape.tiles : shape.tiles + TILE_WORDS * total].reshape(total, TILE_WORDS)
        parts[:, 0] = starts
        parts[:, 1] = np.minimum(ends[run] - starts, size)
        parts[:, 2] = slots[run]
    return total - int(tiles_of[-1]), total


def _check(token_slots: NDArray[np.int32], shape: BatchShape) -> None:
    if token_slots.dtype != np.int32 or token_slots.ndim != 1:
        raise ValueError(f"token_slots is {token_slots.dtype} {list(token_slots.shape)}; it must be int32 [tokens]")
    if len(token_slots) > shape.max_tokens:
        raise ValueError(f"{len(token_slots)} tokens, room for {shape.max_tokens}; raise max_tokens or split the step")
    if len(token_slots):
        low, high = int(token_slots.min()), int(token_slots.max())
        if low < -1 or high >= shape.num_slots:
            raise ValueError(
                f"slot {low if low < -1 else high} does not exist; slots are 0 to {shape.num_slots - 1}, -1 is the base"
            )
