"""The attention kernels of the Triton back end: decoding beside the bytes of K and V, prefill in TFLOP/s.

    python benchmark/kernels/attention.py --model qwen3-1.7b --decode 1 64 --contexts 512 2048 --tune

A CUDA graph has 28 calls, each on a layer of its own as far as memory allows, so that no K or V is found in the L2
cache. Tokens lie scattered over the pool, as after hours of serving. With --tune: the best tiles and splits for each
case. With --flashinfer: its kernels beside ours, in pages of 16. With --page-size 1 16 64: one size beside the other.
Prints a table and, with --out, JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replay import replay_ms
from torch import Tensor

from sglang.srt.layers.attention.triton import query_blocks
from sglang.srt.model_executor.forward_context import StepShape
from sglang.srt.ops.triton import attention as ops

BANDWIDTH = 4.3e12
"""Bytes a second that an H200 copies at (measured), the roofline of the table."""
CALLS = 28
FLUSH_BYTES = 256 << 20
"""Written before each replay: more than any L2 cache holds."""
MODELS = {"qwen3-1.7b": (16, 8, 128), "qwen3-8b": (32, 8, 128)}
"""Query heads, KV heads, head dimension."""
PREFILLS = [(1, 8192), (4, 2048), (32, 256)]
"""Sequences, tokens of each."""
FLASHINFER_PAGE = 16
"""Tokens of a page that flashinfer's kernels are compared in."""
BEST = 5
"""Lines that --tune prints for each case."""


@dataclass(frozen=True)
class Variant:
    """One way to run a case.

    Attributes:
        what: the parameters, for people; run: all calls once.
    """

    what: str
    run: Callable[[], None]


