"""A call of every operation, and what the kernel it launches must be given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kernels.emulator.arguments import argument_types
from kernels.emulator.build import Sources
from kernels.mock_driver import FLOAT32, INT32, INT64, UINT8, Machine, Tensors
from kernels.mock_driver.geometry import Geometry, struct_of

from sgl_kernel.lora.batch import BatchShape
from sgl_kernel.lora.layout import LoraGroup, LoraLayout

MOST_SHARED = {"cuda": 227 << 10, "rocm": 64 << 10}
MOST_CLUSTER = {"cuda": 8, "rocm": 1}
MULTIPROCESSORS = 100
"""Of the mocks' GPUs, unless they are told otherwise."""
NO_SITE, NO_SHAPE = {"words": [0] * 12}, {"words": [0] * 8}
SLOTS = 3
LOW, HIGH = 16, 20
"""Ranks of layouts: all in registers of the kernels for up to 16; rounded up to 24, which takes those for 64."""


@dataclass
class Call:
    """Arguments of a function, and of the kernel it launches.

    Attributes:
        shared: bytes; or a function of the launch's cluster and arguments.
        clusters: along x of the grid; or a function of their size.
        cluster: blocks of one, where they may be as many as they like.
        blocks_y: of the grid.
        fields: of the argument struct, by names with dots: numbers, or tensors for their addresses.
    """

    function: str
    args: list[Any]
    kernel: str
    threads: int
    shared: int | Callable[[int, Any], int]
    clusters: int | Callable[[int], int]
    blocks_y: int
    fields: dict[str, Any] = field(default_factory=dict)
    cluster: int = 1


