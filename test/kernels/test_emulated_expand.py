"""Segmented expand, as both vendors' lanes compute it, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from kernels.emulator import VENDORS, Gpu
from kernels.emulator.adapters import Adapters, Ranks, lora_tiles, make_batch
from kernels.emulator.numbers import NAN, Bits, Floats, assert_rounded_once, padded, random_bf16, to_float
from kernels.test_emulated_shrink import shrink

pytestmark = pytest.mark.parametrize("vendor", VENDORS)

NEGATIVE_ZERO = 0x8000


def expand(
    gpu: Gpu,
    y: Bits,
    u: Bits,
    adapters: Adapters,
    slots: Sequence[int],
    tile: int = 16,
    seed: int = 0,
    slot_stride: int = 0,
    spare_tiles: int = 0,
    held: int = 0,
) -> Bits:
    """y with the low-rank term of every row added; rows behind those of `slots` belong to nobody."""
    n = y.shape[1]
    num_slots = 1 + max(*adapters.ranks, *slots, 0)
    batch, _ = make_batch(gpu, slots, adapters.ranks, num_slots, tile, len(slots) + 3 + tile * spare_tiles)
    out = gpu.array("y", padded(y, n + 8), "output")
    args = gpu.args("ExpandArgs", y=out, y_stride=n + 8)
    args.delta.site, args.delta.batch = adapters.site, batch
    args.delta.u = gpu.array("u", padded(u, u.shape[1] + 8), "input").ctypes.data
    args.delta.u_stride, args.delta.u_slot_stride = u.shape[1] + 8, slot_stride
    blocks = sum(gpu.geometry("expand_blocks", gpu.warp, rows) for rows in adapters.out_features)
    grid = (blocks, max(1, lora_tiles(slots, tile) + spare_tiles))
    kernel = f"lora_expand_add_{held or (16 if adapters.rank_cap <= 16 else 64)}"
    gpu.launch(kernel, args, grid, gpu.geometry("expand_threads", gpu.warp), 0, seed=seed)
    assert (out[:, n:] == NAN).all()
    return out[:, :n]


def random_u(rng: np.random.Generator, adapters: Adapters, slots: Sequence[int], num_slots: int = 0) -> Bits:
    """NaN but for the columns that count; `num_slots` many side by side, or one of each row's own slot."""
    width = len(adapters.out_features) * adapters.rank_cap
    u = np.full((len(slots), width * max(num_slots, 1)), NAN, np.uint16)
    for row, slot in enumerate(slots):
        for index, rank in enumerate(adapters.ranks.get(slot, ())):
            start = (slot * width if num_slots else 0) + index * adapters.rank_cap
            u[row, start : start + rank] = random_bf16(rng, rank)
    return u


def term(u: Floats, adapters: Adapters, slot: int) -> tuple[Floats, Floats]:
    """scale * B u of a row and the same of absolute values; u begins with the columns of this slot."""
    sums = []
    for index, rank in enumerate(adapters.ranks[slot]):
        _, b, scale = adapters.part(slot, index)
        own = u[index * adapters.rank_cap :][:rank]
        sums.append((scale * (b @ own), scale * (np.abs(b) @ np.abs(own))))
    return tuple(np.concatenate(part) for part in zip(*sums, strict=True))


def assert_expanded(
    actual: Bits, y: Bits, u: Bits, adapters: Adapters, slots: Sequence[int], slot_stride: int = 0
) -> None:
    """Rounded once where a module is; every bit kept elsewhere, which is why y must have no such module's columns."""
    for row in range(len(y)):
        slot = slots[row] if row < len(slots) else -1
        if slot not in adapters.ranks:
            assert (actual[row] == y[row]).all()
            continue
        added, magnitude = term(to_float(u[row])[slot * slot_stride :], adapters, slot)
        before = to_float(y[row])
        present = np.repeat(np.array(adapters.ranks[slot]) > 0, adapters.out_features)
        assert (actual[row, ~present] == y[row, ~present]).all()
        exact, size = (before + added)[present], (np.abs(before) + magnitude)[present]
        assert_rounded_once(actual[row, present], exact, size)


def starting_y(rng: np.random.Generator, rows: int, adapters: Adapters) -> Bits:
    y = random_bf16(rng, rows, sum(adapters.out_features))
    y[:, ::5] = NEGATIVE_ZERO
    return y


