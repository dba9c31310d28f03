"""That the emulated tests would notice: kernels with one mistake each must fail, and say what is wrong.

Mistakes that only sometimes do harm on a GPU (a barrier too few, a copy not waited for, a read outside) are found by
the rules of the emulator, the others by their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from kernels.emulator import VENDORS, Gpu, KernelError
from kernels.emulator.adapters import Adapters
from kernels.emulator.build import Sources
from kernels.emulator.numbers import random_bf16
from kernels.test_emulated_expand import assert_expanded, expand, random_u, starting_y
from kernels.test_emulated_gemm import Product, assert_product, assert_u
from kernels.test_emulated_shrink import assert_shrunk, shrink

HEADERS = ("stream_gemm", "tile_gemm", "expand", "lora")
STREAM_GEMM, TILE_GEMM, EXPAND_TILE, LORA = (f"include/sgl_kernel/{name}.h" for name in HEADERS)
GEMM, EXPAND = "csrc/kernels/gemm.h", "csrc/kernels/expand.h"
UNITS = "csrc/kernels/gemm.cu", "csrc/kernels/expand.cu"

NUMBERS = "numbers"
"""No rule is broken; the result is wrong."""
RACE = "race|which nobody has written"
"""What a missing barrier is called depends on who comes first."""
OUTSIDE, EARLY, STUCK = r"bytes at", "before wait_for_previous_kernel", "deadlock|divergence"
NEVER = "leaves without wait_for_previous_kernel"
ON_ITS_WAY = "on its way"


@dataclass(frozen=True)
class Mutant:
    """`old`, which must be in `file`, becomes `new`; each vendor's run must end in an error that matches."""

    file: str
    old: str
    new: str
    error: str
    vendors: tuple[str, ...] = VENDORS


WAIT = " wait_for_previous_kernel()"


def shrink_exit(kind: str) -> str:
    """How the shrink kernels begin."""
    start = f"lora_shrink_{kind}(const ShrinkArgs& args) {{\n  let_next_kernel_start();\n"
    return f"{start}  if (block_y() >= num_lora_tiles(args.batch)) return{WAIT};"


