"""That the emulated tests would notice: kernels with one mistake each must fail, and say what is wrong.

Mistakes that only sometimes do harm on a GPU (a barrier too few, a copy not waited for, a read outside) are found by
the rules of the emulator, the others by their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from ctypes import Structure
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from kernels.emulator import VENDORS, Gpu, KernelError
from kernels.emulator.adapters import Adapters
from kernels.emulator.build import Sources
from kernels.emulator.numbers import Bits, assert_rounded_once, random_bf16, to_float
from kernels.test_emulated_expand import assert_expanded, expand, random_u, starting_y
from kernels.test_emulated_fused import (
    BEHIND,
    Heads,
    Rows,
    assert_heads,
    assert_normalised,
    run_activation,
    run_norm,
    run_rope,
)
from kernels.test_emulated_gemm import GROUPS, GroupProduct, Product, assert_product, assert_u
from kernels.test_emulated_shrink import assert_shrunk, shrink
from numpy.typing import NDArray

HEADERS = ("stream_gemm", "tile_gemm", "group_gemm", "geometry", "expand", "lora")
STREAM_GEMM, TILE_GEMM, GROUP_GEMM, GEOMETRY, STRIP, LORA = (f"include/sgl_kernel/{name}.h" for name in HEADERS)
GEMM, EXPAND, NORM, ACTIVATION, ROPE, ROWS = (
    f"csrc/kernels/{name}.h" for name in ("gemm", "expand", "norm", "activation", "rope", "rows")
)
UNITS = tuple(f"csrc/kernels/{name}.cu" for name in ("gemm", "expand", "norm", "activation", "rope"))

NUMBERS = "numbers"
"""No rule is broken; the result is wrong."""
RACE = "race|which nobody has written"
"""What a missing barrier is called depends on who comes first."""
OUTSIDE, EARLY, STUCK = r"bytes at", "before wait_for_previous_kernel", "deadlock|divergence"
NEVER = "leaves without wait_for_previous_kernel"
ON_ITS_WAY = "on its way"
NOT_THERE = "multiplies .* while a copy is on its way|which no copy has brought|has not waited for"
"""A tile, for those who did not wait for it."""
CUDA, HIP = ("cuda",), ("hip",)


@dataclass(frozen=True)
class Mutant:
    """`old`, which must be in `file`, becomes `new`; each vendor's run must end in an error that matches."""

    file: str
    old: str
    new: str
    error: str
    vendors: tuple[str, ...] = CUDA


WAIT = " wait_for_previous_kernel()"
STEPS = "for (int step = 0; step < kSteps; ++step)"
WAITS, FIRST = "  wait_for_previous_kernel();\n", "  fetch(first, 0);\n"
"""How warps with strips begin."""
HELD = f"{STEPS} load(held[step], module, 16 * step + Strip::k());"
UNITS_LOOP = "for (int unit = first; work.exists(unit); unit = work.next(unit)) {"
SUMS = "Accumulator even = {}, odd = {};"
NO_TILE = f"tile.slot < 0) return{WAIT};\n"
"""How both shrink kernels begin; what follows tells them apart."""

STREAM_MUTANTS = {
    "waits for one copy too few": Mutant(
        STREAM_GEMM, "async_wait<kStages - 2>();", "async_wait<kStages - 1>();", ON_ITS_WAY
    ),
    "no warp barrier": Mutant(STREAM_GEMM, "        warp_barrier();\n", "", f"{RACE}|{ON_ITS_WAY}", VENDORS),
    "a warp barrier before the wait": Mutant(
        STREAM_GEMM,
        "async_wait<kStages - 2>();\n        warp_barrier();",
        "warp_barrier();\n        async_wait<kStages - 2>();",
        f"{RACE}|{ON_ITS_WAY}",
    ),
    "fetches into the stage that is read": Mutant(
        STREAM_GEMM,
        "i < kStages - 1; ++i) {\n      if (busy && work.exists(fe",
        "i < kStages; ++i) {\n      if (busy && work.exists(fe",
        f"{RACE}|{ON_ITS_WAY}",
        VENDORS,
    ),
    "does not wait for the previous kernel": Mutant(STREAM_GEMM, "    wait_for_previous_kernel();\n", "", EARLY),
    "fetches tokens too early": Mutant(
        STREAM_GEMM,
        "        copy_rows(fetched);\n        f",
        "        copy_rows(fetched), copy_tokens(fetched);\n        f",
        EARLY,
    ),
    "walks to the next unit instead of its own": Mutant(GEMM, "existing(unit + stride)", "existing(unit + 1)", "race"),
    "stays in its unit": Mutant(STREAM_GEMM, "      unit = work.next(unit);\n", "", NUMBERS),
    "does not begin the next unit at its first slice": Mutant(STREAM_GEMM, "      slice = 0;\n", "", NUMBERS, HIP),
    "one slice too many of a unit": Mutant(STREAM_GEMM, "if (++slice < slices)", "if (++slice <= slices)", NUMBERS),
    "keeps the rows of the unit before": Mutant(
        STREAM_GEMM,
        "      if (at.slice == 0) {\n        const auto source",
        "      if (at.slice == 0 && at.unit == work.start()) {\n        const auto source",
        NUMBERS,
    ),
    "begins every unit in the first stage": Mutant(
        STREAM_GEMM,
        "Accumulator even = {}, odd = {};",
        "Accumulator even = {}, odd = {}; stage = 0;",
        f"{ON_ITS_WAY}|{RACE}|{NUMBERS}",
        VENDORS,
    ),
    "keeps the sums of the unit before": Mutant(
        STREAM_GEMM,
        f"    {UNITS_LOOP}\n      {SUMS}",
        f"    {SUMS}\n    {UNITS_LOOP}",
        NUMBERS,
        HIP,
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
        STREAM_GEMM, "source != nullptr && k < k_end", "source != nullptr", f"{OUTSIDE}|{NUMBERS}", VENDORS
    ),
    "warps share a ring": Mutant(
        STREAM_GEMM, "shared + warp * kStages * kStageBytes", "shared", f"{RACE}|{ON_ITS_WAY}", VENDORS
    ),
    "reads eight tokens that are not there": Mutant(
        STREAM_GEMM, "swizzle(row % kTokens, step", "swizzle(row, step", f"{RACE}|{ON_ITS_WAY}|{OUTSIDE}"
    ),
    "wrong half of a fragment": Mutant(
        STREAM_GEMM, "(row % kTokens, step * 2 + half)", "(row % kTokens, step * 2 + 1 - half)", NUMBERS, VENDORS
    ),
    "adds eight columns of sixteen": Mutant(STREAM_GEMM, "mma<kTokens>(", "mma<8>(", NUMBERS),
    "stores sixteen columns of eight": Mutant(
        STREAM_GEMM, "Accumulator::kSize * kTokens / 16", "Accumulator::kSize", f"{RACE}|{OUTSIDE}"
    ),
    "every other step is lost": Mutant(STREAM_GEMM, "even.v[i] + odd.v[i]", "even.v[i]", NUMBERS),
    "warps share their sums": Mutant(STREAM_GEMM, "sums + (warp_id() * kTokens + ", "sums + (", RACE, VENDORS),
    "no barrier before the sums are read": Mutant(
        STREAM_GEMM, "if (parts > 1) cluster_barrier();\n    else barrier();\n    c", "c", RACE, VENDORS
    ),
    "a block's barrier before the sums are read": Mutant(
        STREAM_GEMM, "if (parts > 1) cluster_barrier();\n    else barrier();\n    c", "barrier();\n    c", RACE
    ),
    "no barrier after the sums are read": Mutant(
        STREAM_GEMM, "while others read them\n    else barrier();", "while others read them", RACE, VENDORS
    ),
    "a block's barrier after the sums are read": Mutant(
        STREAM_GEMM,
        "if (parts > 1) cluster_barrier();  // nobody overwrites",
        "if (parts > 1) barrier();  // nobody overwrites",
        "leaves while|which has left|race",
    ),
    "adds its own part for every other": Mutant(
        STREAM_GEMM, "add(cluster_load(own + warp * kNextWarp, part))", "add(own[warp * kNextWarp])", NUMBERS
    ),
    "leaves the first part out": Mutant(STREAM_GEMM, "int part = 0; part", "int part = 1; part", NUMBERS),
    "adds a part that is not there": Mutant(STREAM_GEMM, "part < parts", "part <= parts", "reads block"),
    "leaves the last warp out": Mutant(
        STREAM_GEMM, "warp < kWarps; ++warp) add(own[", "warp < kWarps - 1; ++warp) add(own[", NUMBERS, HIP
    ),
    "every block stores all sums": Mutant(
        STREAM_GEMM, "int i = cluster_rank() * kThreads + thread_id(); i", "int i = thread_id(); i", "race"
    ),
    "takes all of the sum in every block": Mutant(
        GEMM,
        "k.begin, k.end);\n}\n\n// Units of A's rows for",
        "0, args.in_features);\n}\n\n// Units of A's rows for",
        NUMBERS,
    ),
    "every cluster takes every unit": Mutant(
        GEMM,
        "GemmWork(args, block_x() / args.num_splits, grid_x() / args.num_splits)",
        "GemmWork(args, block_x() / args.num_splits, 1)",
        "race",
    ),
    "the blocks of a cluster take units of their own": Mutant(
        GEMM, "GemmWork(args, block_x() / args.num_splits", "GemmWork(args, block_x()", f"{NUMBERS}|race|{STUCK}"
    ),
    "no mask of rows of a matrix": Mutant(
        GEMM,
        "return row < count ? base + (row",
        "return true ? base + (row",
        OUTSIDE,
        VENDORS,
    ),
    "rows of A without gaps": Mutant(
        GEMM, "base + (row + ((row >= rank) + (row >= 2 * rank)) * gap)", "base + row", f"{NUMBERS}|{OUTSIDE}", HIP
    ),
    "the third slice's rows of A after the first gap": Mutant(
        GEMM, "((row >= rank) + (row >= 2 * rank)) * gap", "(row >= rank) * gap", NUMBERS
    ),
    "columns of u without gaps": Mutant(LORA, "(site.rank_cap - rank);", "0;", f"race|{NUMBERS}"),
    "stores rows that are not there": Mutant(
        GEMM, "if (n < args.out_features) *reinterpret_cast", "*reinterpret_cast", f"{OUTSIDE}|{NUMBERS}"
    ),
    "no mask of token rows": Mutant(
        GEMM,
        "int, int t) const {\n    return t < args.tokens ? args.x + t * args.x_stride : nullptr;",
        "int, int t) const {\n    return args.x + t * args.x_stride;",
        OUTSIDE,
        VENDORS,
    ),
    "stores tokens that are not there": Mutant(GEMM, "{ return args.tokens; }", "{ return args.tokens + 1; }", OUTSIDE),
    "a unit too few": Mutant(
        GEMM, "unit < args.a_units + args.base_tiles;", "unit < args.a_units + args.base_tiles - 1;", NUMBERS
    ),
    "reads rows of W where A's begin": Mutant(
        GEMM, "const int row = (unit - args.a_units) * kStreamRows;", "const int row = unit * kStreamRows;", NUMBERS
    ),
    "stores y where u's units begin": Mutant(
        GEMM, "const int n = (unit - args.a_units)", "const int n = unit", f"{NUMBERS}|race", HIP
    ),
    "one A unit too many": Mutant(
        GEMM, "if (unit >= args.a_units)", "if (unit > args.a_units)", f"{NUMBERS}|{OUTSIDE}"
    ),
    "every unit of a slot is its first": Mutant(
        GEMM, "return unit / args.max_live * kStreamRows;", "return 0;", f"race|{NUMBERS}"
    ),
    "skips units by one": Mutant(GEMM, "a_rows(unit).count) unit += stride;", "a_rows(unit).count) ++unit;", "race"),
    "skips to W as soon as a slot has no more rows": Mutant(
        GEMM,
        "while (unit < args.a_units && a_first(unit) >= a_rows(unit).count) unit += stride;",
        "if (unit < args.a_units && a_first(unit) >= a_rows(unit).count) unit += stride;\n"
        "    while (unit < args.a_units && a_first(unit) > 0) unit += stride;",
        NUMBERS,
    ),
    "keeps the slot of its first unit": Mutant(
        GEMM, "unit == first ? live : read_live(args.batch, unit % args.max_live)", "live", f"race|{NUMBERS}"
    ),
    "takes a slot for the next live one": Mutant(
        GEMM, "return ARows::of(args.site, own.slot,", "return ARows::of(args.site, unit % args.max_live,", NUMBERS
    ),
    "reads behind the live slots": Mutant(GEMM, "first % args.max_live)", "first)", f"{NUMBERS}|{OUTSIDE}"),
    "asks for the slots of other tokens": Mutant(
        GEMM, "thread_id() / (kStreamRows / 2)", "thread_id() / kStreamRows", NUMBERS, VENDORS
    ),
    "stores ranks that are not there": Mutant(
        GEMM, "if (row + 1 < a.count) u[a.p", "u[a.p", f"{OUTSIDE}|race|{NUMBERS}"
    ),
    "writes u for tokens of other slots": Mutant(GEMM, "if (token_slot == a.slot) st", "st", f"race|{NUMBERS}"),
    "shrinks tokens of other tiles": Mutant(GEMM, "t < tile.count ? args.x", "t < 16 ? args.x", OUTSIDE),
    "stores tokens of other tiles": Mutant(GEMM, "{ return tile.count; }", "{ return 16; }", f"race|{OUTSIDE}"),
    "forgets where a tile starts": Mutant(
        GEMM,
        "int t) const { return args.batch.perm[tile.start + t]; }",
        "int t) const { return args.batch.perm[t]; }",
        f"race|{NUMBERS}",
        HIP,
    ),
    "shrinks with the first slice alone": Mutant(
        GEMM, "unit * kStreamRows < a.count; }", "unit * kStreamRows < a.rank; }", NUMBERS
    ),
    "a block that has nothing to do does not wait": Mutant(
        GEMM, f"{NO_TILE}  const ARows", f"{NO_TILE.replace(WAIT, '')}  const ARows", NEVER
    ),
}

