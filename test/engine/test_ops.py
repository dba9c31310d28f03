"""Each operation against its formula in float64, written here apart from it, and kernels against the reference."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sglang.srt.errors import ConfigError
from sglang.srt.layers.rotary import RotaryEmbedding
from sglang.srt.ops import attention
from sglang.srt.ops.activation import silu_and_mul
from sglang.srt.ops.linear import dense_linear, head_logits, linear_reference
from sglang.srt.ops.norm import fused_add_rms_norm, rms_norm
from sglang.srt.ops.op import Op
from sglang.srt.ops.rope import rotate_

CPU = torch.device("cpu")


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=atol)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rms_formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (3, 4, 32)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm(shape: tuple[int, ...], scale: float) -> None:
    x, weight = torch.randn(shape) * scale, torch.randn(shape[-1])
    before = x.clone()
    close(rms_norm(x, weight, 1e-5), rms_formula(x, weight, 1e-5))
    assert torch.equal(x, before)


def test_rms_norm_of_a_view_and_of_zeros() -> None:
    fused, weight = torch.randn(6, 10, 32), torch.randn(32)
    close(rms_norm(fused[:, 2:5], weight, 1e-6), rms_formula(fused[:, 2:5], weight, 1e-6))
    assert torch.equal(rms_norm(torch.zeros(2, 32), weight, 1e-6), torch.zeros(2, 32))


def test_rms_norm_bfloat16_takes_statistics_in_float32() -> None:
    x, weight = torch.randn(4, 4096).bfloat16(), torch.randn(4096).bfloat16()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), rms_formula(x, weight, 1e-5), rtol=1e-2, atol=1e-2)


def test_fused_add_rms_norm_updates_the_residual() -> None:
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    total = x + residual
    close(fused_add_rms_norm(x, residual, weight, 1e-5), rms_formula(total, weight, 1e-5))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("column_major", [False, True])
def test_silu_and_mul(column_major: bool) -> None:
    x = torch.randn(32, 7).t() if column_major else torch.randn(7, 32)
    gate, up = x.double().chunk(2, dim=-1)
    close(silu_and_mul(x), gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 9, 16, 128, 129])
@pytest.mark.parametrize("outputs", [64, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows: int, outputs: int, bias: bool) -> None:
    x, weight = torch.randn(rows, 48), torch.randn(outputs, 48)
    b = torch.randn(outputs) if bias else None
    expected = x.double() @ weight.double().t() + (0 if b is None else b.double())
    for y in (
        dense_linear(x, weight, b),
        dense_linear(x.t().contiguous().t(), weight, b),
        linear_reference(x, weight, b),
    ):
        assert y.shape == (rows, outputs)
        close(y, expected, atol=2e-5)


def test_linear_bfloat16() -> None:
    x, weight = torch.randn(16, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    assert torch.equal(dense_linear(x, weight), F.linear(x, weight))


def test_wide_logits_are_not_rounded() -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    expected, out = x.double() @ weight.double().t(), torch.empty(5, 100)
    close(head_logits(x, weight, torch.float32), expected, atol=2e-5)
    close(head_logits(x, weight, torch.float32, out), expected, atol=2e-5)
    close(out, expected, atol=2e-5)
    rounded = head_logits(x, weight, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and (rounded - expected).abs().max() > 1e-3


def test_op_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def double_it(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = Op(double_it, {"cpu": lambda x: x + x})
    assert op(torch.ones(1)).item() == 2
    with caplog.at_level(logging.WARNING):
        assert op(torch.ones(1, device="meta")).device.type == "meta"
        op(torch.ones(1, device="meta"))
    assert [record.getMessage() for record in caplog.records] == ["no double_it kernel for meta: torch reference"]


# ---- rotary ----


def rope_config(**changes: object) -> object:
    from sglang.srt.config.model_config import ModelConfig

    values: dict = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 128,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "context_length": 4096,
    }
    return ModelConfig(**{**values, **changes})


def test_rotation_is_a_complex_product() -> None:
    x, positions = torch.randn(5, 3, 64), torch.tensor([0, 1, 7, 100, 4000])
    cos, sin = RotaryEmbedding(rope_config(), torch.float32, CPU).angles(positions)
    angle = positions.double()[:, None, None] * 10000.0 ** (-torch.arange(32).double() / 32)
    pairs = torch.complex(x[..., :32].double(), x[..., 32:].double()) * torch.polar(torch.ones_like(angle), angle)
    # Angles are float32: at position 4000 they are good to about 2e-4.
    fused = torch.cat([x, torch.ones(5, 1, 64)], dim=1)
    close(rotate_(fused[:, :3], cos, sin), torch.cat([pairs.real, pairs.imag], -1), atol=2e-3)
    assert bool((fused[:, 3] == 1).all()), "the rotation left its view"


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_angles_equal_transformers(name: str) -> None:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    theirs = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={**scaling, "rope_theta": 10000.0},
    )
    positions = torch.tensor([0, 1, 5, 900, 4095])
    want = LlamaRotaryEmbedding(theirs)(torch.zeros(1, dtype=torch.float32), positions[None])
    got = RotaryEmbedding(rope_config(rope_scaling=scaling), torch.float32, CPU).angles(positions)
    signs = torch.tensor([[1.0] * 64, [-1.0] * 32 + [1.0] * 32])
    for ours, reference, sign in zip(got, want, signs, strict=True):
        torch.testing.assert_close(ours[:, 0], reference[0] * sign, rtol=0, atol=2e-5)


def test_unknown_scaling_is_named() -> None:
    with pytest.raises(ConfigError, match="spiral"):
        RotaryEmbedding(rope_config(rope_scaling={"rope_type": "spiral"}), torch.float32, CPU)


# ---- attention ----


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float):
    """q [Q, Hq, D], k and v [L, Hkv, D], seen bool [Q, L]; float64, head by head."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head // group].double().t() * scale
        heads.append(scores.masked_fill(~seen, -np.inf).softmax(-1) @ v[:, head // group].double())
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_decode_attention(heads: int, kv_heads: int) -> None:
    q, k, v = torch.randn(3, heads, 16), torch.randn(3, 9, kv_heads, 16), torch.randn(3, 9, kv_heads, 16)
    seen = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    mask = attention.additive_mask(seen[:, None, None], torch.float32)
    got = attention.decode_attention(q, k, v, mask, 0.3)
    for i in range(3):
        close(got[i : i + 1], softmax_attention(q[i : i + 1], k[i], v[i], seen[i : i + 1], 0.3))


@pytest.mark.parametrize("masked", [False, True])
def test_prefill_attention(masked: bool) -> None:
    q, k, v = torch.randn(5, 6, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = attention.additive_mask(seen, torch.float32) if masked else None
    close(attention.prefill_attention(q, k, v, mask, 0.25), softmax_attention(q, k, v, seen, 0.25))


def test_store_kv_converts_and_leaves_other_rows() -> None:
    k_pool, v_pool = torch.zeros(6, 2, 4, dtype=torch.bfloat16), torch.ones(6, 2, 4, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    attention.store_kv(k, v, k_pool, v_pool, torch.tensor([4, 1]))
    assert torch.equal(k_pool[[4, 1]], k.bfloat16()) and torch.equal(v_pool[[4, 1]], v.bfloat16())
    assert not k_pool[[0, 2, 3, 5]].any() and bool((v_pool[[0, 2, 3, 5]] == 1).all())


@pytest.mark.parametrize("page_size", [1, 4])
def test_token_locations(page_size: int) -> None:
    pages = torch.tensor([[3, 0, 2], [1, 5, 4]], dtype=torch.int32)
    positions = torch.tensor([[0, 2], [1, 2]])
    got = attention.token_locations(pages, torch.tensor([[1], [0]]), positions, page_size)
    want = [
        [int(pages[slot, p // page_size]) * page_size + p % page_size for p in row]
        for slot, row in zip((1, 0), positions.tolist(), strict=True)
    ]
    assert got.tolist() == want and got.dtype == torch.int64