STREAM_MUTANTS = {
    "waits for one copy too few": Mutant(
        STREAM_GEMM, "async_wait<kStages - 2>();", "async_wait<kStages - 1>();", ON_ITS_WAY, ("cuda",)
    ),
    "no warp barrier": Mutant(STREAM_GEMM, "        warp_barrier();\n", "", f"{RACE}|{ON_ITS_WAY}"),
    "a warp barrier before the wait": Mutant(
        STREAM_GEMM,
        "async_wait<kStages - 2>();\n        warp_barrier();",
        "warp_barrier();\n        async_wait<kStages - 2>();",
        f"{RACE}|{ON_ITS_WAY}",
        ("cuda",),
    ),
    "fetches into the stage that is read": Mutant(
        STREAM_GEMM,
        "i < kStages - 1; ++i) {\n      if (busy && work.exists(fe",
        "i < kStages; ++i) {\n      if (busy && work.exists(fe",
        f"{RACE}|{ON_ITS_WAY}",
    ),
    "does not wait for the previous kernel": Mutant(STREAM_GEMM, "    wait_for_previous_kernel();\n", "", EARLY),
    "fetches tokens too early": Mutant(
        STREAM_GEMM,
        "        copy_rows(fetched);\n        f",
        "        copy_rows(fetched), copy_tokens(fetched);\n        f",
        EARLY,
    ),
    "walks to the next unit instead of its own": Mutant(STREAM_GEMM, "      unit += stride;", "      ++unit;", NUMBERS),
    "stays in its unit": Mutant(STREAM_GEMM, "      unit += stride;\n", "", NUMBERS, ("cuda",)),
    "does not begin the next unit at its first slice": Mutant(STREAM_GEMM, "      slice = 0;\n", "", NUMBERS),
    "one slice too many of a unit": Mutant(STREAM_GEMM, "if (++slice < slices)", "if (++slice <= slices)", NUMBERS),
    "keeps the rows of the unit before": Mutant(
        STREAM_GEMM,
        "      if (at.slice == 0)\n        SGL_UNROLL\n        for (int i = 0; i < kRowCopies",
        """
      if (at.slice == 0 && at.unit == first)
        for (int i = 0; i < kRowCopies""",
        NUMBERS,
    ),
    "begins every unit in the first stage": Mutant(
        STREAM_GEMM,
        "Accumulator even = {}, odd = {};",
        "Accumulator even = {}, odd = {}; stage = 0;",
        f"{ON_ITS_WAY}|{RACE}|{NUMBERS}",
    ),
    "keeps the sums of the unit before": Mutant(
        STREAM_GEMM,
        "    for (int unit = first; work.exists(unit); unit += stride) {\n      Accumulator even = {}, odd = {};",
        "    Accumulator even = {}, odd = {};\n    for (int unit = first; work.exists(unit); unit += stride) {",
        NUMBERS,
    ),
    "wrong step along the sum": Mutant(
        STREAM_GEMM,
        "copy_rows = [&](const Cursor& at) {\n      const int k = k_first + at.slice * kWarps * kDepth;",
        "copy_rows = [&](const Cursor& at) {\n      const int k = k_first + at.slice * kDepth;",
        NUMBERS,
    ),
    "every warp begins with the first slice": Mutant(
        STREAM_GEMM, "k_begin + warp * kDepth + chunk", "k_begin + chunk", NUMBERS
    ),
    "a slice too few": Mutant(STREAM_GEMM, "(all - warp + kWarps - 1) / kWarps", "(all - warp) / kWarps", NUMBERS),
    "reads behind the end of the sum": Mutant(
        STREAM_GEMM, "source != nullptr && k < k_end", "source != nullptr", f"{OUTSIDE}|{NUMBERS}"
    ),
    "warps share a ring": Mutant(
        STREAM_GEMM, "shared + warp * kStages * kStageBytes", "shared", f"{RACE}|{ON_ITS_WAY}"
    ),
    "reads eight tokens that are not there": Mutant(
        STREAM_GEMM, "swizzle(row % kTokens, step", "swizzle(row, step", f"{RACE}|{ON_ITS_WAY}|{OUTSIDE}", ("cuda",)
    ),
    "wrong half of a fragment": Mutant(
        STREAM_GEMM, "(row % kTokens, step * 2 + half)", "(row % kTokens, step * 2 + 1 - half)", NUMBERS
    ),
    "adds eight columns of sixteen": Mutant(STREAM_GEMM, "mma<kTokens>(", "mma<8>(", NUMBERS, ("cuda",)),
    "stores sixteen columns of eight": Mutant(
        STREAM_GEMM, "Accumulator::kSize * kTokens / 16", "Accumulator::kSize", f"{RACE}|{OUTSIDE}", ("cuda",)
    ),
    "every other step is lost": Mutant(STREAM_GEMM, "even.v[i] + odd.v[i]", "even.v[i]", NUMBERS),
    "warps share their sums": Mutant(STREAM_GEMM, "sums + (warp_id() * kTokens + ", "sums + (", RACE),
    "no barrier before the sums are read": Mutant(
        STREAM_GEMM, "if (parts > 1) cluster_barrier();\n    else barrier();\n    c", "c", RACE
    ),
    "a block's barrier before the sums are read": Mutant(
        STREAM_GEMM,
        "if (parts > 1) cluster_barrier();\n    else barrier();\n    c",
        "barrier();\n    c",
        RACE,
        ("cuda",),
    ),
    "no barrier after the sums are read": Mutant(
        STREAM_GEMM, "while others read them\n    else barrier();", "while others read them", RACE
    ),
    "a block's barrier after the sums are read": Mutant(
        STREAM_GEMM,
        "if (parts > 1) cluster_barrier();  // nobody overwrites",
        "if (parts > 1) barrier();  // nobody overwrites",
        "leaves while|which has left|race",
        ("cuda",),
    ),
    "adds its own part for every other": Mutant(
        STREAM_GEMM, "(place), part)", "(place), cluster_rank())", NUMBERS, ("cuda",)
    ),
    "leaves the first part out": Mutant(STREAM_GEMM, "int part = 0; part", "int part = 1; part", NUMBERS),
    "adds a part that is not there": Mutant(STREAM_GEMM, "part < parts", "part <= parts", "reads block"),
    "leaves the last warp out": Mutant(STREAM_GEMM, "warp < kWarps; ++warp", "warp < kWarps - 1; ++warp", NUMBERS),
    "every block stores all sums": Mutant(
        STREAM_GEMM, "int i = cluster_rank() * kThreads + thread_id(); i", "int i = thread_id(); i", "race", ("cuda",)
    ),
    "takes all of the sum in every block": Mutant(
        GEMM,
        "k.begin, k.end);\n}\n\n// Units of A's rows for",
        "0, args.in_features);\n}\n\n// Units of A's rows for",
        NUMBERS,
        ("cuda",),
    ),
    "every cluster takes every unit": Mutant(
        GEMM,
        "GemmWork{args}, block_x() / args.num_splits, grid_x() / args.num_splits",
        "GemmWork{args}, block_x() / args.num_splits, 1",
        "race",
    ),
    "the blocks of a cluster take units of their own": Mutant(
        GEMM,
        "GemmWork{args}, block_x() / args.num_splits",
        "GemmWork{args}, block_x()",
        f"{NUMBERS}|race|{STUCK}",
        ("cuda",),
    ),
    "no mask of weight rows": Mutant(
        GEMM,
        "return n < args.out_features ? args.weight + n * args.weight_stride : nullptr;",
        "return args.weight + n * args.weight_stride;",
        OUTSIDE,
    ),
    "stores rows that are not there": Mutant(
        GEMM, "if (n < args.out_features) *reinterpret_cast", "*reinterpret_cast", f"{OUTSIDE}|{NUMBERS}"
    ),
    "no mask of token rows": Mutant(
        GEMM,
        "int, int t) const {\n    return t < args.tokens ? args.x + t * args.x_stride : nullptr;",
        "int, int t) const {\n    return args.x + t * args.x_stride;",
        OUTSIDE,
    ),
    "stores tokens that are not there": Mutant(GEMM, "{ return args.tokens; }", "{ return args.tokens + 1; }", OUTSIDE),
    "one base unit too many": Mutant(GEMM, "if (unit >= args.base_tiles)", "if (unit > args.base_tiles)", NUMBERS),
    "a unit of a slot too few": Mutant(
        GEMM,
        "(args.site.num_slices * args.site.rank_cap + 15) / 16;",
        "args.site.num_slices * args.site.rank_cap / 16;",
        NUMBERS,
    ),
    "every unit of a slot is its first": Mutant(GEMM, "index % each * 16", "0", f"race|{NUMBERS}"),
    "takes a slot for the next live one": Mutant(
        GEMM, "args.batch.live[index / each]", "index / each", f"{NUMBERS}|{OUTSIDE}"
    ),
    "no mask of ranks": Mutant(
        GEMM, "    if (first + r >= count(a)) return nullptr;\n", "", f"{OUTSIDE}|race|{NUMBERS}"
    ),
    "stores ranks that are not there": Mutant(
        GEMM, "      if (first + r + i >= count(a)) return;\n", "", f"{OUTSIDE}|race|{NUMBERS}"
    ),
    "writes u for tokens of other slots": Mutant(
        GEMM, "if (args.batch.token_slot[t] == a.slot) a.store", "a.store", f"race|{NUMBERS}"
    ),
    "shrinks tokens of other tiles": Mutant(GEMM, "return t < tile.count ? args.x", "return t < 16 ? args.x", OUTSIDE),
    "stores tokens of other tiles": Mutant(GEMM, "{ return tile.count; }", "{ return 16; }", f"race|{OUTSIDE}"),
    "forgets where a tile starts": Mutant(
        GEMM,
        "int t) const { return args.batch.perm[tile.start + t]; }",
        "int t) const { return args.batch.perm[t]; }",
        f"race|{NUMBERS}",
    ),
    "works on tiles without an adapter": Mutant(
        GEMM, shrink_exit("stream"), shrink_exit("stream").replace("lora_tiles", "tiles"), OUTSIDE
    ),
    "a block that has nothing to do does not wait": Mutant(
        GEMM, shrink_exit("stream"), shrink_exit("stream").replace(WAIT, ""), NEVER
    ),
}

