"""LoraLinear: the server's forward pass, bit for bit, and the right gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgl_kernel import linear
from sgl_kernel.linear import LoraLinear, lora_linear
from sgl_kernel.lora.slab import LoraModule, pack_slab
from sgl_kernel.ops import lora_expand_add_, lora_shrink


def _operands(dtype, rank=5, inputs=16, outputs=12, factors=torch.float32):
    torch.manual_seed(0)
    shapes = [(outputs, inputs), (outputs,), (rank, inputs), (outputs, rank)]
    weight, bias, a, b = (torch.randn(shape) for shape in shapes)
    return weight.to(dtype), bias.to(dtype), a.to(factors).requires_grad_(), b.to(factors).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 5, 8, 17, 64])
def test_forward_is_the_servers(make_case, dtype, factors, rank):
    """The same x through a slab that `pack_slab` filled."""
    case = make_case([0] * 20, [(rank,)], inputs=16, outputs=(12,), tile_tokens=64)
    scale, a, b = case.factors[0, 0]
    weight, bias, *_ = _operands(dtype)
    x = torch.randn(2, 10, 16).to(dtype)
    y = lora_linear(x, weight, bias, torch.tensor(a).to(factors), torch.tensor(b).to(factors), scale)
    served = F.linear(x.view(20, 16), weight, bias)
    u = lora_shrink(x.view(20, 16), case.slabs, case.site, case.batch)
    lora_expand_add_(served, case.delta(u))
    assert y.dtype == dtype and y.shape == (2, 10, 12)
    assert torch.equal(y.view(20, 12), served)


@pytest.mark.parametrize("rank", [1, 5, 8, 17])
def test_the_slab_is_the_one_that_is_packed_elsewhere(rank, monkeypatch):
    """Zeros behind the rank included, in memory that was full of something else."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(0xFF))
    *_, a, b = _operands(torch.float32, rank)
    slabs, site, _, _ = linear._pack(a.detach(), b.detach(), 0.7)
    expected = np.zeros(slabs.layout.slab_bytes, np.uint8)
    pack_slab(slabs.layout, [LoraModule(0, "linear", 0, 0.7, a, b)], expected)
    got, end_of_a = slabs.data[0].numpy(), site.a_start(0) + rank * 16 * 2
    for part in (slice(end_of_a), slice(site.b_offsets[0], site.b_offsets[0] + 12 * -(-rank // 8) * 8 * 2)):
        np.testing.assert_array_equal(got[part], expected[part])
    assert slabs.ranks.tolist() == [rank]


def test_gradcheck():
    weight, bias, a, b = (t.detach().double().requires_grad_() for t in _operands(torch.float64))
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: lora_linear(*args, 0.7), (x, weight, bias, a, b))
    frozen = (x.detach(), weight.detach(), None, a, b)
    assert torch.autograd.gradcheck(lambda a, b: lora_linear(*frozen[:3], a, b, 0.7), frozen[3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_those_of_the_rounded_function(dtype):
    weight, bias, a, b = _operands(dtype)
    x = torch.randn(7, 16).to(dtype).requires_grad_()
    dy = torch.randn(7, 12).to(dtype)
    lora_linear(x, weight, bias, a, b, 0.7).backward(dy)
    wide_a, wide_b = (t.detach().bfloat16().double() for t in (a, b))
    wide_x, wide_dy, wide_w = (t.detach().double() for t in (x, dy, weight))
    u = (wide_x @ wide_a.t()).to(dtype).double()
    du = 0.7 * wide_dy @ wide_b
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    assert a.grad.dtype == b.grad.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(a.grad.double(), du.t() @ wide_x, **tolerance)
    torch.testing.assert_close(b.grad.double(), 0.7 * wide_dy.t() @ u, **tolerance)
    loose = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(x.grad.double(), wide_dy @ wide_w + du @ wide_a, **loose)


def test_the_optimizers_writes_are_seen():
    layer = LoraLinear(nn.Linear(16, 12), rank=4, alpha=8)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base(x)), "B starts as zero"
        layer.lora_b.data.fill_(1.0)
        assert not torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_module_trains_its_factors_only(dtype):
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(16, 12, bias=False).to(dtype), rank=4, alpha=8, use_rslora=True)
    assert layer.scale == 8 / math.sqrt(4) and "scale=4" in repr(layer)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    base, x, target = layer.base.weight.clone(), torch.randn(9, 16).to(dtype), torch.randn(9, 12).to(dtype)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(layer.base.weight, base) and layer.base.weight.grad is None


def test_autocast_is_off_inside():
    weight, bias, a, b = _operands(torch.float32)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, 0.7)
    assert y.dtype == torch.float32 and torch.equal(y, lora_linear(x, weight, bias, a, b, 0.7))


def test_no_rows():
    weight, bias, a, b = _operands(torch.bfloat16)
    y = lora_linear(torch.empty(0, 16).bfloat16(), weight, bias, a, b, 0.7)
    assert y.shape == (0, 12)
    y.sum().backward()
    assert not a.grad.any() and not b.grad.any()


def test_errors_say_the_value():
    weight, bias, a, b = _operands(torch.bfloat16)
    x = torch.randn(3, 16).bfloat16()
    with pytest.raises(ValueError, match=r"a \[5, 8\]"):
        lora_linear(x, weight, bias, a[:, :8], b, 1.0)
    with pytest.raises(ValueError, match=r"b \[12, 4\]"):
        lora_linear(x, weight, bias, a, b[:, :4], 1.0)
    with pytest.raises(TypeError, match=r"x is torch.float32, weight is torch.bfloat16"):
        lora_linear(x.float(), weight, bias, a, b, 1.0)
    with pytest.raises(ValueError, match="in_features is 10; it must be a multiple of 8"):
        LoraLinear(nn.Linear(10, 12), rank=4, alpha=8)
    with pytest.raises(ValueError, match="max_rank is 300"):
        LoraLinear(nn.Linear(16, 12), rank=300, alpha=8)
