"""The Triton back end compiled for a GPU: every dtype, large batches, long contexts, graphs, the same bits twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.test_triton_attention import Bench
from torch import Tensor

from sglang.srt.model_executor.forward_context import StepShape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(16, 8, 128), (32, 8, 128), (8, 8, 64), (3, 1, 96), (7, 1, 64), (4, 2, 256), (12, 1, 80)]


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    pytest.importorskip("triton")


def make_bench(
    shape: tuple[int, int, int] = (16, 8, 128),
    page_size: int = 1,
    window: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    capacity: int = 1 << 15,
    max_len: int = 8192,
    slots: int = 16,
) -> Bench:
    sizes = {"capacity": capacity, "max_len": max_len, "slots": slots}
    return Bench(*shape, page_size, window, dtype=dtype, device=torch.device("cuda"), **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mix(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    bench = make_bench(shape, dtype=dtype)
    bench.step([(0, 700)])
    bench.step([(0, 1)])
    bench.step([(1, 5), (0, 1), (2, 1333), (3, 1)])
    bench.step([(0, 1), (1, 1), (2, 1), (3, 1)])
    bench.step([(2, 17), (0, 400)])


@pytest.mark.parametrize("window", [None, 1, 100, 1024])
@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 256])
def test_pages_and_windows(page_size: int, window: int | None) -> None:
    bench = make_bench(page_size=page_size, window=window)
    bench.grow(0, 3000)
    bench.step([(0, 1), (1, 300)])
    bench.step([(0, 200), (1, 1), (2, 77)])
    bench.step([(0, 1), (1, 1), (2, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 16, 33, 64, 128, 256])
def test_batches_of_decodes(batch: int, dtype: torch.dtype) -> None:
    bench = make_bench(dtype=dtype, capacity=1 << 17, slots=batch)
    rng = np.random.default_rng(batch)
    lengths = rng.integers(1, 700, batch)
    lengths[: min(batch, 3)] = (5000, 1, 2049)[:batch]
    for slot, length in enumerate(lengths):
        bench.grow(slot, int(length))
    bench.step([(int(slot), 1) for slot in rng.permutation(batch)])


def test_a_prefix_of_5000() -> None:
    bench = make_bench(page_size=16)
    bench.grow(0, 5000)
    bench.step([(0, 100), (1, 2000), (2, 1)])


class Graph:
    """A captured step of `batch` decodes with tensors that may be changed between replays."""

    def __init__(self, bench: Bench, batch: int) -> None:
        self.bench, self.batch = bench, batch
        device = bench.device
        self.slots = torch.zeros(batch, dtype=torch.int64, device=device)
        self.kv_lens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.q = bench.queries(batch)
        bench.backend.plan_decode(self.slots, self.kv_lens)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outs = self.run()

    def run(self) -> list[Tensor]:
        k = self.q[:, : self.bench.kv_heads]
        return [self.bench.backend.forward(self.q, k, k, layer, self.bench.scale) for layer in (0, 1, 0)]

    def replay(self, live: list[int]) -> list[Tensor]:
        lengths = [self.bench.lengths[slot] for slot in live]
        self.slots.zero_()[: len(live)] = torch.tensor(live)
        self.kv_lens.fill_(1)[: len(live)] = torch.tensor(lengths)
        self.q.copy_(self.bench.queries(self.batch))
        self.graph.replay()
        for layer, out in zip((0, 1, 0), self.outs, strict=True):
            self.bench.check(out[: len(live)], self.q[: len(live)], layer, live, [1] * len(live), lengths)
            assert torch.isfinite(out).all()
        assert not self.bench.backend._counters.any()
        return [out.clone() for out in self.outs]


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_graphs_replay_with_other_sequences(batch: int) -> None:
    bench = make_bench(capacity=1 << 16, slots=12)
    for slot, length in enumerate((5000, 1, 64, 65, 300, 1024, 2047, 17, 128, 511, 4096, 9)):
        bench.grow(slot, length)
    graph = Graph(bench, batch)
    rng = np.random.default_rng(1)
    for live in (batch, max(1, batch // 2), batch):
        graph.replay(rng.integers(12, size=live).tolist())
    bench.step([(0, 3), (4, 1)])  # an eager step between replays
    graph.bench.backend.plan_decode(graph.slots, graph.kv_lens)
    graph.replay(rng.integers(12, size=batch).tolist())


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_the_same_bits_twice(batch: int) -> None:
    """Whichever split finishes last."""
    bench = make_bench(capacity=1 << 17, slots=batch)
    for slot in range(batch):
        bench.grow(slot, 1000 + 13 * slot if batch > 1 else 8000)
    shape = StepShape(np.ones(batch, dtype=np.int32), np.array(bench.lengths, dtype=np.int32))
    bench.backend.plan(shape, torch.arange(batch, device="cuda"))
    q = bench.queries(batch)
    first = bench.forward(q, 0)
    for _ in range(50):
        assert torch.equal(bench.forward(q, 0), first)


def test_a_prefill_gives_the_same_bits_twice() -> None:
    bench = make_bench()
    bench.grow(0, 3000)
    shape = StepShape(np.array([2500], dtype=np.int32), np.array([3000], dtype=np.int32))
    bench.backend.plan(shape, torch.zeros(1, dtype=torch.int64, device="cuda"))
    q = bench.queries(2500)
    assert torch.equal(bench.forward(q, 0), bench.forward(q, 0))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 << 30, reason="needs 24 GiB of free memory"
)
def test_rows_beyond_2_to_the_31_values() -> None:
    """4 GiB of K, the sequence at its far end."""
    bench = make_bench((8, 8, 128), capacity=256, max_len=256)
    far = (1 << 31) // (8 * 128)
    buffers = [torch.zeros(far + 256, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    bench.pool.layer = lambda layer: (buffers[0], buffers[1])  # type: ignore[method-assign]
    bench.table.free = list(range(far, far + 256))
    bench.step([(0, 150)])
    bench.step([(0, 1), (1, 40)])
    bench.step([(0, 1), (1, 1)])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_plan_and_forward_never_wait() -> None:
    bench = make_bench()
    for slot in range(3):
        bench.grow(slot, 300)
    shape = StepShape(np.array([1, 40, 1], dtype=np.int32), np.array([300, 300, 300], dtype=np.int32))
    slots, q = torch.arange(3, device="cuda"), bench.queries(42)
    bench.backend.plan(shape, slots)
    bench.forward(q, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.backend.plan(shape, slots)
        bench.backend.forward(q, q[:, :8], q[:, :8], 0, bench.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