TILE_MUTANTS = {
    "no barrier in the main loop": Mutant(
        TILE_GEMM, "async_wait<kStages - 2>();\n      barrier();", "async_wait<kStages - 2>();", RACE
    ),
    "waits for one copy too few": Mutant(
        TILE_GEMM, "async_wait<kStages - 2>();", "async_wait<kStages - 1>();", "on its way", ("cuda",)
    ),
    "no barrier after the main loop": Mutant(TILE_GEMM, "async_wait<0>();\n    barrier();", "async_wait<0>();", RACE),
    "no barrier between tiles": Mutant(TILE_GEMM, "barrier();  // the stages may", "// the stages may", RACE),
    "does not wait for the previous kernel": Mutant(TILE_GEMM, "    wait_for_previous_kernel();\n", "", EARLY),
    "wrong row of a fragment": Mutant(
        TILE_GEMM, "row_tile + swizzle(warp_id() * 16 + row,", "row_tile + swizzle(warp_id() * 16 + (row ^ 8),", NUMBERS
    ),
    "wrong half of a fragment": Mutant(
        TILE_GEMM,
        "token_tile + swizzle(t * 16 + row, step * 2 + half)",
        "token_tile + swizzle(t * 16 + row, step * 2 + 1 - half)",
        NUMBERS,
    ),
    "a product by some lanes": Mutant(
        TILE_GEMM, "if (active) multiply", "if (active && lane_id() < 8) multiply", STUCK
    ),
    "reads behind the end of the sum": Mutant(
        TILE_GEMM, "source != nullptr && k < k_end", "source != nullptr", f"{OUTSIDE}|{NUMBERS}", ("cuda",)
    ),
    "adds the first part twice": Mutant(
        TILE_GEMM, "for (int other = 1; other < parts", "for (int other = 0; other < parts", NUMBERS, ("cuda",)
    ),
    "starts with its own part": Mutant(
        TILE_GEMM, "cluster_load(place, 0)", "cluster_load(place, cluster_rank())", NUMBERS, ("cuda",)
    ),
    "no barrier before the sums are read": Mutant(
        TILE_GEMM, "    cluster_barrier();\n    constexpr int kQuads", "    constexpr int kQuads", RACE
    ),
    "leaves while others read its sums": Mutant(
        TILE_GEMM, "if (parts > 1) cluster_barrier();", "", "leaves while|which has left|race", ("cuda",)
    ),
    "no mask of weight rows": Mutant(
        GEMM,
        "return r < rows ? args.weight + (first + r) * args.weight_stride : nullptr;",
        "return args.weight + (first + r) * args.weight_stride;",
        OUTSIDE,
    ),
    "no mask of token rows": Mutant(
        GEMM,
        "[&](int t) { return t < args.tokens ? args.x + t * args.x_stride : nullptr; }",
        "[&](int t) { return args.x + t * args.x_stride; }",
        OUTSIDE,
        ("cuda",),
    ),
    "no mask of ranks": Mutant(GEMM, "if (r >= rows) return nullptr;\n", "", f"{OUTSIDE}|race|{NUMBERS}"),
    "writes four ranks at a time": Mutant(GEMM, "j < 4 && r + j < rows", "j < 4", f"{OUTSIDE}|race|{NUMBERS}"),
    "writes u for tokens of other slots": Mutant(
        GEMM, "args.batch.token_slot[t] == slot ? t : -1", "t", f"race|{NUMBERS}", ("cuda",)
    ),
    "one base tile too many": Mutant(
        GEMM, "if (cluster < args.base_tiles) {", "if (cluster <= args.base_tiles) {", NUMBERS, ("hip",)
    ),
    "works on tiles without an adapter": Mutant(
        GEMM, shrink_exit("tile"), shrink_exit("tile").replace("lora_tiles", "tiles"), OUTSIDE, ("cuda",)
    ),
    "a block that has no tile does not wait": Mutant(
        GEMM, shrink_exit("tile"), shrink_exit("tile").replace(WAIT, ""), NEVER, ("cuda",)
    ),
    "a block that has no rank does not wait": Mutant(
        GEMM, f"if (rows <= 0) return{WAIT};", "if (rows <= 0) return;", NEVER, ("hip",)
    ),
    "takes A of the first slice": Mutant(
        LORA,
        "static_cast<int64_t>(slice) * site.rank_cap * site.in_features",
        "0 * site.in_features",
        NUMBERS,
        ("cuda",),
    ),
}