TILE_MUTANTS = {
    "no barrier in the main loop": Mutant(
        TILE_GEMM, "async_wait<kStages - 2>();\n      barrier();", "async_wait<kStages - 2>();", RACE, VENDORS
    ),
    "waits for one copy too few": Mutant(
        TILE_GEMM, "async_wait<kStages - 2>();", "async_wait<kStages - 1>();", ON_ITS_WAY
    ),
    "no barrier after the main loop": Mutant(
        TILE_GEMM, "async_wait<0>();\n    barrier();", "async_wait<0>();", RACE, VENDORS
    ),
    "no barrier between tiles": Mutant(TILE_GEMM, "barrier();  // the stages may", "// the stages may", RACE, VENDORS),
    "does not wait for the previous kernel": Mutant(TILE_GEMM, "    wait_for_previous_kernel();\n", "", EARLY, HIP),
    "wrong row of a fragment": Mutant(
        TILE_GEMM,
        "row_tile + swizzle(first + h * 16 + row,",
        "row_tile + swizzle(first + h * 16 + (row ^ 8),",
        NUMBERS,
        HIP,
    ),
    "wrong half of a fragment": Mutant(
        TILE_GEMM,
        "token_tile + swizzle(t * 16 + row, step * 2 + half)",
        "token_tile + swizzle(t * 16 + row, step * 2 + 1 - half)",
        NUMBERS,
        VENDORS,
    ),
    "a product by some lanes": Mutant(
        TILE_GEMM, "if (active) multiply", "if (active && lane_id() < 8) multiply", STUCK, VENDORS
    ),
    "reads behind the end of the sum": Mutant(
        TILE_GEMM, "source != nullptr && k < k_end", "source != nullptr", f"{OUTSIDE}|{NUMBERS}"
    ),
    "leaves the first part out": Mutant(
        TILE_GEMM, "for (int other = 0; other < parts", "for (int other = parts > 1; other < parts", NUMBERS
    ),
    "adds its own part only": Mutant(TILE_GEMM, "(kSums / 4), other)", "(kSums / 4), cluster_rank())", NUMBERS),
    "adds one half twice": Mutant(TILE_GEMM, "place + h * (kSums / 4)", "place", NUMBERS),
    "both halves take the same columns": Mutant(TILE_GEMM, "warp_id() / kGroups * kSteps + i;", "i;", NUMBERS),
    "both halves store to one place": Mutant(
        TILE_GEMM, "part + warp_id() / kGroups * kSums + warp_id()", "part + warp_id()", f"{RACE}|{NUMBERS}"
    ),
    "no barrier before the sums are read": Mutant(
        TILE_GEMM, "    cluster_barrier();\n    constexpr int kQuads", "    constexpr int kQuads", RACE, VENDORS
    ),
    "a block's barrier before the sums are read": Mutant(
        TILE_GEMM, "    cluster_barrier();\n    constexpr int kQuads", "    barrier();\n    constexpr int kQuads", RACE
    ),
    "leaves while others read its sums": Mutant(
        TILE_GEMM, "if (parts > 1) cluster_barrier();", "", "leaves while|which has left|race"
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
    ),
    "no mask of tokens of a slot": Mutant(
        GEMM, "return row < 0 ? nullptr : x + row * x_stride;", "return x + row * x_stride;", OUTSIDE, HIP
    ),
    "no mask of ranks": Mutant(GEMM, "return row < count ? base + (row", "return true ? base + (row", OUTSIDE, HIP),
    "rows of A without gaps": Mutant(
        GEMM, "((row >= rank) + (row >= 2 * rank)) * gap", "0 * gap", f"{NUMBERS}|{OUTSIDE}"
    ),
    "writes four ranks at a time": Mutant(GEMM, "j < 4 && r + j < rows", "j < 4", f"{OUTSIDE}|race|{NUMBERS}", VENDORS),
    "stores every tile of u where the first is": Mutant(
        GEMM, "a.place(site, first + r + j)", "a.place(site, r + j)", f"race|{NUMBERS}"
    ),
    "writes u for tokens of other slots": Mutant(
        GEMM, "args.batch.token_slot[t] == live.slot ? t : -1", "t", f"race|{NUMBERS}"
    ),
    "every unit of a slot is its first": Mutant(
        GEMM, "unit / args.max_live * Gemm::kRows", "0 * Gemm::kRows", f"race|{NUMBERS}", HIP
    ),
    "reads behind the live slots": Mutant(
        GEMM, "unit % args.max_live);\n    const A", "unit);\n    const A", f"{NUMBERS}|{OUTSIDE}"
    ),
    "one base tile too many": Mutant(
        GEMM, "if (cluster < args.base_tiles) {", "if (cluster <= args.base_tiles) {", NUMBERS, HIP
    ),
    "a block that has no tile does not wait": Mutant(
        GEMM, f"{NO_TILE}  const int first", f"{NO_TILE.replace(WAIT, '')}  const int first", NEVER
    ),
    "a block that has no rank does not wait": Mutant(
        GEMM, f"if (rows <= 0) return{WAIT};", "if (rows <= 0) return;", NEVER, HIP
    ),
}

