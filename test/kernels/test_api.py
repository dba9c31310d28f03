"""The border: what arguments are refused and how, which backend runs, and what an import costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sgl_kernel
from sgl_kernel import _binding, _checks, ops, reference
from sgl_kernel.lora.batch import BatchShape, build_batch
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs, pinned_slab, pinned_words

# ---- the package -----------------------------------------------------------------------------------------------------


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_brings_no_torch_and_no_numpy():
    blocked = "for name in ('torch', 'tvm_ffi', 'triton'): sys.modules[name] = None\n"
    code = f"""import sys
sys.path[:0] = {sys.path!r}
{blocked}import sgl_kernel, sgl_kernel.lora, sgl_kernel.lora.layout
assert sgl_kernel.__version__ == "0.5.12"
layout = sgl_kernel.LoraLayout(sgl_kernel.decoder_groups(64, 96, 4, 2, 16), 2, 8)
assert "numpy" not in sys.modules
import numpy as np
from sgl_kernel.lora import BatchShape, LoraModule, build_batch, pack_slab, peft_modules
from sgl_kernel.lora import slab_digest, slab_rank, unpack_slab
slab = np.zeros(layout.slab_bytes, np.uint8)
a, b = np.ones((8, 64), np.float32), np.ones((64, 8), np.float32)
name = "base_model.model.model.layers.0.self_attn.q_proj.lora_%s.weight"
modules = peft_modules(layout, {{name % "A": a, name % "B": b}}, {{"r": 8, "lora_alpha": 16}})
pack_slab(layout, modules, slab)
assert unpack_slab(layout, slab)[0].scale == 2 and slab_digest(layout, slab)
build_batch(np.zeros(3, np.int32), np.array([slab_rank(slab)], np.int32), BatchShape(4, 1, 16))
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_had():
    for name in sgl_kernel.__all__:
        assert getattr(sgl_kernel, name) is not None
    assert set(dir(sgl_kernel)) >= set(sgl_kernel.__all__)
    for name in sgl_kernel.lora.__all__:
        assert getattr(sgl_kernel.lora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sgl_kernel.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sgl_kernel.lora.nothing


def test_upstreams_calling_conventions():
    def names(function):
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]

    assert names(ops.rmsnorm) == ["input", "weight", "eps", "out", "enable_pdl"]
    assert names(ops.fused_add_rmsnorm) == ["input", "residual", "weight", "eps", "enable_pdl"]
    assert names(ops.silu_and_mul) == ["input", "out"]
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.ones(16)
    assert ops.fused_add_rmsnorm(x, residual, weight, 1e-6, False) is None
    out = torch.empty(3, 8)
    assert ops.silu_and_mul(x, out) is out
    assert ops.rmsnorm(x, weight, 1e-6, x, None) is x


# ---- backends --------------------------------------------------------------------------------------------------------


def test_the_library_comes_first_and_the_reference_runs_on_a_cpu(monkeypatch):
    x = torch.randn(2, 8)
    assert ops.backend_for(x) is reference
    fake = SimpleNamespace(rmsnorm=lambda x, weight, eps, out: out.fill_(5))
    monkeypatch.setattr(_binding, "native_for", lambda tensor: fake if tensor is x else None)
    assert (ops.rmsnorm(x, torch.ones(8)) == 5).all()


def test_other_gpus_get_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_binding, "native_for", lambda tensor: None)
    backend = ops.backend_for(SimpleNamespace(device=torch.device("cuda", 0)))
    assert backend.__name__ == "sgl_kernel.triton_ops"
    names = "lora_shrink lora_expand_add skinny_gemm rmsnorm fused_add_rmsnorm silu_and_mul qk_norm_rope"
    for name in names.split():
        theirs, ours = (list(inspect.signature(getattr(m, name)).parameters) for m in (backend, reference))
        assert theirs[: len(ours)] == ours, name


# ---- results ---------------------------------------------------------------------------------------------------------