EXPAND_MUTANTS = {
    "does not wait for the previous kernel": Mutant(EXPAND, "  wait_for_previous_kernel();\n", "", EARLY),
    "a block that has no tile does not wait": Mutant(
        EXPAND, f"num_lora_tiles(delta.batch)) return{WAIT};", "num_lora_tiles(delta.batch)) return;", NEVER, ("hip",)
    ),
    "a block that has no rank does not wait": Mutant(
        EXPAND, f"if (module.rank == 0) return{WAIT};", "if (module.rank == 0) return;", NEVER, ("cuda",)
    ),
    "no barrier before the next part": Mutant(
        EXPAND_TILE, "barrier();  // the operands of", "// the operands of", RACE
    ),
    "no barrier after the copies": Mutant(EXPAND_TILE, "async_wait<0>();\n      barrier();", "async_wait<0>();", RACE),
    "does not wait for its copies": Mutant(EXPAND_TILE, "      async_wait<0>();\n", "", "on its way", ("cuda",)),
    "no barrier before the sums are read": Mutant(
        EXPAND_TILE, "            scale * sums[t].v[i];\n    barrier();", "            scale * sums[t].v[i];", RACE
    ),
    "no mask of ranks of u": Mutant(
        EXPAND_TILE,
        "const int bytes = u != nullptr ? bytes_of(rank - k) : 0;",
        "const int bytes = u != nullptr ? 16 : 0;",
        NUMBERS,
    ),
    "no mask of ranks of B": Mutant(
        EXPAND_TILE, "column < columns ? bytes_of(rank - k) : 0", "column < columns ? 16 : 0", f"{NUMBERS}|{OUTSIDE}"
    ),
    "no mask of columns": Mutant(
        EXPAND_TILE, "column < columns ? bytes_of(rank - k) : 0", "bytes_of(rank - k)", OUTSIDE
    ),
    "no mask of token rows": Mutant(
        EXPAND, "return t < tile.count ? u_of(", "return t < 16 ? u_of(", OUTSIDE, ("cuda",)
    ),
    "a step of the rank too few": Mutant(EXPAND_TILE, "(rank - k + 15) / 16;", "(rank - k) / 16;", NUMBERS, ("hip",)),
    "no scale": Mutant(EXPAND_TILE, "scale * sums[t].v[i]", "sums[t].v[i]", NUMBERS, ("hip",)),
    "works on tiles without an adapter": Mutant(
        EXPAND, "block_y() >= num_lora_tiles(delta.batch)", "block_y() >= num_tiles(delta.batch)", OUTSIDE, ("hip",)
    ),
    "forgets that u of all slots lies side by side": Mutant(
        EXPAND_TILE, " + slot * delta.u_slot_stride", "", NUMBERS, ("cuda",)
    ),
    "B without padding": Mutant(LORA, "return (rank + 7) / 8 * 8;", "return rank;", "multiple of 16", ("cuda",)),
    "next slice in the wrong column": Mutant(
        EXPAND, "out_start += delta.site.out_features[slice];", "", f"race|{NUMBERS}", ("hip",)
    ),
    "adds to rows of other tiles": Mutant(
        EXPAND, "i < tile.count * vectors", "i < Expand::kTokens * vectors", f"race|{OUTSIDE}", ("hip",)
    ),
}


