"""The torch operators: the same results, and torch.compile sees through them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_kernel import ops
from sgl_kernel.library import shape_ints

OPS = torch.ops.sgl_kernel


def _layer(case):
    site, shape = list(case.site.words), shape_ints(case.batch.shape)

    def run(x, weight, residual, norm, slabs, words):
        y = x @ weight.t()
        u = OPS.lora_shrink(x, slabs, site, words, shape)
        OPS.lora_expand_add_(y, u, slabs, site, words, shape)
        inner = torch.empty(y.shape[0], y.shape[1] // 2, dtype=y.dtype)
        OPS.silu_and_mul(inner, y)
        OPS.fused_add_rmsnorm(inner, residual, norm, 1e-6, False)
        out = torch.empty_like(inner)
        OPS.rmsnorm(out, inner, norm, 1e-6, False)
        return out

    return run


def _eager(case, x, weight, residual, norm):
    y = x @ weight.t()
    ops.lora_expand_add_(y, case.delta(ops.lora_shrink(x, case.slabs, case.site, case.batch)))
    inner = ops.silu_and_mul(y)
    ops.fused_add_rmsnorm(inner, residual, norm)
    return ops.rmsnorm(inner, norm)


@pytest.fixture
def layer(make_case):
    case = make_case([1, -1, 0, 1], [(3, 8), (5, 0)], outputs=(16, 16))
    x, weight = torch.randn(4, 24).bfloat16(), torch.randn(32, 24).bfloat16()
    return case, (x, weight, torch.randn(4, 16).bfloat16(), torch.randn(16).bfloat16())


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_compiled_layer_is_the_eager_one(layer, backend):
    case, (x, weight, residual, norm) = layer
    expected_residual = residual.clone()
    expected = _eager(case, x, weight, expected_residual, norm)
    run = _layer(case)
    if backend is not None:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend=backend)
    got = run(x, weight, residual, norm, case.slabs.data, case.batch.words)
    assert torch.equal(got, expected) and torch.equal(residual, expected_residual)


def test_a_trace_holds_the_operators(layer):
    case, tensors = layer
    graph = make_fx(_layer(case), tracing_mode="fake")(*tensors, case.slabs.data, case.batch.words)
    called = {str(node.target).split(".")[1] for node in graph.graph.nodes if "sgl_kernel" in str(node.target)}
    assert called == {"lora_shrink", "lora_expand_add_", "silu_and_mul", "fused_add_rmsnorm", "rmsnorm"}


def test_fake_tensors_get_shapes(layer):
    case, (x, *_) = layer
    with FakeTensorMode() as mode:
        words = [mode.from_tensor(t) for t in (x, case.slabs.data, case.batch.words)]
        u = OPS.lora_shrink(words[0], words[1], list(case.site.words), words[2], shape_ints(case.batch.shape))
    assert u.shape == (4, case.site.u_width) and u.dtype == torch.bfloat16


def test_schemas_say_what_is_written():
    for name, written in (("lora_expand_add_", ["y"]), ("fused_add_rmsnorm", ["input", "residual"])):
        arguments = getattr(OPS, name).default._schema.arguments
        assert [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write] == written
    assert OPS.lora_shrink.default._schema.is_mutable is False


def test_errors_of_the_functions_come_through(layer):
    case, (x, *_) = layer
    with pytest.raises(ValueError, match="x has 16 columns, the site takes 24"):
        OPS.lora_shrink(
            x[:, :16], case.slabs.data, list(case.site.words), case.batch.words, shape_ints(case.batch.shape)
        )
