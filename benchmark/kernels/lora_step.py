"""What adapters add to a step: all projections and the kernels between them, captured, with and without adapters.

    python benchmark/kernels/lora_step.py --model qwen3-1.7b --ranks 8 16 64 --out lora.jsonl

A step is, for every layer, qkv, norm of heads + rotation + KV write, o, add + norm, gate_up, SwiGLU, down, add + norm;
there is no attention. Every layer has its own weights and adapters, so that none is found in the L2 cache. Products are
ours or cuBLAS's as in the server. Up to 16 rows those of A are in the product's tile list; beyond, A of up to four
adapters is the last rows of the weight, and that of more is multiplied by `lora_shrink` on a branch. B is added by the
kernel that reads the product.
`bytes` is the least that adapters add: A and B of live adapters, once; `floor` its time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from replay import replay_ms
from torch import Tensor

from sgl_kernel import _binding
from sgl_kernel.lora.batch import BatchShape, build_batch
from sgl_kernel.lora.layout import HEADER_BYTES, RANK_STEP, LoraGroup, LoraLayout, round_up
from sgl_kernel.ops import streamed_rows
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

BANDWIDTH = 4.3e12
"""Bytes a second that an H200 copies at (measured)."""
HEAD_DIM = 128
FEW_ROWS, FEW_ADAPTERS = 16, 4
"""Token rows whose product takes rows of A along, and adapters whose A is behind the weight for more rows."""
PROMPT = 8192


@dataclass(frozen=True)
class Model:
    """Shape of a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int

    def groups(self) -> list[LoraGroup]:
        """The matrices that adapters add to."""
        q, kv = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        return [
            LoraGroup("qkv", self.hidden, (q, kv, kv)),
            LoraGroup("o", q, (self.hidden,)),
            LoraGroup("gate_up", self.hidden, (self.mlp, self.mlp)),
            LoraGroup("down", self.mlp, (self.hidden,)),
        ]


MODELS = {
    "qwen3-1.7b": Model(28, 2048, 16, 8, 6144),
    "qwen3-8b": Model(36, 4096, 32, 8, 12288),
}


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