EXPAND_MUTANTS = {
    "does not wait for the previous kernel": Mutant(
        EXPAND, "  wait_for_previous_kernel();\n  SGL_NO_UNROLL", "  SGL_NO_UNROLL", EARLY, VENDORS
    ),
    "a block that has no rows does not wait": Mutant(
        EXPAND, f"rows.slot < 0) return{WAIT};", "rows.slot < 0) return;", NEVER, HIP
    ),
    "a block that has no module does not wait": Mutant(
        EXPAND, f"module.rank == 0) return{WAIT};", "module.rank == 0) return;", NEVER
    ),
    "a product by some lanes": Mutant(
        STRIP,
        "if (16 * step < module.rank) multiply_add",
        "if (16 * step < module.rank && lane_id() < 8) multiply_add",
        STUCK,
        VENDORS,
    ),
    "wrong columns of B": Mutant(STRIP, "Strip::part(j) : last;", "Strip::part(j ^ 1) : last;", NUMBERS, VENDORS),
    "ranks of B in another order than those of u": Mutant(
        STRIP,
        f"columns - 1;\n    SGL_UNROLL\n    {HELD}",
        f"columns - 1;\n    {HELD.replace('k()', 'k() % 4')}",
        NUMBERS,
        VENDORS,
    ),
    "all lanes bring the first ranks of u": Mutant(
        STRIP, "const int k = begin + Strip::k();", "const int k = begin + Strip::k() % 4;", NUMBERS
    ),
    "no mask of columns": Mutant(
        STRIP, "Strip::part(j) < last ? Strip::part(j) : last;", "Strip::part(j);", OUTSIDE, VENDORS
    ),
    "no mask of ranks of B": Mutant(STRIP, "(k < module.b_stride ? k : 0)", "k", f"{NUMBERS}|{OUTSIDE}", VENDORS),
    "no mask of ranks of u": Mutant(STRIP, "module.rank - begin", "module.b_stride - begin", NUMBERS, VENDORS),
    "no mask of ranks beyond all of u": Mutant(
        STRIP, "left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u", "left == 1 ? 0xffffu : ~0u", NUMBERS, VENDORS
    ),
    "no mask of the second of four ranks": Mutant(STRIP, "left >= 2 ? ~0u", "left >= 1 ? ~0u", NUMBERS),
    "no mask of the last two of four ranks": Mutant(STRIP, "left == 3 ? 0xffffu : 0u", "~0u", NUMBERS),
    "no mask of token rows": Mutant(ROWS, "(mine[i] ? index : rows.count - 1)", "index", OUTSIDE, VENDORS),
    "the first held ranks of B in every step": Mutant(
        STRIP,
        f"columns - 1;\n    SGL_UNROLL\n    {HELD}",
        f"columns - 1;\n    {HELD.replace('16 * step + ', '')}",
        NUMBERS,
    ),
    "held ranks alone": Mutant(STRIP, "k = 16 * kSteps; k < module.rank", "k = 16 * kSteps; k < 0", NUMBERS, VENDORS),
    "held ranks twice": Mutant(STRIP, "int k = 16 * kSteps;", "int k = 16 * kSteps - 16;", NUMBERS),
    "every other step on demand": Mutant(STRIP, "k < module.rank; k += 16)", "k < module.rank; k += 32)", NUMBERS),
    "a step of the rank too few": Mutant(
        STRIP, "if (16 * step < module.rank)", "if (16 * step + 16 <= module.rank)", NUMBERS, HIP
    ),
    "the held u on demand": Mutant(STRIP, "u.load(rows, module, k);", "u.load(rows, module, 0);", NUMBERS),
    "no scale": Mutant(STRIP, "multiply_add(module.scale,", "multiply_add(1.f,", NUMBERS),
    "B as far apart as the module's ranks": Mutant(
        STRIP, "b_stride(rank), own.scale", "b_stride(own.rank), own.scale", NUMBERS, VENDORS
    ),
    "forgets that u of all slots lies side by side": Mutant(STRIP, "slot * delta.u_slot_stride + ", "", NUMBERS),
    "u of the first slice": Mutant(STRIP, " + slice * delta.site.rank_cap", "", NUMBERS),
    "rank and scale of the first slice": Mutant(
        STRIP, "read_slice(delta.site, slot, slice)", "read_slice(delta.site, slot, 0)", NUMBERS
    ),
    "B of the first slice": Mutant(
        LORA, "slice == 0 ? site.b_offsets[0] :", "slice >= 0 ? site.b_offsets[0] :", f"{NUMBERS}|{OUTSIDE}", HIP
    ),
    "B of the first slot": Mutant(STRIP, "{b_of(delta.site, slot, slice)", "{b_of(delta.site, 0, slice)", NUMBERS),
    "B without padding": Mutant(LORA, "return (rank + 7) / 8 * 8;", "return rank;", "misaligned"),
    "next slice in the wrong column": Mutant(EXPAND, "    out_start += width;\n", "", f"race|{NUMBERS}", HIP),
    "next slice as wide as the first": Mutant(
        EXPAND, "    width = site.out_features[i];\n", "", f"race|{OUTSIDE}|{NUMBERS}"
    ),
    "strips counted from the first slice on": Mutant(EXPAND, "    index -= blocks;\n", "", f"{NUMBERS}|{OUTSIDE}"),
    "warps share their columns": Mutant(EXPAND, "(index * kExpandWarps + warp_id())", "(index * kExpandWarps)", "race"),
    "adds to columns of the next slice": Mutant(
        EXPAND, "return strip.mine[i] && Strip::column() < left;", "return strip.mine[i];", f"race|{OUTSIDE}|{NUMBERS}"
    ),
    "adds to the first rows of a tile again and again": Mutant(
        EXPAND, "strip(rows, begin);", "strip(rows, 0);", NUMBERS, VENDORS
    ),
    "every strip is a tile's first": Mutant(
        ROWS, "index = begin + Strip::row(i);", "index = Strip::row(i);", f"race|{NUMBERS}", VENDORS
    ),
    "adds to rows of other tiles": Mutant(
        ROWS,
        "mine[i] = index < rows.count;\n      row[i] = rows.perm[rows.first + (mine[i] ? index : rows.count - 1)];",
        "mine[i] = true;\n      row[i] = rows.perm[rows.first + index];",
        "race|reads",
        VENDORS,
    ),
    "adds to rows that are nobody's": Mutant(
        EXPAND, "return strip.mine[i] && Strip::column() < left;", "return Strip::column() < left;", f"race|{NUMBERS}"
    ),
}