@lru_cache
def small_sources(*kernels: str) -> Sources:
    """With these kernels of gemm.cu and the small expand alone: others take long to compile."""
    sources = Sources(optimize="-O0")
    gemm = re.sub(r"\nSGL_(\w+)\((.*)\)", lambda m: m[0] if m[2] in kernels else "", sources.text(UNITS[0]))
    assert gemm.count("\nSGL_") == len(kernels)
    return sources.add(UNITS[0], gemm).replace(UNITS[1], "SGL_EXPAND(64, 128)\n", "")


def run_stream(make: Callable[[], Gpu]) -> None:
    """Rings that run on over several units, with several slices of a unit or none, a ragged edge everywhere."""
    rng, slots = np.random.default_rng(1), [1, -1, 0, 1, 3]
    ranks = {0: (3, 0, 33), 1: (17, 1, 1), 3: (40, 40, 40)}
    for k, splits in ((72, 1), (1096, 1), (1096, 2)):
        if splits > 1 and make().vendor == "hip":
            continue
        x, weight = random_bf16(rng, len(slots), k), random_bf16(rng, 72, k)
        gpu = make()
        adapters = Adapters(gpu, k, (40, 24, 8), ranks, 4)
        y, u = Product(gpu, x, weight, "skinny_gemm_8", splits, 3, 1, adapters, slots, 4).run()
        assert_product(y, x, weight)
        assert_u(u, x, adapters, slots)
        gpu, more = make(), [1, -1, 3, *[0] * 9]
        x = random_bf16(rng, len(more), k)
        adapters = Adapters(gpu, k, (40, 24, 8), ranks, 4)
        u = shrink(gpu, x, adapters, more, 16, splits, spare_tiles=1, clusters=2)
        assert_shrunk(u, x, adapters, more)