CASES: dict[str, tuple[Ranks, Sequence[int], Sequence[int]]] = {
    **{f"rank {r}": ({0: (r,)}, (136,), [0, -1, 0]) for r in (1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 128, 255, 256)},
    "mixed": ({0: (1,), 2: (64,), 3: (17,)}, (264,), [3, 0, -1, 2, 2, 0, 3, -1, 2]),
    "three slices": ({0: (3, 16, 1), 1: (64, 8, 40)}, (136, 8, 24), [1, 0, -1, 0]),
    "modules missing": ({0: (0, 8, 0), 1: (3, 0, 0), 2: (0, 0, 7), 3: (0, 0, 0)}, (8, 128, 16), [0, 1, 2, 3, 2, -1]),
    "one slot has nearly all": ({0: (8,), 1: (17,), 2: (3,)}, (8,), [1, *[0] * 70, 2]),
    "all different": ({slot: (1 + 7 * slot,) for slot in range(9)}, (40,), list(range(8, -1, -1))),
    "nobody": ({0: (8,)}, (8,), [-1, -1]),
}


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("case", CASES)
def test_expand(vendor: str, tile: int, case: str) -> None:
    ranks, out_features, slots = CASES[case]
    gpu, rng = Gpu(vendor), np.random.default_rng(11)
    adapters = Adapters(gpu, 8, out_features, ranks, 1 + max(*ranks, *slots, 0))
    y, u = starting_y(rng, len(slots) + 3, adapters), random_u(rng, adapters, slots)
    assert_expanded(expand(gpu, y, u, adapters, slots, tile, seed=tile), y, u, adapters, slots)


@pytest.mark.parametrize("tile", [16, 64])
def test_u_of_every_slot_side_by_side(vendor: str, tile: int) -> None:
    gpu, rng, slots = Gpu(vendor, side="start"), np.random.default_rng(12), [2, 0, -1, 2, 1]
    adapters = Adapters(gpu, 8, (24, 8), {0: (5, 8), 1: (0, 3), 2: (17, 1)}, 3)
    stride = 2 * adapters.rank_cap
    y, u = starting_y(rng, 5, adapters), random_u(rng, adapters, slots, 3)
    actual = expand(gpu, y, u, adapters, slots, tile, slot_stride=stride)
    assert_expanded(actual, y, u, adapters, slots, stride)


@pytest.mark.parametrize("tile", [16, 64])
def test_a_row_has_the_same_bits_alone_in_a_crowd_and_permuted(vendor: str, tile: int) -> None:
    rng, slots = np.random.default_rng(13), [0, 1, -1, *[1] * 20, 0]

    def fresh() -> tuple[Gpu, Adapters]:
        gpu = Gpu(vendor)
        return gpu, Adapters(gpu, 8, (136, 16), {0: (3, 40), 1: (64, 100)}, 2)

    _, adapters = fresh()
    y, u = starting_y(rng, len(slots), adapters), random_u(rng, adapters, slots)

    def run(order: Sequence[int], seed: int) -> Bits:
        gpu, again = fresh()
        return expand(gpu, y[order], u[order], again, [slots[i] for i in order], tile, seed)

    everyone = list(range(len(slots)))
    whole = run(everyone, 0)
    for seed, order in enumerate((everyone, everyone[::-1], [0], [1], [2], [22], [5, 2, 23]), 1):
        assert (run(order, seed) == whole[order]).all()


def test_blocks_beyond_the_live_tiles_do_nothing(vendor: str) -> None:
    gpu, rng, slots = Gpu(vendor), np.random.default_rng(14), [0, 2, -1]
    adapters = Adapters(gpu, 8, (8,), {0: (4,), 2: (8,)}, 3)
    y, u = starting_y(rng, 3, adapters), random_u(rng, adapters, slots)
    assert_expanded(expand(gpu, y, u, adapters, slots, spare_tiles=9), y, u, adapters, slots)


@pytest.mark.parametrize("tile", [16, 64])
def test_shrink_then_expand(vendor: str, tile: int) -> None:
    """The whole addition: the kernels' u is bf16, which may cost 2^-9 of each of its terms."""
    gpu, rng, slots = Gpu(vendor), np.random.default_rng(15), [1, -1, 0, 1, 1]
    adapters = Adapters(gpu, 200, (40, 16), {0: (3, 17), 1: (32, 8)}, 2)
    x, y = random_bf16(rng, 5, 200), starting_y(rng, 5, adapters)
    actual = expand(gpu, y, shrink(gpu, x, adapters, slots, tile), adapters, slots, tile)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (actual[row] == y[row]).all()
            continue
        exact_u = np.zeros(2 * adapters.rank_cap)
        for index, rank in enumerate(adapters.ranks[slot]):
            exact_u[index * adapters.rank_cap :][:rank] = adapters.part(slot, index)[0] @ to_float(x[row])
        added, magnitude = term(exact_u, adapters, slot)
        before = to_float(y[row])
        assert_rounded_once(actual[row], before + added, np.abs(before) + magnitude, magnitude * 2.0**-9)