def test_outputs_are_allocated(make_case):
    case = make_case([0, -1], [(3, 5)], outputs=(8, 8))
    x = torch.randn(2, 24).bfloat16()
    u = ops.lora_shrink(x, case.slabs, case.site, case.batch)
    assert u.shape == (2, 16) and u.dtype == x.dtype
    y = ops.skinny_gemm(x, torch.randn(16, 24).bfloat16(), shrink=(case.slabs, case.site, case.batch, u))
    assert y.shape == (2, 16)
    assert ops.lora_expand_add_(y, case.delta(u)) is y
    assert ops.silu_and_mul(y, delta=case.delta(u)).shape == (2, 8)


def test_leading_dimensions():
    x, residual, weight = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(16)
    flat_x, flat_residual = x.view(6, 16).clone(), residual.view(6, 16).clone()
    assert torch.equal(ops.rmsnorm(x, weight).view(6, 16), ops.rmsnorm(flat_x, weight))
    assert torch.equal(ops.silu_and_mul(x).view(6, 8), ops.silu_and_mul(flat_x))
    assert ops.rmsnorm(x[0, 0], weight).shape == (16,)
    ops.fused_add_rmsnorm(x, residual, weight)
    ops.fused_add_rmsnorm(flat_x, flat_residual, weight)
    assert torch.equal(x.view(6, 16), flat_x) and torch.equal(residual.view(6, 16), flat_residual)


def test_qk_norm_rope_passes_everything_on(make_case):
    case = make_case([0, -1], [(3, 5, 1)], outputs=(16, 8, 8))
    qkv = torch.randn(2, 32)
    args = (2, 1, 8, torch.randn(8), torch.randn(8), 1e-6, torch.randn(5, 8), torch.tensor([4, 1]))
    delta = case.delta(case.random_u(2, torch.float32))
    rest = {"bias": torch.randn(32), "locs": torch.tensor([2, 0]), "delta": delta}
    pools = [{name: torch.zeros(3, 1, 8) for name in ("k_pool", "v_pool")} for _ in range(2)]
    expected = reference.qk_norm_rope(qkv.clone(), *args, **rest, **pools[0])
    assert ops.qk_norm_rope(qkv, *args, **rest, **pools[1]) is qkv
    assert torch.equal(qkv, expected) and torch.equal(pools[0]["v_pool"], pools[1]["v_pool"])


# ---- slabs and batches -----------------------------------------------------------------------------------------------


def test_commit_and_clear(make_case):
    case = make_case([0, 1], [(3,), (8,)], outputs=(8,))
    slabs = LoraSlabs.allocate(case.slabs.layout, 3, "cpu")
    ranks = slabs.ranks
    assert slabs.num_slots == 3 and not slabs.data.any() and ranks.tolist() == [0, 0, 0] and ranks.dtype == np.int32
    slab = pinned_slab(case.slabs.layout)
    slab.copy_(case.slabs.data[1])
    slabs.commit(2, slab)
    assert torch.equal(slabs.data[2], slab) and not slabs.data[:2].any() and ranks.tolist() == [0, 0, 8]
    slabs.commit(2, case.slabs.data[0])
    assert ranks.tolist() == [0, 0, 3]
    slabs.commit(1, slab, 8)
    slabs.clear(2)
    assert not slabs.data[2].any() and ranks.tolist() == [0, 8, 0]
    slabs.clear(1)
    assert not slabs.data.any() and slabs.ranks is ranks
    for call in (lambda: slabs.commit(3, slab), lambda: slabs.clear(-1)):
        with pytest.raises(ValueError, match=r"slot (3|-1) is out of range; slots are 0 to 2"):
            call()
    with pytest.raises(ValueError, match="the slab has shape"):
        slabs.commit(0, slab[:-1])
    with pytest.raises(TypeError, match=r"the slab is torch.int8"):
        slabs.commit(0, slab.view(torch.int8))
    with pytest.raises(ValueError, match="the adapter has rank 9, the slabs take 0 to 8; use a larger max_rank"):
        slabs.commit(0, slab, 9)
    with pytest.raises(ValueError, match="fill it with this version's pack_slab"):
        slabs.commit(0, torch.full_like(slab, 0xFF))
    assert not slabs.data.any() and not ranks.any()