def run_tiles(make: Callable[[], Gpu]) -> None:
    """A sum that ends in the first stage again, a ragged edge everywhere, one worker for several adapters."""
    rng, k, slots = np.random.default_rng(1), 552, [1, -1, 0, 1, 2, *[0] * 6]
    x, weight = random_bf16(rng, len(slots), k), random_bf16(rng, 72, k)
    for splits in (1, 2) if make().vendor == "cuda" else (1,):
        gpu = make()
        adapters = Adapters(gpu, k, (40, 32), {0: (3, 70), 1: (17, 1), 2: (72, 72)}, 3)
        y, u = Product(gpu, x, weight, "skinny_gemm_32x64", splits, 1, 1, adapters, slots, 3).run()
        assert_product(y, x, weight)
        assert_u(u, x, adapters, slots)
        gpu = make()
        adapters = Adapters(gpu, k, (8, 8), {0: (3, 70), 1: (17, 1), 2: (72, 72)}, 3)
        assert_shrunk(shrink(gpu, x, adapters, slots, 64, splits, spare_tiles=1), x, adapters, slots)


def run_expand(make: Callable[[], Gpu]) -> None:
    """Ranks beyond one step of 64, slices that end inside a tile, rows of nobody, both forms of u."""
    rng = np.random.default_rng(2)
    for slots in ([1, -1, 0, 1, 2], [2, 1, *[0] * 17]):
        for every_slot in (False, True):
            gpu = make()
            adapters = Adapters(gpu, 8, (136, 24), {0: (3, 100), 1: (33, 0), 2: (5, 104)}, 3)
            stride = 2 * adapters.rank_cap if every_slot else 0
            y, u = starting_y(rng, len(slots), adapters), random_u(rng, adapters, slots, 3 if every_slot else 0)
            actual = expand(gpu, y, u, adapters, slots, slot_stride=stride, spare_tiles=1)
            assert_expanded(actual, y, u, adapters, slots, stride)


RUNS = {
    "stream": (run_stream, STREAM_MUTANTS, ("skinny_gemm, GemmArgs, 8", "lora_shrink, ShrinkArgs, 16")),
    "tiles": (run_tiles, TILE_MUTANTS, ("skinny_gemm, GemmArgs, 32, 64", "lora_shrink, ShrinkArgs, 64, 64")),
    "expand": (run_expand, EXPAND_MUTANTS, ()),
}
"""What is run, what is done to it, and the kernels of gemm.cu that it needs."""
CASES = [
    (kind, name, vendor)
    for kind, (_, mutants, _) in RUNS.items()
    for name, mutant in mutants.items()
    for vendor in mutant.vendors
]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_kernels_without_a_mistake_pass(vendor: str, kind: str) -> None:
    run, _, kernels = RUNS[kind]
    run(lambda: Gpu(vendor, small_sources(*kernels)))


@pytest.mark.parametrize(("kind", "name", "vendor"), CASES)
def test_mistakes_are_found(kind: str, name: str, vendor: str) -> None:
    run, mutants, kernels = RUNS[kind]
    mutant = mutants[name]
    sources = small_sources(*kernels).replace(mutant.file, mutant.old, mutant.new)
    try:
        run(lambda: Gpu(vendor, sources))
    except KernelError as error:
        found = str(error)
    except AssertionError:
        found = NUMBERS
    else:
        found = "nothing"
    assert re.search(mutant.error, found), f"found: {found}"