class Adapters:
    """Slabs with every module of the same rank, and the batch of one step."""

    def __init__(self, model: Model, rank: int, count: int, tokens: int) -> None:
        self.layout = LoraLayout(model.groups(), model.layers, rank)
        self.slabs = LoraSlabs.allocate(self.layout, count, "cuda")
        self.slabs.data.view(torch.bfloat16).normal_(std=0.02)
        head = np.zeros((HEADER_BYTES + self.layout.table_bytes) // 4, np.int32)
        table = head[HEADER_BYTES // 4 :]
        head[0], table[0::2], table[1::2] = rank, rank, np.float32(1).view(np.int32)
        self.slabs.data[:, : head.nbytes] = torch.from_numpy(head.view(np.uint8)).cuda()
        self.slabs.ranks[:] = rank
        self._clear_padding(model, rank)
        shape = BatchShape(tokens, count, 16 if tokens <= 256 else 64)
        slots = np.sort(np.arange(tokens, dtype=np.int32) % count)
        self.batch = LoraBatch.to_device(build_batch(slots, self.slabs.ranks, shape), shape, "cuda")
        self.live = min(count, tokens)
        self.extended: list[dict[str, Tensor]] = []

    def extend(self, weights: list[dict[str, Tensor]]) -> None:
        """Make copies of the weights with every adapter's rows of A behind them."""
        for layer, matrices in enumerate(weights):
            sites = {name: self.layout.site(layer, name) for name in matrices}
            rows = {
                name: self.slabs.data[:, site.a_offset : site.a_offset + site.u_width * site.in_features * 2]
                for name, site in sites.items()
            }
            self.extended.append(
                {
                    name: torch.cat([weight, rows[name].view(torch.bfloat16).reshape(-1, weight.shape[1])])
                    for name, weight in matrices.items()
                }
            )

    def _clear_padding(self, model: Model, rank: int) -> None:
        """Columns of B behind the rank are zeros."""
        stride = round_up(rank, RANK_STEP)
        for layer in range(model.layers if rank < stride else 0):
            for group in model.groups():
                for start, rows in zip(self.layout.site(layer, group.name).b_offsets, group.out_features, strict=True):
                    b = self.slabs.data[:, start : start + rows * stride * 2].view(torch.bfloat16)
                    b.unflatten(1, (rows, stride))[:, :, rank:] = 0

    @property
    def bytes(self) -> int:
        """Of A and B of the live adapters."""
        return self.live * (self.layout.slab_bytes - self.layout.table_bytes - HEADER_BYTES)


class Step:
    """The tensors of a step and the functions that enqueue it."""

    def __init__(self, model: Model, tokens: int, weights: list[dict[str, Tensor]]) -> None:
        self.model, self.tokens, self.weights = model, tokens, weights
        width = {group.name: sum(group.out_features) for group in model.groups()}
        self.dense = {name: random(tokens, size) for name, size in width.items()}
        self.out, self.widths, self.wide = dict(self.dense), width, dict[str, Tensor]()
        self.x, self.residual = random(tokens, model.hidden), random(tokens, model.hidden)
        self.attended, self.act = random(tokens, model.heads * HEAD_DIM), random(tokens, model.mlp)
        self.norm, self.head_norm = random(model.hidden), random(HEAD_DIM)
        self.cos_sin = torch.rand(tokens, HEAD_DIM, device="cuda")
        self.positions = torch.arange(tokens, device="cuda")
        self.pool = random(2, tokens, model.kv_heads, HEAD_DIM)
        self.side = torch.cuda.Stream()
        ops = _binding.native_for(self.x)
        assert ops is not None, "no binary for this GPU"
        self.ops, self.streamed = ops, streamed_rows(self.x)

    def project(self, name: str, x: Tensor, layer: int, adapters: Adapters | None) -> LoraDelta | None:
        """One product; the low-rank term that is still to be added."""
        weight, y = self.weights[layer][name], self.out[name]
        if adapters is None:
            self.multiply(x, weight, y)
            return None
        site = adapters.layout.site(layer, name)
        lora = (adapters.slabs, site, adapters.batch)
        if adapters.extended:
            y = self.extended(name, len(adapters.slabs.data) * site.u_width)
            self.multiply(x, adapters.extended[layer][name], y)
            self.out[name] = y[:, : len(weight)]
            return LoraDelta(y[:, len(weight) :], *lora, site.u_width)
        u = torch.empty(self.tokens, site.u_width, device="cuda", dtype=torch.bfloat16)
        if self.tokens <= FEW_ROWS:
            self.ops.skinny_gemm(x, weight, y, (*lora, u))
        else:
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                self.ops.lora_shrink(x, *lora, u)
            self.multiply(x, weight, y)
            main.wait_stream(self.side)
        return LoraDelta(u, *lora)

    def multiply(self, x: Tensor, weight: Tensor, y: Tensor) -> None:
        """y = x W^T as the server does it for so many rows."""
        if self.tokens <= self.streamed:
            self.ops.skinny_gemm(x, weight, y)
        else:
            torch.mm(x, weight.t(), out=y)

    def extended(self, name: str, columns: int) -> Tensor:
        """A product's output with columns for u behind it, its rows at multiples of 128 bytes."""
        width = self.widths[name] + columns
        if name not in self.wide or self.wide[name].shape[1] != round_up(width, 64):
            self.wide[name] = random(self.tokens, round_up(width, 64))
        return self.wide[name][:, :width]

    def run(self, adapters: Adapters | None) -> None:
        """Enqueue a step."""
        self.out.update(self.dense)
        model, ops, out = self.model, self.ops, self.out
        heads = (model.heads, model.kv_heads, HEAD_DIM)
        for layer in range(model.layers):
            delta = self.project("qkv", self.x, layer, adapters)
            norms = (self.head_norm, self.head_norm, 1e-6)
            pools = (self.pool[0], self.pool[1], self.positions)
            ops.qk_norm_rope(out["qkv"], *heads, *norms, self.cos_sin, self.positions, None, *pools, delta)
            delta = self.project("o", self.attended, layer, adapters)
            ops.fused_add_rmsnorm(out["o"], self.residual, self.norm, 1e-6, delta)
            delta = self.project("gate_up", out["o"], layer, adapters)
            ops.silu_and_mul(out["gate_up"], self.act, delta)
            delta = self.project("down", self.act, layer, adapters)
            ops.fused_add_rmsnorm(out["down"], self.residual, self.norm, 1e-6, delta)


def graph_us(run: Callable[[], None], repeats: int) -> float:
    """Median time of a replay of `run`, captured with early launches."""
    with _binding.programmatic_launch():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return replay_ms(graph, repeats) * 1e3


def cases(batches: list[int], ranks: list[int], counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(token rows, rank, adapters); more adapters than rows are left out."""
    for tokens in batches:
        for rank in ranks:
            for count in counts:
                if count <= tokens:
                    yield tokens, rank, count


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-1.7b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256, PROMPT])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = MODELS[args.model]
    weights = [
        {group.name: random(sum(group.out_features), group.in_features, scale=0.02) for group in model.groups()}
        for _ in range(model.layers)
    ]
    print(f"{args.model}; {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("tokens rank adapters | base us | with adapters us |  added us     %  | floor us")
    bases: dict[int, tuple[Step, float]] = {}
    for tokens, rank, count in cases(args.batches, args.ranks, args.adapters):
        if tokens not in bases:
            step = Step(model, tokens, weights)
            bases[tokens] = (step, graph_us(lambda step=step: step.run(None), args.repeats))
        step, base = bases[tokens]
        adapters = Adapters(model, rank, count, tokens)
        if tokens > FEW_ROWS and count <= FEW_ADAPTERS:
            adapters.extend(weights)
        full = graph_us(lambda step=step, adapters=adapters: step.run(adapters), args.repeats)
        floor = adapters.bytes / BANDWIDTH * 1e6
        added = full - base
        head = f"{tokens:6d} {rank:4d} {count:8d} | {base:7.1f} | {full:16.1f}"
        print(f"{head} | {added:9.1f} {added / base:6.1%} | {floor:8.1f}", flush=True)
        if args.out:
            row = {"model": args.model, "tokens": tokens, "rank": rank, "adapters": count}
            row |= {"base_us": base, "lora_us": full, "bytes": adapters.bytes, "floor_us": floor}
            with contextlib.closing(args.out.open("a")) as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
