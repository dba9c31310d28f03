"""Packed weights: the torch reference against the gguf library, the kernel against the reference, loading."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sglang.srt.models.weight_map import Cut, Target, WeightMap
from sglang.srt.ops import packed
from sglang.srt.ops.activation import silu_and_mul, silu_and_mul_reference
from sglang.srt.ops.linear import embedding, linear
from sglang.srt.ops.norm import add_rms_norm_reference, fused_add_rms_norm
from sglang.srt.ops.packed import MAX_KERNEL_ROWS, PackedWeight, stack, unpack_reference

FORMATS = sorted(packed.FORMATS)


def make(kind: str, outputs: int, inputs: int, seed: int = 0) -> PackedWeight:
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    if kind == "bf16":
        return PackedWeight(kind, values.bfloat16().view(torch.uint8))
    data = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return PackedWeight(kind, torch.from_numpy(np.ascontiguousarray(data)))


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "bf16"])
def test_reference_equals_the_gguf_library(kind: str) -> None:
    weight = make(kind, 7, 96)
    want = gguf.quants.dequantize(weight.data.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    torch.testing.assert_close(unpack_reference(weight), torch.from_numpy(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (7, 96), (64, 64), (131, 576), (2048, 512)])
def test_kernel_unpacks_as_the_reference(kind: str, outputs: int, inputs: int) -> None:
    weight = make(kind, outputs, inputs)
    torch.testing.assert_close(weight.unpack(), unpack_reference(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 10, 16, 17, 33, 49, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1])
@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(1, 32, True), (13, 96, False), (131, 576, True)])
def test_product_equals_the_reference(kind: str, rows: int, outputs: int, inputs: int, bias: bool) -> None:
    weight, x = make(kind, outputs, inputs), torch.randn(rows, inputs)
    b = torch.randn(outputs) if bias else None
    want = F.linear(x.double(), unpack_reference(weight).double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x, weight, b).double(), want, rtol=1e-5, atol=1e-4)


def test_activations_may_be_column_major() -> None:
    weight, x = make("q4_1", 64, 64), torch.randn(64, 9).t()
    torch.testing.assert_close(linear(x, weight), linear(x.contiguous(), weight), rtol=0, atol=0)


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = make("q8_0", 40, 64), torch.randn(3, 64)
    want = linear(x, weight)
    monkeypatch.setattr(packed, "load_library", lambda: None)
    assert not packed.can_pack()
    torch.testing.assert_close(linear(x, weight), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding_takes_rows(kind: str) -> None:
    weight, ids = make(kind, 50, 64), torch.tensor([3, 3, 49, 0])
    torch.testing.assert_close(embedding(ids, weight), unpack_reference(weight)[ids], rtol=0, atol=1e-6)


def weight_map() -> WeightMap:
    parts = {"q": (0, 8), "k": (8, 4), "v": (12, 4)}
    return WeightMap({name: Target("qkv", start, (rows, 64), Cut.COLUMN) for name, (start, rows) in parts.items()})


def test_parts_of_one_format_stay_packed() -> None:
    parts = {"q": make("q4_1", 8, 64, 1), "k": make("q4_1", 4, 64, 2), "v": make("q4_1", 4, 64, 3)}
    parameters = {"qkv": torch.empty(16, 64)}
    weight_map().load(parameters, [(n, parts[n]) for n in ("v", "q", "k")], "test")
    assert isinstance(parameters["qkv"], PackedWeight)
    assert torch.equal(parameters["qkv"].data, stack(list(parts.values())).data)


def test_parts_of_different_formats_are_widened() -> None:
    parts = {"q": make("q4_1", 8, 64, 1), "k": make("q8_0", 4, 64, 2), "v": torch.randn(4, 64)}
    parameters = {"qkv": torch.empty(16, 64)}
    weight_map().load(parameters, list(parts.items()), "test")
    want = torch.cat([unpack_reference(parts["q"]), unpack_reference(parts["k"]), parts["v"]])
    torch.testing.assert_close(parameters["qkv"], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("size", [8, 33, 576])
def test_fused_operators_equal_their_references(rows: int, size: int) -> None:
    x, residual, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
    want_residual = residual.clone()
    want = add_rms_norm_reference(x, want_residual, weight, 1e-5)
    torch.testing.assert_close(fused_add_rms_norm(x, residual, weight, 1e-5), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, want_residual)
    gate_up = torch.randn(rows, 2 * size) * 4
    torch.testing.assert_close(silu_and_mul(gate_up), silu_and_mul_reference(gate_up), rtol=1e-5, atol=1e-6)
