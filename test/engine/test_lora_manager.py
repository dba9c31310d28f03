"""LoRAManager: what is copied, where it lands, what is refused, and that nothing is left when a version goes."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from engine.parity_bench import VOCAB, make_checkpoint
from engine.tiny_lora import CPU, HIDDEN, MODULE, manager_of, tiny_adapter, tiny_manager, write_adapter
from torch import Tensor

from sglang.srt.config.model_config import load_model_config
from sglang.srt.config.sections import LoadSection
from sglang.srt.errors import WeightError
from sglang.srt.lora.lora_manager import BaseTensor, LoRAManager
from sglang.srt.model_executor.setup import lora_tensors
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.decoder import DecoderForCausalLM
from sglang.srt.ops.lora import lora_add_, lora_embedding_add_
from sglang.srt.ops.packed import PackedWeight, can_pack


def factors(outputs: int, inputs: int, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


# ---- the operation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [False, True], ids=["row_major", "column_major"])
@pytest.mark.parametrize("rows", [None, [1, 4, 6], [5]])
def test_lora_add_is_the_formula(rows: list[int] | None, columns: bool) -> None:
    a, b = factors(6, 10)
    base = torch.randn(7, 20)
    y = base.t().contiguous().t() if columns else base.clone()
    chosen = list(range(7)) if rows is None else rows
    x = torch.randn(len(chosen), 10)
    want = base.double()
    want[chosen, 8:14] += 0.5 * (x.double() @ a.double().t()) @ b.double().t()
    out = lora_add_(y, x, None if rows is None else torch.tensor(rows), a, b, 0.5, 8)
    assert out is y
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5)
    others = [i for i in range(7) if i not in chosen]
    assert torch.equal(y[others], base[others])


def test_lora_add_rounds_once_in_bfloat16() -> None:
    a, b = (f.bfloat16() for f in factors(6, 64, rank=16))
    x, y = torch.randn(4, 64).bfloat16(), torch.randn(4, 6).bfloat16()
    want = y.double() + 2.0 * (x.double() @ a.double().t()) @ b.double().t()
    for rows in (None, torch.arange(4)):
        got = lora_add_(y.clone(), x, rows, a, b, 2.0, 0)
        assert got.dtype == torch.bfloat16
        assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-4).all()


def test_embedding_add_is_lora_add_of_one_hot_rows() -> None:
    a, b = factors(5, 12)
    ids, rows = torch.tensor([3, 11, 3]), torch.tensor([0, 2, 3])
    base = torch.randn(4, 5)
    one_hot = torch.nn.functional.one_hot(ids, 12).float()
    want = lora_add_(base.clone(), one_hot, rows, a, b, 1.5, 0)
    torch.testing.assert_close(lora_embedding_add_(base.clone(), ids, rows, a, b, 1.5), want)


# ---- copying -------------------------------------------------------------------------------------------------------


def real_manager(path: Path, family: str = "qwen3") -> tuple[LoRAManager, DecoderForCausalLM]:
    make_checkpoint(family, path)
    model = load_model(load_model_config(str(path)), LoadSection(path=str(path), dtype="float32"), CPU)
    return manager_of(lora_tensors(model.weights), model.parameters), model


def test_modules_land_at_their_rows_of_the_fused_parameters(tmp_path: Path) -> None:
    manager, model = real_manager(tmp_path)
    sizes = {name: target.shape for name, target in model.weights.targets.items()}
    names = [f"model.layers.1.{part}" for part in ("self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj")]
    names += ["model.embed_tokens", "lm_head"]
    modules = {}
    for seed, name in enumerate(names):
        outputs, inputs = sizes[f"{name}.weight"]
        if name == "model.embed_tokens":
            outputs, inputs = inputs, outputs
        modules[name] = (*factors(outputs, inputs, seed=seed), 0.25 + seed)
    weights = manager.stage(write_adapter(tmp_path / "adapter", modules))
    found = {(p, f.start): f for p, parts in weights.factors.items() for f in parts}
    q = sizes["model.layers.1.self_attn.q_proj.weight"][0]
    kv = sizes["model.layers.1.self_attn.k_proj.weight"][0]
    places = [("layers.1.qkv", q + kv), ("layers.1.qkv", q), ("layers.1.gate_up", 112), ("embed_tokens", 0)]
    places.append(("lm_head", 0))
    assert set(found) == set(places)
    for place, (a, b, scale) in zip(places, modules.values(), strict=True):
        assert torch.equal(found[place].a, a) and torch.equal(found[place].b, b)
        assert found[place].scale == scale, "C16: the scale stays beside the tensors"


def test_with_tied_weights_embedding_and_head_stay_apart(tmp_path: Path) -> None:
    manager, _ = real_manager(tmp_path, "llama3_rope")
    head = {"lm_head": (*factors(VOCAB, 64), 1.0)}
    assert set(manager.stage(write_adapter(tmp_path / "a", head)).factors) == {"lm_head"}
    embedding = {"model.embed_tokens": (*factors(64, VOCAB), 1.0)}
    assert set(manager.stage(write_adapter(tmp_path / "b", embedding)).factors) == {"embed_tokens"}


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def base(outputs: int = HIDDEN) -> dict[str, BaseTensor]:
    """A module in a layer, whose factors go into a slab, and two outside."""
    return {
        f"{MODULE}.weight": BaseTensor("layers.0.out", 0, (outputs, HIDDEN)),
        "model.embed_tokens.weight": BaseTensor("embed_tokens", 0, (16, HIDDEN)),
    }


@pytest.mark.parametrize("module", [MODULE, "lm_head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
def test_factors_are_cast_to_the_models_dtype(
    own: torch.dtype, dtype: torch.dtype, module: str, tmp_path: Path
) -> None:
    """As torch casts, bit for bit, in the slab as outside."""
    manager = manager_of(base(16), {}, dtype=str(own).removeprefix("torch."))
    spread = 10.0 ** torch.arange(-9, 4)
    a, b = (torch.cat([f * s for s in spread], dim) for f, dim in zip(factors(16, HIDDEN, 2), (0, 1), strict=True))
    a, b = a.to(dtype), b.to(dtype)
    ((copy,),) = manager.stage(write_adapter(tmp_path / "a", {module: (a, b, 1.0)})).factors.values()
    for got, given in ((copy.a, a), (copy.b, b)):
        assert got.dtype == own and torch.equal(got, given.to(own))
        assert torch.equal(got.signbit(), given.signbit())


def test_numbers_beyond_the_models_dtype_are_refused(tmp_path: Path) -> None:
    a, b = factors(HIDDEN, HIDDEN)
    a[1, 3] = 1e5
    adapter = write_adapter(tmp_path / "a", {MODULE: (a, b, 1.0)})
    with pytest.raises(ValueError, match=rf"{MODULE} .* too large for float16"):
        manager_of(base(), {}, dtype="float16").stage(adapter)
    manager_of(base(), {}, dtype="bfloat16").stage(adapter)


def test_b14_the_file_is_not_read_again(tmp_path: Path) -> None:
    manager = tiny_manager()
    adapter = tiny_adapter(tmp_path / "a")
    weights = manager.stage(adapter)
    before = weights.slab.data.clone()
    (tmp_path / "a").write_bytes(b"\xff" * adapter.nbytes)
    assert torch.equal(weights.slab.data, before)


def test_c25_what_cannot_be_staged_leaves_nothing(tmp_path: Path) -> None:
    manager = tiny_manager()
    adapter = tiny_adapter(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"\0" * 8)
    with pytest.raises(ValueError, match="length"):
        manager.stage(adapter)
    with pytest.raises(WeightError, match="no module model.layers.7.x"):
        manager.stage(write_adapter(tmp_path / "b", {"model.layers.7.x": (*factors(2, 2), 1.0)}))
    assert manager.versions == frozenset() and manager.nbytes == 0


# ---- base weights in the adapter's file ----------------------------------------------------------------------------


def stage_with_copy(manager: LoRAManager, path: Path, name: str, copy: Tensor) -> None:
    manager.stage(write_adapter(path / "a", {MODULE: (*factors(HIDDEN, HIDDEN), 1.0)}, {name: copy}))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", f"{MODULE}.weight"])
def test_base_weights_that_an_adapter_repeats_must_be_the_models(name: str, tmp_path: Path) -> None:
    base = {MODULE: torch.randn(HIDDEN, HIDDEN), "embed": torch.randn(16, HIDDEN)}
    tensors = {
        f"{MODULE}.weight": BaseTensor("qkv", 2, (HIDDEN, HIDDEN)),
        "model.embed_tokens.weight": BaseTensor("embed", 0, (16, HIDDEN)),
    }
    qkv = torch.cat([torch.zeros(2, HIDDEN), base[MODULE], torch.zeros(3, HIDDEN)])
    manager = manager_of(tensors, {"qkv": qkv, "embed": base["embed"]})
    right = base[MODULE] if name.startswith(MODULE) else base["embed"]
    stage_with_copy(manager, tmp_path, name, right)
    stage_with_copy(manager, tmp_path, name, right.bfloat16())
    wrong = right.clone()
    wrong[3, 3] += 1e-3
    for copy in (wrong, right[:, :4].clone()):
        with pytest.raises(WeightError, match=name):
            stage_with_copy(manager, tmp_path, name, copy)
    with pytest.raises(WeightError, match=r"model\.norm"):
        stage_with_copy(manager, tmp_path, "model.norm", right)


@pytest.mark.skipif(not can_pack(), reason="no compiler: weights are not packed here")
def test_a_packed_base_is_compared_with_tolerance(tmp_path: Path) -> None:
    weight = torch.randn(64, 32)
    scale = weight.abs().amax(1, keepdim=True) / 127
    blocks = torch.cat([scale.half().view(torch.uint8), (weight / scale).round().to(torch.int8).view(torch.uint8)], 1)
    tensors = {
        "model.embed_tokens.weight": BaseTensor("embed", 0, (64, 32)),
        f"{MODULE}.weight": BaseTensor("q", 0, (8, 8)),
    }
    packed = PackedWeight("q8_0", blocks.contiguous())
    manager = manager_of(tensors, {"embed": packed, "q": torch.zeros(8, 8)})
    stage_with_copy(manager, tmp_path, "model.embed_tokens.weight", weight.bfloat16())
    with pytest.raises(WeightError, match="embed_tokens"):
        stage_with_copy(manager, tmp_path, "model.embed_tokens.weight", weight + 0.2 * torch.randn(64, 32))
    with pytest.raises(WeightError, match="embed_tokens"):
        stage_with_copy(manager, tmp_path, "model.embed_tokens.weight", torch.zeros(64, 32))


# ---- versions ------------------------------------------------------------------------------------------------------


def test_d9_free_returns_the_bytes(tmp_path: Path) -> None:
    manager = tiny_manager(2)
    each = manager.nbytes // 2
    assert manager.free(1) == each and manager.nbytes == each and manager.versions == {2}
    assert 2 in manager and 1 not in manager


def test_d8_a_thousand_versions_leave_no_memory_behind(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": BaseTensor("embed", 0, (1024, 1024)),
        f"{MODULE}.weight": BaseTensor("q", 0, (1024, 1024)),
    }
    manager = manager_of(tensors, {"embed": torch.empty(1)})
    modules = {name: (*factors(1024, 1024, rank=16), 1.0) for name in ("model.embed_tokens", MODULE)}
    adapter = write_adapter(tmp_path / "a", modules)
    process, sizes = psutil.Process(), []
    for version in range(1, 1001):
        manager.commit(version, manager.stage(adapter))
        if version > 2:
            manager.free(version - 2)
        if version % 500 == 0:
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert manager.nbytes == 2 * manager.free(1000)
    assert sizes[-1] - sizes[0] < 16 << 20


def test_staging_works_in_a_thread_beside_inference(tmp_path: Path) -> None:
    """The main thread is in inference mode, the worker is not: its tensors must still serve."""
    manager, results = tiny_manager(), []
    adapter = tiny_adapter(tmp_path / "a")
    thread = threading.Thread(target=lambda: results.append(manager.stage(adapter)))
    thread.start()
    thread.join()
    manager.commit(1, results[0])
    with torch.inference_mode():
        y = torch.zeros(3, HIDDEN)
        batch = manager.batch(np.array([1, 0, 1]))
        assert batch is not None
        batch.add_(y, torch.ones(3, HIDDEN), "layers.0.out")
    assert y[0].any() and not y[1].any() and torch.equal(y[0], y[2])


def test_g2_rows_of_the_base_alone_have_no_batch() -> None:
    manager = tiny_manager(1)
    assert manager.batch(np.zeros(5, dtype=np.int64)) is None
    assert manager.batch(np.zeros(0, dtype=np.int64)) is None


def test_d1_parameters_that_an_adapter_lacks_get_nothing() -> None:
    manager = tiny_manager(2)
    batch = manager.batch(np.array([1, 2, 0]))
    assert batch is not None
    y = torch.randn(3, 16)
    before = y.clone()
    batch.add_(y, torch.ones(3, HIDDEN), "lm_head")
    batch.add_embedding_(y, torch.ones(3, dtype=torch.int64), "embed_tokens")
    assert torch.equal(y, before)


def test_d5_versions_are_on_the_device_while_they_have_a_slot(tmp_path: Path) -> None:
    """On a device that is not the host; its copies come and go, the host's stay."""
    manager = manager_of(base(), {}, torch.device("meta"))
    assert manager._slots is not None
    for version in (1, 2, 3):
        manager.commit(version, manager.stage(tiny_adapter(tmp_path / "a", version)))
    assert manager.versions == set(manager._slots.versions) == {1, 2, 3}, "as many as there are rows, at once"
    manager.load((1, 0))
    assert set(manager._slots.weights) == {1}
    manager.load((2, 3))
    assert set(manager._slots.weights) == {2, 3} and manager.versions == {1, 2, 3}
    before = manager.nbytes
    assert manager.free(3) * 3 == before and manager.nbytes == before - before // 3
    assert sorted(manager._slots.versions) == [0, 1, 2] and set(manager._slots.weights) == {2}


def test_a_host_that_is_the_device_has_no_rows_and_slabs_of_the_adapters_rank(tmp_path: Path) -> None:
    host, device = (manager_of(base(), {}, torch.device(name), max_rank=256) for name in ("cpu", "meta"))
    adapter = tiny_adapter(tmp_path / "a", rank=3)
    small, large = host.stage(adapter).slab, device.stage(adapter).slab
    assert (small.layout.max_rank, large.layout.max_rank, small.rank, large.rank) == (3, 256, 3, 3)
    assert small.data.nbytes < large.data.nbytes == large.layout.slab_bytes
    assert host._slots is None


def test_ranks_beyond_the_slots_are_refused(tmp_path: Path) -> None:
    """The front has refused them before."""
    manager = manager_of(base(), {}, torch.device("meta"), max_rank=4)
    manager.stage(tiny_adapter(tmp_path / "a", rank=4))
    with pytest.raises(ValueError, match="rank is 5; this layout takes 1 to 4"):
        manager.stage(tiny_adapter(tmp_path / "b", rank=5))
