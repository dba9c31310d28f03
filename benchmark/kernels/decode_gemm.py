"""All matrix products of one decode step, in a CUDA graph: ours beside cuBLAS, beside the bytes of the weights.

    python benchmark/kernels/decode_gemm.py --model qwen3-1.7b --tokens 1 16 64

Every layer has its own weights, so that none is found in the L2 cache. With --tails the weights are followed by A of so
many adapters of rank 16 (`lora.weight_tails`). Prints a table and, with --out, JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from replay import replay_ms
from torch import Tensor

from sgl_kernel import _binding
from sgl_kernel.ops import MAX_SKINNY_ROWS

BANDWIDTH = 4.3e12
"""Bytes a second that an H200 copies at (measured), the roofline of the table."""

MODELS = {  # layers, hidden, q + k + v, q, intermediate, vocabulary
    "qwen3-1.7b": (28, 2048, 4096, 2048, 6144, 151936),
    "qwen3-8b": (36, 4096, 6144, 4096, 12288, 151936),
}


RANK = 16


class Matrix(NamedTuple):
    """A weight [N + tail, K]: N rows of its own, and `width` more for each adapter behind it."""

    data: Tensor
    rows: int
    width: int

    def with_tail(self, adapters: int) -> Tensor:
        """The weight and A of so many adapters."""
        return self.data[: self.rows + adapters * self.width]


def matrices(model: str, layers: int | None, adapters: int) -> list[Matrix]:
    """The weights of a step, in its order, with room for A of so many adapters."""
    depth, hidden, qkv, q, mlp, vocab = MODELS[model]
    layer = [(qkv, hidden, 3 * RANK), (hidden, q, RANK), (2 * mlp, hidden, 2 * RANK), (hidden, mlp, RANK)]

    def matrix(rows: int, columns: int, width: int) -> Matrix:
        data = torch.randn(rows + adapters * width, columns, device="cuda", dtype=torch.bfloat16) * 0.02
        return Matrix(data, rows, width)

    return [matrix(*shape) for shape in layer * (layers or depth) + [(vocab, hidden, 0)]]


def graph_ms(run: Callable[[], None], repeats: int) -> float:
    """Median time of a replay of `run`, captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replay_ms(graph, repeats)


def systems(
    extended: list[Matrix], tokens: int, splits: list[int], tails: list[int]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, a step's products) of everything that is compared."""
    weights = [matrix.with_tail(0) for matrix in extended]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device="cuda", dtype=torch.bfloat16) for w in weights}
    widths = {len(matrix.with_tail(adapters)) for matrix in extended for adapters in (0, *tails)}
    outputs = {width: torch.empty(tokens, width, device="cuda", dtype=torch.bfloat16) for width in widths}
    native = _binding.native_for(inputs[weights[0].shape[1]])
    assert native is not None, "no binary for this GPU"

    def cublas(adapters: int) -> None:
        for matrix in extended:
            torch.mm(inputs[matrix.data.shape[1]], matrix.with_tail(adapters).t())

    def ours(count: int, adapters: int = 0) -> None:
        for matrix in extended:
            w = matrix.with_tail(adapters)
            native.skinny_gemm(inputs[w.shape[1]], w, outputs[len(w)], splits=count)

    def overlapped(count: int, adapters: int = 0) -> None:
        with _binding.programmatic_launch():
            ours(count, adapters)

    yield "cublas", lambda: cublas(0)
    for count in tails:
        yield f"cublas, A of {count}", lambda count=count: cublas(count)
    if tokens > MAX_SKINNY_ROWS:
        return
    yield "ours", lambda: ours(0)
    yield "ours+overlap", lambda: overlapped(0)
    if tokens > 16:
        for count in tails:
            yield f"ours+overlap, A of {count}", lambda count=count: overlapped(0, count)
    for count in splits:
        yield f"ours+overlap, {count} splits", lambda count=count: overlapped(count)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-1.7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--splits", type=int, nargs="*", default=[])
    parser.add_argument("--tails", type=int, nargs="*", default=[], help="adapters whose A follows the weights")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    weights = matrices(args.model, args.layers, max(args.tails, default=0))
    size = sum(matrix.with_tail(0).nbytes for matrix in weights)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{args.model}: {size / 1e9:.2f} GB, {size / BANDWIDTH * 1e3:.3f} ms; {where}")
    for tokens in args.tokens:
        for name, run in systems(weights, tokens, args.splits, args.tails):
            ms = graph_ms(run, args.repeats)
            rate = size / ms / 1e9
            print(f"M={tokens:3d} {name:24s} {ms:7.3f} ms  {rate:5.2f} TB/s", flush=True)
            if args.out:
                row = {"model": args.model, "tokens": tokens, "system": name, "ms": ms, "tb_per_s": rate}
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
