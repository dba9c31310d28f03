"""The torch back end against full attention written out here: every mix of prefill, chunks and decode in one step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from engine.model_harness import CPU, NaNPool, PageTable
from engine.test_ops import softmax_attention
from torch import Tensor

from sglang.srt.errors import ConfigError
from sglang.srt.layers.attention import torch_native
from sglang.srt.layers.attention.factory import create_attention_backend
from sglang.srt.model_executor.forward_context import StepShape
from sglang.srt.ops.attention import store_kv
from sglang.srt.ops.cpu import kernels

DIM, LAYERS, SCALE = 16, 2, 0.21


class Bench:
    """Random q, k, v for a few sequences; checks every step's output against all the k and v so far."""

    def __init__(self, heads: int, kv_heads: int, page_size: int, window: int | None, capacity: int = 2048) -> None:
        self.heads, self.kv_heads, self.window = heads, kv_heads, window
        self.pool = NaNPool(LAYERS, capacity, kv_heads, DIM, torch.float32, CPU)
        self.table = PageTable(8, 600 // page_size, page_size, capacity // page_size, CPU)
        self.backend = create_attention_backend("torch_native", self.pool, self.table, heads, CPU, window)
        self.history: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.generator = torch.Generator().manual_seed(1)

    def random(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, DIM, generator=self.generator)

    def step(self, work: Iterable[tuple[int, int]]) -> None:
        """`work`: (slot, new tokens)."""
        slots, counts = zip(*work, strict=True)
        old = [len(self.history[s][0][0]) if s in self.history else 0 for s in slots]
        locs = []
        for slot, count, before in zip(slots, counts, old, strict=True):
            self.table.grow(slot, before, before + count)
            locs.append(self.table.locations(slot, before, before + count))
        kv_lens = np.array(old, dtype=np.int32) + np.array(counts, dtype=np.int32)
        shape = StepShape(np.array(counts, dtype=np.int32), kv_lens)
        self.locs = torch.from_numpy(np.concatenate(locs))
        self.backend.plan(shape, torch.tensor(slots))
        for layer in range(LAYERS):
            self._layer(layer, slots, counts)

    def _layer(self, layer: int, slots: tuple[int, ...], counts: tuple[int, ...]) -> None:
        # Views of one fused projection, as the model passes them.
        fused = self.random(sum(counts), self.heads + 2 * self.kv_heads)
        q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        store_kv(k, v, *self.pool.layer(layer), self.locs)
        out = self.backend.forward(q, k, v, layer, SCALE)
        assert out.shape == (sum(counts), self.heads * DIM)
        for slot, q_new, k_new, v_new, got in zip(slots, *(t.split(counts) for t in (q, k, v, out)), strict=True):
            layers = self.history.setdefault(slot, [(k[:0], v[:0])] * LAYERS)
            keys, values = torch.cat([layers[layer][0], k_new]), torch.cat([layers[layer][1], v_new])
            layers[layer] = keys, values
            position = torch.arange(len(keys) - len(q_new), len(keys))[:, None]
            seen = torch.arange(len(keys)) <= position
            if self.window is not None:
                seen &= torch.arange(len(keys)) > position - self.window
            want = softmax_attention(q_new, keys, values, seen, SCALE)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything with the compiled decode kernel, where there is one, and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "load_library", lambda: None)


HEADS = [(4, 4), (6, 2), (3, 1)]


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_every_mix(heads: int, kv_heads: int, page_size: int, window: int | None) -> None:
    bench = Bench(heads, kv_heads, page_size, window)
    bench.step([(0, 20)])
    bench.step([(0, 1)])
    bench.step([(1, 5), (0, 1), (2, 33), (3, 1)])
    bench.step([(0, 1), (1, 1), (2, 1), (3, 1)])
    bench.step([(3, 1), (0, 9), (1, 1)])
    bench.step([(2, 17), (0, 4)])
    bench.step([(1, 1), (2, 1), (0, 1)])


@pytest.mark.parametrize("window", [None, 10])
def test_random_schedules(window: int | None) -> None:
    rng = np.random.default_rng(0)
    bench = Bench(4, 2, 4, window)
    for _ in range(25):
        slots = rng.permutation(6)[: rng.integers(1, 7)]
        bench.step([(int(s), int(rng.choice([1, 1, 1, 2, 6, 19]))) for s in slots])


@pytest.mark.parametrize("window", [None, 40])
def test_queries_beyond_one_mask_block(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_native, "_QUERY_BLOCK", 16)
    bench = Bench(4, 2, 16, window)
    bench.step([(0, 50)])
    bench.step([(0, 70), (1, 33)])


def test_unequal_lengths_are_padded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_native, "_FREE_PADDING", 8)
    bench = Bench(4, 2, 1, None)
    bench.step([(0, 300), (1, 3), (2, 5), (3, 17), (4, 2)])
    bench.step([(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)])
    assert len(bench.backend._decodes) > 1  # type: ignore[attr-defined]
    bench.step([(4, 1), (0, 1), (5, 6)])


def test_padding_is_split_only_when_it_is_most() -> None:
    members = np.arange(4)
    assert [b.tolist() for b in torch_native._batches(members, np.array([9, 9, 10, 8]))] == [[0, 1, 2, 3]]
    split = torch_native._batches(members, np.array([8000, 20, 25, 7000]))
    assert sorted(b.tolist() for b in split) == [[0, 3], [1, 2]]
    assert torch_native._batches(members[:0], members[:0]) == []


def test_a_window_reads_only_what_it_sees() -> None:
    """Tokens that fell out of the window may be overwritten with NaN."""
    bench = Bench(4, 2, 1, 8)
    bench.step([(0, 30), (1, 12)])
    for slot, length in ((0, 30), (1, 12)):
        bench.pool.data[:, :, bench.table.locations(slot, 0, length - 7)] = float("nan")
    bench.step([(0, 1), (1, 1)])
    bench.step([(0, 3), (1, 1)])


def test_pool_of_another_dtype_is_converted() -> None:
    bench = Bench(4, 2, 1, None)
    bench.pool.data = bench.pool.data.double()
    bench.step([(0, 5)])
    bench.step([(0, 1), (1, 4)])
    bench.step([(0, 1), (1, 1)])


def test_unknown_back_end_is_named() -> None:
    with pytest.raises(ConfigError, match="warp"):
        create_attention_backend("warp", NaNPool(1, 4, 1, 4, torch.float32, CPU), PageTable(1, 1, 1, 4, CPU), 1, CPU)


def test_churn_in_random_order_stays_right() -> None:
    rng = np.random.default_rng(4)
    bench = Bench(4, 2, 4, None)
    for _ in range(10):
        slots = [int(s) for s in rng.permutation(6)[: rng.integers(1, 7)]]
        if rng.random() < 0.4:
            bench.step([(slots[0], int(rng.integers(2, 9)))])
        for _ in range(int(rng.integers(1, 6))):
            bench.step([(s, 1) for s in slots])
