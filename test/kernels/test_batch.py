"""The batch buffer: every row in one tile of its own slot, in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kernel.lora.batch import BatchShape, build_batch


def _expected(slots: list[int], ranks: list[int], shape: BatchShape) -> list[int]:
    """README.md, by loops."""
    order: list[int] = []
    tiles: list[list[int]] = []
    lora_tiles = 0
    live = sorted(set(slots) - {-1})
    for slot in [*live, -1]:
        rows = [t for t, s in enumerate(slots) if s == slot]
        for first in range(0, len(rows), shape.tile_tokens):
            tiles.append(
                [len(order) + first, min(shape.tile_tokens, len(rows) - first), slot, ranks[slot] if slot >= 0 else 0]
            )
            lora_tiles += slot >= 0
        order += rows
    assert len(tiles) <= shape.max_tiles
    header = [lora_tiles, len(tiles), len(slots), len(live), shape.tile_tokens, 0, 0, 0]
    empty, padding = shape.max_tokens - len(slots), -2 * shape.max_tokens % 4
    flat = [word for tile in tiles for word in tile]
    return [
        *header,
        *order,
        *[0] * empty,
        *slots,
        *[-1] * (empty + padding),
        *flat,
        *[0] * (4 * shape.max_tiles - len(flat)),
        *[word for slot in live for word in (slot, ranks[slot])],
        *[-1, 0] * (shape.num_slots - len(live)),
    ]


def _build(slots: list[int], ranks: list[int], shape: BatchShape, out: np.ndarray | None = None) -> np.ndarray:
    return build_batch(np.array(slots, np.int32), np.array(ranks, np.int32), shape, out)


@st.composite
def _batches(draw):
    shape = BatchShape(draw(st.integers(1, 150)), draw(st.integers(1, 6)), draw(st.sampled_from([16, 64])))
    # A run of one slot, as in prompts, and rows of any, as in decoding.
    run = st.tuples(st.integers(-1, shape.num_slots - 1), st.sampled_from([1, 1, 1, 15, 16, 17, 40, 65]))
    slots = [slot for slot, length in draw(st.lists(run, max_size=20)) for _ in range(length)]
    ranks = draw(st.lists(st.integers(0, 256), min_size=shape.num_slots, max_size=shape.num_slots))
    return shape, ranks, slots[: shape.max_tokens]


@settings(max_examples=150, deadline=None)
@given(_batches())
def test_words_are_those_of_the_table(batch):
    shape, ranks, slots = batch
    words = _build(slots, ranks, shape)
    assert words.dtype == np.int32 and words.tolist() == _expected(slots, ranks, shape)


@pytest.mark.parametrize("max_tokens", [20, 21])
def test_a_used_buffer_is_written_anew(max_tokens):
    shape = BatchShape(max_tokens, 4, 16)
    out = np.full(shape.words, 77, np.int32)
    slots, ranks = [2, -1, 0, 2, 1], [8, 3, 256, 5]
    assert _build(slots, ranks, shape, out) is out
    assert out.tolist() == _expected(slots, ranks, shape)


@pytest.mark.parametrize(("max_tokens", "tiles"), [(100, 208), (101, 212)])
def test_offsets(max_tokens, tiles):
    shape = BatchShape(max_tokens, 5, 16)
    assert (shape.perm, shape.token_slot, shape.tiles) == (8, 8 + max_tokens, tiles)
    assert shape.live == tiles + 4 * shape.max_tiles and shape.words == shape.live + 2 * 5


@given(st.integers(1, 10000), st.integers(1, 300), st.sampled_from([16, 64]))
def test_tiles_and_live_slots_are_vectors(max_tokens, num_slots, tile):
    """A tile can be read as 16 bytes, and a live slot as 8, and neither is part of what lies before it."""
    shape = BatchShape(max_tokens, num_slots, tile)
    assert shape.tiles % 4 == 0 and shape.live % 2 == 0
    assert 0 <= shape.tiles - (shape.token_slot + max_tokens) < 4
    assert shape.live - shape.tiles == 4 * shape.max_tiles and shape.words - shape.live == 2 * num_slots


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("num_slots", [1, 3, 40])
def test_max_tiles_is_reached_and_no_more(tile, num_slots):
    for tokens in (1, 2, 17, 30, 100):
        shape = BatchShape(tokens, num_slots, tile)
        # Runs of one row, and whatever is left in the last: nothing makes more partial tiles.
        slots = (list(range(-1, num_slots)) + [0] * tokens)[:tokens]
        assert _build(slots, [8] * num_slots, shape)[1] == shape.max_tiles


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ([0, 3], "slot 3 does not exist; slots are 0 to 2"),
        ([-2], "slot -2 does not exist"),
        ([0, -(2**31), 2], "slot -2147483648 does not exist"),
        ([2**31 - 1], "slot 2147483647 does not exist"),
        ([0] * 9, "9 tokens, room for 8"),
        ([[0]], r"int32 \[1, 1\]"),
        (np.zeros(2, np.int64), "int64"),
    ],
)
def test_errors_say_the_value(slots, text):
    array = slots if isinstance(slots, np.ndarray) else np.array(slots, np.int32)
    with pytest.raises(ValueError, match=text):
        build_batch(array, np.zeros(3, np.int32), BatchShape(8, 3, 16))


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([8, 257, 0], "slot 1 has rank 257; it must be 0 to 256"),
        ([0, 3, -1], "slot 2 has rank -1"),
        ([8, 8], r"ranks are int32 \[2\]; they must be int32 \[3\]"),
        ([[8, 8, 8]], r"int32 \[1, 3\]"),
        (np.zeros(3, np.int64), r"ranks are int64 \[3\]"),
    ],
)
def test_ranks_are_checked(ranks, text):
    array = ranks if isinstance(ranks, np.ndarray) else np.array(ranks, np.int32)
    with pytest.raises(ValueError, match=text):
        build_batch(np.zeros(1, np.int32), array, BatchShape(8, 3, 16))


@pytest.mark.parametrize(("args", "text"), [((0, 1, 16), "max_tokens"), ((1, 0, 16), "num_slots"), ((1, 1, 32), "32")])
def test_shapes_are_checked(args, text):
    with pytest.raises(ValueError, match=text):
        BatchShape(*args)


def test_out_must_fit():
    shape = BatchShape(8, 3, 16)
    with pytest.raises(ValueError, match=r"out is int32 \[3\]"):
        build_batch(np.zeros(1, np.int32), np.zeros(3, np.int32), shape, np.zeros(3, np.int32))