class Lora:
    """Adapters of a site in the second layer, and a batch of `tokens` rows."""

    def __init__(
        self, t: Tensors, inputs: int, outputs: tuple[int, ...], tokens: int, tile: int, rank: int = HIGH
    ) -> None:
        layout = LoraLayout([LoraGroup("g", inputs, outputs)], 2, rank)
        self.held = 16 if rank <= 16 else 64
        self.site, self.shape = layout.site(1, "g"), BatchShape(tokens + 5, SLOTS, tile)
        self.slabs = t(SLOTS, layout.slab_bytes, dtype=UINT8)
        self.words = t(self.shape.words, dtype=INT32)
        self.u = t(tokens, self.site.u_width, pad=8)
        # Whole tiles, a partial one of every slot and of the base model; no more than there are rows.
        self.tiles = min(-(-tokens // tile) + SLOTS + 1, tokens, self.shape.max_tiles)

    @property
    def site_words(self) -> dict[str, Any]:
        return {"words": list(self.site.words)}

    @property
    def shape_words(self) -> dict[str, Any]:
        s = self.shape
        return {"words": [s.max_tokens, s.num_slots, s.tile_tokens, s.max_tiles, s.perm, s.token_slot, s.tiles, s.live]}

    @property
    def batch_fields(self) -> dict[str, Any]:
        offsets = {name: getattr(self.shape, name) for name in ("perm", "token_slot", "tiles", "live")}
        found = {f"batch.{name}": self.words["address"] + 4 * words for name, words in offsets.items()}
        site = self.site
        found |= {"site.slabs": self.slabs, "site.slab_bytes": self.slabs["shape"][1]}
        for name in ("table_offset", "a_offset", "in_features", "rank_cap", "num_slices"):
            found[f"site.{name}"] = getattr(site, name)
        found["site.out_features"] = list(site.out_features)
        found["site.b_offsets"] = list(site.b_offsets)
        return found

    def delta(self, slot_stride: int = 0) -> list[Any]:
        """As functions take it."""
        return [self.u, slot_stride, self.slabs, self.site_words, self.words, self.shape_words]

    def delta_fields(self, slot_stride: int = 0) -> dict[str, Any]:
        own = {"u": self.u, "u_stride": self.u["strides"][0], "u_slot_stride": slot_stride} | self.batch_fields
        return {f"delta.{name}": value for name, value in own.items()}


NO_DELTA = [None, 0, None, NO_SITE, None, NO_SHAPE]


def _blocks(count: int, each: int) -> int:
    return -(-count // each)


def _strip(g: Geometry, tile: int) -> int:
    """Token rows that a warp multiplies with B at once: eight for steps of decoding, where its matrix units can."""
    return 8 if tile == 16 and g.warp == 32 else 16


def _piece(g: Geometry, tile: int) -> int:
    """Rows of a tile that a block takes: a strip, so that more blocks share a step of decoding; else all of them."""
    return _strip(g, tile) if tile == 16 else tile


def skinny_gemm(
    t: Tensors,
    g: Geometry,
    tokens: int,
    outputs: int,
    *,
    inputs: int = 512,
    adapters: bool = False,
    overlap: bool = False,
    warpgroups: bool = True,
) -> Call:
    """On a GPU that has warpgroups, or not."""
    if tokens > 16 and g.warp == 32 and warpgroups and not adapters:
        return _group_gemm(t, g, tokens, outputs, inputs, overlap)
    x, weight, y = t(tokens, inputs, pad=8), t(outputs, inputs, pad=16), t(tokens, outputs, pad=24)
    fields = {"x": x, "weight": weight, "y": y, "x_stride": inputs + 8, "weight_stride": inputs + 16}
    fields |= {"y_stride": outputs + 24, "tokens": tokens, "in_features": inputs, "out_features": outputs}
    stream = tokens <= 16
    if stream:
        kernel, rows, threads = f"skinny_gemm_{8 if tokens <= 8 else 16}", 16, 256
        shared = g("stream_shared_bytes", g.warp, 8 if tokens <= 8 else 16)
    else:
        columns, rows = 32 if tokens <= 32 else 64, 64
        kernel, threads = f"skinny_gemm_{columns}x{rows}", g("gemm_threads", g.warp, rows)
        shared = g("gemm_shared_bytes", g.warp, rows, columns)
    extra: list[Any] = [None, NO_SITE, None, NO_SHAPE, None]
    tiles, live, units = _blocks(outputs, rows), 0, 0
    if adapters:
        lora = Lora(t, inputs, (outputs - 16, 16), tokens, 16)
        extra = [lora.slabs, lora.site_words, lora.words, lora.shape_words, lora.u]
        live = min(SLOTS, tokens)  # no step has more
        units = live * _blocks(lora.site.u_width, rows)
        fields |= lora.batch_fields | {"u": lora.u, "u_stride": lora.u["strides"][0]}
    else:
        fields |= {"site.slabs": None, "batch.live": None, "u": None}
    fields |= {"base_tiles": tiles, "max_live": live, "a_units": units}

    def clusters(size: int) -> int:
        room = 2 * MULTIPROCESSORS // size  # two blocks fit a multiprocessor
        return min(tiles + units, room) if stream else tiles + min(units, room)

    # 512 columns make two parts of 256, if there are multiprocessors that would have nothing to do.
    assert inputs == 512
    cluster = 2 if tiles < 0.9 * MULTIPROCESSORS else 1
    args = [x, weight, y, *extra, 0, overlap]
    return Call("skinny_gemm", args, kernel, threads, shared, clusters, 1, fields, cluster)


def _group_gemm(t: Tensors, g: Geometry, tokens: int, outputs: int, inputs: int, overlap: bool) -> Call:
    x, weight, y = t(tokens, inputs, pad=8), t(outputs, inputs, pad=16), t(tokens, outputs, pad=24)
    rows, splits = divmod(g("group_choice", MULTIPROCESSORS, outputs, inputs), 16)
    # Maps of the mock: address, rows, columns, bytes from row to row, rows and columns of a tile.
    fields = {"x": [x["address"], tokens, inputs, 2 * (inputs + 8), 64, 64]}
    fields["weight"] = [weight["address"], outputs, inputs, 2 * (inputs + 16), rows, 64]
    fields |= {"y": y, "y_stride": outputs + 24, "tokens": tokens, "in_features": inputs, "out_features": outputs}
    fields |= {"part_columns": _blocks(inputs, 64 * splits) * 64, "share_tokens": _blocks(tokens, splits)}
    args = [x, weight, y, None, NO_SITE, None, NO_SHAPE, None, 0, overlap]
    # Four warps that multiply and one that copies; eight stages of tiles, 64 columns of bf16 wide.
    shape = (f"skinny_gemm_group_{rows}", 160, 1024 + 8 * ((rows + 64) * 128 + 16))
    return Call("skinny_gemm", args, *shape, _blocks(outputs, rows), 1, fields, splits)


def lora_shrink(t: Tensors, g: Geometry, tokens: int, tile: int) -> Call:
    inputs = 2048
    lora, x = Lora(t, inputs, (64, 32), tokens, tile), t(tokens, inputs, pad=8)
    args = [x, lora.slabs, lora.site_words, lora.words, lora.shape_words, lora.u, False]
    fields = {"x": x, "x_stride": inputs + 8, "u": lora.u, "u_stride": lora.u["strides"][0]} | lora.batch_fields
    if tile == 16:
        shape = ("lora_shrink_16", 256, g("stream_shared_bytes", g.warp, 16))
    else:
        shape = ("lora_shrink_64x64", g("gemm_threads", g.warp, 64), g("gemm_shared_bytes", g.warp, 64, 64))
    clusters = _blocks(2 * 24, 16 if tile == 16 else 64)
    return Call("lora_shrink", args, *shape, clusters, lora.tiles, fields)


def lora_expand_add(t: Tensors, g: Geometry, tokens: int, tile: int, rank: int = HIGH) -> Call:
    outputs = (256, 136, 24)
    lora, y = Lora(t, 64, outputs, tokens, tile, rank), t(tokens, sum(outputs), pad=8)
    stride = lora.site.u_width
    lora.u = t(tokens, SLOTS * stride, pad=8)
    fields = {"y": y, "y_stride": sum(outputs) + 8} | lora.delta_fields(stride)
    # 128 threads; a warp has 32 columns, and every slice begins a block.
    blocks = sum(_blocks(columns, 128 // g.warp * 32) for columns in outputs)
    shape = (f"lora_expand_add_{lora.held}", 128, 0, blocks, lora.tiles)
    return Call("lora_expand_add", [y, *lora.delta(stride), False], *shape, fields)


def _walk_shared(g: Geometry, threads: int, factors: int) -> int:
    """What warps that walk over the 64 rows of a tile have there: two vectors and some u of each of a lane's rows.

    Four lanes have 32 columns of a row, so that a lane has eight rows of the tile, or four.
    """
    return threads * (64 // (g.warp // 4)) * (2 * 16 + 8 * factors)


def _norm_shared(g: Geometry, hidden: int, strip: int) -> Callable[[int, Any], int]:
    def shared(cluster: int, args: Any) -> int:
        sizes = (g.warp, hidden, cluster, args.block_tokens, strip)
        assert args.parts * cluster * 32 >= hidden > (args.parts - 1) * cluster * 32
        assert args.turns == g("norm_turns", *sizes)
        assert args.staged == g("norm_staged", hidden, cluster)
        assert args.held == g("norm_held", *sizes)
        return g("norm_shared_bytes", *sizes)

    return shared


def rmsnorm(t: Tensors, g: Geometry, tokens: int, hidden: int) -> Call:
    x, weight, out = t(tokens, hidden, pad=8), t(hidden), t(tokens, hidden, pad=16)
    each = 1 if tokens < 1024 else 4
    fields = {"x": x, "residual": None, "out": out, "weight": weight, "x_stride": hidden + 8, "out_stride": hidden + 16}
    fields |= {"tokens": tokens, "hidden": hidden, "block_tokens": each, "delta.u": None, "eps": 2**-20}
    fields["mean"] = ctypes.c_float(1 / hidden).value
    shape = ("fused_add_rmsnorm", 256, _norm_shared(g, hidden, 0), 1, _blocks(tokens, each))
    return Call("rmsnorm", [x, weight, 2**-20, out, False], *shape, fields)


def fused_add_rmsnorm(
    t: Tensors, g: Geometry, tokens: int, hidden: int, tile: int, *, adapters: bool = True, rank: int = HIGH
) -> Call:
    x, residual, weight = t(tokens, hidden, pad=8), t(tokens, hidden), t(hidden)
    fields = {"x": x, "residual": residual, "out": None, "weight": weight}
    fields |= {"x_stride": hidden + 8, "residual_stride": hidden, "tokens": tokens, "hidden": hidden, "eps": 2**-20}
    each = 1 if tile == 16 else 4
    delta, kernel, strip, pieces, blocks_y, cluster = NO_DELTA, "fused_add_rmsnorm", 0, 1, _blocks(tokens, each), 1
    if adapters:
        lora = Lora(t, 64, (hidden,), tokens, tile, rank)
        delta, blocks_y, kernel = lora.delta(), lora.tiles, f"fused_add_rmsnorm_{tile}x{lora.held}"
        each = strip = _strip(g, tile)
        pieces, cluster = tile // strip, g("norm_cluster", tile, hidden)
        fields |= lora.delta_fields()
    fields |= {"block_tokens": each}
    shape = (kernel, g("norm_threads", g.warp, strip), _norm_shared(g, hidden, strip), pieces, blocks_y)
    args = [x, residual, weight, 2**-20, *delta, False]
    return Call("fused_add_rmsnorm", args, *shape, fields, cluster)


def silu_and_mul(
    t: Tensors, g: Geometry, tokens: int, inner: int, tile: int, *, adapters: bool = True, rank: int = HIGH
) -> Call:
    x, out = t(tokens, 2 * inner, pad=8), t(tokens, inner, pad=16)
    fields = {"x": x, "out": out, "x_stride": 2 * inner + 8, "out_stride": inner + 16, "tokens": tokens, "inner": inner}
    delta, kernel, shared = NO_DELTA, "silu_and_mul", 0
    grid = (_blocks(inner, 128 * 8), _blocks(tokens, 4))  # eight columns of four rows a thread
    if adapters:
        lora = Lora(t, 64, (inner, inner), tokens, tile, rank)
        delta, kernel = lora.delta(), f"silu_and_mul_{tile}x{lora.held}"
        pieces = tile // _piece(g, tile)
        grid = (_blocks(inner, 128 // g.warp * 32), lora.tiles * pieces)
        shared = _walk_shared(g, 128, 2) if tile == 64 else 0
        fields |= lora.delta_fields() | {"block_tokens": _piece(g, tile), "piece_bits": pieces - 1}
    return Call("silu_and_mul", [x, out, *delta, False], kernel, 128, shared, *grid, fields)


def qk_norm_rope(
    t: Tensors, g: Geometry, tokens: int, dim: int, tile: int, *, adapters: bool = True, rank: int = HIGH
) -> Call:
    heads, columns = 4 + 2 * 2, (4 + 2 * 2) * dim
    qkv, cos_sin, positions = t(tokens, columns, pad=8), t(99, dim, dtype=FLOAT32), t(tokens, dtype=INT64)
    optional: dict[str, Any] = dict.fromkeys(("q_weight", "k_weight", "bias", "k_pool", "v_pool", "locs"))
    fields = {"qkv": qkv, "qkv_stride": columns + 8, "cos_sin": cos_sin, "positions": positions, "tokens": tokens}
    fields |= {"num_heads": 4, "num_kv_heads": 2, "eps": 2**-20}
    # Sixteen rows; a lane has sixteen columns of one of them.
    delta, kernel, threads, shared, blocks_y = NO_DELTA, f"qk_norm_rope_{dim}", dim, 0, _blocks(tokens, 16)
    block_heads = 1 if tile == 16 else 4
    if adapters:
        lora = Lora(t, 64, (4 * dim, 2 * dim, 2 * dim), tokens, tile, rank)
        delta, kernel = lora.delta(), f"qk_norm_rope_{dim}x{tile}x{lora.held}"
        optional = {"q_weight": t(dim), "k_weight": t(dim), "bias": t(columns), "k_pool": t(50, 2, dim)}
        optional |= {"v_pool": t(50, 2, dim), "locs": t(tokens, dtype=INT64)}
        warps = dim // 64  # of a head: 32 columns of either half each
        block_heads = 1 if tile == 16 else 4 // warps
        pieces = tile // _piece(g, tile)
        threads, blocks_y = block_heads * warps * g.warp, lora.tiles * pieces
        # Two buffers of a float for every warp and row.
        shared = 2 * block_heads * warps * 16 * 4 if warps > 1 else 0
        shared += _walk_shared(g, threads, 1) if tile == 64 else 0
        fields |= lora.delta_fields() | {"block_tokens": _piece(g, tile), "piece_bits": pieces - 1}
    fields |= {"block_heads": block_heads}
    o = optional
    args = [qkv, 4, 2, dim, o["q_weight"], o["k_weight"], 2**-20, cos_sin, positions, o["bias"]]
    args += [o["k_pool"], o["v_pool"], o["locs"], *delta, False]
    grid = (_blocks(heads, block_heads), blocks_y)
    return Call("qk_norm_rope", args, kernel, threads, shared, *grid, fields | optional)


Make = Callable[[Tensors, Geometry], Call]


def _cases() -> Iterator[tuple[str, Make]]:
    for tokens, outputs in ((1, 48), (8, 4096), (9, 200), (16, 32768), (17, 1000), (33, 512), (50, 9600), (64, 12800)):
        yield f"skinny_gemm-{tokens}-{outputs}", partial(skinny_gemm, tokens=tokens, outputs=outputs)
    for tokens, outputs in ((1, 96), (12, 2048), (31, 200), (64, 2048)):
        yield f"skinny_gemm-{tokens}-adapters", partial(skinny_gemm, tokens=tokens, outputs=outputs, adapters=True)
    for tokens, tile in ((1, 16), (16, 16), (1000, 64)):
        yield f"lora_shrink-{tokens}", partial(lora_shrink, tokens=tokens, tile=tile)
        for rank in (LOW, HIGH):
            expand = partial(lora_expand_add, tokens=tokens, tile=tile, rank=rank)
            yield f"lora_expand_add-{tokens}-{rank}", expand
    for tokens, hidden in ((3, 2048), (1023, 512), (1024, 16384)):
        yield f"rmsnorm-{tokens}", partial(rmsnorm, tokens=tokens, hidden=hidden)
    for term in ({"adapters": False}, {"rank": LOW}, {"rank": HIGH}):
        kind = str(term.get("rank", "plain"))
        for tokens, hidden, tile in ((5, 4096, 16), (5, 16384, 16), (2, 264, 16), (1100, 896, 64), (1100, 16384, 64)):
            norm = partial(fused_add_rmsnorm, tokens=tokens, hidden=hidden, tile=tile, **term)
            yield f"fused_add_rmsnorm-{tokens}-{hidden}-{kind}", norm
        for tokens, tile in ((5, 16), (37, 16), (1100, 64)):
            activation = partial(silu_and_mul, tokens=tokens, inner=1544, tile=tile, **term)
            yield f"silu_and_mul-{tokens}-{kind}", activation
            for dim in (64, 128, 256):
                rope = partial(qk_norm_rope, tokens=tokens, dim=dim, tile=tile, **term)
                yield f"qk_norm_rope-{dim}-{tokens}-{kind}", rope


CASES: dict[str, Make] = dict(_cases())


def decode(launch: dict[str, Any]) -> Any:
    """The arguments that a kernel got."""
    return argument_types(Sources())[struct_of(launch["kernel"])].from_buffer_copy(bytes.fromhex(launch["args"]))


def check_launch(machine: Machine, call: Call, launch: dict[str, Any], most_cluster: int = 0) -> None:
    """That a launch is what the call asks for, and what a GPU can run, whose clusters have `most_cluster` blocks."""
    args, cluster = decode(launch), launch["cluster"]
    assert cluster == min(call.cluster, most_cluster or MOST_CLUSTER[machine.target])
    shared = call.shared if isinstance(call.shared, int) else call.shared(cluster, args)
    assert (launch["kernel"], launch["block"], launch["shared"]) == (call.kernel, [call.threads, 1, 1], shared)
    assert launch["shared"] <= MOST_SHARED[machine.target]
    clusters = call.clusters if isinstance(call.clusters, int) else call.clusters(cluster)
    assert launch["grid"] == [clusters * cluster, call.blocks_y, 1]
    if hasattr(args, "num_splits"):
        assert args.num_splits == cluster
    for name, expected in call.fields.items():
        value = args
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, ctypes.Array):
            value = list(value)[: len(expected)]
        assert value == (expected["address"] if isinstance(expected, dict) else expected), name
