"""Module shapes of every family against the model itself, and the spellings of tensor names."""

from __future__ import annotations

import msgspec
import pytest
from unit.lora.adapter_files import MODEL

from sglang.srt.config.model_config import FAMILIES
from sglang.srt.lora.target_modules import (
    allowed_kinds,
    ends_of,
    layer_of,
    meaning_of,
    module_shapes,
    parse_base_copy,
    parse_factor,
    parts_of,
)

UP1 = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_decoder(architecture, tied):
    from sglang.srt.models.decoder import DecoderForCausalLM

    family = FAMILIES[architecture]
    bias = bool(family.attention_bias)
    config = msgspec.structs.replace(
        MODEL, architecture=architecture, tie_word_embeddings=tied, attention_bias=bias, qk_norm=family.qk_norm
    )
    targets = DecoderForCausalLM.weight_map(config).targets
    matrices = {name.removesuffix(".weight"): t.shape for name, t in targets.items() if len(t.shape) == 2}
    matrices["model.embed_tokens"] = matrices["model.embed_tokens"][::-1]
    matrices.setdefault("lm_head", (config.vocab_size, config.hidden_size))
    assert module_shapes(config) == matrices


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{UP1}.lora_A.weight",
        f"base_model.model.{UP1}.lora_A.default.weight",
        f"base_model.model.{UP1}.lora_A.my-adapter_2.weight",
        f"{UP1}.lora_A.weight",
        "layers.1.mlp.up_proj.lora_A.weight",
        "base_model.model.layers.1.mlp.up_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight",
        "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_A.weight",
    ],
)
def test_c10_prefixes_are_normalised_before_anything_is_checked(name):
    assert parse_factor(name) == (UP1, "A")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", ("model.embed_tokens", "A")),
        ("base_model.model.model.embed_tokens.lora_embedding_B.default", ("model.embed_tokens", "B")),
        ("base_model.model.model.embed_tokens.lora_A.weight", ("model.embed_tokens", "A")),
        ("base_model.model.lm_head.lora_B.weight", ("lm_head", "B")),
        ("base_model.model.model.lm_head.lora_B.weight", ("lm_head", "B")),
        ("base_model.model.model.unembed_tokens.lora_B.weight", ("lm_head", "B")),
        ("unembed_tokens.lora_A.weight", ("lm_head", "A")),
        ("model.layers.0.self_attn.qkv_proj.lora_B.weight", ("model.layers.0.self_attn.qkv_proj", "B")),
        (f"{UP1}.lora_B.bias", None),
        (f"{UP1}.lora_magnitude_vector", None),
        (f"{UP1}.lora_C.weight", None),
        (f"{UP1}.lora_A", None),
        (f"{UP1}.weight", None),
        ("lora_A.weight", None),
    ],
)
def test_c12_names_of_factors(name, expected):
    assert parse_factor(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.embed_tokens.weight", "model.embed_tokens"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens"),
        ("base_model.model.lm_head.base_layer.weight", "lm_head"),
        ("lm_head.weight", "lm_head"),
        ("base_model.model.lm_head.modules_to_save.weight", None),
        ("model.layers.0.mlp.up_proj.base_layer.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_names_of_base_copies(name, expected):
    assert parse_base_copy(name) == expected


def test_fused_names_and_ends():
    assert parts_of("model.layers.0.self_attn.qkv_proj")[1] == "model.layers.0.self_attn.k_proj"
    assert parts_of("model.layers.0.mlp.gate_up_proj")[0] == "model.layers.0.mlp.gate_proj"
    assert parts_of("lm_head") == ("lm_head",)
    assert ends_of(UP1)[-2:] == ["mlp.up_proj", "up_proj"] and layer_of(UP1) == 1 and layer_of("lm_head") is None
    assert meaning_of("gate_up_proj") == ("gate_proj", "up_proj")
    assert meaning_of(f"base_model.model.{UP1}") == ("layers.1.mlp.up_proj",)
    assert meaning_of("unembed_tokens") == ("lm_head",)


def test_allowed_kinds_of_the_launch_flag():
    assert allowed_kinds(None) is None and allowed_kinds(["q_proj", "all-linear"]) is None
    assert allowed_kinds(["qkv_proj", "mlp.down_proj"]) == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert allowed_kinds(["embed_tokens", "lm_head"]) == {"embed_tokens", "lm_head"}