def test_slabs_know_their_ranks(make_case):
    case = make_case([0], [(3, 8), (0, 0), (5, 1)], outputs=(8, 8))
    data, layout = case.slabs.data, case.slabs.layout
    read = LoraSlabs(data, layout)
    assert read.ranks.tolist() == LoraSlabs(data).ranks.tolist() == [8, 0, 5] and read.ranks.dtype == np.int32
    given = np.array([1, 2, 3], np.int32)
    slabs = LoraSlabs(data, layout, given)
    given[:] = 0
    assert slabs.ranks.tolist() == [1, 2, 3]
    data[1, 0] = 4
    assert read.ranks.tolist() == [8, 0, 5]
    assert LoraSlabs(data.to("meta"), layout).ranks.tolist() == [0, 0, 0], "no device is waited for"
    for bad in (given[:2], given.astype(np.int64)):
        with pytest.raises(ValueError, match=r"ranks are int(32 \[2\]|64 \[3\]); they must be int32 \[3\]"):
            LoraSlabs(data, layout, bad)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_gpu_takes_bfloat16_slabs_alone(make_case, dtype):
    """A GPU's tensor, for as long as nothing but its device is asked for."""
    case = make_case([0], [(3,)], outputs=(8,), dtype=dtype)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    text = f"the site's numbers are {dtype}, .* make the layout with dtype='bfloat16'"
    with pytest.raises(ValueError, match=text):
        _checks.check_lora(x, case.slabs, case.site, case.batch, 1)
    with pytest.raises(ValueError, match=text):
        _checks.check_delta(x, case.delta(torch.zeros(1, 8)), 1, 8)


def test_a_gpu_writes_eight_columns_or_sixteen():
    _checks.check_outputs(SimpleNamespace(is_cuda=True), 24)
    _checks.check_outputs(torch.zeros(1), 3)
    with pytest.raises(ValueError, match="weight has 12 rows; on a GPU they must be a multiple of 8"):
        _checks.check_outputs(SimpleNamespace(is_cuda=True), 12)


def test_a_batch_can_be_rewritten_in_place():
    shape = BatchShape(4, 2, 16)
    host = pinned_words(shape)
    ranks = np.array([3, 8], np.int32)
    build_batch(np.array([1, -1], np.int32), ranks, shape, host.numpy())
    batch = LoraBatch.to_device(host, shape, "cpu")
    address, words = batch.words.data_ptr(), build_batch(np.array([0, 0, 1], np.int32), ranks, shape)
    assert batch.words.data_ptr() != host.data_ptr()
    batch.update(words)
    assert batch.words.data_ptr() == address and batch.words.tolist() == words.tolist()
    with pytest.raises(ValueError, match="words have shape"):
        batch.update(words[:-1])
    with pytest.raises(ValueError, match="words have shape"):
        LoraBatch(batch.words[:-1], shape)
    with pytest.raises(TypeError, match=r"words are torch.int64"):
        LoraBatch(batch.words.long(), shape)


def test_slabs_are_checked(make_case):
    layout = make_case([0], [(3,)], outputs=(8,)).slabs.layout
    with pytest.raises(TypeError, match=r"slabs are torch.int8"):
        LoraSlabs(torch.zeros(2, layout.slab_bytes, dtype=torch.int8), layout)
    with pytest.raises(ValueError, match=r"slabs have 64 bytes, the layout says"):
        LoraSlabs(torch.zeros(2, 64, dtype=torch.uint8), layout)
    with pytest.raises(ValueError, match="contiguous"):
        LoraSlabs(torch.zeros(layout.slab_bytes, 2, dtype=torch.uint8).t(), layout)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        LoraSlabs(torch.zeros(64 * 3 + 8, dtype=torch.uint8)[8:].view(3, 64))


