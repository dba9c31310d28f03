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
NO_SITE, NO_SHAPE = {"words": [0] * 12}, {"words": [0] * 8}
SLOTS = 3
RANK = 20
"""Rounded up to 24 by the layout."""


@dataclass
class Call:
    """Arguments of a function, and of the kernel it launches.

    Attributes:
        shared: bytes; or a function of the launch's cluster and arguments.
        blocks_y: of the grid.
        fields: of the argument struct, by names with dots: numbers, or tensors for their addresses.
    """

    function: str
    args: list[Any]
    kernel: str
    threads: int
    shared: int | Callable[[int, Any], int]
    blocks_y: int
    fields: dict[str, Any] = field(default_factory=dict)


class Lora:
    """Adapters of a site in the second layer, and a batch of `tokens` rows."""

    def __init__(self, t: Tensors, inputs: int, outputs: tuple[int, ...], tokens: int, tile: int) -> None:
        layout = LoraLayout([LoraGroup("g", inputs, outputs)], 2, RANK)
        self.site, self.shape = layout.site(1, "g"), BatchShape(tokens + 5, SLOTS, tile)
        self.slabs = t(SLOTS, layout.slab_bytes, dtype=UINT8)
        self.words = t(self.shape.words, dtype=INT32)
        self.u = t(tokens, self.site.u_width, pad=8)
        self.blocks_y = min(-(-tokens // tile) + SLOTS + 1, tokens, self.shape.max_tiles)

    @property
    def site_words(self) -> dict[str, Any]:
        return {"words": list(self.site.words)}

    @property
    def shape_words(self) -> dict[str, Any]:
        s = self.shape
        return {"words": [s.max_tokens, s.num_slots, s.tile_tokens, s.max_tiles, s.perm, s.token_slot, s.tiles, s.live]}

    @property
    def batch_fields(self) -> dict[str, Any]:
        offsets = {"header": 0, "perm": self.shape.perm, "token_slot": self.shape.token_slot}
        offsets |= {"tiles": self.shape.tiles, "live": self.shape.live}
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


def skinny_gemm(
    t: Tensors, g: Geometry, tokens: int, outputs: int, *, adapters: bool = False, overlap: bool = False
) -> Call:
    inputs = 512
    x, weight, y = t(tokens, inputs, pad=8), t(outputs, inputs, pad=16), t(tokens, outputs, pad=24)
    fields = {"x": x, "weight": weight, "y": y, "x_stride": inputs + 8, "weight_stride": inputs + 16}
    fields |= {"y_stride": outputs + 24, "tokens": tokens, "in_features": inputs, "out_features": outputs}
    extra: list[Any] = [None, NO_SITE, None, NO_SHAPE, None]
    if adapters:
        lora = Lora(t, inputs, (outputs - 16, 16), tokens, 16)
        extra = [lora.slabs, lora.site_words, lora.words, lora.shape_words, lora.u]
        fields |= lora.batch_fields | {"u": lora.u, "u_stride": lora.u["strides"][0]}
    else:
        fields |= {"site.slabs": None, "batch.header": None, "u": None}
    if tokens <= 16:
        kernel, rows, threads = f"skinny_gemm_{8 if tokens <= 8 else 16}", 16, 256
        shared = g("stream_shared_bytes", g.warp, 8 if tokens <= 8 else 16)
    else:
        columns, rows = (32, 64) if tokens <= 32 else (64, 128 if outputs >= 1024 else 64)
        kernel, threads = f"skinny_gemm_{columns}x{rows}", g("gemm_threads", g.warp, rows)
        shared = g("gemm_shared_bytes", g.warp, rows, columns)
    fields["base_tiles"] = -(-outputs // rows)
    return Call("skinny_gemm", [x, weight, y, *extra, 0, overlap], kernel, threads, shared, 1, fields)


def lora_shrink(t: Tensors, g: Geometry, tokens: int, tile: int) -> Call:
    lora, x = Lora(t, 512, (64, 32), tokens, tile), t(tokens, 512, pad=8)
    args = [x, lora.slabs, lora.site_words, lora.words, lora.shape_words, lora.u, 0, False]
    fields = {"x": x, "x_stride": 520, "u": lora.u, "u_stride": lora.u["strides"][0]} | lora.batch_fields
    if tile == 16:
        shape = ("lora_shrink_16", 256, g("stream_shared_bytes", g.warp, 16))
    else:
        shape = ("lora_shrink_64x64", g("gemm_threads", g.warp, 64), g("gemm_shared_bytes", g.warp, 64, 64))
    return Call("lora_shrink", args, *shape, lora.blocks_y, fields)


def lora_expand_add(t: Tensors, g: Geometry, tokens: int, tile: int) -> Call:
    lora, y = Lora(t, 64, (256, 128, 128), tokens, tile), t(tokens, 512, pad=8)
    stride = lora.site.u_width
    lora.u = t(tokens, SLOTS * stride, pad=8)
    fields = {"y": y, "y_stride": 520} | lora.delta_fields(stride)
    shape = (f"lora_expand_add_{tile}x128", g("expand_threads", g.warp, 128), g("expand_shared_bytes", tile, 128))
    return Call("lora_expand_add", [y, *lora.delta(stride), False], *shape, lora.blocks_y, fields)


def _norm_shared(g: Geometry, tile: int, hidden: int, delta: bool) -> Callable[[int, Any], int]:
    def shared(cluster: int, args: Any) -> int:
        assert args.staged == g("norm_staged", g.warp, tile, hidden, cluster, delta)
        assert args.held == g("norm_held", g.warp, tile, hidden, cluster, args.block_tokens, delta)
        return g("norm_shared_bytes", g.warp, tile, hidden, cluster, args.block_tokens, delta)

    return shared


def rmsnorm(t: Tensors, g: Geometry, tokens: int, hidden: int) -> Call:
    x, weight, out = t(tokens, hidden, pad=8), t(hidden), t(tokens, hidden, pad=16)
    tile, each = (16, 1) if tokens < 256 else (64, 4)
    fields = {"x": x, "residual": None, "out": out, "weight": weight, "x_stride": hidden + 8, "out_stride": hidden + 16}
    fields |= {"tokens": tokens, "hidden": hidden, "block_tokens": each, "delta.u": None, "eps": 2**-20}
    shape = (f"fused_add_rmsnorm_{tile}", g("norm_threads", g.warp, tile), _norm_shared(g, tile, hidden, False))
    return Call("rmsnorm", [x, weight, 2**-20, out, False], *shape, -(-tokens // each), fields)


def fused_add_rmsnorm(t: Tensors, g: Geometry, tokens: int, hidden: int, tile: int, *, adapters: bool = True) -> Call:
    x, residual, weight = t(tokens, hidden, pad=8), t(tokens, hidden), t(hidden)
    fields = {
        "x": x,
        "residual": residual,
        "out": None,
        "weight": weight,
        "x_stride": hidden + 8,
        "residual_stride": hidden,
    }
    fields |= {"tokens": tokens, "hidden": hidden, "eps": 2**-20}
    delta, blocks_y = NO_DELTA, -(-tokens // (1 if tile == 16 else 4))
    if adapters:
        lora = Lora(t, 64, (hidden,), tokens, tile)
        delta, blocks_y = lora.delta(), lora.blocks_y
        fields |= lora.delta_fields() | {"block_tokens": g("norm_tokens", tile)}
    shape = (f"fused_add_rmsnorm_{tile}", g("norm_threads", g.warp, tile), _norm_shared(g, tile, hidden, adapters))
    return Call("fused_add_rmsnorm", [x, residual, weight, 2**-20, *delta, False], *shape, blocks_y, fields)


def silu_and_mul(t: Tensors, g: Geometry, tokens: int, inner: int, tile: int, *, adapters: bool = True) -> Call:
    x, out = t(tokens, 2 * inner, pad=8), t(tokens, inner, pad=16)
    fields = {"x": x, "out": out, "x_stride": 2 * inner + 8, "out_stride": inner + 16, "tokens": tokens, "inner": inner}
    delta, blocks_y = NO_DELTA, -(-tokens // g("activation_tokens", g.warp, tile))
    if adapters:
        lora = Lora(t, 64, (inner, inner), tokens, tile)
        delta, blocks_y = lora.delta(), lora.blocks_y
        fields |= lora.delta_fields()
    shared = g("activation_shared_bytes", g.warp, tile, adapters)
    shape = (f"silu_and_mul_{tile}", g("activation_threads", g.warp), shared)
    return Call("silu_and_mul", [x, out, *delta, False], *shape, blocks_y, fields)


def qk_norm_rope(t: Tensors, g: Geometry, tokens: int, dim: int, tile: int, *, adapters: bool = True) -> Call:
    columns = (4 + 2 * 2) * dim
    qkv, cos_sin, positions = t(tokens, columns, pad=8), t(99, dim, dtype=FLOAT32), t(tokens, dtype=INT64)
    optional: dict[str, Any] = dict.fromkeys(("q_weight", "k_weight", "bias", "k_pool", "v_pool", "locs"))
    delta, blocks_y = NO_DELTA, -(-tokens // g("rope_tokens", g.warp, dim, tile))
    fields = {"qkv": qkv, "qkv_stride": columns + 8, "cos_sin": cos_sin, "positions": positions, "tokens": tokens}
    fields |= {"num_heads": 4, "num_kv_heads": 2, "eps": 2**-20}
    if adapters:
        lora = Lora(t, 64, (4 * dim, 2 * dim, 2 * dim), tokens, tile)
        delta, blocks_y = lora.delta(), lora.blocks_y
        optional = {"q_weight": t(dim), "k_weight": t(dim), "bias": t(columns), "k_pool": t(50, 2, dim)}
        optional |= {"v_pool": t(50, 2, dim), "locs": t(tokens, dtype=INT64)}
        fields |= lora.delta_fields()
    o = optional
    args = [qkv, 4, 2, dim, o["q_weight"], o["k_weight"], 2**-20, cos_sin, positions, o["bias"]]
    args += [o["k_pool"], o["v_pool"], o["locs"], *delta, False]
    shape = (
        f"qk_norm_rope_{dim}x{tile}",
        g("rope_threads", g.warp, dim),
        g("rope_shared_bytes", g.warp, dim, tile, adapters),
    )
    return Call("qk_norm_rope", args, *shape, blocks_y, fields | optional)


Make = Callable[[Tensors, Geometry], Call]


def _cases() -> Iterator[tuple[str, Make]]:
    for tokens, outputs in ((1, 48), (8, 4096), (9, 200), (16, 32768), (17, 1000), (33, 512), (64, 1024)):
        yield f"skinny_gemm-{tokens}-{outputs}", partial(skinny_gemm, tokens=tokens, outputs=outputs)
    for tokens, outputs in ((1, 96), (12, 2048), (64, 2048)):
        yield f"skinny_gemm-{tokens}-adapters", partial(skinny_gemm, tokens=tokens, outputs=outputs, adapters=True)
    for tokens, tile in ((1, 16), (16, 16), (1000, 64)):
        yield f"lora_shrink-{tokens}", partial(lora_shrink, tokens=tokens, tile=tile)
        yield f"lora_expand_add-{tokens}", partial(lora_expand_add, tokens=tokens, tile=tile)
    for tokens, hidden in ((3, 2048), (700, 16384)):
        yield f"rmsnorm-{tokens}", partial(rmsnorm, tokens=tokens, hidden=hidden)
    for adapters in (False, True):
        for tokens, hidden, tile in ((5, 4096, 16), (5, 16384, 16), (600, 896, 64)):
            norm = partial(fused_add_rmsnorm, tokens=tokens, hidden=hidden, tile=tile, adapters=adapters)
            yield f"fused_add_rmsnorm-{tokens}-{hidden}-{adapters}", norm
        for tokens, tile in ((5, 16), (600, 64)):
            activation = partial(silu_and_mul, tokens=tokens, inner=1536, tile=tile, adapters=adapters)
            yield f"silu_and_mul-{tokens}-{adapters}", activation
            for dim in (64, 128, 256):
                rope = partial(qk_norm_rope, tokens=tokens, dim=dim, tile=tile, adapters=adapters)
                yield f"qk_norm_rope-{dim}x{tile}-{adapters}", rope


CASES: dict[str, Make] = dict(_cases())


def decode(launch: dict[str, Any]) -> Any:
    """The arguments that a kernel got."""
    return argument_types(Sources())[struct_of(launch["kernel"])].from_buffer_copy(bytes.fromhex(launch["args"]))


def check_launch(machine: Machine, call: Call, launch: dict[str, Any]) -> None:
    """That a launch is what the call asks for, and what a GPU can run."""
    args, cluster = decode(launch), launch["cluster"]
    shared = call.shared if isinstance(call.shared, int) else call.shared(cluster, args)
    assert (launch["kernel"], launch["block"], launch["shared"]) == (call.kernel, [call.threads, 1, 1], shared)
    assert launch["shared"] <= MOST_SHARED[machine.target]
    assert launch["grid"][1:] == [call.blocks_y, 1] and launch["grid"][0] % cluster == 0
    if hasattr(args, "num_splits"):
        assert args.num_splits == cluster
    for name, expected in call.fields.items():
        value = args
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, ctypes.Array):
            value = list(value)[: len(expected)]
        assert value == (expected["address"] if isinstance(expected, dict) else expected), name