NORM_MUTANTS = {
    "a block's barrier before the sums are read": Mutant(
        NORM, "if (cluster_size() > 1) cluster_barrier();\n      else barrier();", "barrier();", RACE
    ),
    "no barrier before the sums are read": Mutant(
        NORM, "if (cluster_size() > 1) cluster_barrier();\n      else barrier();\n", "", RACE, VENDORS
    ),
    "no barrier before the scales are read": Mutant(
        NORM, "compute_scales();\n      barrier();", "compute_scales();", RACE, VENDORS
    ),
    "writes to blocks that may not have started": Mutant(
        NORM, "if (cluster_size() > 1) cluster_started();", "", "may not have started|before the cluster_started"
    ),
    "ends a barrier that it has not begun": Mutant(
        NORM, "if (cluster_size() > 1) cluster_start();", "", "with no cluster_start"
    ),
    "does not wait for the weight": Mutant(NORM, "async_wait<0>();", "", ON_ITS_WAY),
    "does not wait for the previous kernel": Mutant(
        ROWS, "    if (live) wait_for_previous_kernel();\n", "", EARLY, VENDORS
    ),
    "a rehearsal has rows": Mutant(NORM, "return live && row[i] >= 0", "return row[i] >= 0", EARLY, VENDORS),
    "a rehearsal has u": Mutant(NORM, "module.b != nullptr && live", "module.b != nullptr", EARLY, VENDORS),
    "a rehearsal has sums": Mutant(NORM, "if (live && i < rows.count)", "if (i < rows.count)", RACE, VENDORS),
    "a rehearsal where turns are ahead": Mutant(NORM, "!kAhead && args.rehearse", "args.rehearse", NUMBERS),
    "a rehearsal is all there is": Mutant(ROWS, "    if (live) return;\n", "    return;\n", NEVER, VENDORS),
    "a rehearsal takes B of other turns": Mutant(NORM, "live ? args.turns : 1;", "args.turns;", NUMBERS, HIP),
    "a block that has no rows does not wait": Mutant(NORM, f"return{WAIT};", "return;", NEVER, VENDORS),
    "every block pushes to where the first one's sums are": Mutant(
        NORM, "(first / kNormPart + lanes.part(turn))", "lanes.part(turn)", RACE
    ),
    "every lane pushes to every block": Mutant(NORM, "int block = lanes.column() / 8;", "int block = 0;", "race"),
    "pushes nothing to the first block": Mutant(
        NORM, "int block = lanes.column() / 8;", "int block = lanes.column() / 8 + 1;", RACE
    ),
    "pushes to a block that is not there": Mutant(
        NORM, "block < cluster_size(); b", "block <= cluster_size(); b", "writes block"
    ),
    "pushes to four blocks": Mutant(
        NORM, "block < cluster_size(); block += 4", "block < 4 && block < cluster_size(); block += 4", RACE
    ),
    "every block takes the first columns": Mutant(
        NORM, "first = cluster_rank() * args.parts * kNormPart;", "first = 0;", "race"
    ),
    "columns behind the row": Mutant(
        NORM, "left < 0 ? 0 : left < most ? left : most;", "most;", f"{OUTSIDE}|race|{NUMBERS}", VENDORS
    ),
    "no mask of columns of B": Mutant(
        NORM, "first + start, columns - start", "first + start, kNormPart", f"{OUTSIDE}|{NUMBERS}", VENDORS
    ),
    "B of the block's first columns": Mutant(NORM, "b.fetch(module, first + start,", "b.fetch(module, start,", NUMBERS),
    "B of the second turn in the third": Mutant(
        NORM, "fetch_b(next_b, module, turn + 2)", "fetch_b(next_b, module, turn + 1)", NUMBERS
    ),
    "B of the first turn in the second": Mutant(
        NORM, "fetch_b(next_b, module, 1)", "fetch_b(next_b, module, 0)", NUMBERS
    ),
    "B of the first turn in every turn": Mutant(
        NORM, "fetch_b(b, module, turn)", "fetch_b(b, module, 0)", NUMBERS, VENDORS
    ),
    "inputs of the turn before": Mutant(NORM, "next = load(turn + 1);", "next = load(turn);", NUMBERS),
    "inputs of the first turn": Mutant(NORM, "next = load(turn);", "next = load(0);", NUMBERS, HIP),
    "a turn too few": Mutant(NORM, "turn < turns; ++turn) {", "turn < turns - 1; ++turn) {", RACE, VENDORS),
    "keeps B of the turn before": Mutant(NORM, "        b = next_b;\n", "", NUMBERS),
    "warps take the same parts": Mutant(NORM, "turn * kWarps + warp_id();", "turn * kWarps;", "race"),
    "the residual is not added": Mutant(NORM, "add(sum, unpack(now.residual[i]))", "(void)0", NUMBERS),
    "the residual is added twice": Mutant(
        NORM,
        "if (args.residual != nullptr) add(sum, unpack(now.residual[i]));",
        "add(sum, unpack(now.residual[i])), add(sum, unpack(now.residual[i]));",
        NUMBERS,
        HIP,
    ),
    "the residual of held turns is not stored": Mutant(
        NORM,
        "      if (args.residual != nullptr) store_vec(side_row[i] + column(turn), rounded);\n",
        "",
        NUMBERS,
    ),
    "the residual of other turns is not stored": Mutant(
        NORM,
        "else if (args.residual != nullptr && mine(turn, i)) store_vec(side_row[i] + column(turn), rounded);",
        "",
        NUMBERS,
    ),
    "stores residuals that are nobody's": Mutant(
        NORM,
        "if (args.residual != nullptr && mine(turn, i)) store",
        "if (args.residual != nullptr) store",
        f"{OUTSIDE}|race|{NUMBERS}",
    ),
    "turns share their place": Mutant(
        NORM,
        "held[(turn * kRows + i) * kThreads + thread_id()] = rounded;",
        "held[i * kThreads + thread_id()] = rounded;",
        f"{NUMBERS}|{RACE}",
        VENDORS,
    ),
    "warps share their place": Mutant(
        NORM,
        "held[(turn * kRows + i) * kThreads + thread_id()] = rounded;",
        "held[(turn * kRows + i) * kThreads + lane_id()] = rounded;",
        RACE,
    ),
    "holds one turn too many": Mutant(
        NORM, "if (turn < args.held) held[", "if (turn <= args.held) held[", f"{OUTSIDE}|{NUMBERS}", HIP
    ),
    "takes a turn for held that is not": Mutant(
        NORM, "    if (turn < args.held) {\n", "    if (turn <= args.held) {\n", f"{OUTSIDE}|{RACE}"
    ),
    "reads x again where the sum is": Mutant(
        NORM, "load_vec((args.residual != nullptr ? side_row[i] : x_row[i])", "load_vec(x_row[i]", NUMBERS
    ),
    "squares of sums that are not rounded": Mutant(
        NORM, "add_squares(0.f, unpack(rounded))", "add_squares(0.f, sum)", NUMBERS, HIP
    ),
    "squares of columns behind the row": Mutant(
        NORM, "column(turn) < columns ? add_squares", "true ? add_squares", NUMBERS, VENDORS
    ),
    "u of rows that are not there": Mutant(
        NORM, "row[i] < 0 ? rows.perm[rows.first] : row[i]", "row[i]", OUTSIDE, VENDORS
    ),
    "a sum by some lanes": Mutant(
        NORM,
        "    const float squares = lanes.sum(",
        "    if (row[i] < 0) return;\n    const float squares = lanes.sum(",
        STUCK,
        VENDORS,
    ),
    "scale of the first row": Mutant(NORM, "scale = scales[lanes.row(i)];", "scale = scales[0];", NUMBERS, VENDORS),
    "a part too few": Mutant(NORM, "part < all; part += 16", "part < all - 1; part += 16", NUMBERS),
    "sixteen parts": Mutant(NORM, "part < all; part += 16", "part < 16; part += 16", NUMBERS),
    "leaves half of sixteen sums out": Mutant(NORM, "int mask = 8; mask > 0", "int mask = 4; mask > 0", NUMBERS, HIP),
    "reads sums of rows that are not there": Mutant(NORM, "      if (live && i < rows.count)\n", "", RACE),
    "weight of the first block": Mutant(NORM, "args.weight + first + i, 16", "args.weight + i, 16", NUMBERS),
    "reads weights that were not fetched": Mutant(
        NORM,
        "(column(turn) < args.staged ? weight : args.weight + first)",
        "weight",
        f"{RACE}|{OUTSIDE}|{NUMBERS}",
        VENDORS,
    ),
    "later weights of the first block": Mutant(NORM, "weight : args.weight + first)", "weight : args.weight)", NUMBERS),
    "fetches weights behind the row": Mutant(
        NORM, "i < args.staged && i < columns", "i < args.staged", OUTSIDE, VENDORS
    ),
    "a whole tile in every piece": Mutant(NORM, "cluster_x(), args.block_tokens)", "0, args.block_tokens)", "race"),
    "blocks for pieces": Mutant(
        NORM, "cluster_x(), args.block_tokens)", "block_x(), args.block_tokens)", f"{NUMBERS}|{STUCK}|{RACE}|{NEVER}"
    ),
    "neighbouring lanes take parts of several rows": Mutant(
        NORM, "thread_id() / 4 - own_row * parts;", "thread_id() / 4 % 2;", f"race|{NUMBERS}"
    ),
    "adds B u to rows of the base model": Mutant(
        STRIP, "  if (slot < 0) return", "  if (false) return", OUTSIDE, VENDORS
    ),
    "rows beyond the tile": Mutant(ROWS, "if (i >= rows.count) return -1;", "", f"race|{OUTSIDE}", VENDORS),
    "forgets where a tile starts": Mutant(ROWS, "rows.perm[rows.first + i]", "rows.perm[i]", f"race|{NUMBERS}"),
    "pieces as long as what is left": Mutant(
        ROWS, "rows.count = left < size ? left : size;", "rows.count = left;", RACE
    ),
    "the last rows as many as the others": Mutant(
        ROWS, "first, left < size ? left : size, -1, 0}", "first, size, -1, 0}", f"{OUTSIDE}|{NUMBERS}", VENDORS
    ),
}

