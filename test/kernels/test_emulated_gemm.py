"""The decode product and the u of every live adapter, as both vendors' lanes compute them, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from kernels.emulator import CLUSTERS, VENDORS, Gpu
from kernels.emulator.adapters import Adapters, Ranks, make_batch
from kernels.emulator.numbers import NAN, Bits, assert_rounded_once, padded, random_bf16, to_float
from kernels.emulator.tiling import tiling

STREAMS = ("skinny_gemm_8", "skinny_gemm_16")
TILES = ("skinny_gemm_32x64", "skinny_gemm_64x64")
GROUPS = ("skinny_gemm_group_64", "skinny_gemm_group_96", "skinny_gemm_group_128")


@dataclass
class Product:
    """One launch: x [T, K] and weight [N, K], both with NaN behind each row, y and u with NaN in every element.

    Attributes:
        kernel: the smallest of STREAMS that takes the tokens, if not given.
        splits: blocks of a cluster.
        clusters: of the grid, at most one for each unit that the capacities allow; of a tile kernel, for u alone.
    """

    gpu: Gpu
    x: Bits
    weight: Bits
    kernel: str = ""
    splits: int = 1
    clusters: int = 1 << 20
    seed: int = 0
    adapters: Adapters | None = None
    slots: Sequence[int] = ()
    num_slots: int = 1

    def run(self) -> tuple[Bits, Bits]:
        (tokens, k), n = self.x.shape, len(self.weight)
        kernel = self.kernel or STREAMS[tokens > 8]
        tile = tiling(self.gpu, kernel)
        base_tiles = -(-n // tile.rows)
        y = self.gpu.array("y", np.full((tokens, n + 8), NAN, np.uint16), "output")
        args = self.gpu.args(
            "GemmArgs",
            x=self.gpu.array("x", padded(self.x, k + 8), "input"),
            weight=self.gpu.array("weight", padded(self.weight, k + 16)),
            y=y,
            x_stride=k + 8,
            weight_stride=k + 16,
            y_stride=n + 8,
            tokens=tokens,
            in_features=k,
            out_features=n,
            num_splits=self.splits,
            base_tiles=base_tiles,
        )
        u = self._add_adapters(args)
        args.max_live = min(self.num_slots, tokens) if self.adapters else 0
        units = args.max_live * -(-u.shape[1] // tile.rows)
        args.a_units = units
        clusters = min(self.clusters, units + (base_tiles if tile.stream else 0))
        blocks = (clusters + (0 if tile.stream else base_tiles)) * self.splits
        self.gpu.launch(kernel, args, (blocks, 1), tile.threads, tile.shared, self.splits, self.seed)
        assert (y[:, n:] == NAN).all()
        return y[:, :n], u

    def _add_adapters(self, args: object) -> Bits:
        if self.adapters is None:
            return np.zeros((0, 0), np.uint16)
        width = len(self.adapters.out_features) * self.adapters.rank_cap
        u = self.gpu.array("u", np.full((len(self.x), width), NAN, np.uint16), "output")
        args.site = self.adapters.site
        args.batch, _ = make_batch(self.gpu, self.slots, self.adapters.ranks, self.num_slots, 16, 70)
        args.u, args.u_stride = u.ctypes.data, width
        return u


@dataclass
class GroupProduct:
    """One launch of a kernel of warpgroups; arrays as those of a `Product`.

    Attributes:
        pad: columns of NaN behind each row of x and y, half of those behind the weight's.
    """

    gpu: Gpu
    x: Bits
    weight: Bits
    kernel: str = GROUPS[0]
    splits: int = 1
    seed: int = 0
    pad: int = 8

    def run(self) -> Bits:
        (tokens, k), n = self.x.shape, len(self.weight)
        tile = tiling(self.gpu, self.kernel)
        x = self.gpu.array("x", padded(self.x, k + self.pad), "input")
        weight = self.gpu.array("weight", padded(self.weight, k + 2 * self.pad))
        y = self.gpu.array("y", np.full((tokens, n + self.pad), NAN, np.uint16), "output")
        args = self.gpu.args(
            "GroupGemmArgs",
            x=self.gpu.tensor_map(x, k, tile.tokens),
            weight=self.gpu.tensor_map(weight, k, tile.rows),
            y=y,
            y_stride=n + self.pad,
            tokens=tokens,
            in_features=k,
            out_features=n,
            num_splits=self.splits,
            part_columns=-(-k // (64 * self.splits)) * 64,
            share_tokens=-(-tokens // self.splits),
        )
        blocks = -(-n // tile.rows) * self.splits
        self.gpu.launch(self.kernel, args, (blocks, 1), tile.threads, tile.shared, self.splits, self.seed)
        assert (y[:, n:] == NAN).all()
        return y[:, :n]


def assert_product(y: Bits, x: Bits, weight: Bits) -> None:
    wide_x, wide_weight = to_float(x), to_float(weight)
    assert_rounded_once(y, wide_x @ wide_weight.T, np.abs(wide_x) @ np.abs(wide_weight).T)


def assert_u(u: Bits, x: Bits, adapters: Adapters, slots: Sequence[int]) -> None:
    """Right where a row's own module has a rank, NaN where its adapter has none; rows behind `slots` are nobody's."""
    for row, slot in enumerate([*slots, *[-1] * (len(x) - len(slots))]):
        expected = np.full(u.shape[1], False)
        for index, rank in enumerate(adapters.ranks.get(slot, ())):
            a, _, _ = adapters.part(slot, index)
            start = index * adapters.rank_cap
            columns = slice(start, start + rank)
            expected[start : start + max(adapters.ranks[slot])] = True
            wide = to_float(x[row])
            assert_rounded_once(u[row, columns], a @ wide, np.abs(a) @ np.abs(wide))
        assert (u[row, ~expected] == NAN).all()


def check_product(vendor: str, tokens: int, n: int, k: int, **launch: object) -> Bits:
    """y, which is right."""
    rng = np.random.default_rng(tokens)
    x, weight = random_bf16(rng, tokens, k), random_bf16(rng, n, k)
    y, _ = Product(Gpu(vendor), x, weight, seed=tokens, **launch).run()
    assert_product(y, x, weight)
    return y


@pytest.mark.parametrize(("vendor", "splits"), CLUSTERS)
@pytest.mark.parametrize(
    ("kernel", "tokens", "n", "k"),
    [
        ("skinny_gemm_32x64", 17, 200, 520),
        ("skinny_gemm_32x64", 31, 72, 64),
        ("skinny_gemm_64x64", 33, 136, 328),
        ("skinny_gemm_64x64", 50, 200, 392),
        ("skinny_gemm_64x64", 64, 136, 264),
    ],
)
def test_tiles(vendor: str, splits: int, kernel: str, tokens: int, n: int, k: int) -> None:
    check_product(vendor, tokens, n, k, kernel=kernel, splits=splits)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(vendor: str, tokens: int) -> None:
    """Eight tokens at once or sixteen: the same bits."""
    results = [check_product(vendor, tokens, 40, 584, kernel=kernel, clusters=2) for kernel in STREAMS[tokens > 8 :]]
    assert (results[0] == results[-1]).all()


@pytest.mark.parametrize(("vendor", "splits"), CLUSTERS)
@pytest.mark.parametrize(
    ("k", "tokens"), [(8, 1), (64, 3), (72, 16), (192, 8), (512, 5), (520, 9), (1032, 2), (2056, 11), (4104, 1)]
)
def test_every_length_of_the_sum(vendor: str, splits: int, k: int, tokens: int) -> None:
    """From so short that only one warp has something to add, to several turns of the ring for one unit."""
    check_product(vendor, tokens, 56, k, splits=splits, clusters=2)


@pytest.mark.parametrize(("vendor", "splits"), CLUSTERS)
@pytest.mark.parametrize(("n", "clusters"), [(8, 1), (16, 1), (24, 2), (264, 1), (264, 3), (264, 16), (264, 17)])
@pytest.mark.parametrize(("k", "tokens"), [(64, 16), (712, 3)])
def test_blocks_walk_through_units(vendor: str, splits: int, n: int, clusters: int, k: int, tokens: int) -> None:
    check_product(vendor, tokens, n, k, splits=splits, clusters=clusters)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("kernel", [*STREAMS, "skinny_gemm_32x64"])
def test_every_placement_of_arrays(vendor: str, side: str, kernel: str) -> None:
    rng = np.random.default_rng(5)
    x, weight = random_bf16(rng, 5, 136), random_bf16(rng, 72, 136)
    y, _ = Product(Gpu(vendor, side=side), x, weight, kernel).run()
    assert_product(y, x, weight)


# ---- warpgroups -----------------------------------------------------------------------------------------------------


def check_group(tokens: int, n: int, k: int, kernel: str, splits: int, **launch: int) -> None:
    rng = np.random.default_rng(tokens + n + k)
    x, weight = random_bf16(rng, tokens, k), random_bf16(rng, n, k)
    assert_product(GroupProduct(Gpu("cuda"), x, weight, kernel, splits, **launch).run(), x, weight)


@pytest.mark.parametrize("kernel", GROUPS)
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "n", "k"), [(17, 8, 8), (33, 136, 328), (48, 200, 1096), (63, 72, 2120), (64, 264, 64)]
)
def test_group_shapes(kernel: str, splits: int, tokens: int, n: int, k: int) -> None:
    """Fewer steps than stages, more of them, parts of K with nothing in them; a ragged edge everywhere."""
    check_group(tokens, n, k, kernel, splits)


@pytest.mark.parametrize("tokens", range(17, 65))
def test_every_number_of_tokens_of_a_group(tokens: int) -> None:
    check_group(tokens, 72, 200, GROUPS[tokens % 3], 1 + tokens % 4, seed=tokens)


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [16, 56, 64, 72, 128, 504, 512, 520, 1024, 1032, 6144])
def test_every_length_of_the_sum_of_a_group(splits: int, k: int) -> None:
    check_group(20, 40, k, GROUPS[k % 3], splits, seed=k)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("pad", [0, 8])
def test_every_placement_of_arrays_of_a_group(side: str, pad: int, seed: int) -> None:
    """Every start of shared memory too."""
    rng = np.random.default_rng(5)
    x, weight = random_bf16(rng, 37, 136), random_bf16(rng, 104, 136)
    assert_product(GroupProduct(Gpu("cuda", side=side), x, weight, GROUPS[1], 2, seed, pad).run(), x, weight)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_of_a_group_has_the_same_bits_whatever_else_there_is(splits: int) -> None:
    """In other places, among fewer rows and beside NaN; with other rows of the weight in a block, and fewer."""
    rng = np.random.default_rng(2)
    x, weight = random_bf16(rng, 64, 840), random_bf16(rng, 264, 840)
    y = GroupProduct(Gpu("cuda"), x, weight, GROUPS[0], splits).run()
    assert_product(y, x, weight)
    for seed, (kernel, order) in enumerate(
        zip(GROUPS, (range(17), rng.permutation(64), range(63, 30, -1)), strict=True)
    ):
        got = GroupProduct(Gpu("cuda"), x[list(order)], weight, kernel, splits, seed).run()
        assert (got == y[list(order)]).all()
    alone = x.copy()
    alone[np.arange(64) != 40] = NAN
    assert (GroupProduct(Gpu("cuda"), alone, weight[:200], GROUPS[2], splits).run()[40] == y[40, :200]).all()


@pytest.mark.parametrize(("n", "k"), [(192, 2056), (256, 2048), (384, 4096)])
@pytest.mark.parametrize("behind", [8, 16, 56])
def test_rows_behind_a_weight_change_no_bit(n: int, k: int, behind: int) -> None:
    """Those of A may be there or not: the host chooses the same."""
    rng, gpu = np.random.default_rng(3), Gpu("cuda")
    x, weight = random_bf16(rng, 24, k), random_bf16(rng, n + behind, k)
    results = []
    for rows in (n, n + behind):
        choice = gpu.geometry("group_choice", 132, rows, k)
        assert choice % 16 > 1
        results.append(
            GroupProduct(Gpu("cuda"), x, weight[:rows], f"skinny_gemm_group_{choice // 16}", choice % 16).run()
        )
    assert (results[0] == results[1][:, :n]).all()


# ---- how many parts -------------------------------------------------------------------------------------------------

QWEN_3 = {
    "1.7B": ((4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144), (151936, 2048)),
    "8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)),
}
"""Rows and columns of the products of a step: q, k, v; output; gate, up; down; logits."""


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
@pytest.mark.parametrize(("n", "k"), [*QWEN_3["1.7B"], *QWEN_3["8B"]])
def test_a_few_rows_behind_a_weight_change_no_choice(multiprocessors: int, n: int, k: int) -> None:
    gpu = Gpu("cuda")
    choice = gpu.geometry("group_choice", multiprocessors, n, k)
    for behind in (8, 16, 48, 64, 192, 768):
        assert gpu.geometry("group_choice", multiprocessors, n + behind, k) == choice


def test_every_choice_can_be_launched() -> None:
    gpu = Gpu("cuda")
    for multiprocessors in (1, 4, 16, 66, 132):
        for n in (8, 64, 72, 1000, 4096, 5000, 151936, 1 << 20):
            for k in (8, 64, 504, 512, 768, 1024, 6144, 1 << 17):
                rows, splits = divmod(gpu.geometry("group_choice", multiprocessors, n, k), 16)
                assert f"skinny_gemm_group_{rows}" in GROUPS
                assert 1 <= splits <= gpu.geometry("kGroupSplits") <= 8 and (splits == 1 or k // splits >= 256)
                assert gpu.geometry("group_shared_bytes", rows) <= 227 << 10


def test_numbers_are_rounded_down_to_few() -> None:
    gpu = Gpu("cuda")
    few = [1, *(value for power in range(1, 22) for value in (2**power, 3 * 2 ** (power - 1)))]
    for value in [*range(1, 3000), 24575, 24576, 151936, (1 << 20) - 1, 1 << 20]:
        assert gpu.geometry("round_down", value) == max(f for f in few if f <= value)


# ---- u --------------------------------------------------------------------------------------------------------------

ADAPTERS: list[tuple[Ranks, Sequence[int], Sequence[int]]] = [
    ({0: (16,)}, (24,), [0]),
    ({1: (1, 8, 3), 3: (64, 0, 17), 4: (0, 0, 0)}, (16, 8, 8), [3, -1, 1, 1, 3, -1, 4]),
    ({0: (0, 0), 2: (5, 9)}, (16, 8), [2, 0, 0, 2, 2]),
    ({0: (3, 64), 1: (33, 0), 2: (0, 1), 4: (8, 8)}, (40, 8), [4, 2, 0, 1, -1, -1, 0, 4, 4, 2, 1, 4, 0]),
]

U_CASES = [(k, *case) for case in ADAPTERS for k in (*STREAMS, TILES[0]) if k != STREAMS[0] or len(case[-1]) <= 8]


@pytest.mark.parametrize("clusters", [1, 2, 7, 100])
@pytest.mark.parametrize(("vendor", "splits"), CLUSTERS)
@pytest.mark.parametrize(("kernel", "ranks", "out_features", "slots"), U_CASES)
def test_u_of_live_adapters(
    vendor: str,
    splits: int,
    clusters: int,
    kernel: str,
    ranks: Ranks,
    out_features: Sequence[int],
    slots: Sequence[int],
) -> None:
    k, rng = 200, np.random.default_rng(1)
    gpu = Gpu(vendor)
    x, weight = random_bf16(rng, len(slots), k), random_bf16(rng, sum(out_features), k)
    adapters = Adapters(gpu, k, out_features, ranks, 5, max_rank=64)
    y, u = Product(gpu, x, weight, kernel, splits, clusters, 3, adapters, slots, 5).run()
    assert_product(y, x, weight)
    assert_u(u, x, adapters, slots)


@pytest.mark.parametrize(("vendor", "splits"), CLUSTERS)
@pytest.mark.parametrize("kernels", [STREAMS, TILES])
def test_a_row_has_the_same_bits_whatever_else_there_is(vendor: str, splits: int, kernels: Sequence[str]) -> None:
    """Alone, in a crowd, permuted, with other kernels of its kind, with fewer or more blocks."""
    rng, k, slots = np.random.default_rng(2), 840, [2, 0, -1, 2, 0, 1, -1]
    x, weight = random_bf16(rng, len(slots), k), random_bf16(rng, 72, k)

    def run(order: Sequence[int], kernel: str, clusters: int, seed: int) -> tuple[Bits, Bits]:
        gpu = Gpu(vendor)
        adapters = Adapters(gpu, k, (40, 32), {0: (3, 32), 1: (8, 8), 2: (17, 1)}, 3, max_rank=32, seed=9)
        chosen = [slots[i] for i in order]
        return Product(gpu, x[order], weight, kernel, splits, clusters, seed, adapters, chosen, 3).run()

    everyone, permuted = list(range(len(slots))), [4, 2, 0, 6, 1, 5, 3]
    y, u = run(everyone, kernels[0], 2, 0)
    crowd = [*permuted, *permuted[:4]]
    runs = [(everyone, 0, 100), (permuted, 0, 1), (permuted, 1, 3), (crowd, -1, 5)]
    for seed, (order, kernel, clusters) in enumerate([*runs, *(([i], 0, 4) for i in (0, 2, 5))], 1):
        got_y, got_u = run(order, kernels[kernel], clusters, seed)
        assert (got_y == y[order]).all() and (got_u == u[order]).all()


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("slots", [[-1, -1, -1], [], [5, -1]])
@pytest.mark.parametrize("kernel", [*STREAMS, "skinny_gemm_32x64"])
def test_capacity_beyond_the_live_adapters_changes_nothing(vendor: str, slots: Sequence[int], kernel: str) -> None:
    """As in a captured graph: blocks for sixteen adapters, none or one live; rows behind the last token."""
    rng, gpu = np.random.default_rng(4), Gpu(vendor)
    x, weight = random_bf16(rng, 3, 72), random_bf16(rng, 24, 72)
    adapters = Adapters(gpu, 72, (24,), {5: (64,)}, 16)
    y, u = Product(gpu, x, weight, kernel, 1, 100, 0, adapters, slots, 16).run()
    assert_product(y, x, weight)
    assert_u(u, x, adapters, slots)
