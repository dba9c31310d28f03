"""The kernels between the products, each with the low-rank term of the projection it reads, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from kernels.emulator import VENDORS, Gpu
from kernels.emulator.adapters import Adapters, Ranks, make_batch
from kernels.emulator.numbers import NAN, Bits, Floats, assert_rounded_once, padded, random_bf16, to_float

pytestmark = pytest.mark.parametrize("vendor", VENDORS)

EPS = 1e-5
NUM_SLOTS = 5
BEHIND = 2
"""Rows behind the last token, which no kernel may touch."""

MIXED = [3, -1, 1, 1, 3, -1, 0]
"""Slots of token rows, with RANKS or some like them."""


def same_rank(rank: int, slices: int) -> Ranks:
    return {0: (rank,) * slices}


@dataclass
class Rows:
    """Token rows and the low-rank term that is to be added to them; without slots, rows of a plain engine.

    Attributes:
        u: of the rows in `order`, columns that are no one's NaN.
        held: ranks that the kernel keeps in registers, by the layout's largest rank.
        rehearse: whether kernels that can have a rehearsal.
        order: which of the rows take part, and where: row i of the launch is row order[i] of the data. Empty: all.
    """

    gpu: Gpu
    out_features: Sequence[int]
    tokens: int
    slots: Sequence[int] | None = None
    ranks: Ranks = field(default_factory=dict)
    tile: int = 16
    order: Sequence[int] = ()
    seed: int = 0
    held: int = 16
    rehearse: bool = True

    def __post_init__(self) -> None:
        self.order = list(self.order or range(self.tokens))
        if self.slots is None:
            return
        self.adapters = Adapters(self.gpu, 8, self.out_features, self.ranks, NUM_SLOTS, seed=self.seed)
        cap = self.adapters.rank_cap
        self.held = 16 if cap <= 16 else 64
        u = random_bf16(np.random.default_rng(self.seed + 1), self.tokens, len(self.out_features), cap)
        for row, slot in enumerate(self.slots):
            for index in range(len(self.out_features)):
                u[row, index, self.ranks[slot][index] if slot >= 0 else 0 :] = NAN
        self.u = u

    def delta(self) -> tuple[ctypes.Structure, int]:
        """LoraDelta of args.h, and tiles that the grid must have."""
        if self.slots is None:
            return self.gpu.args("LoraDelta"), 0
        width = self.u[0].size
        u = padded(self.u[self.order].reshape(-1, width), width + 8)
        batch, shape = make_batch(self.gpu, [self.slots[i] for i in self.order], self.ranks, NUM_SLOTS, self.tile)
        u = self.gpu.array("u", u, "input")
        delta = self.gpu.args("LoraDelta", site=self.adapters.site, batch=batch, u=u, u_stride=width + 8)
        return delta, shape.max_tiles

    def term(self, index: int) -> tuple[Floats, Floats]:
        """What is added to a slice's columns of every row in `order`, and the sum of its absolute values."""
        exact = np.zeros((len(self.order), self.out_features[index]))
        magnitude = exact.copy()
        for i, row in enumerate(self.order):
            slot = -1 if self.slots is None else self.slots[row]
            rank = self.ranks[slot][index] if slot >= 0 else 0
            if rank:
                _, b, scale = self.adapters.part(slot, index)
                u = to_float(self.u[row, index, :rank])
                exact[i], magnitude[i] = scale * (b @ u), scale * (np.abs(b) @ np.abs(u))
        return exact, magnitude

    def place(self, name: str, values: Bits, role: str) -> Bits:
        """An array whose rows are those in `order`, NaN behind each and in BEHIND more rows."""
        rows = padded(values[self.order], values.shape[1] + 8)
        return self.gpu.array(name, np.concatenate([rows, np.full((BEHIND, rows.shape[1]), NAN, np.uint16)]), role)

    def grid_y(self, max_tiles: int, rows_at_once: int) -> int:
        return max_tiles or -(-len(self.order) // rows_at_once)


def taken(array: Bits) -> Bits:
    """The rows and columns that a kernel was to write; nothing else may have been."""
    assert (array[-BEHIND:] == NAN).all() and (array[:, -8:] == NAN).all()
    return array[:-BEHIND, :-8].copy()


def block_tokens(rows: Rows) -> int:
    """Of kernels that take whole tiles for prompts, and strips in a step of decoding."""
    return rows.gpu.geometry("strip_tokens", rows.gpu.warp, 16) if rows.tile == 16 else rows.tile


def clusters(vendor: str, size: int) -> int:
    if vendor == "hip" and size > 1:
        pytest.skip("clusters are CUDA's")
    return size


# ---- residual add and norm ------------------------------------------------------------------------------------------


def run_norm(
    rows: Rows, x: Bits, residual: Bits | None, weight: Bits, cluster: int = 1, block: int = 16
) -> tuple[Bits, Bits]:
    """(residual, normalised rows)"""
    gpu, hidden = rows.gpu, x.shape[1]
    delta, max_tiles = rows.delta()
    lora = rows.slots is not None
    block = gpu.geometry("strip_tokens", gpu.warp, rows.tile) if lora else block
    strip = block if lora else 0
    sizes = (gpu.warp, hidden, cluster, block, strip)
    out = rows.place("x", x, "output")
    stream = None if residual is None else rows.place("residual", residual, "output")
    stride = hidden + 8
    args = gpu.args(
        "NormArgs",
        x=out,
        residual=stream,
        out=out if residual is None else None,
        weight=gpu.array("weight", weight),
        x_stride=stride,
        residual_stride=stride,
        out_stride=stride,
        tokens=len(rows.order),
        hidden=hidden,
        block_tokens=block,
        parts=gpu.geometry("norm_block_parts", hidden, cluster),
        turns=gpu.geometry("norm_turns", *sizes),
        staged=gpu.geometry("norm_staged", hidden, cluster),
        held=gpu.geometry("norm_held", *sizes),
        eps=EPS,
        mean=np.float32(1) / np.float32(hidden),
        rehearse=rows.rehearse,
        delta=delta,
    )
    pieces = rows.tile // block if max_tiles else 1
    gpu.launch(
        f"fused_add_rmsnorm_{rows.tile}x{rows.held}" if lora else "fused_add_rmsnorm",
        args,
        (cluster * pieces, rows.grid_y(max_tiles, pieces * block)),
        gpu.geometry("norm_threads", gpu.warp, strip),
        gpu.geometry("norm_shared_bytes", *sizes),
        cluster,
        rows.seed,
    )
    return (np.zeros(0, np.uint16) if stream is None else taken(stream)), taken(out)


def assert_normalised(out: Bits, rounded: Bits, weight: Bits) -> None:
    value = to_float(rounded)
    exact = value / np.sqrt((value**2).mean(1, keepdims=True) + np.float64(np.float32(EPS))) * to_float(weight)
    assert_rounded_once(out, exact, np.abs(exact))


def norm_data(tokens: int, hidden: int) -> tuple[Bits, Bits, Bits]:
    rng = np.random.default_rng(hidden)
    return random_bf16(rng, tokens, hidden), random_bf16(rng, tokens, hidden), random_bf16(rng, hidden)


NORMS = [
    # hidden, tile, cluster, slots, ranks
    (8, 16, 1, [0], same_rank(1, 1)),
    (136, 16, 2, MIXED, {0: (0,), 1: (5,), 3: (16,)}),
    (392, 16, 1, MIXED, {0: (64,), 1: (3,), 3: (0,)}),
    (1032, 16, 4, MIXED, {0: (8,), 1: (100,), 3: (256,)}),
    (264, 64, 1, [1] * 35 + [-1] * 3, {1: (17,)}),
    (648, 64, 2, [1] * 18 + [-1] * 3, {1: (40,)}),
]


@pytest.mark.parametrize(("hidden", "tile", "cluster", "slots", "ranks"), NORMS)
def test_add_and_norm(vendor: str, hidden: int, tile: int, cluster: int, slots: Sequence[int], ranks: Ranks) -> None:
    cluster, tokens = clusters(vendor, cluster), len(slots)
    x, residual, weight = norm_data(tokens, hidden)
    rows = Rows(Gpu(vendor), [hidden], tokens, slots, ranks, tile)
    stream, out = run_norm(rows, x, residual, weight, cluster)
    exact, magnitude = rows.term(0)
    sums = to_float(residual) + to_float(x)
    assert_rounded_once(stream, sums + exact, np.abs(to_float(residual)) + np.abs(to_float(x)) + magnitude)
    assert_normalised(out, stream, weight)


@pytest.mark.parametrize(("hidden", "block", "tile"), [(392, 1, 16), (392, 4, 16), (1032, 2, 64), (264, 16, 64)])
def test_norm_alone(vendor: str, hidden: int, block: int, tile: int) -> None:
    x, _, weight = norm_data(7, hidden)
    _, out = run_norm(Rows(Gpu(vendor), [hidden], 7, tile=tile), x, None, weight, 1, block)
    assert_normalised(out, x, weight)


@pytest.mark.parametrize("lora", [False, True])
def test_norm_does_not_depend_on_clusters_blocks_or_tiles(vendor: str, lora: bool) -> None:
    hidden, slots, ranks = 1160, [1, 1, -1], {1: (9,)}
    x, residual, weight = norm_data(len(slots), hidden)
    found = set()
    for tile, block, cluster in [(16, 16, 1), (16, 1, 1), (64, 8, 1), (16, 2, 2), (16, 16, 4), (64, 16, 8)]:
        if vendor == "hip" and cluster > 1:
            continue
        for rehearse in (False, True):
            of = slots if lora else None
            rows = Rows(Gpu(vendor), [hidden], len(slots), of, ranks, tile, rehearse=rehearse)
            found.add(b"".join(part.tobytes() for part in run_norm(rows, x, residual, weight, cluster, block)))
    assert len(found) == 1


def test_rows_that_do_not_fit_into_shared_memory_are_read_again(vendor: str) -> None:
    hidden = 16384
    x, residual, weight = norm_data(3, hidden)
    rows = Rows(Gpu(vendor), [hidden], 3, [0, -1, 0], same_rank(2, 1), 64)
    sizes = (rows.gpu.warp, hidden, 1, 16, 16)
    assert rows.gpu.geometry("norm_held", *sizes) < rows.gpu.geometry("norm_turns", *sizes)
    stream, out = run_norm(rows, x, residual, weight)
    assert_normalised(out, stream, weight)
    plain_stream, plain = run_norm(Rows(Gpu(vendor), [hidden], 3), x, residual, weight, 1, 2)
    assert (stream[1] == plain_stream[1]).all() and (out[1] == plain[1]).all()


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------


def run_activation(rows: Rows, x: Bits) -> Bits:
    gpu, inner, lora = rows.gpu, x.shape[1] // 2, rows.slots is not None
    delta, max_tiles = rows.delta()
    out = rows.place("out", np.full((len(x), inner), NAN, np.uint16), "output")
    args = gpu.args(
        "ActivationArgs",
        x=rows.place("x", x, "input"),
        out=out,
        x_stride=2 * inner + 8,
        out_stride=inner + 8,
        tokens=len(rows.order),
        inner=inner,
        block_tokens=block_tokens(rows),
        piece_bits=(rows.tile // block_tokens(rows)).bit_length() - 1,
        rehearse=rows.rehearse,
        delta=delta,
    )
    gpu.launch(
        f"silu_and_mul_{rows.tile}x{rows.held}" if lora else "silu_and_mul",
        args,
        (
            gpu.geometry("activation_blocks", gpu.warp, inner, lora),
            rows.grid_y(max_tiles << args.piece_bits, gpu.geometry("kActivationRows")),
        ),
        gpu.geometry("activation_threads", gpu.warp),
        gpu.geometry("walk_shared_bytes", gpu.warp, 128, 2) if lora and rows.tile == 64 else 0,
        seed=rows.seed,
    )
    return taken(out)


ACTIVATIONS = [
    (8, 16, [0], same_rank(1, 2)),
    (136, 16, MIXED, {0: (0, 16), 1: (5, 0), 3: (0, 0)}),
    (264, 16, MIXED, {0: (256, 3), 1: (64, 70), 3: (16, 8)}),
    (136, 64, [1] * 70 + [-1, 0], {0: (33, 65), 1: (12, 7)}),
    (72, 64, [1, 0, -1], {0: (0, 2), 1: (1, 0)}),
]


@pytest.mark.parametrize(("inner", "tile", "slots", "ranks"), ACTIVATIONS)
def test_silu_and_mul(vendor: str, inner: int, tile: int, slots: Sequence[int], ranks: Ranks) -> None:
    x = random_bf16(np.random.default_rng(inner), len(slots), 2 * inner)
    x[0, 0:6] = [0x42F6, 0xC2F6, 0x0000, 0x8000, 0x4200, 0xC200]  # 123, -123, 0, -0, 32, -32
    rows = Rows(Gpu(vendor), [inner, inner], len(slots), slots, ranks, tile)
    out = run_activation(rows, x)
    (gate_term, gate_size), (up_term, up_size) = rows.term(0), rows.term(1)
    gate, up = to_float(x[:, :inner]) + gate_term, to_float(x[:, inner:]) + up_term
    silu = gate / (1 + np.exp(-gate))
    gate_size += np.abs(to_float(x[:, :inner]))
    up_size += np.abs(to_float(x[:, inner:]))
    # exp(-gate) is wrong by as much as gate is, and the slope of silu is at most 1.1.
    magnitude = 1.1 * gate_size * np.abs(up) + np.abs(silu) * (up_size + gate_size * np.abs(up))
    assert_rounded_once(out, silu * up, magnitude)


# ---- head norm and rotation -----------------------------------------------------------------------------------------


@dataclass
class Heads:
    """Data of `tokens` rows of qkv and of all that is applied to them."""

    tokens: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    bias: bool = True
    norm: tuple[bool, bool] = (True, True)
    pool: bool = True

    def __post_init__(self) -> None:
        rng, dim = np.random.default_rng(self.head_dim), self.head_dim
        self.widths = [self.num_heads * dim, self.num_kv_heads * dim, self.num_kv_heads * dim]
        self.qkv = random_bf16(rng, self.tokens, sum(self.widths))
        self.biases = random_bf16(rng, sum(self.widths)) if self.bias else None
        self.weights = [random_bf16(rng, dim) if wanted else None for wanted in self.norm]
        angles = rng.uniform(0, 6.28, (50, dim // 2))
        self.cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        self.positions = rng.integers(0, 50, self.tokens)
        self.locs = rng.permutation(self.tokens + 4)[: self.tokens]


def run_rope(rows: Rows, data: Heads) -> tuple[Bits, Bits, Bits]:
    """(qkv, k pool, v pool)"""
    gpu, dim, order = rows.gpu, data.head_dim, rows.order
    lora = rows.slots is not None
    block_heads = gpu.geometry("rope_block_heads", dim, rows.tile, lora)
    head_blocks = -(-(data.num_heads + 2 * data.num_kv_heads) // block_heads)
    delta, max_tiles = rows.delta()
    qkv = rows.place("qkv", data.qkv, "output")
    empty = np.full((data.tokens + 4, data.num_kv_heads, dim), NAN, np.uint16)
    pools = [gpu.array(f"{name}_pool", empty, "output") for name in "kv"]
    optional = {"bias": data.biases, "q_weight": data.weights[0], "k_weight": data.weights[1]}
    args = gpu.args(
        "RopeArgs",
        qkv=qkv,
        **{name: None if values is None else gpu.array(name, values) for name, values in optional.items()},
        cos_sin=gpu.array("cos_sin", data.cos_sin),
        positions=gpu.array("positions", data.positions[order].astype(np.int64)),
        k_pool=pools[0] if data.pool else None,
        v_pool=pools[1] if data.pool else None,
        locs=gpu.array("locs", data.locs[order].astype(np.int64)) if data.pool else None,
        qkv_stride=sum(data.widths) + 8,
        tokens=len(order),
        num_heads=data.num_heads,
        num_kv_heads=data.num_kv_heads,
        block_heads=block_heads,
        block_tokens=block_tokens(rows),
        piece_bits=(rows.tile // block_tokens(rows)).bit_length() - 1,
        eps=EPS,
        rehearse=rows.rehearse,
        delta=delta,
    )
    gpu.launch(
        f"qk_norm_rope_{dim}x{rows.tile}x{rows.held}" if lora else f"qk_norm_rope_{dim}",
        args,
        (head_blocks, rows.grid_y(max_tiles << args.piece_bits, gpu.geometry("kRopeRows"))),
        gpu.geometry("rope_threads", gpu.warp, dim, block_heads, lora),
        gpu.geometry("rope_shared_bytes", gpu.warp, dim, block_heads, rows.tile, lora),
        seed=rows.seed,
    )
    return taken(qkv), pools[0], pools[1]


def expected_heads(rows: Rows, data: Heads, index: int) -> tuple[Floats, Floats]:
    """q, k or v [T, heads, D], and what float32's error is in proportion to."""
    start, dim = sum(data.widths[:index]), data.head_dim
    columns = slice(start, start + data.widths[index])
    bias = to_float(data.biases[columns]) if data.biases is not None else np.zeros(data.widths[index])
    x, (term, size) = to_float(data.qkv[rows.order][:, columns]), rows.term(index)
    y = (x + bias + term).reshape(len(x), -1, dim)
    size = (np.abs(x) + np.abs(bias) + size).reshape(y.shape)
    weight = data.weights[index] if index < 2 else None
    if weight is not None:
        factor = to_float(weight) / np.sqrt((y**2).mean(-1, keepdims=True) + EPS)
        # The root's own error: sums of squares are off by the sizes.
        size += np.abs(y) * (size**2).mean(-1, keepdims=True) / (y**2).mean(-1, keepdims=True)
        y, size = y * factor, size * np.abs(factor)
    if index == 2:
        return y, size
    cos, sin = np.split(data.cos_sin[data.positions[rows.order]].astype(np.float64)[:, None], 2, axis=-1)
    (low, high), (low_size, high_size) = np.split(y, 2, axis=-1), np.split(size, 2, axis=-1)
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
    absolute = [low_size * np.abs(cos) + high_size * np.abs(sin), high_size * np.abs(cos) + low_size * np.abs(sin)]
    return turned, np.concatenate(absolute, -1)


def assert_heads(rows: Rows, data: Heads, qkv: Bits, k_pool: Bits, v_pool: Bits) -> None:
    start = 0
    for index, width in enumerate(data.widths):
        actual = qkv[:, start : start + width].reshape(len(qkv), -1, data.head_dim)
        assert_rounded_once(actual, *expected_heads(rows, data, index))
        start += width
        if index == 0:
            continue
        expected = np.full_like(k_pool, NAN)
        if data.pool:
            expected[data.locs[rows.order]] = actual
        assert ((k_pool, v_pool)[index - 1] == expected).all()


ROPES = [
    (Heads(1, 64, 2, 1), 16, [0], same_rank(1, 3)),
    (Heads(7, 64, 3, 1, bias=False), 16, MIXED, {0: (0, 16, 3), 1: (5, 0, 0), 3: (0, 0, 64)}),
    (Heads(7, 128, 2, 1, norm=(False, False)), 16, MIXED, {0: (256, 1, 3), 1: (64, 70, 9), 3: (0, 0, 0)}),
    (Heads(7, 256, 1, 1, pool=False), 16, MIXED, {0: (8, 1, 3), 1: (0, 17, 9), 3: (2, 80, 0)}),
    (Heads(37, 64, 2, 1), 64, [1] * 34 + [-1, -1, 0], {0: (33, 0, 9), 1: (12, 7, 5)}),
    (Heads(35, 128, 1, 1, norm=(True, False)), 64, [1] * 34 + [-1], {1: (16, 8, 0)}),
    (Heads(18, 256, 1, 1, bias=False), 64, [1] * 17 + [-1], {1: (16, 0, 8)}),
]


@pytest.mark.parametrize(("data", "tile", "slots", "ranks"), ROPES)
def test_head_norm_and_rotation(vendor: str, data: Heads, tile: int, slots: Sequence[int], ranks: Ranks) -> None:
    rows = Rows(Gpu(vendor), data.widths, data.tokens, slots, ranks, tile)
    assert_heads(rows, data, *run_rope(rows, data))


def test_heads_of_a_plain_engine(vendor: str) -> None:
    data = Heads(5, 64, 2, 1)
    rows = Rows(Gpu(vendor), data.widths, 5)
    assert_heads(rows, data, *run_rope(rows, data))


# ---- what holds for all of them -------------------------------------------------------------------------------------

KERNELS = {"norm": 1, "activation": 2, "rope": 3}
"""Slices that each adds to."""


def run_any(
    kernel: str, vendor: str, slots: Sequence[int] | None, ranks: Ranks, tile: int, order: Sequence[int], seed: int
) -> Bits:
    """Everything that a kernel writes, a row for each of `order`."""
    tokens = len(MIXED)
    if kernel == "norm":
        rows = Rows(Gpu(vendor), [264], tokens, slots, ranks, tile, order, seed=0)
        x, residual, weight = norm_data(tokens, 264)
        return np.concatenate(run_norm(rows, x, residual, weight, 1, 8 >> seed), 1)
    if kernel == "activation":
        rows = Rows(Gpu(vendor), [136, 136], tokens, slots, ranks, tile, order)
        return run_activation(rows, random_bf16(np.random.default_rng(3), tokens, 272))
    data = Heads(tokens, 64, 1, 1)
    rows = Rows(Gpu(vendor), data.widths, tokens, slots, ranks, tile, order)
    return run_rope(rows, data)[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_has_the_same_bits_alone_in_a_crowd_and_permuted(vendor: str, kernel: str) -> None:
    slices = KERNELS[kernel]
    ranks: Ranks = {0: (0,) * slices, 1: (3,) * slices, 3: (70,) * slices}
    everything = range(len(MIXED))
    whole = run_any(kernel, vendor, MIXED, ranks, 16, everything, 0)
    for tile, order in ((16, [4, 6, 1, 2, 0, 5, 3]), (64, everything), (16, [2]), (64, [5, 3])):
        assert (run_any(kernel, vendor, MIXED, ranks, tile, order, 1) == whole[list(order)]).all()
    plain = run_any(kernel, vendor, None, {}, 16, everything, 0)
    same = [slot < 1 for slot in MIXED]  # the base model, and an adapter that has no such module
    assert (whole[same] == plain[same]).all()
    assert (run_any(kernel, vendor, None, {}, 64, everything, 1) == plain).all()
    assert not (whole == plain).all(1)[~np.array(same)].any()
