"""Packing: what goes in comes out, equal adapters have equal bytes, and PEFT's adapters compute what PEFT computes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kernel.lora.bf16 import all_finite, from_bf16_bits, to_bf16_bits, to_float16, to_float32
from sgl_kernel.lora.layout import LoraGroup, LoraLayout, decoder_groups
from sgl_kernel.lora.peft import peft_modules
from sgl_kernel.lora.slab import LoraModule, pack_slab, slab_digest, slab_rank, unpack_slab

LAYOUT = LoraLayout([LoraGroup("qkv", 16, (10, 6, 6)), LoraGroup("o", 8, (16,))], 2, 17)
FLOAT16 = LoraLayout(LAYOUT.groups, 2, 17, "float16")
FLOAT32 = LoraLayout(LAYOUT.groups, 2, 17, "float32")
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _pack(layout, modules, fill=0):
    slab = np.full(layout.slab_bytes, fill, np.uint8)
    pack_slab(layout, modules, slab)
    return slab


def _module(layer=1, group="qkv", index=0, rank=3, scale=0.5, seed=0, layout=LAYOUT):
    site = layout.site(layer, group)
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, site.in_features)), rng.normal(size=(site.out_features[index], rank))
    return LoraModule(layer, group, index, scale, a.astype(np.float32), b.astype(np.float32))


# ---- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_bf16_is_rounded_as_torch_rounds(dtype):
    torch.manual_seed(0)
    values = (torch.randn(2000, dtype=torch.float64) * 10.0 ** torch.randint(-42, 5, (2000,))).to(dtype)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], dtype=dtype)])
    expected = values.float().bfloat16().view(torch.int16).numpy().view(np.uint16)
    if dtype == torch.float64:  # torch rounds twice, which differs in one of 2^16 values
        assert (to_bf16_bits(values) == expected).mean() > 0.999
    else:
        np.testing.assert_array_equal(to_bf16_bits(values), expected)
        if dtype != torch.bfloat16:
            np.testing.assert_array_equal(to_bf16_bits(values.numpy()), expected)


def test_float64_is_rounded_once():
    tie = 1 + 2.0**-8  # halfway between two bf16 numbers, of which the even one is 1
    values = np.array([tie, tie + 2**-40, tie - 2**-40, -tie - 2**-40, tie + 2**-7, tie + 2**-7 - 2**-45])
    assert from_bf16_bits(to_bf16_bits(values)).tolist() == [1, 1 + 2**-7, 1, -1 - 2**-7, 1 + 2**-6, 1 + 2**-7]


def test_bits_pass_unchanged():
    bits = np.arange(0, 0x7F80, 7, dtype=np.uint16)
    assert to_bf16_bits(bits) is bits
    np.testing.assert_array_equal(to_bf16_bits(from_bf16_bits(bits)), bits)


def test_float32_is_rounded_from_float64_alone():
    values = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-40, 0.1, -0.0, 3e-46, 1e39])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(to_float32(values), values.astype(np.float32))
    exact = torch.randn(99)
    assert to_float32(exact).base is not None and to_float32(exact).tolist() == exact.tolist()
    for dtype in (torch.float16, torch.bfloat16):
        np.testing.assert_array_equal(to_float32(exact.to(dtype)), exact.to(dtype).float())
    bits = np.arange(0, 0x7F80, 7, dtype=np.uint16)
    np.testing.assert_array_equal(to_float32(bits), from_bf16_bits(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float16_is_rounded_as_torch_rounds(dtype):
    torch.manual_seed(0)
    values = (torch.randn(2000) * 10.0 ** torch.randint(-9, 6, (2000,))).to(dtype)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0], dtype=dtype)])
    expected = values.half().view(torch.int16).numpy()
    np.testing.assert_array_equal(to_float16(values).view(np.int16), expected)
    assert not all_finite(to_float16(values)) and all_finite(to_float16(values.clamp(-9, 9)))


def test_float16_is_rounded_from_float64_once():
    tie = 1 + 2.0**-11
    assert to_float16(np.array([tie, tie + 2**-40, -tie - 2**-40])).tolist() == [1, 1 + 2**-10, -1 - 2**-10]
    exact = np.ones(3, np.float16)
    assert to_float16(exact) is exact


# ---- packing ---------------------------------------------------------------------------------------------------------

_SLICES = [(layer, group, index) for layer in (0, 1) for group, index in (("qkv", 0), ("qkv", 1), ("qkv", 2), ("o", 0))]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(_SLICES),
        st.tuples(st.integers(1, 17), st.floats(-(2.0**99), 2.0**99, width=32), st.integers(0, 99)),
    ),
    st.randoms(use_true_random=False),
    st.sampled_from([LAYOUT, FLOAT16, FLOAT32]),
)
def test_what_is_packed_comes_out(adapter, random, layout):
    modules = [_module(*key, rank, scale, seed) for key, (rank, scale, seed) in sorted(adapter.items())]
    slab = _pack(layout, modules, fill=0xAB)
    found = {(m.layer, m.group, m.slice_index): m for m in unpack_slab(layout, slab)}
    assert found.keys() == adapter.keys()
    assert slab_rank(slab) == slab_rank(slab[:16]) == max((rank for rank, _, _ in adapter.values()), default=0)
    for module in modules:
        same = found[module.layer, module.group, module.slice_index]
        assert same.scale == module.scale
        np.testing.assert_array_equal(same.a, torch.tensor(module.a).to(TORCH[layout.dtype]).float())
        np.testing.assert_array_equal(same.b, torch.tensor(module.b).to(TORCH[layout.dtype]).float())
    random.shuffle(modules)
    again = _pack(layout, modules, fill=0xCD)
    assert slab_digest(layout, again) == slab_digest(layout, slab)
    np.testing.assert_array_equal(_pack(layout, found.values()), slab)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(
    ("rank", "other"), [(1, 0), (3, 8), (3, 9), (5, 1), (8, 17), (17, 3), (64, 64), (256, 1), (1, 256)]
)
def test_bytes_are_where_the_readme_says(rank, other, dtype):
    """Of a module beside another one, whose larger rank would be the adapter's."""
    largest = max(rank, other)
    layout = LoraLayout([LoraGroup("g", 8, (6, 5))], 2, largest, dtype)
    module = _module(1, "g", 1, rank, 0.75, layout=layout)
    beside = [_module(0, "g", 0, other, layout=layout)] if other else []
    slab = _pack(layout, [*beside, module], fill=0xFF)
    site, stride = layout.site(1, "g"), -(-largest // 8) * 8
    assert slab[:16].view(np.int32).tolist() == [largest, 0, 0, 0]
    entry = slab[site.table_offset + 8 : site.table_offset + 16]
    assert entry[:4].view(np.int32)[0] == rank and entry[4:].view(np.float32)[0] == 0.75
    first = layout.site(0, "g").table_offset
    assert first == 16 and slab[first : first + 4].view(np.int32)[0] == other
    numbers, item = torch.from_numpy(slab).view(TORCH[dtype]), layout.item_bytes
    a = numbers[site.a_offset // item + layout.rank_cap * 8 :][: rank * 8].view(rank, 8)
    b = numbers[site.b_offsets[1] // item :][: 5 * stride].view(5, stride)
    assert torch.equal(a, torch.tensor(module.a).to(TORCH[dtype]))
    assert torch.equal(b[:, :rank], torch.tensor(module.b).to(TORCH[dtype])) and not b[:, rank:].any()
    counted = item * sum(np.count_nonzero(m.a) + np.count_nonzero(m.b) for m in (module, *beside))
    assert np.count_nonzero(slab) <= counted + 2 + 8 * (1 + len(beside)), "padding is zero"


@pytest.mark.parametrize("convert", [torch.tensor, lambda v: torch.tensor(v).bfloat16(), to_bf16_bits, np.float64])
@pytest.mark.parametrize("layout", [LAYOUT, FLOAT16, FLOAT32])
def test_any_dtype_gives_the_same_bytes(convert, layout):
    module = _module()
    if layout is not LAYOUT:  # they keep what bf16 loses
        module = _with(a=from_bf16_bits(to_bf16_bits(module.a)), b=from_bf16_bits(to_bf16_bits(module.b)))
    other = LoraModule(1, "qkv", 0, 0.5, convert(module.a), convert(module.b))
    np.testing.assert_array_equal(_pack(layout, [other]), _pack(layout, [module]))


def test_tensors_in_training_and_views_are_taken():
    module = _module()
    a, b = torch.nn.Parameter(torch.tensor(module.a.T.copy())).t(), torch.tensor(module.b.T.copy()).bfloat16().t()
    np.testing.assert_array_equal(_pack(LAYOUT, [LoraModule(1, "qkv", 0, 0.5, a, b)]), _pack(LAYOUT, [_module()]))


def test_another_layout_is_another_digest():
    other = LoraLayout(LAYOUT.groups, 2, 18)
    assert other.slab_bytes == LAYOUT.slab_bytes
    empty = np.zeros(LAYOUT.slab_bytes, np.uint8)
    assert slab_digest(other, empty) != slab_digest(LAYOUT, empty)


def _with(**changes):
    module = _module()
    values = {name: getattr(module, name) for name in ("layer", "group", "slice_index", "scale", "a", "b")}
    return LoraModule(**{**values, **changes})


NAN_A = np.full((3, 16), np.nan, np.float32)
TOO_LARGE = np.full((3, 16), 3.4e38, np.float32)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([_module(), _module(seed=1)], "layer 1, qkv[0] is given twice"),
        ([_with(a=NAN_A)], "layer 1, qkv[0]: a factor has a value that is infinite or NaN"),
        ([_with(a=TOO_LARGE)], "too large for bfloat16"),
        ([_with(a=np.full((3, 16), 1e300))], "too large for bfloat16"),
        ([_with(a=np.zeros((3, 8), np.float32))], "A has shape [3, 8]; it must be [rank, 16]"),
        ([_with(b=np.zeros((10, 4), np.float32))], "B has shape [10, 4]; it must be [10, 3]"),
        ([_with(b=np.zeros(10, np.float32))], "B has shape [10]"),
        ([_module(rank=18)], "rank is 18; this layout takes 1 to 17"),
        ([_with(a=np.zeros((0, 16), np.float32), b=np.zeros((10, 0), np.float32))], "rank is 0"),
        ([_with(a=np.zeros((3, 16), np.int32))], "dtype is int32"),
        ([_with(scale=float("inf"))], "scale is inf"),
        ([_with(scale=1e39)], "scale is 1e+39"),
        ([_with(slice_index=3)], "layer 1, qkv[3]: there is no such slice"),
        ([_with(group="lm_head")], "no site 'lm_head'"),
        ([_with(layer=2)], "layers are 0 to 1"),
    ],
)
def test_errors_name_the_module_and_leave_nothing(modules, text):
    out = np.full(LAYOUT.slab_bytes, 1, np.uint8)
    with pytest.raises(ValueError, match=re.escape(text)):
        pack_slab(LAYOUT, [_module(0, "o"), *modules], out)
    assert not out.any()


@pytest.mark.parametrize("layout", [LAYOUT, FLOAT16, FLOAT32])
def test_unpacked_factors_outlive_the_slab(layout):
    slab = _pack(layout, [_module()])
    (module,) = unpack_slab(layout, slab)
    a, b = module.a.copy(), module.b.copy()
    slab.fill(0xFF)
    assert (module.a == a).all() and (module.b == b).all()


def test_float16_has_smaller_numbers():
    slab = _pack(FLOAT16, [_with(a=np.full((3, 16), 65504.0))])
    assert (unpack_slab(FLOAT16, slab)[0].a == 65504).all()
    with pytest.raises(ValueError, match="infinite or NaN, or too large for float16"):
        _pack(FLOAT16, [_with(a=np.full((3, 16), 65520, np.float32))])


def test_what_is_wrong_with_the_last_module_empties_the_slab():
    """Values are read while the slab is filled."""
    slab = np.full(LAYOUT.slab_bytes, 1, np.uint8)
    with pytest.raises(ValueError, match=r"layer 1, qkv\[2\]: a factor"):
        pack_slab(LAYOUT, (m for m in [_module(), _module(index=1), _nan_module()]), slab)
    assert not slab.any()


def _nan_module():
    module = _module(index=2)
    return LoraModule(1, "qkv", 2, 0.5, module.a, np.full_like(module.b, np.nan))


def test_float32_has_larger_numbers():
    slab = _pack(FLOAT32, [_with(a=TOO_LARGE)])
    assert (unpack_slab(FLOAT32, slab)[0].a == TOO_LARGE).all()
    for values in (np.full((3, 16), 1e300), NAN_A):
        with pytest.raises(ValueError, match="infinite or NaN, or too large for float32"):
            _pack(FLOAT32, [_with(a=values)])


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (np.zeros(8, np.uint8), "out is uint8 [8]"),
        (np.zeros(LAYOUT.slab_bytes, np.int8), "out is int8"),
        (np.zeros(2 * LAYOUT.slab_bytes, np.uint8)[::2], "contiguous"),
        (np.frombuffer(bytes(LAYOUT.slab_bytes), np.uint8), "read-only"),
    ],
)
def test_out_must_fit(out, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        pack_slab(LAYOUT, [], out)


@pytest.mark.parametrize(
    "words", [[0x7F7F7F7F] * 4, [-1, 0, 0, 0], [257, 0, 0, 0], [8, 0x3F000000, 0, 0], [0, 0, 0, 1]]
)
def test_a_header_that_is_none_is_refused(words):
    """The fourth is how format 1 began: the first module's rank and scale."""
    slab = _pack(LAYOUT, [_module()])
    slab[:16].view(np.int32)[:] = words
    with pytest.raises(ValueError, match=re.escape(f"the slab begins with {words}")):
        slab_rank(slab)
    with pytest.raises(ValueError, match="fill it with this version's pack_slab"):
        unpack_slab(LAYOUT, slab)


def test_a_slab_of_another_layout_is_not_unpacked():
    slab = _pack(LAYOUT, [_module(rank=3)])
    entry = slab[LAYOUT.site(1, "qkv").table_offset :][:4].view(np.int32)
    for rank in (-1, 4, 25):
        entry[0] = rank
        with pytest.raises(ValueError, match=rf"has rank {rank}, the adapter 3, .* packed for another layout"):
            unpack_slab(LAYOUT, slab)
    entry[0] = 2
    with pytest.raises(ValueError, match="no module has the adapter's rank 3"):
        unpack_slab(LAYOUT, slab)
    with pytest.raises(ValueError, match="this layout has"):
        unpack_slab(LAYOUT, slab[:-1])


# ---- PEFT ------------------------------------------------------------------------------------------------------------

PEFT_LAYOUT = LoraLayout(decoder_groups(32, 48, 4, 2, 8), 2, 12)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"k_proj": 12, "layers.1.mlp.up_proj": 1, "q_proj": 3},
            "alpha_pattern": {r"model\.layers\.\d\.self_attn\.o_proj": 32},
        },
    ],
)
def test_an_adapter_computes_what_peft_computes(tiny_llama, options):
    """Merged into the base weights by hand, the unpacked modules give PEFT's logits."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    options = {"target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(), **options}
    model = get_peft_model(deepcopy(tiny_llama), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).mul_(0.3).bfloat16().float()
    ids = torch.arange(12)[None]
    saved = get_peft_model_state_dict(model)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert any(".default." in name for name in trained)
    config = model.peft_config["default"].to_dict()
    slab = _pack(PEFT_LAYOUT, peft_modules(PEFT_LAYOUT, saved, config))
    np.testing.assert_array_equal(_pack(PEFT_LAYOUT, peft_modules(PEFT_LAYOUT, trained, config)), slab)

    merged = deepcopy(tiny_llama)
    targets = {
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "o": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    modules = unpack_slab(PEFT_LAYOUT, slab)
    assert len(modules) == 2 * len(options["target_modules"])
    with torch.no_grad():
        for m in modules:
            linear = merged.get_submodule(f"model.layers.{m.layer}.{targets[m.group][m.slice_index]}")
            linear.weight += m.scale * torch.tensor(m.b) @ torch.tensor(m.a)
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, tiny_llama(ids).logits, atol=1e-2)


def test_peft_defaults_and_other_names():
    a, b = np.ones((8, 32), np.float32), np.ones((32, 8), np.float32)
    for prefix in ("base_model.model.", ""):
        for adapter in ("", ".policy"):
            name = f"{prefix}model.layers.1.self_attn.q_proj.lora_%s{adapter}.weight"
            (module,) = peft_modules(PEFT_LAYOUT, {name % "A": a, name % "B": b}, {})
            assert (module.layer, module.group, module.slice_index, module.scale) == (1, "qkv", 0, 1.0)


A8, B8 = np.ones((8, 32), np.float32), np.ones((32, 8), np.float32)
GOOD = {f"{Q}.lora_A.weight": A8, f"{Q}.lora_B.weight": B8}


@pytest.mark.parametrize(
    ("state", "config", "text"),
    [
        ({}, {"use_dora": True}, "DoRA"),
        ({}, {"bias": "lora_only"}, "biases"),
        ({}, {"lora_bias": True}, "bias of lora_B"),
        ({}, {"modules_to_save": ["lm_head"]}, "trained in full"),
        ({}, {"fan_in_fan_out": True}, "transposed"),
        ({}, {"peft_type": "IA3"}, "peft_type is IA3"),
        ({}, {"r": 4}, "has rank 8, its config says 4"),
        ({}, {"rank_pattern": {"q_proj": 2}}, "has rank 8, its config says 2"),
        ({f"{Q}.lora_magnitude_vector": A8}, {}, "DoRA"),
        ({f"{Q}.lora_B.bias": A8}, {}, "biases"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": A8}, {}, "embeddings"),
        ({"base_model.model.lm_head.lora_A.weight": A8}, {}, "lm_head"),
        ({f"{Q}.weight": A8}, {}, "not the name of a LoRA factor"),
        ({Q.replace("q_proj", "qkv_proj") + ".lora_A.weight": A8}, {}, "not a module of this layout"),
        ({f"{Q}.lora_A.other.weight": A8}, {}, "two lora_A"),
        ({Q.replace("q_proj", "k_proj") + ".lora_A.weight": A8}, {}, "has no lora_B"),
    ],
)
def test_what_a_slab_cannot_represent_is_refused(state, config, text):
    with pytest.raises(ValueError, match=text):
        peft_modules(PEFT_LAYOUT, {**GOOD, **state}, config)


def test_a_layer_that_the_model_lacks_is_refused_when_packed():
    state = {name.replace("layers.0", "layers.7"): value for name, value in GOOD.items()}
    with pytest.raises(ValueError, match="layers are 0 to 1"):
        _pack(PEFT_LAYOUT, peft_modules(PEFT_LAYOUT, state, {}))