def test_deltas_are_checked(make_case):
    case = make_case([0, 1], [(3, 1), (8, 2)], outputs=(8, 8))
    u = torch.zeros(2, 16)
    case.delta(u)
    case.delta(u, 16)
    case.delta(torch.zeros(2, 32), 16)
    for bad, stride, text in (
        (u[:, :15], 0, r"u has shape \[2, 15\]"),
        (torch.zeros(2, 24), 16, "16 of them for each of 1 to 2 slots"),
        (torch.zeros(2, 48), 16, "16 of them for each of 1 to 2 slots"),
        (torch.zeros(16, 2).t(), 0, "adjacent columns"),
        (u, 8, "u_slot_stride is 8; it must be 0 or the site's u_width 16"),
        (u.to("meta"), 0, "u is on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            case.delta(bad, stride)
    with pytest.raises(TypeError, match=r"u is torch.float64"):
        case.delta(u.double())
    few = LoraSlabs(case.slabs.data[:1], case.slabs.layout)
    with pytest.raises(ValueError, match="the batch names 2 slots, there are 1"):
        LoraDelta(u, few, case.site, case.batch)
    with pytest.raises(ValueError, match="the site ends at byte"):
        LoraDelta(u, LoraSlabs(torch.zeros(2, 256, dtype=torch.uint8)), case.site, case.batch)


# ---- arguments -------------------------------------------------------------------------------------------------------

X, W16 = torch.zeros(2, 16), torch.ones(16)
ANGLES, POSITIONS = torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64)
POOL = torch.zeros(3, 1, 8)


def _rope(qkv=None, q_weight=None, angles=ANGLES, positions=POSITIONS, heads=(2, 1, 8), **rest):
    qkv = torch.zeros(2, 32) if qkv is None else qkv
    return ops.qk_norm_rope(qkv, *heads, q_weight, None, 1e-6, angles, positions, **rest)


REFUSED = [
    (lambda c: ops.rmsnorm(X.long(), W16), TypeError, r"input is torch.int64"),
    (lambda c: ops.rmsnorm(X, W16.bfloat16()), TypeError, r"weight is torch.bfloat16; it must be torch.float32"),
    (lambda c: ops.rmsnorm(X, W16[:8]), ValueError, r"weight has shape \[8\]; it must be contiguous \[16\]"),
    (lambda c: ops.rmsnorm(X, W16.to("meta")), ValueError, "weight is on meta"),
    (lambda c: ops.rmsnorm(X.t(), W16[:2]), ValueError, "adjacent columns"),
    (lambda c: ops.rmsnorm(torch.zeros(2, 3, 32)[..., :16], W16), ValueError, "make it contiguous"),
    (lambda c: ops.rmsnorm(X, W16, out=torch.zeros(3, 16)), ValueError, r"out has shape \[3, 16\]"),
    (lambda c: ops.fused_add_rmsnorm(X, X[:1].clone(), W16), ValueError, r"residual has shape \[1, 16\]"),
    (lambda c: ops.fused_add_rmsnorm(X, X.half(), W16), TypeError, r"residual is torch.float16"),
    (lambda c: ops.silu_and_mul(X[:, :15].contiguous()), ValueError, "15 columns; it must be an even number"),
    (lambda c: ops.silu_and_mul(X, torch.zeros(2, 16)), ValueError, r"out has shape \[2, 16\]; it must be \[2, 8\]"),
    (lambda c: ops.silu_and_mul(torch.zeros(2, 24), delta=c.delta(c.u)), ValueError, "must be gate and up, 12 each"),
    (lambda c: ops.lora_shrink(X, *c.lora), ValueError, "x has 16 columns, the site takes 24"),
    (lambda c: ops.lora_shrink(torch.zeros(3, 24), *c.lora), ValueError, "3 rows, the batch has room for 2"),
    (lambda c: ops.lora_shrink(c.x, *c.lora, torch.zeros(2, 8)), ValueError, r"out has shape \[2, 8\]"),
    (lambda c: ops.lora_shrink(c.x.to("meta"), *c.lora), ValueError, "the slabs are on cpu"),
    (lambda c: ops.lora_expand_add_(X, c.delta(c.u)), ValueError, "16 columns, the delta's site has 24 outputs"),
    (lambda c: ops.lora_expand_add_(c.x, c.delta(c.u[:1])), ValueError, "u has 1 rows, the activations have 2"),
    (
        lambda c: ops.lora_expand_add_(c.x.half(), c.delta(c.u)),
        TypeError,
        r"u is torch.float32; it must be torch.float16",
    ),
    (lambda c: ops.lora_expand_add_(torch.zeros(3, 24), c.delta(torch.zeros(3, 16))), ValueError, "room for 2"),
    (lambda c: ops.skinny_gemm(torch.zeros(65, 16), X), ValueError, "65 rows; skinny_gemm takes up to 64"),
    (lambda c: ops.skinny_gemm(torch.zeros(2, 12), X), ValueError, "12 columns; it must be a multiple of 8"),
    (lambda c: ops.skinny_gemm(c.x, X), ValueError, "x has 24 columns, weight has 16"),
    (lambda c: ops.skinny_gemm(c.x, c.x.half()), TypeError, r"weight is torch.float16"),
    (lambda c: ops.skinny_gemm(c.x, c.x, shrink=(*c.lora, X[:, :8])), ValueError, r"u has shape \[2, 8\]"),
    (lambda c: ops.skinny_gemm(X, X, shrink=(*c.lora, c.u)), ValueError, "the site takes 24"),
    (lambda c: ops.skinny_gemm(X, X, X), ValueError, r"out has shape \[2, 16\]; it must be \[2, 2\]"),
    (lambda c: _rope(torch.zeros(2, 24)), ValueError, r"24 columns; it must have 16 \+ 2 \* 8"),
    (lambda c: _rope(torch.zeros(2, 28), heads=(2, 1, 7)), ValueError, "an even width 7"),
    (lambda c: _rope(q_weight=W16), ValueError, r"q_weight has shape \[16\]"),
    (lambda c: _rope(bias=W16), ValueError, r"bias has shape \[16\]"),
    (lambda c: _rope(angles=ANGLES.half()), TypeError, r"cos_sin is torch.float16"),
    (lambda c: _rope(angles=ANGLES[:, :4]), ValueError, r"cos_sin has shape \[4, 4\]"),
    (lambda c: _rope(positions=POSITIONS.int()), TypeError, r"positions are torch.int32"),
    (lambda c: _rope(positions=POSITIONS[:1]), ValueError, r"positions have shape \[1\]"),
    (lambda c: _rope(k_pool=POOL), ValueError, "give all three or none"),
    (lambda c: _rope(k_pool=POOL, v_pool=POOL[:, :, :4], locs=POSITIONS), ValueError, "v_pool has shape"),
    (lambda c: _rope(k_pool=POOL.half(), v_pool=POOL, locs=POSITIONS), TypeError, "k_pool is torch.float16"),
    (lambda c: _rope(torch.zeros(2, 24), heads=(1, 1, 8), delta=c.delta(c.u)), ValueError, "they must be q, k and v"),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED)
def test_arguments_are_refused_with_the_value(make_case, call, error, text):
    case = make_case([0, -1], [(3, 5)], outputs=(16, 8))
    c = SimpleNamespace(
        x=torch.zeros(2, 24), u=torch.zeros(2, 16), lora=(case.slabs, case.site, case.batch), delta=case.delta
    )
    with pytest.raises(error, match=text):
        call(c)