ACTIVATION_MUTANTS = {
    "does not wait for the previous kernel": Mutant(ROWS, f"{WAITS}{FIRST}", FIRST, EARLY, VENDORS),
    "plain: does not wait for the previous kernel": Mutant(
        ROWS, "    if (live) wait_for_previous_kernel();\n", "", EARLY, HIP
    ),
    "plain: a rehearsal has rows": Mutant(
        ACTIVATION, "live && column < args.inner", "column < args.inner", EARLY, VENDORS
    ),
    "a block that has no rows does not wait": Mutant(ACTIVATION, f"return{WAIT};", "return;", NEVER, VENDORS),
    "gate for up": Mutant(ACTIVATION, "silu_times(gate_sum, up_sum)", "silu_times(up_sum, gate_sum)", NUMBERS),
    "u of gate for up": Mutant(ACTIVATION, "fetch_u(strip, 1, up, at)", "fetch_u(strip, 1, gate, at)", NUMBERS),
    "B of gate for up": Mutant(ACTIVATION, "up_b.fetch(up,", "up_b.fetch(gate,", NUMBERS, HIP),
    "term of gate for up": Mutant(ACTIVATION, "up, up_term, i)", "up, gate_term, i)", NUMBERS),
    "inputs of the first strip": Mutant(ACTIVATION, "finish(at, strip);", "finish(at, 0);", NUMBERS, VENDORS),
    "u of the first strip": Mutant(ACTIVATION, "get_u(strip, 0, gate, at)", "get_u(0, 0, gate, at)", NUMBERS),
    "reads inputs that are on their way": Mutant(
        ROWS, "async_wait<kStrips - 1>();", "async_wait<kStrips>();", ON_ITS_WAY
    ),
    "reads strips that are on their way": Mutant(ROWS, "    inputs.fetched();\n  }\n}", "  }\n}", ON_ITS_WAY),
    "waits for nothing": Mutant(ROWS, "{ async_wait<kStrips - 1>(); }", "{}", ON_ITS_WAY),
    "threads share their place": Mutant(
        ROWS, "static_cast<Vec8*>(shared) + thread_id()),", "static_cast<Vec8*>(shared) + lane_id()),", RACE, VENDORS
    ),
    "u is where x is": Mutant(
        ROWS,
        "kStrips * 2 * kRows * kThreads) + thread_id()",
        "kStrips * kRows * kThreads) + thread_id()",
        f"{RACE}|{ON_ITS_WAY}|{NUMBERS}",
        VENDORS,
    ),
    "parts share their place": Mutant(
        ROWS, "async_copy16(x + ((strip * 2 + part)", "async_copy16(x + ((strip * 2)", f"{RACE}|{ON_ITS_WAY}", VENDORS
    ),
    "factors share their place": Mutant(
        ROWS, "(strip * kFactors + factor)", "(strip * kFactors)", f"{NUMBERS}|{ON_ITS_WAY}", VENDORS
    ),
    "reads x too early": Mutant(ROWS, f"{WAITS}{FIRST}", f"{FIRST}{WAITS}", EARLY),
    "rows of the first strip": Mutant(ROWS, "kWalks ? strips(strip) : first, s", "first, s", f"race|{NUMBERS}", HIP),
    "inputs of the first strip for all": Mutant(
        ROWS, "fetch(strips(strip), strip)", "fetch(first, strip)", NUMBERS, VENDORS
    ),
    "rows of the first lanes": Mutant(
        ROWS, "kHeld == 1 || begin < kWarp ? held[0] : held[kHeld - 1]", "held[0]", f"race|{NUMBERS}"
    ),
    "rows of another lane": Mutant(
        ROWS, "(begin + Strip::row(i)) % kWarp", "Strip::row(i) % kWarp", f"race|{NUMBERS}", VENDORS
    ),
    "asks for rows beyond the tile": Mutant(ROWS, "(index < count ? index : count - 1)", "index", OUTSIDE, VENDORS),
    "a strip's rows beyond the tile": Mutant(
        ROWS, "strip * Strip::kTokens + Strip::row(i) < count", "true", "race", VENDORS
    ),
    "reads gate for up": Mutant(
        ACTIVATION, "inputs.fetch(strip, 1, i, x + args.inner);", "inputs.fetch(strip, 1, i, x);", NUMBERS
    ),
    "module of gate for up": Mutant(
        ACTIVATION, "rows.slot, rows.rank, 1)", "rows.slot, rows.rank, 0)", NUMBERS, VENDORS
    ),
    "no mask of columns of B": Mutant(
        ACTIVATION, "up_b.fetch(up, first, left);", "up_b.fetch(up, first, Strip::kColumns);", OUTSIDE, VENDORS
    ),
    "reads columns behind the last": Mutant(
        ACTIVATION,
        "(Strip::column() < left ? Strip::column() : left - 8)",
        "Strip::column()",
        f"{OUTSIDE}|{NUMBERS}",
        VENDORS,
    ),
    "no mask of columns": Mutant(
        ACTIVATION,
        "if (at.mine[i] && Strip::column() < left)",
        "if (at.mine[i])",
        f"{OUTSIDE}|race|{NUMBERS}",
        VENDORS,
    ),
    "rows beyond the tile": Mutant(
        ACTIVATION,
        "if (at.mine[i] && Strip::column() < left)",
        "if (Strip::column() < left)",
        f"race|{OUTSIDE}",
        VENDORS,
    ),
    "warps share their columns": Mutant(
        ACTIVATION, "(block_x() * kActivationWarps + warp_id()) * S", "(block_x() * kActivationWarps) * S", "race"
    ),
    "the first strip of a tile alone": Mutant(ROWS, "    if (!kWalks) return;\n", "    return;\n", NUMBERS, VENDORS),
    "plain: rows behind the last token": Mutant(ACTIVATION, "if (i >= rows) continue;", "", EARLY, VENDORS),
    "plain: stores rows behind the last token": Mutant(
        ACTIVATION, "if (i < rows) store_vec", "store_vec", f"{OUTSIDE}|{NUMBERS}|{EARLY}"
    ),
    "plain: no mask of columns": Mutant(
        ACTIVATION, "live && column < args.inner ?", "live ?", f"{OUTSIDE}|race|{NUMBERS}", VENDORS
    ),
    "adds a zero to rows of the base model": Mutant(STRIP, "  if (module.rank == 0) return;\n", "", NUMBERS, VENDORS),
    "a tile is one piece": Mutant(
        ROWS, "const int tile = block_y() >> bits;", "const int tile = block_y();", f"{NUMBERS}|{OUTSIDE}"
    ),
    "every piece is a tile's first": Mutant(ROWS, "block_y() - (tile << bits)", "0", "race"),
    "pieces counted from the first tile on": Mutant(ROWS, "block_y() - (tile << bits)", "block_y()", NUMBERS),
    "pieces begin where their tile does": Mutant(ROWS, "  rows.first += piece * size;\n", "", f"race|{NUMBERS}"),
    "pieces have rows of the next tile": Mutant(
        ROWS, "const int left = rows.count - piece * size;", "const int left = rows.count;", f"race|{OUTSIDE}"
    ),
    "forgets where a tile starts": Mutant(
        ROWS, "rows.perm[rows.first + (mine[i]", "rows.perm[(mine[i]", f"race|{NUMBERS}", VENDORS
    ),
}

ROPE_MUTANTS = {
    "no barrier before the squares are read": Mutant(ROPE, "    barrier();\n", "", RACE, VENDORS),
    "one buffer for all strips": Mutant(ROPE, "    buffer = !buffer;\n", "", RACE, VENDORS),
    "a barrier for heads with a norm": Mutant(
        ROPE,
        "if (has_norm(args)) add_warps(squares);",
        "if (head.norm() != nullptr) add_warps(squares);",
        STUCK,
        VENDORS,
    ),
    "heads share their sums": Mutant(ROPE, "sums[warp_id() * 16 +", "sums[warp_id() % kWarps * 16 +", RACE, VENDORS),
    "every lane writes the sum": Mutant(ROPE, "if (Strip::column() == 0)", "if (true)", "race"),
    "sums of the first head": Mutant(ROPE, "sums + warp_id() / kWarps * kWarps * 16;", "sums;", NUMBERS, VENDORS),
    "squares of one warp": Mutant(ROPE, " + own[(other + 1) * 16 + Strip::row(i)]", "", NUMBERS),
    "squares of the first row": Mutant(ROPE, "own[other * 16 + Strip::row(i)]", "own[other * 16]", NUMBERS),
    "does not wait for the previous kernel": Mutant(ROWS, f"{WAITS}{FIRST}", FIRST, EARLY, VENDORS),
    "reads qkv too early": Mutant(ROWS, f"{WAITS}{FIRST}", f"{FIRST}{WAITS}", EARLY),
    "plain: does not wait for the previous kernel": Mutant(
        ROWS, "    if (live) wait_for_previous_kernel();\n", "", EARLY
    ),
    "plain: a rehearsal reads qkv": Mutant(ROPE, "head.load(row, live && mine)", "head.load(row, mine)", EARLY),
    "plain: a rehearsal writes": Mutant(ROPE, "row, loc, live && mine)", "row, loc, mine)", EARLY),
    "plain: the weight of the first head": Mutant(
        ROPE, "      if (i > begin) weight = head.weight(), bias = head.bias();\n", "", NUMBERS
    ),
    "a block that has no rows does not wait": Mutant(ROPE, f"return{WAIT};", "return;", NEVER, HIP),
    "B of the first half for the second": Mutant(
        ROPE, "high_b.fetch(module, first + kHeadDim / 2,", "high_b.fetch(module, first,", NUMBERS, VENDORS
    ),
    "term of the first half for the second": Mutant(
        ROPE, "add_term(high[i], module, high_term, i)", "add_term(high[i], module, low_term, i)", NUMBERS
    ),
    "B of the first head": Mutant(ROPE, "head.index * kHeadDim + in_head()", "in_head()", NUMBERS, HIP),
    "B of the first warp of a head": Mutant(
        ROPE, "head.index * kHeadDim + in_head() - Strip::column();", "head.index * kHeadDim;", NUMBERS
    ),
    "B from the lane's columns on": Mutant(ROPE, "in_head() - Strip::column();", "in_head();", f"{NUMBERS}|{OUTSIDE}"),
    "module of q for k and v": Mutant(ROPE, "rows.rank, head.slice)", "rows.rank, 0)", NUMBERS),
    "reads the second half beside the first": Mutant(
        ROPE,
        "return {load_vec(p), load_vec(p + kHalf)};",
        "return {load_vec(p), load_vec(p + 8)};",
        f"{NUMBERS}|race|{OUTSIDE}",
    ),
    "stores the second half beside the first": Mutant(
        ROPE, "store_vec(p + kHalf, y.high)", "store_vec(p + 8, y.high)", f"{NUMBERS}|race", HIP
    ),
    "no norm": Mutant(ROPE, "    if (norm() == nullptr) return;\n", "    return;\n", NUMBERS),
    "a norm for v": Mutant(ROPE, "slice == 1 ? args.k_weight : nullptr", "args.k_weight", NUMBERS),
    "the norm of q for k": Mutant(
        ROPE, "slice == 1 ? args.k_weight : nullptr", "slice == 1 ? args.q_weight : nullptr", NUMBERS, HIP
    ),
    "turns v": Mutant(ROPE, "if (slice < 2)", "if (true)", NUMBERS),
    "turns the other way": Mutant(ROPE, "-(high.v[c] * turn.sine.v[c])", "high.v[c] * turn.sine.v[c]", NUMBERS),
    "angles of the row, not of its position": Mutant(ROPE, "static_cast<int>(args.positions[row])", "row", NUMBERS),
    "sines for cosines": Mutant(ROPE, "load_floats(angles + kHalf)", "load_floats(angles)", NUMBERS),
    "row of the pool for its place": Mutant(
        ROPE, "? static_cast<int>(args.locs[row]) : 0;", "? row : 0;", f"race|{NUMBERS}"
    ),
    "head of qkv for that of the pool": Mutant(
        ROPE, "+ index * kHeadDim + in_head, y)", "+ slice * kHeadDim + in_head, y)", f"race|{NUMBERS}|{OUTSIDE}"
    ),
    "k for v": Mutant(ROPE, "slice == 1 ? args.k_pool : args.v_pool", "args.k_pool", f"race|{NUMBERS}"),
    "copies q": Mutant(ROPE, "if (slice == 0 || args.k_pool", "if (args.k_pool", f"race|{NUMBERS}|{OUTSIDE}"),
    "bias of another column": Mutant(ROPE, "load_pair(args.bias + column)", "load_pair(args.bias + in_head)", NUMBERS),
    "no bias": Mutant(ROPE, "head.add_bias(low[i], high[i], bias);", "", NUMBERS, HIP),
    "a head that is not there": Mutant(ROPE, "exists ? index_ : heads - 1;", "index_;", OUTSIDE, VENDORS),
    "the last head twice": Mutant(ROPE, "if (!mine || !exists) return;", "if (!mine) return;", "race", VENDORS),
    "rows beyond the tile": Mutant(
        ROPE, "if (!mine || !exists) return;", "if (!exists) return;", f"{OUTSIDE}|race", VENDORS
    ),
    "the first rows of a tile alone": Mutant(ROWS, "    if (!kWalks) return;\n", "    return;\n", NUMBERS),
    "inputs of the first strip": Mutant(
        ROPE, "finish(at, strip, places);", "finish(at, 0, places);", f"race|{NUMBERS}"
    ),
    "inputs of the first strip for all": Mutant(
        ROWS, "fetch(strips(strip), strip)", "fetch(first, strip)", f"race|{NUMBERS}"
    ),
    "u of the first strip": Mutant(ROPE, "get_u(strip, 0, module, at)", "get_u(0, 0, module, at)", NUMBERS),
    "reads strips that are on their way": Mutant(ROWS, "    inputs.fetched();\n  }\n}", "  }\n}", ON_ITS_WAY),
    "angles of the first rows in every strip": Mutant(
        ROPE, "if (kMany) load_turns(places, strip)", "if (kMany) load_turns(places, 0)", NUMBERS, VENDORS
    ),
    "places of the first row": Mutant(
        ROPE, "places.loc_of(strip, i), at", "head.loc(rows.perm[rows.first]), at", f"race|{NUMBERS}"
    ),
    "places of the first strip": Mutant(
        ROPE, "places.loc_of(strip, i), at", "places.loc_of(0, i), at", f"race|{NUMBERS}"
    ),
    "rows of the first strip": Mutant(ROWS, "kWalks ? strips(strip) : first, s", "first, s", f"race|{NUMBERS}", HIP),
    "heads take the same columns": Mutant(
        ROPE, "block_x() * args_.block_heads + warp_id() / kWarps", "block_x() * args_.block_heads", f"race|{STUCK}"
    ),
    "plain: squares of two lanes": Mutant(ROPE, "      squares += shuffle_xor(squares, 2);\n", "", NUMBERS),
    "plain: squares of four lanes": Mutant(
        ROPE, "int mask = 4; mask < kLanes", "int mask = kLanes; mask < kLanes", NUMBERS, HIP
    ),
    "plain: rows of the block before": Mutant(
        ROPE,
        "neighbouring_rows(args.tokens, block_y(), kRopeRows)",
        "neighbouring_rows(args.tokens, 0, kRopeRows)",
        f"race|{NUMBERS}",
    ),
    "plain: a head too few": Mutant(ROPE, "live ? args.block_heads : 1", "live ? args.block_heads - 1 : 1", NUMBERS),
}