class Pool:
    """K and V of some layers, and sequences of equal length in it."""

    def __init__(self, model: str, batch: int, context: int, page_size: int, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.dim = MODELS[model]
        self.batch, self.context, self.page_size, self.dtype = batch, context, page_size, dtype
        pages = -(-context // page_size)
        shape = (batch * pages * page_size, self.kv_heads, self.dim)
        self.layer_bytes = 2 * dtype.itemsize * shape[0] * self.kv_heads * self.dim
        free = torch.cuda.mem_get_info()[0]
        layers = max(1, min(CALLS, int(0.8 * free) // self.layer_bytes))
        order = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
        self.layers = [ops.PagedKV(self._values(shape), self._values(shape), order, page_size) for _ in range(layers)]
        self.slots = torch.arange(batch, device="cuda")
        self.scale = self.dim**-0.5

    def queries(self, tokens: int) -> Tensor:
        """[tokens, heads, dim], a view of a fused projection."""
        return self._values((tokens, self.heads + 2 * self.kv_heads, self.dim))[:, : self.heads]

    def output(self, tokens: int) -> Tensor:
        """[tokens, heads * dim]"""
        return torch.empty(tokens, self.heads * self.dim, dtype=self.dtype, device="cuda")

    def calls(self) -> Iterator[ops.PagedKV]:
        """The layers of a graph's calls."""
        return (self.layers[i % len(self.layers)] for i in range(CALLS))

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="cuda").normal_()


def graph_us(run: Callable[[], None], repeats: int) -> float:
    """Median microseconds of one of the CALLS of `run`, captured, with none of its operands in the L2 cache."""
    other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()  # operands are being filled on another stream
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replay_ms(graph, repeats, other.zero_) * 1e3 / CALLS


def decode_variants(pool: Pool, max_context: int, tune: bool) -> Iterator[Variant]:
    """The default of a server whose sequences may have `max_context` tokens; when tuning, all others that make sense.

    A tuned variant has exactly the splits it says (`min_tokens` is one block), whatever the longest sequence.
    """
    q, out = pool.queries(pool.batch), pool.output(pool.batch)
    kv_lens = torch.full((pool.batch,), pool.context, dtype=torch.int64, device="cuda")
    decodes = ops.Decodes(pool.slots, kv_lens, None, pool.batch)
    counters = torch.zeros(pool.batch * pool.kv_heads, dtype=torch.int32, device="cuda")

    def variant(name: str, tiles: ops.DecodeTiles, splits: ops.Splits) -> Variant:
        def run() -> None:
            for kv in pool.calls():
                ops.decode(q, out, kv, decodes, splits, counters, pool.scale, None, tiles)

        return Variant(f"{name}{tuple(tiles)} x {tuple(splits)}", run)

    device = torch.device("cuda", torch.cuda.current_device())
    splits = ops.choose_splits(pool.batch, pool.kv_heads, max_context, device)
    yield variant("default ", ops.decode_tiles(pool.dim, pool.dtype), splits)
    if not tune:
        return
    for block_n, warps, stages in product((32, 64, 128), (2, 4, 8), (2, 3, 4)):
        for parts in split_counts(pool, block_n):
            yield variant("", ops.DecodeTiles(block_n, warps, stages), ops.Splits(parts, block_n))


def split_counts(pool: Pool, block_n: int) -> list[int]:
    """Powers of two: at least a block of keys each, and not more programs than a device has room for many times."""
    most = max(1, min(pool.context // block_n, 8192 // (pool.batch * pool.kv_heads)))
    return [1 << i for i in range(most.bit_length()) if 1 << i <= 64]


def flashinfer_tables(pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pages of each sequence begin among all pages, those pages, and tokens in each one's last page."""
    pages = pool.layers[0].pages
    starts = torch.arange(pool.batch + 1, dtype=torch.int32) * pages.shape[1]
    last = torch.full((pool.batch,), (pool.context - 1) % pool.page_size + 1, dtype=torch.int32)
    return starts, pages.reshape(-1), last


def flashinfer_paged(pool: Pool, kv: ops.PagedKV) -> tuple[Tensor, Tensor]:
    """K and V of a layer in pages."""
    keys, values = (t.view(-1, pool.page_size, pool.kv_heads, pool.dim) for t in (kv.k, kv.v))
    return keys, values


def flashinfer_decodes(pool: Pool) -> Iterator[Variant]:
    """Its decode kernels, those for CUDA cores and those for tensor cores."""
    import flashinfer

    q, out = pool.queries(pool.batch).contiguous(), pool.output(pool.batch).view(pool.batch, pool.heads, pool.dim)
    starts, pages, last = flashinfer_tables(pool)
    for tensor_cores in (False, True):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=starts.cuda(),
            paged_kv_indices_buffer=pages.clone(),
            paged_kv_last_page_len_buffer=last.cuda(),
        )
        sizes = (pool.heads, pool.kv_heads, pool.dim, pool.page_size)
        wrapper.plan(starts, pages, last, *sizes, q_data_type=pool.dtype, kv_data_type=pool.dtype)

        def run(wrapper: Any = wrapper) -> None:
            for kv in pool.calls():
                wrapper.run(q, flashinfer_paged(pool, kv), out=out)

        yield Variant("flashinfer, tensor cores" if tensor_cores else "flashinfer", run)


def flashinfer_prefills(pool: Pool) -> Iterator[Variant]:
    """Its prefill kernels, for Ampere and for Hopper."""
    import flashinfer

    tokens = pool.batch * pool.context
    q, out = pool.queries(tokens), pool.output(tokens).view(tokens, pool.heads, pool.dim)
    starts, pages, last = flashinfer_tables(pool)
    query_starts = torch.arange(pool.batch + 1, dtype=torch.int32) * pool.context
    for backend in ("fa2", "fa3"):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"), "NHD", backend=backend
        )
        sizes = (pool.heads, pool.kv_heads, pool.dim, pool.page_size)
        wrapper.plan(
            query_starts, starts, pages, last, *sizes, causal=True, sm_scale=pool.scale, q_data_type=pool.dtype
        )

        def run(wrapper: Any = wrapper) -> None:
            for kv in pool.calls():
                wrapper.run(q, flashinfer_paged(pool, kv), out=out)

        yield Variant(f"flashinfer, {backend}", run)


def prefill_variants(pool: Pool, tune: bool) -> Iterator[Variant]:
    """The default; when tuning, all other tiles too."""
    tokens = pool.batch * pool.context
    q, out, group = pool.queries(tokens), pool.output(tokens), pool.heads // pool.kv_heads
    lens = np.full(pool.batch, pool.context, dtype=np.int32)

    def variant(name: str, tiles: ops.PrefillTiles) -> Variant:
        blocks = torch.from_numpy(query_blocks(StepShape(lens, lens), tiles.queries(group))).cuda()

        def run() -> None:
            for kv in pool.calls():
                ops.prefill(q, out, kv, pool.slots, blocks, pool.scale, None, tiles)

        return Variant(f"{name}{tuple(tiles)}", run)

    device = torch.device("cuda", torch.cuda.current_device())
    yield variant("default ", ops.prefill_tiles(pool.dim, group, pool.dtype, device))
    if tune:
        for sizes in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            yield variant("", ops.PrefillTiles(*sizes))


def timed(variants: Iterator[Variant], repeats: int) -> list[tuple[float, str]]:
    """(microseconds a call, what) of every variant that fits the GPU: the default, then the best."""
    from triton.runtime.errors import OutOfResources

    results = []
    for variant in variants:
        try:
            results.append((graph_us(variant.run, repeats), variant.what))
        except OutOfResources:
            continue
    return results[:1] + sorted(results[1:])[:BEST]


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-1.7b")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 256], help="batch sizes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 2048, 8192])
    parser.add_argument("--max-context", type=int, default=40960, help="of the server whose defaults are measured")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--page-size", type=int, nargs="+", default=[16], help="tokens of a page (default: 16)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--flashinfer", action="store_true", help="which must be installed; pages of 16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.flashinfer and FLASHINFER_PAGE not in args.page_size:
        parser.error(f"--flashinfer takes pages of {FLASHINFER_PAGE}; add {FLASHINFER_PAGE} to --page-size")
    dtype = getattr(torch, args.dtype)
    print(f"{args.model} {args.dtype}; {torch.cuda.get_device_name()}, {torch.__version__}")

    def report(row: dict[str, object], line: str) -> None:
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"model": args.model, **row}) + "\n")

    for batch, context, page_size in product(args.decode, args.contexts, args.page_size):
        pool = Pool(args.model, batch, context, page_size, dtype)
        size = 2 * dtype.itemsize * batch * (context * pool.kv_heads + pool.heads) * pool.dim
        others = flashinfer_decodes(pool) if args.flashinfer and page_size == FLASHINFER_PAGE else ()
        for us, what in timed(chain(decode_variants(pool, args.max_context, args.tune), others), args.repeats):
            rate, floor = size / us / 1e6, size / BANDWIDTH * 1e6
            case = {"kind": "decode", "batch": batch, "context": context, "page_size": page_size}
            report(
                {**case, "what": what, "us": us, "tb_per_s": rate},
                f"decode {batch:3d} x {context:4d} in pages of {page_size:2d} {what:36s} {us:8.1f} us  "
                f"floor {floor:7.1f}  {rate:5.2f} TB/s",
            )
        del pool
        torch.cuda.empty_cache()
    for (batch, context), page_size in product([] if args.no_prefill else PREFILLS, args.page_size):
        pool = Pool(args.model, batch, context, page_size, dtype)
        flops = 4 * pool.dim * pool.heads * batch * context * (context + 1) / 2
        others = flashinfer_prefills(pool) if args.flashinfer and page_size == FLASHINFER_PAGE else ()
        for us, what in timed(chain(prefill_variants(pool, args.tune), others), args.repeats):
            case = {"kind": "prefill", "batch": batch, "context": context, "page_size": page_size}
            rate = flops / us / 1e6
            report(
                {**case, "what": what, "us": us, "tflop_per_s": rate},
                f"prefill {batch:2d} x {context:4d} in pages of {page_size:2d} {what:36s} {us:8.1f} us  "
                f"{rate:6.1f} TFLOP/s",
            )
        del pool
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
