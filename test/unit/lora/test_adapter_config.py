"""adapter_config.json: PEFT's meaning of every key, or a refusal that names it (C11, C14, C15, H3)."""

from __future__ import annotations

import math
import time

import pytest
from unit.lora.adapter_files import K0, Q0, minimal_config

from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter_config import parse_adapter_config

# Written by PEFT 0.21 for LoraConfig(target_modules=["q_proj"]).
PEFT_DEFAULTS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def test_peft_defaults():
    config = parse_adapter_config(PEFT_DEFAULTS)
    assert config.rank_of(Q0) == 4 and config.scale_of(Q0) == 4.0
    assert config.admits(Q0) and not config.admits(K0)


def test_minimal_config_and_missing_keys_have_pefts_defaults():
    assert parse_adapter_config(minimal_config()).scale_of(Q0) == 2.0
    empty = parse_adapter_config({})
    assert empty.rank_of(Q0) == 8 and empty.scale_of(Q0) == 1.0 and empty.admits(Q0)


def test_c14_rslora_scales_by_root_rank():
    config = parse_adapter_config(minimal_config(r=16, lora_alpha=32, use_rslora=True))
    assert config.scale_of(Q0) == 32 / math.sqrt(16)


def test_c15_patterns_of_rank_and_alpha():
    config = parse_adapter_config(
        minimal_config(
            rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 16, r"^model\.layers\.[12]\..*k_proj": 3},
            alpha_pattern={"k_proj": 6, "proj": 100},
        )
    )
    assert config.rank_of(Q0) == 2
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 16
    assert config.rank_of(K0) == 4 and config.rank_of("model.layers.1.self_attn.k_proj") == 3
    assert config.scale_of("model.layers.1.self_attn.k_proj") == 2.0
    assert config.scale_of(Q0) == 4.0, "proj alone is no component's name"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.experts.w"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", ["gaussian"]),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("ensure_weight_tying", True),
        ("peft_type", "VERA"),
        ("peft_type", "ADALORA"),
        ("a_key_of_the_future", 1),
        ("r", 0),
        ("r", -4),
        ("r", True),
        ("r", 4.0),
        ("r", "4"),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_alpha", "16"),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("alpha_pattern", {"q_proj": "1"}),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", 3),
        ("exclude_modules", r".*\.k_proj"),
        ("layers_to_transform", ["0"]),
        ("base_model_name_or_path", 3),
    ],
)
def test_c15_a_key_is_implemented_or_refused_by_name(key, value):
    with pytest.raises(AdapterError, match=key) as caught:
        parse_adapter_config({**PEFT_DEFAULTS, key: value})
    assert caught.value.code == "invalid_adapter"


def test_c15_all_problems_are_listed_together():
    with pytest.raises(AdapterError) as caught:
        parse_adapter_config(minimal_config(use_dora=True, bias="all", r=0))
    assert all(key in str(caught.value) for key in ("use_dora", "bias", "r is 0"))


@pytest.mark.parametrize("value", [None, False, "", [], {}, 0])
def test_c15_unknown_keys_that_say_nothing_are_fine(value):
    parse_adapter_config(minimal_config(a_key_of_the_future=value))


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal"])
def test_c15_initialisations_that_leave_the_base_alone(value):
    parse_adapter_config(minimal_config(init_lora_weights=value))


def test_c15_layers_and_excluded_modules_are_honoured():
    config = parse_adapter_config(
        minimal_config("q_proj", "k_proj", layers_to_transform=[1], layers_pattern="layers", exclude_modules=["k_proj"])
    )
    assert config.admits("model.layers.1.self_attn.q_proj")
    assert not config.admits(Q0) and not config.admits("model.layers.1.self_attn.k_proj")
    assert parse_adapter_config(minimal_config(layers_to_transform=0)).admits(Q0)


@pytest.mark.parametrize("targets", ["all-linear", "all", r".*\.(q|v)_proj", ["all-linear"], None, []])
def test_c11_strings_are_not_lists_of_characters(targets):
    config = parse_adapter_config({**PEFT_DEFAULTS, "target_modules": targets})
    assert config.target_modules is None and config.admits(K0)


def test_targets_that_other_keys_rule_out_are_not_missing():
    """PEFT writes `all-linear` as every module's full name, whatever it excludes."""
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    config = parse_adapter_config(minimal_config(*targets, layers_to_transform=[1], exclude_modules=["k_proj"]))
    assert config.unmet_targets([]) == ["model.layers.1.self_attn.q_proj"]


def test_targets_by_fused_name_full_name_and_unembed():
    config = parse_adapter_config(minimal_config("qkv_proj", "model.layers.1.mlp.up_proj", "unembed_tokens"))
    assert config.admits(K0) and config.admits("model.layers.1.mlp.up_proj") and config.admits("lm_head")
    assert not config.admits("model.layers.0.mlp.up_proj")
    assert config.unmet_targets([K0]) == ["model.layers.1.mlp.up_proj", "unembed_tokens"]


@pytest.mark.parametrize("key", ["path", "lora_path", "model_path", "cache_file"])
def test_h3_paths_are_refused(key):
    with pytest.raises(AdapterError, match=key):
        parse_adapter_config(minimal_config(**{key: "org/repo"}))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(.*)*x", ".*.*.*x", "(?=x)q_proj", r"(\w)\1", "a{1,99}", "q_proj)(", "[", "x" * 300, "(a|a)*"],
)
def test_h10_expressions_that_could_take_for_ever_are_refused(pattern):
    started = time.perf_counter()
    with pytest.raises(AdapterError, match="rank_pattern"):
        parse_adapter_config(minimal_config(rank_pattern={pattern: 4})).rank_of(Q0)
    assert time.perf_counter() - started < 1


def test_h10_the_worst_expression_allowed_is_quick():
    config = parse_adapter_config(minimal_config(rank_pattern={f".*.*{i}!?".replace("!?", ""): 4 for i in range(16)}))
    started = time.perf_counter()
    for _ in range(100):
        config.rank_of("model." * 8 + "q_proj")
    assert time.perf_counter() - started < 1
    with pytest.raises(AdapterError, match="more than 16"):
        parse_adapter_config(minimal_config(rank_pattern={f".*{i}": 4 for i in range(17)}))
