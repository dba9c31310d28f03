"""Segmented shrink, as both vendors' lanes compute it, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from kernels.emulator import VENDORS, Gpu
from kernels.emulator.adapters import Adapters, Ranks, lora_tiles, make_batch
from kernels.emulator.numbers import NAN, Bits, assert_rounded_once, padded, random_bf16, to_float
from kernels.emulator.tiling import tiling

KERNELS = {16: "lora_shrink_16", 64: "lora_shrink_64x64"}
"""By the largest tiles of the batch."""


def shrink(
    gpu: Gpu,
    x: Bits,
    adapters: Adapters,
    slots: Sequence[int],
    tile: int = 16,
    seed: int = 0,
    spare_tiles: int = 0,
    blocks: int | None = None,
) -> Bits:
    """u [T, n * rank_cap], with NaN wherever the kernel did not write.

    Args:
        tile: tokens of the batch's tiles.
        spare_tiles: that the grid has beyond the live ones.
        blocks: for every tile, if fewer than there are units; then the kernel must be one that streams.
    """
    k, width = x.shape[1], len(adapters.out_features) * adapters.rank_cap
    num_slots = 1 + max(*adapters.ranks, *slots, 0)
    batch, _ = make_batch(gpu, slots, adapters.ranks, num_slots, tile, len(slots) + 3 + tile * spare_tiles)
    u = gpu.array("u", np.full((len(x), width + 8), NAN, np.uint16), "output")
    args = gpu.args(
        "ShrinkArgs",
        x=gpu.array("x", padded(x, k + 8), "input"),
        u=u,
        x_stride=k + 8,
        u_stride=width + 8,
        site=adapters.site,
        batch=batch,
    )
    launch = tiling(gpu, KERNELS[tile])
    grid = (blocks or -(-width // launch.rows), max(1, lora_tiles(slots, tile) + spare_tiles))
    gpu.launch(KERNELS[tile], args, grid, launch.threads, launch.shared, 1, seed)
    assert (u[:, width:] == NAN).all()
    return u[:, :width]


def assert_shrunk(u: Bits, x: Bits, adapters: Adapters, slots: Sequence[int]) -> None:
    """Right where a row's module has a rank, untouched where its adapter has none."""
    wide = to_float(x)
    touched = np.zeros(u.shape, bool)
    for row, slot in enumerate(slots):
        for index, rank in enumerate(adapters.ranks.get(slot, ())):
            a, _, _ = adapters.part(slot, index)
            start = index * adapters.rank_cap
            columns = slice(start, start + rank)
            touched[row, start : start + max(adapters.ranks[slot])] = True  # beyond the module's rank with anything
            if rank:
                assert_rounded_once(u[row, columns], a @ wide[row], np.abs(a) @ np.abs(wide[row]))
    assert (u[~touched] == NAN).all()


CASES: dict[str, tuple[Ranks, Sequence[int]]] = {
    "rank 1": ({0: (1,)}, [0]),
    "rank 3": ({0: (3,)}, [0, 0, -1]),
    "rank 8": ({2: (8,)}, [2] * 17),
    "rank 16": ({0: (16,)}, [0, -1] * 4),
    "rank 17": ({0: (17,)}, [0] * 5),
    "rank 64": ({0: (64,)}, [0] * 3),
    "rank 256": ({1: (256,), 0: (1,)}, [0, 1, 0]),
    "mixed": ({0: (1, 3, 8), 2: (16, 17, 64), 3: (5, 1, 9)}, [3, 0, -1, 2, 2, 0, 3, -1, 2]),
    "slices without a module": ({0: (0, 8, 0), 1: (3, 0, 0), 2: (0, 0, 7), 3: (0, 0, 0)}, [0, 1, 2, 3, 2, 1, 0]),
    "three of 256": ({0: (256, 256, 256), 1: (100, 33, 1)}, [0, 1, 1]),
    "one slot has nearly all": ({0: (8,), 1: (17,), 2: (3,)}, [1, *[0] * 70, 2]),
    "all different": ({slot: (1 + 2 * slot,) for slot in range(12)}, list(range(11, -1, -1))),
    "nobody": ({0: (8,)}, [-1, -1]),
}


@pytest.mark.parametrize("tile", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("case", CASES)
def test_shrink(vendor: str, tile: int, case: str) -> None:
    ranks, slots = CASES[case]
    gpu, k = Gpu(vendor), 136
    x = random_bf16(np.random.default_rng(7), len(slots), k)
    adapters = Adapters(gpu, k, (16, 8, 8)[: len(ranks[min(ranks)])], ranks, 1 + max(*ranks, *slots, 0))
    u = shrink(gpu, x, adapters, slots, tile, seed=tile)
    assert_shrunk(u, x, adapters, slots)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("tile", KERNELS)
@pytest.mark.parametrize("k", [8, 64, 72, 1024, 2056])
def test_every_length_of_the_sum(vendor: str, k: int, tile: int) -> None:
    gpu, slots = Gpu(vendor, side="start"), [0, 1, 0]
    x = random_bf16(np.random.default_rng(k), 3, k)
    adapters = Adapters(gpu, k, (8,), {0: (9,), 1: (2,)}, 2)
    assert_shrunk(shrink(gpu, x, adapters, slots, tile), x, adapters, slots)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 20])
@pytest.mark.parametrize("k", [64, 712])
def test_blocks_walk_through_units(vendor: str, blocks: int, k: int) -> None:
    gpu, slots = Gpu(vendor), [0, 1, -1, *[0] * 16, 2]
    x = random_bf16(np.random.default_rng(k), len(slots), k)
    adapters = Adapters(gpu, k, (8, 8), {0: (70, 33), 1: (3, 0), 2: (0, 0)}, 3)
    u = shrink(gpu, x, adapters, slots, 16, blocks, blocks=blocks)
    assert_shrunk(u, x, adapters, slots)


@pytest.mark.parametrize("tile", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_a_row_has_the_same_bits_alone_in_a_crowd_and_permuted(vendor: str, tile: int) -> None:
    ranks = {0: (3, 40), 1: (64, 64)}
    slots = [0, 1, -1, *[1] * 20, 0]
    x = random_bf16(np.random.default_rng(3), len(slots), 584)

    def run(order: Sequence[int], seed: int) -> Bits:
        gpu = Gpu(vendor)
        adapters = Adapters(gpu, 584, (8, 8), ranks, 2)
        blocks = seed if tile == 16 else None
        return shrink(gpu, x[order], adapters, [slots[i] for i in order], tile, seed, blocks=blocks)

    everyone = list(range(len(slots)))
    whole = run(everyone, 0)
    for seed, order in enumerate((everyone, everyone[::-1], [0], [1], [22], [5, 2, 23]), 1):
        assert (run(order, seed) == whole[order]).all()


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("tile", KERNELS)
def test_blocks_beyond_the_live_tiles_do_nothing(vendor: str, tile: int) -> None:
    gpu, slots = Gpu(vendor), [0, 2, -1]
    x = random_bf16(np.random.default_rng(3), 3, 72)
    adapters = Adapters(gpu, 72, (8,), {0: (4,), 2: (8,)}, 3)
    assert_shrunk(shrink(gpu, x, adapters, slots, tile, spare_tiles=9), x, adapters, slots)