GROUP_MUTANTS = {
    "does not wait for a tile": Mutant(
        GROUP_GEMM, "      wait_for_arrivals(filled + step % kStages, step / kStages % 2);\n", "", NOT_THERE
    ),
    "one thread waits for a tile": Mutant(
        GROUP_GEMM,
        "wait_for_arrivals(filled + step",
        "if (thread_id() == 0) wait_for_arrivals(filled + step",
        NOT_THERE,
    ),
    "waits for the other phase of a tile": Mutant(
        GROUP_GEMM,
        "(filled + step % kStages, step / kStages % 2)",
        "(filled + step % kStages, (step / kStages + 1) % 2)",
        NOT_THERE,
    ),
    "waits for the next tile": Mutant(
        GROUP_GEMM,
        "wait_for_arrivals(filled + step % k",
        "wait_for_arrivals(filled + (step + 1) % k",
        f"{NOT_THERE}|{STUCK}",
    ),
    "does not wait for a free stage": Mutant(
        GROUP_GEMM,
        "      wait_for_arrivals(free + step % kStages, (step / kStages - 1) % 2);\n",
        "",
        f"race|{ON_ITS_WAY}|arrives at",
    ),
    "waits for the other phase of a free stage": Mutant(
        GROUP_GEMM, "(step / kStages - 1) % 2)", "step / kStages % 2)", f"race|{ON_ITS_WAY}|arrives at|{STUCK}"
    ),
    "frees no stage": Mutant(
        GROUP_GEMM, "      if (step > 0 && thread_id() == 0) arrive(free + (step - 1) % kStages);\n", "", STUCK
    ),
    "frees the stage that is read": Mutant(
        GROUP_GEMM,
        "if (step > 0 && thread_id() == 0) arrive(free + (step - 1) % kStages)",
        "if (thread_id() == 0) arrive(free + step % kStages)",
        "which a product that this thread has not waited for reads",
    ),
    "every warp frees a stage": Mutant(
        GROUP_GEMM,
        "step > 0 && thread_id() == 0",
        "step > 0 && lane_id() == 0",
        f"race|{STUCK}|{ON_ITS_WAY}|arrives at",
    ),
    "does not wait for products": Mutant(
        GROUP_GEMM, "      group_wait<1>(sums);\n", "", "which a product that this thread has not waited for reads"
    ),
    "waits for one product too few": Mutant(
        GROUP_GEMM, "group_wait<1>", "group_wait<2>", "which a product that this thread has not waited for reads"
    ),
    "does not wait for the last product": Mutant(
        GROUP_GEMM, "    group_wait<0>(sums);\n", "", "leaves while a product"
    ),
    "uses sums of all but the last product": Mutant(
        GROUP_GEMM, "group_wait<0>(sums)", "group_wait<1>(sums)", "leaves while a product"
    ),
    "does not begin": Mutant(GROUP_GEMM, "      group_begin();\n", "", "no group_begin"),
    "does not commit": Mutant(
        GROUP_GEMM, "      group_commit();\n", "", "which a product that this thread has not waited for reads"
    ),
    "no barrier after arrivals are made": Mutant(
        GROUP_GEMM,
        "arrivals_ready();\n    }\n    barrier();",
        "arrivals_ready();\n    }",
        "race: uses arrivals|no arrivals are",
    ),
    "arrivals are not made ready": Mutant(GROUP_GEMM, "      arrivals_ready();\n", "", "before arrivals_ready"),
    "a tile waits for two threads": Mutant(
        GROUP_GEMM, "arrivals_init(filled + i, 1)", "arrivals_init(filled + i, 2)", STUCK
    ),
    "a free stage waits for a warpgroup": Mutant(
        GROUP_GEMM, "arrivals_init(free + i, 1)", "arrivals_init(free + i, kWarpgroup)", STUCK
    ),
    "one place for both arrivals": Mutant(
        GROUP_GEMM, "filled, filled + kStages, cluster_x()", "filled, filled, cluster_x()", "which counts arrivals"
    ),
    "expects the weights alone": Mutant(
        GROUP_GEMM,
        "arrive_expecting(done, kStageBytes)",
        "arrive_expecting(done, kStageBytes - kTokenBytes)",
        "are brought to|" + NOT_THERE,
    ),
    "expects a row more": Mutant(
        GROUP_GEMM, "arrive_expecting(done, kStageBytes)", "arrive_expecting(done, kStageBytes + 128)", STUCK
    ),
    "expects every part": Mutant(
        GROUP_GEMM,
        "copy_tile(stage(step), args.x,",
        "arrive_expecting(filled + step % kStages, kTokenBytes), copy_tile(stage(step), args.x,",
        "arrives at",
    ),
    "copies tokens too early": Mutant(
        GROUP_GEMM, "    wait_for_previous_kernel();\n    SGL_NO_UNROLL\n", "    SGL_NO_UNROLL\n", EARLY
    ),
    "copies tokens with the weights": Mutant(
        GROUP_GEMM, "++step) copy_weights(step);\n", "++step) copy_weights(step), copy_tokens(step);\n", EARLY
    ),
    "stores before the previous kernel has ended": Mutant(
        GROUP_GEMM, "    wait_for_previous_kernel();  // which may read what y was\n", "", EARLY
    ),
    "fills the ring beyond its end": Mutant(
        GROUP_GEMM,
        "steps < kStages ? steps : kStages;",
        "steps < kStages + 1 ? steps : kStages + 1;",
        f"race|{ON_ITS_WAY}|arrives at",
    ),
    "copies a step too few": Mutant(
        GROUP_GEMM, "int step = kStages; step < steps", "int step = kStages; step < steps - 1", STUCK
    ),
    "copies a step too many": Mutant(
        GROUP_GEMM,
        "int step = kStages; step < steps",
        "int step = kStages; step <= steps",
        f"{STUCK}|leaves while a tile",
    ),
    "copies what the first turn had": Mutant(
        GROUP_GEMM, "args.x, 0, first_column + step * 64", "args.x, 0, first_column + step % kStages * 64", NUMBERS
    ),
    "multiplies a step too few": Mutant(
        GROUP_GEMM,
        "step < steps; ++step) {\n      const Operand",
        "step < steps - 1; ++step) {\n      const Operand",
        f"leaves while a tile|{STUCK}",
    ),
    "loses columns of a step": Mutant(GROUP_GEMM, "int i = 0; i < 4", "int i = 0; i < 3", NUMBERS),
    "multiplies the same columns": Mutant(
        GROUP_GEMM, "(sums, tokens, weights, i)", "(sums, tokens, weights, 0)", NUMBERS
    ),
    "takes weights for tokens": Mutant(
        GROUP_GEMM,
        "(sums, tokens, weights, i)",
        "(sums, weights, tokens, i)",
        f"{NUMBERS}|{NOT_THERE}",
    ),
    "sums begin with something": Mutant(GROUP_GEMM, "sums.v[i] = 0.f", "sums.v[i] = 1.f", NUMBERS),
    "clears sums on the way": Mutant(
        GROUP_GEMM,
        "      group_begin();\n",
        "      group_begin();\n      if (step == 2) sums.v[0] = 0.f;\n",
        "race: writes sums",
    ),
    "a value of its own in every lane": Mutant(
        GROUP_GEMM,
        "same_in_all_lanes(warp_id())",
        "same_in_all_lanes(thread_id())",
        r"same_in_all_lanes of \d+, and of \d+ in",
    ),
    "a fifth warp multiplies": Mutant(
        GROUP_GEMM, "      copy();\n    }\n", "      copy();\n    }\n    multiply(sums);\n", "multiplies as thread"
    ),
    "a warp copies": Mutant(
        GROUP_GEMM,
        "} else if (lane_id() == 0) {",
        "} else {",
        f"arrives at|{ON_ITS_WAY}|are brought to",
    ),
    "tiles at a multiple of 128": Mutant(
        GROUP_GEMM, "align_shared(shared_memory(), 1024)", "align_shared(shared_memory(), 128)", "misaligned: a tile"
    ),
    "no room to align": Mutant(GEOMETRY, "return 1024 + kGroupStages * (", "return 0 + kGroupStages * (", OUTSIDE),
    "rows of the first block": Mutant(GROUP_GEMM, "args.weight, first_row, first", "args.weight, 0, first", NUMBERS),
    "every block has rows of its own": Mutant(GROUP_GEMM, "cluster_x() * kRows", "block_x() * kRows", NUMBERS),
    "all of the sum of weights in every block": Mutant(
        GROUP_GEMM, "first_row, first_column + step * 64", "first_row, step * 64", NUMBERS
    ),
    "all of the sum in every block": Mutant(
        GROUP_GEMM,
        "same_in_all_lanes(cluster_rank()) * args.part_columns",
        "0",
        NUMBERS,
    ),
    "stores tokens that are not there": Mutant(GROUP_GEMM, "      if (token >= args.tokens) continue;\n", "", OUTSIDE),
    "stores columns that are not there": Mutant(
        GROUP_GEMM, "if (first_row + i * 4 < args.out_features) y[", "y[", f"{NUMBERS}|race|{OUTSIDE}"
    ),
    "stores columns of parts that are not there": Mutant(
        GROUP_GEMM, "      if (n >= args.out_features) continue;\n", "", f"{NUMBERS}|race|{OUTSIDE}"
    ),
    "adds tokens that are not there": Mutant(
        GROUP_GEMM, "last = end < args.tokens ? end : args.tokens", "last = end", f"{OUTSIDE}|race"
    ),
    "parts that overlap": Mutant(GROUP_GEMM, "left < args.part_columns ? left : args.part_columns", "left", NUMBERS),
    "a part without its last columns": Mutant(GROUP_GEMM, "(columns + 63) / 64", "columns / 64", NUMBERS),
    "shares leave a token out": Mutant(
        GROUP_GEMM, "end = first + args.share_tokens", "end = first + args.share_tokens - 1", NUMBERS
    ),
    "stores the rows of one half": Mutant(GROUP_GEMM, "sums.row(half)", "sums.row(0)", f"race|{NUMBERS}"),
    "stores columns apart": Mutant(GROUP_GEMM, "y[i / 2 * 4]", "y[i * 4]", f"race|{NUMBERS}|{OUTSIDE}"),
    "every block adds all tokens": Mutant(
        GROUP_GEMM, "first = cluster_rank() * args.share_tokens", "first = 0", f"race|{NUMBERS}"
    ),
    "the fifth warp's share is lost": Mutant(
        GROUP_GEMM, "i < last * kQuads; i += kThreads", "i < last * kQuads; i += kWarpgroup", "race"
    ),
    "no barrier before the sums are read": Mutant(
        GROUP_GEMM, "    cluster_barrier();\n    constexpr int kQuads", "    constexpr int kQuads", RACE
    ),
    "a block's barrier before the sums are read": Mutant(
        GROUP_GEMM, "    cluster_barrier();\n    constexpr int kQuads", "    barrier();\n    constexpr int kQuads", RACE
    ),
    "no barrier after the sums are read": Mutant(
        GROUP_GEMM,
        "    cluster_started();  // nobody leaves while others read its sums; y may still be on its way\n",
        "",
        "leaves while|which has left",
    ),
    "ends a barrier that it has not begun": Mutant(GROUP_GEMM, "    cluster_start();\n", "", "with no cluster_start"),
    "sums are read behind a barrier that orders nothing": Mutant(
        GROUP_GEMM,
        "    cluster_barrier();\n    constexpr int kQuads",
        "    cluster_start();\n    cluster_started();\n    constexpr int kQuads",
        RACE,
    ),
    "adds its own part alone": Mutant(
        GROUP_GEMM, "cluster_load(place, other)", "cluster_load(place, cluster_rank())", NUMBERS
    ),
    "leaves the first part out": Mutant(
        GROUP_GEMM,
        "for (int other = 0; other < kGroupSplits; ++other)\n        if (other < parts)\n          SGL",
        "for (int other = 1; other < kGroupSplits; ++other)\n        if (other < parts)\n          SGL",
        NUMBERS,
    ),
    "reads a part that is not there": Mutant(
        GROUP_GEMM, "if (other < parts) more", "if (other <= parts) more", "reads block"
    ),
    "sums of other rows": Mutant(
        GROUP_GEMM, "row = i % kQuads * 4, n", "row = i % kQuads, n", f"misaligned|{NUMBERS}|race"
    ),
    "stores halves in the other order": Mutant(
        GROUP_GEMM,
        "pack_bf16(sums.v[2 * i], sums.v[2 * i + 1])",
        "pack_bf16(sums.v[2 * i + 1], sums.v[2 * i])",
        NUMBERS,
    ),
}


