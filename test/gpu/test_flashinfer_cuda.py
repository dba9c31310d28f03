"""The flashinfer back end on a GPU, in a pool that is NaN wherever no token of a sequence is."""

from __future__ import annotations

import pytest
import torch
from engine.test_flashinfer_attention import FlashInferBench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPES = [(16, 8, 128), (8, 8, 64), (4, 2, 256)]


@pytest.fixture(autouse=True)
def _needs_flashinfer() -> None:
    pytest.importorskip("flashinfer")


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mix(shape: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    sizes = {"capacity": 1 << 15, "max_len": 8192, "slots": 16}
    bench = FlashInferBench(*shape, 16, window, dtype=dtype, device=torch.device("cuda"), **sizes)
    bench.step([(0, 700)])
    bench.step([(0, 1)])
    bench.step([(1, 5), (0, 1), (2, 1333), (3, 1)])
    bench.step([(0, 1), (1, 1), (2, 1), (3, 1)])
    bench.step([(2, 17), (0, 400)])
