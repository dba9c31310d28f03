"""How the host launches products, by the names of their kernels."""

from __future__ import annotations

from dataclasses import dataclass

from . import Gpu


@dataclass(frozen=True)
class Tiling:
    """Of a kernel of gemm.cu.

    Attributes:
        tokens: that a block takes at most.
        rows: of weights, of a unit of work or of a tile.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        stream: whether blocks walk through all units, as stream_gemm.h has it.
    """

    tokens: int
    rows: int
    threads: int
    shared: int
    stream: bool


def tiling(gpu: Gpu, kernel: str) -> Tiling:
    """Of e.g. ``skinny_gemm_8``, ``lora_shrink_64x64`` or ``skinny_gemm_group_96``."""
    if "_group_" in kernel:
        group_rows = int(kernel.rsplit("_", 1)[1])
        shared = gpu.geometry("group_shared_bytes", group_rows)
        return Tiling(gpu.geometry("kGroupTokens"), group_rows, gpu.geometry("kGroupThreads"), shared, False)
    tokens, *rows = map(int, kernel.rsplit("_", 1)[1].split("x"))
    if not rows:
        shared = gpu.geometry("stream_shared_bytes", gpu.warp, tokens)
        return Tiling(tokens, gpu.geometry("kStreamRows"), gpu.geometry("kStreamThreads"), shared, True)
    threads = gpu.geometry("gemm_threads", gpu.warp, *rows)
    return Tiling(tokens, *rows, threads, gpu.geometry("gemm_shared_bytes", gpu.warp, *rows, tokens), False)