# ---- the runs --------------------------------------------------------------------------------------------------------

MACROS = "STREAM|TILE|GROUP|EXPAND|NORM|SILU_AND_MUL|ROPE_OF|ROPE"


@lru_cache
def small_sources(*kernels: str) -> Sources:
    """With no entry points but those whose macros begin so: others take long to compile."""
    sources = Sources(optimize="-O0")
    found: list[str] = []

    def keep(use: re.Match[str]) -> str:
        found.extend(kernel for kernel in kernels if use[0].startswith(f"SGL_{kernel}"))
        return use[0] if use[0].startswith(tuple(f"SGL_{kernel}" for kernel in kernels)) else ""

    for unit in UNITS:
        sources = sources.add(unit, re.sub(rf"(?<!#define )SGL_({MACROS})\([^()\n]*\)", keep, sources.text(unit)))
    assert sorted(found) == sorted(kernels)
    return sources


def run_stream(make: Callable[[], Gpu]) -> None:
    """Rings that run on over several units, with several slices of a unit or none, a ragged edge everywhere."""
    rng, slots = np.random.default_rng(1), [1, -1, 0, 1, 3]
    ranks = {0: (3, 0, 33), 1: (17, 1, 1), 3: (40, 40, 40)}
    for k, splits, clusters in ((72, 1, 6), (1096, 1, 3), (1096, 2, 3)):
        if splits > 1 and make().vendor == "hip":
            continue
        x, weight = random_bf16(rng, len(slots), k), random_bf16(rng, 72, k)
        gpu = make()
        adapters = Adapters(gpu, k, (40, 24, 8), ranks, 4)
        y, u = Product(gpu, x, weight, "skinny_gemm_8", splits, clusters, 1, adapters, slots, 4).run()
        assert_product(y, x, weight)
        assert_u(u, x, adapters, slots)
        gpu, more = make(), [1, -1, 3, *[0] * 9]
        x = random_bf16(rng, len(more), k)
        adapters = Adapters(gpu, k, (40, 24, 8), ranks, 4)
        u = shrink(gpu, x, adapters, more, 16, spare_tiles=1, blocks=2)
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
        assert_shrunk(shrink(gpu, x, adapters, slots, 64, spare_tiles=1), x, adapters, slots)


