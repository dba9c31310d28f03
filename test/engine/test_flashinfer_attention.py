"""The flashinfer back end, with a stand-in that computes what flashinfer's documentation says of its arguments."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from engine.model_harness import CPU
from engine.test_ops import softmax_attention
from engine.test_triton_attention import Bench, kernels  # noqa: F401  (a fixture)
from torch import Tensor


class PagedWrapper:
    """Of BatchPrefillWithPagedKVCacheWrapper, what is used, from the tables of a step alone."""

    plans = 0

    def __init__(self, workspace: Tensor, layout: str, backend: str) -> None:
        assert layout == "NHD" and backend in ("fa2", "fa3") and workspace.dtype is torch.uint8

    def plan(self, *tables: Any, causal: bool, sm_scale: float, window_left: int, q_data_type: torch.dtype) -> None:
        starts, page_starts, pages, last, heads, kv_heads, dim, size = tables
        assert causal and all(t.dtype is torch.int32 for t in (starts, page_starts, pages, last))
        assert not any(t.is_cuda for t in (starts, page_starts, last))
        assert len(starts) == len(page_starts) == len(last) + 1 and len(pages) == page_starts[-1]
        self.step = starts.tolist(), page_starts.tolist(), pages.long(), last.tolist()
        self.shape, self.scale, self.window, self.dtype = (
            (heads, kv_heads, dim, size),
            sm_scale,
            window_left,
            q_data_type,
        )
        PagedWrapper.plans += 1

    def run(self, q: Tensor, paged: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        starts, page_starts, pages, last = self.step
        heads, kv_heads, dim, size = self.shape
        assert q.shape[1:] == out.shape[1:] == (heads, dim) and q.dtype is self.dtype
        assert all(buffer.shape[1:] == (size, kv_heads, dim) for buffer in paged)
        for i, tokens in enumerate(last):
            own = pages[page_starts[i] : page_starts[i + 1]]
            length = (len(own) - 1) * size + tokens
            keys, values = (buffer[own].flatten(0, 1)[:length] for buffer in paged)
            queries = q[starts[i] : starts[i + 1]]
            position = torch.arange(length - len(queries), length)[:, None]
            seen = torch.arange(length) <= position
            if self.window >= 0:
                seen &= torch.arange(length) >= position - self.window
            out[starts[i] : starts[i + 1]] = softmax_attention(
                queries, keys, values.nan_to_num(), seen, self.scale
            ).view(out[starts[i] : starts[i + 1]].shape)
        return out


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = PagedWrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


class FlashInferBench(Bench):
    def __init__(self, *args: Any, **options: Any) -> None:
        from sglang.srt.layers.attention.factory import create_attention_backend

        super().__init__(*args, **options)
        self.flashinfer = create_attention_backend(
            "flashinfer", self.pool, self.table, self.heads, self.device, self.window
        )
        self.backend = SimpleNamespace(  # with the counters that Bench looks at
            plan=self.flashinfer.plan, forward=self.flashinfer.forward, _counters=self.flashinfer._decodes._counters
        )


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.usefixtures("kernels", "flashinfer")
def test_every_mix(page_size: int, window: int | None) -> None:
    bench = FlashInferBench(4, 2, 64, page_size, window)
    bench.step([(0, 20)])
    bench.step([(0, 1)])
    bench.step([(1, 5), (0, 1), (2, 70), (3, 1)])
    bench.step([(0, 1), (1, 1), (2, 1), (3, 1)])
    bench.step([(2, 17), (0, 4)])


@pytest.mark.usefixtures("kernels", "flashinfer")
def test_a_step_is_planned_once_and_decodes_are_tritons() -> None:
    bench = FlashInferBench(2, 2, 64, 4)
    before = PagedWrapper.plans
    bench.step([(0, 6), (1, 1)])
    bench.forward(bench.queries(7), 0)
    assert PagedWrapper.plans == before + 1
    bench.step([(0, 1), (1, 1)])
    assert PagedWrapper.plans == before + 1
    bench.flashinfer.plan_decode(torch.tensor([0]), torch.tensor([7], device=CPU))
    q = bench.queries(1)
    bench.check(bench.forward(q, 0), q, 0, [0], [1], [7])
    assert PagedWrapper.plans == before + 1
