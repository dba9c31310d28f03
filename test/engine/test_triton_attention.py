"""The Triton back end, interpreted on the CPU, against full attention in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from engine.model_harness import CPU, NaNPool, PageTable
from engine.test_ops import softmax_attention
from kernels.triton_interpreter import interpret_library, repair, without
from torch import Tensor

from sglang.srt.errors import ConfigError
from sglang.srt.model_executor.forward_context import StepShape

MODULE = "sglang.srt.ops.triton.attention"
LAYERS = 2
TOLERANCES = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


class Bench:
    """A few sequences of random K and V in a pool that is NaN elsewhere; checks every step, of one layer in turn."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        page_size: int = 1,
        window: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        capacity: int = 2048,
        max_len: int = 640,
        slots: int = 8,
    ) -> None:
        from sglang.srt.layers.attention.triton import TritonAttention

        self.heads, self.kv_heads, self.dim, self.window = heads, kv_heads, dim, window
        self.dtype, self.device, self.scale = dtype, device, dim**-0.5
        self.pool = NaNPool(LAYERS, capacity, kv_heads, dim, dtype, device)
        self.table = PageTable(slots, max_len // page_size, page_size, capacity // page_size, device)
        self.backend = TritonAttention(self.pool, self.table, heads, device, window)
        self.lengths, self.layer = [0] * slots, 0
        self.generator = torch.Generator().manual_seed(1)

    def random(self, tokens: int, heads: int) -> Tensor:
        values = torch.randn(tokens, heads, self.dim, generator=self.generator)
        return values.to(self.dtype).to(self.device)

    def grow(self, slot: int, tokens: int) -> None:
        """Add tokens with random K and V in every layer."""
        old = self.lengths[slot]
        pages = self.table.pages
        self.table.grow(slot, old, old + tokens)
        self.table.pages = pages.copy_(self.table.pages)  # captured graphs read this tensor
        locs = torch.from_numpy(self.table.locations(slot, old, old + tokens)).to(self.device)
        for layer in range(LAYERS):
            for buffer in self.pool.layer(layer):
                buffer[locs] = self.random(tokens, self.kv_heads)
        self.lengths[slot] += tokens

    def queries(self, tokens: int) -> Tensor:
        """A view of a fused projection, as the model passes it."""
        return self.random(tokens, self.heads + 2 * self.kv_heads)[:, : self.heads]

    def step(self, work: Sequence[tuple[int, int]]) -> None:
        """`work`: (slot, new tokens)."""
        for slot, count in work:
            self.grow(slot, count)
        slots, counts = zip(*work, strict=True)
        lengths = [self.lengths[slot] for slot in slots]
        shape = StepShape(np.array(counts, dtype=np.int32), np.array(lengths, dtype=np.int32))
        self.backend.plan(shape, torch.tensor(slots, device=self.device))
        self.layer = (self.layer + 1) % LAYERS
        q = self.queries(sum(counts))
        self.check(self.forward(q, self.layer), q, self.layer, slots, counts, lengths)

    def forward(self, q: Tensor, layer: int) -> Tensor:
        k = v = q.new_full((len(q), self.kv_heads, self.dim), torch.nan)
        out = self.backend.forward(q, k, v, layer, self.scale)
        assert out.shape == (len(q), self.heads * self.dim)
        assert out.is_contiguous() and out.dtype == self.dtype
        assert not self.backend._counters.any()
        return out

    def check(
        self, out: Tensor, q: Tensor, layer: int, slots: Sequence[int], counts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        parts = zip(slots, lengths, q.split(list(counts)), out.split(list(counts)), strict=True)
        for slot, length, queries, got in parts:
            want = self.expected(queries, layer, slot, length)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCES[self.dtype])

    def expected(self, q: Tensor, layer: int, slot: int, length: int) -> Tensor:
        locs = torch.from_numpy(self.table.locations(slot, 0, length)).to(self.device)
        keys, values = (buffer[locs] for buffer in self.pool.layer(layer))
        position = torch.arange(length - len(q), length, device=self.device)[:, None]
        tokens = torch.arange(length, device=self.device)
        seen = tokens <= position
        if self.window is not None:
            seen &= tokens > position - self.window
        return softmax_attention(q, keys, values.nan_to_num(), seen, self.scale)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels for tensors on the CPU, in the back end too."""
    pytest.importorskip("triton")
    from sglang.srt.layers.attention import triton as backend

    module = _interpreted_module()
    with pytest.MonkeyPatch.context() as patch:
        interpret_library(patch)
        repair(patch)
        patch.setattr(backend, "ops", module)
        yield module


@cache
def _interpreted_module() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch, without(MODULE):
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(MODULE)


@pytest.fixture
def splits(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with more multiprocessors: more splits than are merged at once."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 8)
    monkeypatch.setattr(kernels, "_MERGE_VALUES", 512)


SHAPES = [(2, 2, 64), (4, 2, 64), (3, 1, 80), (8, 2, 32), (7, 1, 128)]  # groups of 1, 2, 3, 4, 7


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.usefixtures("kernels")
def test_every_mix(heads: int, kv_heads: int, dim: int, page_size: int) -> None:
    bench = Bench(heads, kv_heads, dim, page_size)
    bench.step([(0, 20)])
    bench.step([(0, 1)])
    bench.step([(1, 5), (0, 1), (2, 70), (3, 1)])
    bench.step([(0, 1), (1, 1), (2, 1), (3, 1)])
    bench.step([(2, 17), (0, 4)])


@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.usefixtures("splits")
def test_windows(page_size: int, window: int) -> None:
    """Tokens that fell out of the window may be NaN."""
    bench = Bench(2, 1, 32, page_size, window)
    for slot, length in ((0, 150), (1, 30)):
        bench.grow(slot, length)
        lost = bench.table.locations(slot, 0, max(0, length - window))
        bench.pool.data[:, :, lost] = torch.nan
    bench.step([(0, 1), (1, 1)])
    bench.step([(1, 50), (0, 1), (2, 3)])
    bench.step([(0, 33), (1, 1), (2, 2)])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 96)])
@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.usefixtures("splits")
def test_decodes_in_splits(heads: int, kv_heads: int, dim: int, page_size: int) -> None:
    """One sequence takes all the splits, others one, two, and a part of one."""
    bench = Bench(heads, kv_heads, dim, page_size)
    for slot, length in enumerate((520, 64, 126, 32)):
        bench.grow(slot, length - 1)
    bench.step([(0, 1), (1, 1)])
    bench.step([(2, 1), (0, 1), (3, 1)])


def test_splits_follow_the_batch(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 132)
    assert kernels.choose_splits(1, 8, 40960, CPU) == (64, 64)
    assert kernels.choose_splits(16, 8, 40960, CPU) == (4, 128)
    assert kernels.choose_splits(64, 8, 1000, CPU) == (1, 2048)
    assert kernels.choose_splits(256, 8, 40960, CPU) == (8, 2048)
    assert kernels.choose_splits(256, 8, 2048, CPU) == (1, 2048)


@pytest.mark.parametrize(("count", "min_tokens"), [(1, 1), (2, 1), (3, 64), (8, 100), (20, 1)])
def test_any_number_of_splits_will_do(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, count: int, min_tokens: int
) -> None:
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: kernels.Splits(count, min_tokens))
    bench = Bench(2, 1, 32)
    for slot, length in enumerate((300, 1, 33, 129)):
        bench.grow(slot, length)
    bench.step([(slot, 1) for slot in range(4)])


@pytest.mark.usefixtures("splits")
def test_static_decodes_read_their_tensors_when_they_run() -> None:
    """Padded rows, of one token or of none, harm nobody and get what is finite."""
    bench = Bench(2, 1, 32, 4)
    for slot, length in enumerate((200, 9, 64, 33)):
        bench.grow(slot, length)
    slots, kv_lens = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    bench.backend.plan_decode(slots, kv_lens)
    for live in ((0, 1, 2, 3), (2, 0), (3, 3, 0, 1, 2, 1)):
        lengths = [bench.lengths[slot] for slot in live]
        slots.zero_()[: len(live)] = torch.tensor(live)
        kv_lens.zero_()[: len(live)] = torch.tensor(lengths)
        kv_lens[len(live) : 5] = 1
        q = bench.queries(6)
        out = bench.forward(q, 1)
        bench.check(out[: len(live)], q[: len(live)], 1, live, [1] * len(live), lengths)
        assert torch.isfinite(out).all()
        assert not out[5].any() or len(live) == 6


@pytest.mark.parametrize("window", [None, 50])
def test_large_blocks(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """The tiles that GPUs get: several blocks of keys at the diagonal, heads that do not fill the rows."""
    monkeypatch.setattr(kernels, "prefill_tiles", lambda *_: kernels.PrefillTiles(128, 64, 8, 3))
    bench = Bench(3, 1, 32, 16, window)
    bench.step([(0, 130), (1, 42), (2, 43)])
    bench.step([(0, 90), (2, 2), (1, 1)])


@pytest.mark.usefixtures("kernels")
def test_more_heads_of_a_group_than_rows() -> None:
    bench = Bench(40, 1, 16)
    bench.step([(0, 7)])
    bench.step([(0, 1), (1, 3)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("splits")
def test_half_precision(dtype: torch.dtype) -> None:
    bench = Bench(4, 2, 32, 4, dtype=dtype)
    bench.step([(0, 70), (1, 5)])
    bench.step([(0, 1), (1, 1)])


@pytest.mark.usefixtures("kernels")
def test_a_first_step_of_decodes_only() -> None:
    """The back end knows nothing of q's heads then; and a plan that was never run is dropped."""
    bench = Bench(4, 2, 32)
    bench.grow(0, 5)
    shape = StepShape(np.array([5], dtype=np.int32), np.array([5], dtype=np.int32))
    bench.backend.plan(shape, torch.tensor([0]))
    bench.step([(0, 1)])
    bench.step([(1, 40), (0, 1)])


def test_blocks_of_queries() -> None:
    from sglang.srt.layers.attention.triton import query_blocks

    shape = StepShape(np.array([1, 5, 2, 1, 4], dtype=np.int32), np.array([9, 5, 12, 1, 8], dtype=np.int32))
    blocks = query_blocks(shape, 4).tolist()
    assert blocks == [[2, 6, 2, 10], [4, 9, 4, 4], [1, 5, 1, 4], [1, 1, 4, 0]]


@pytest.mark.parametrize("page_size", [3, 0, 24])
def test_page_sizes_are_powers_of_two(page_size: int) -> None:
    from sglang.srt.layers.attention.triton import TritonAttention

    table = PageTable(1, 1, 1, 4, CPU)
    table.page_size = page_size
    with pytest.raises(ConfigError, match=f"--page-size {page_size}.*power of two"):
        TritonAttention(NaNPool(1, 4, 1, 16, torch.float32, CPU), table, 1, CPU)