def run_groups(make: Callable[[], Gpu]) -> None:
    """Rings of less than a turn, of one and a bit, and of several; one part, and some; a ragged edge everywhere."""
    rng = np.random.default_rng(5)
    for seed, (tokens, n, k, splits) in enumerate([(37, 200, 1352, 1), (20, 104, 712, 3), (50, 40, 1224, 2)], 1):
        x, weight = random_bf16(rng, tokens, k), random_bf16(rng, n, k)
        assert_product(GroupProduct(make(), x, weight, GROUPS[1], splits, seed).run(), x, weight)


def run_expand(make: Callable[[], Gpu]) -> None:
    """Ranks beyond those in registers, slices that end inside a strip, rows of nobody, both forms of u."""
    rng = np.random.default_rng(2)
    ranks = {0: (3, 100), 1: (33, 0), 2: (5, 104), 3: (104, 70)}
    for slots, tile in (([1, -1, 0, 1, 2, 3], 16), ([2, 1, *[0] * 17], 64)):
        for every_slot in (False, True):
            gpu = make()
            adapters = Adapters(gpu, 8, (136, 24), ranks, 4)
            stride = 2 * adapters.rank_cap if every_slot else 0
            y, u = starting_y(rng, len(slots), adapters), random_u(rng, adapters, slots, 4 if every_slot else 0)
            actual = expand(gpu, y, u, adapters, slots, tile, slot_stride=stride, spare_tiles=1)
            assert_expanded(actual, y, u, adapters, slots, stride)


class FrugalGpu(Gpu):
    """One that gives its threads' stacks back: those of all mutants are more mappings than a process may have."""

    def launch(self, name: str, args: Structure, grid: tuple[int, int], *sizes: int, **more: Any) -> None:
        super().launch(name, args, grid, *sizes, **more)
        with suppress(KernelError):
            super().launch(name, args, (0, 0), *sizes, **more)  # refused, which is when they are freed


class TightGpu(FrugalGpu):
    """One on which the last row of x is the end of memory that may be read."""

    def array(self, name: str, values: NDArray[Any], role: str = "static", align: int = 16) -> NDArray[Any]:
        tight = values[:-BEHIND].reshape(-1)[:-8] if name == "x" else values
        return super().array(name, tight, role, align)


class SmallGpu(FrugalGpu):
    """One whose blocks have little room: rows of a norm do not fit into shared memory."""

    ROOM: Mapping[str, int] = {"norm_held": 1, "norm_staged": 128}

    def geometry(self, function: str, *sizes: int) -> int:
        return min(super().geometry(function, *sizes), self.ROOM.get(function, 1 << 30))


def run_norm_kernels(make: Callable[[], Gpu]) -> None:
    """Several turns of a block, the last of which has no work for some warps; more rows of a slot than one piece."""
    rng = np.random.default_rng(3)
    mixed = [4, -1, 1, 1, 4, -1, 0, *[1] * 8]
    many = [*[4] * 18, -1]
    for hidden, cluster, small, slots, tile in (
        (648, 2, False, mixed, 16),
        (648, 2, True, many, 64),
        (1096, 8, True, [1, -1], 16),
    ):
        gpu, tokens = _like(make, SmallGpu if small else FrugalGpu), len(slots)
        x, residual = random_bf16(rng, tokens, hidden), random_bf16(rng, tokens, hidden)
        weight = random_bf16(rng, hidden)
        rows = Rows(gpu, [hidden], tokens, slots, {0: (0,), 1: (5,), 4: (16,)}, tile)
        stream, out = run_norm(rows, x, residual, weight, cluster if gpu.vendor == "cuda" else 1)
        _assert_added(stream, x, residual, *rows.term(0))
        assert_normalised(out, stream, weight)
    for hidden, small in ((8, False), (264, True)):
        x, residual, weight = random_bf16(rng, 7, hidden), random_bf16(rng, 7, hidden), random_bf16(rng, hidden)
        stream, out = run_norm(
            Rows(_like(make, SmallGpu if small else FrugalGpu), [hidden], 7), x, residual, weight, 1, 4
        )
        _assert_added(stream, x, residual)
        assert_normalised(out, stream, weight)
        _, out = run_norm(Rows(_like(make, SmallGpu if small else FrugalGpu), [hidden], 7), x, None, weight, 1, 4)
        assert_normalised(out, x, weight)


def _like(make: Callable[[], Gpu], kind: type[Gpu]) -> Gpu:
    gpu = make()
    return kind(gpu.vendor, gpu.sources)


def _assert_added(stream: Bits, x: Bits, residual: Bits, term: object = 0.0, size: object = 0.0) -> None:
    magnitude = np.abs(to_float(x)) + np.abs(to_float(residual)) + size
    assert_rounded_once(stream, to_float(x) + to_float(residual) + term, magnitude)


def run_activation_kernels(make: Callable[[], Gpu]) -> None:
    """A strip that is cut off, the last adapter of the slabs, tiles of several pieces and of several strips."""
    rng, inner = np.random.default_rng(4), 136
    ranks = {0: (3, 8), 1: (5, 0), 4: (13, 16)}
    for slots, tile in (([4, -1, 1, 1, 4, 0, *[1] * 7], 16), ([4, -1, *[0] * 33], 64)):
        x = random_bf16(rng, len(slots), 2 * inner)
        x[1, :inner:3] = 0x8000  # -0 of a row of the base model
        rows = Rows(_like(make, TightGpu), [inner, inner], len(slots), slots, ranks, tile)
        out = run_activation(rows, x)
        (gate, gate_size), (up, up_size) = rows.term(0), rows.term(1)
        _assert_activated(out, x, gate, gate_size, up, up_size)
        plain = run_activation(Rows(make(), [inner, inner], len(slots)), x)
        _assert_activated(plain, x)
        base = np.array(slots) < 0
        assert (out[base] == plain[base]).all()


def _assert_activated(
    out: Bits, x: Bits, gate: object = 0.0, gate_size: object = 0.0, up: object = 0.0, up_size: object = 0.0
) -> None:
    gates, ups = np.split(to_float(x), 2, axis=1)
    gate, gate_size, up, up_size = gates + gate, np.abs(gates) + gate_size, ups + up, np.abs(ups) + up_size
    silu = gate / (1 + np.exp(-gate))
    magnitude = 1.1 * gate_size * np.abs(up) + np.abs(silu) * (up_size + gate_size * np.abs(up))
    assert_rounded_once(out, silu * up, magnitude)


def run_rope_kernels(make: Callable[[], Gpu]) -> None:
    """Heads of two warps, a block with one head too many, tiles of several pieces and of several strips."""
    ranks = {0: (3, 8, 1), 1: (5, 0, 2), 4: (13, 16, 16)}
    for slots, tile in (([4, -1, 1, 1, 4, 0, *[1] * 7], 16), ([4, *[0] * 34], 64)):
        data = Heads(len(slots), 128, *((2, 1) if tile == 16 else (3, 2)))
        rows = Rows(make(), data.widths, len(slots), slots, ranks, tile)
        assert_heads(rows, data, *run_rope(rows, data))
    data = Heads(18, 128, 3, 1)
    rows = Rows(make(), data.widths, 18, tile=64)
    assert_heads(rows, data, *run_rope(rows, data))


Run = tuple[Callable[[Callable[[], Gpu]], None], Mapping[str, Mutant], tuple[str, ...]]

RUNS: Mapping[str, Run] = {
    "stream": (run_stream, STREAM_MUTANTS, ("STREAM(skinny_gemm, GemmArgs, 8", "STREAM(lora_shrink, ShrinkArgs, 16")),
    "tiles": (run_tiles, TILE_MUTANTS, ("TILE(skinny_gemm, GemmArgs, 32, 64", "TILE(lora_shrink, ShrinkArgs, 64, 64")),
    "groups": (run_groups, GROUP_MUTANTS, ("GROUP(96",)),
    "expand": (run_expand, EXPAND_MUTANTS, ("EXPAND(64",)),
    "norm": (run_norm_kernels, NORM_MUTANTS, ("NORM(16, 16", "NORM(64, 16")),
    "activation": (
        run_activation_kernels,
        ACTIVATION_MUTANTS,
        ("SILU_AND_MUL(16, 16", "SILU_AND_MUL(64, 16"),
    ),
    "rope": (
        run_rope_kernels,
        ROPE_MUTANTS,
        ("ROPE(128", "ROPE_OF(head_dim, 16, 16", "ROPE_OF(head_dim, 64, 16"),
    ),
}
"""What is run, what is done to it, and the entry points that it needs, by their macros' arguments."""
CASES = [
    (kind, name, vendor)
    for kind, (_, mutants, _) in RUNS.items()
    for name, mutant in mutants.items()
    for vendor in mutant.vendors
]


@pytest.mark.parametrize(
    ("vendor", "kind"), [(vendor, kind) for vendor in VENDORS for kind in RUNS if (vendor, kind) != ("hip", "groups")]
)
def test_kernels_without_a_mistake_pass(vendor: str, kind: str) -> None:
    run, _, kernels = RUNS[kind]
    run(lambda: FrugalGpu(vendor, small_sources(*kernels)))


@pytest.mark.parametrize(("kind", "name", "vendor"), CASES)
def test_mistakes_are_found(kind: str, name: str, vendor: str) -> None:
    run, mutants, kernels = RUNS[kind]
    mutant = mutants[name]
    sources = small_sources(*kernels).replace(mutant.file, mutant.old, mutant.new)
    try:
        run(lambda: FrugalGpu(vendor, sources))
    except KernelError as error:
        found = str(error)
    except AssertionError:
        found = NUMBERS
    else:
        found = "nothing"
    assert re.search(mutant.error, found), f"found: {found}"
