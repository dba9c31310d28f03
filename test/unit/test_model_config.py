"""Model configs of every family, in both styles of config.json and from GGUF, and the refusals."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from unit.tiny_models import write_config, write_gguf

from sglang.srt.config.model_config import FAMILIES, ModelConfig, load_model_config
from sglang.srt.errors import ConfigError

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def load(tmp_path, change: dict | None = None, generation: dict | None = None, **options) -> ModelConfig:
    config = {k: v for k, v in {**BASE, **(change or {})}.items() if v != "absent"}
    return load_model_config(str(write_config(tmp_path, config, generation)), **options)


def family(name: str) -> dict:
    return {"architectures": [name], "model_type": FAMILIES[name].model_type}


# ---- directories ---------------------------------------------------------------------------------------------------


def test_llama(tmp_path):
    config = load(tmp_path, {"rope_theta": 5e5, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2})
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        context_length=256,
        torch_dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config


def test_llama_biases_and_tied_embeddings(tmp_path):
    config = load(tmp_path, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    assert (config.attention_bias, config.attention_out_bias, config.mlp_bias) == (True, True, True)
    assert config.tie_word_embeddings


def test_qwen2_has_biases_on_qkv_alone(tmp_path):
    config = load(tmp_path, {**family("Qwen2ForCausalLM"), "sliding_window": 64, "use_sliding_window": False})
    assert (config.attention_bias, config.attention_out_bias, config.mlp_bias) == (True, False, False)
    assert (config.qk_norm, config.sliding_window, config.head_dim) == (False, None, 16)


def test_qwen3_has_query_key_norms_and_its_own_head_dim(tmp_path):
    config = load(tmp_path, {**family("Qwen3ForCausalLM"), "head_dim": 32, "attention_bias": False})
    assert (config.qk_norm, config.head_dim, config.attention_bias) == (True, 32, False)
    assert load(tmp_path, family("Qwen3ForCausalLM")).head_dim == 128


@pytest.mark.parametrize("window", [None, 32])
def test_mistral_sliding_window_may_be_null(tmp_path, window):
    config = load(tmp_path, {**family("MistralForCausalLM"), "sliding_window": window, "head_dim": None})
    assert (config.sliding_window, config.attention_bias, config.head_dim) == (window, False, 16)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"max_window_layers": 4}, None),
        ({"max_window_layers": 0}, 32),
        ({"layer_types": ["full_attention"] * 4}, None),
        ({"layer_types": ["sliding_attention"] * 4}, 32),
        ({"max_window_layers": 2}, "2 of 4 layers"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, "2 of 4 layers"),
    ],
)
def test_qwen_sliding_window_is_all_or_none(tmp_path, change, want):
    change = {**family("Qwen2ForCausalLM"), "sliding_window": 32, "use_sliding_window": True, **change}
    if isinstance(want, str):
        with pytest.raises(ConfigError, match=want):
            load(tmp_path, change)
    else:
        assert load(tmp_path, change).sliding_window == want


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, None),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, 1e5, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            {"rope_type": "llama3", **LLAMA3},
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            5e5,
            {"rope_type": "llama3", **LLAMA3},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_rope_in_both_styles(tmp_path, change, theta, scaling):
    config = load(tmp_path, change)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", **LLAMA3}, 256),
    ],
)
def test_context_length_counts_the_scaling_once(tmp_path, scaling, want):
    assert load(tmp_path, {"rope_scaling": scaling}).context_length == want


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32", "torch_dtype": "float16"}, "float32"),
        ({}, "float32"),
    ],
)
def test_dtype_in_both_styles(tmp_path, change, want):
    assert load(tmp_path, change).torch_dtype == want


def test_ids_are_the_union_of_config_and_generation_config(tmp_path):
    generation = {"eos_token_id": [7, 3], "pad_token_id": 5, "temperature": 0.6, "top_k": 20, "top_p": None, "x": 1}
    config = load(tmp_path, {"eos_token_id": 3}, {**generation, "do_sample": True})
    assert config.eos_token_ids == (3, 7)
    assert (config.bos_token_id, config.pad_token_id) == (None, 5)
    assert config.generation_defaults == {"temperature": 0.6, "top_k": 20}


def test_context_length_can_be_lowered_not_raised(tmp_path):
    assert load(tmp_path, context_length=100).context_length == 100
    for value in (0, 257):
        with pytest.raises(ConfigError, match=rf"--context-length {value} .* 256"):
            load(tmp_path, context_length=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "absent"}, "config.json: key 'vocab_size' is missing"),
        ({"hidden_size": "64"}, "key 'hidden_size' is '64', which has the wrong type"),
        ({"num_hidden_layers": 0}, "key 'num_hidden_layers' is 0, must be positive"),
        ({"num_hidden_layers": True}, "key 'num_hidden_layers' is True, which has the wrong type"),
        ({"architectures": ["MixtralForCausalLM"]}, r"\['MixtralForCausalLM'\]; this server runs LlamaForCausalLM,"),
        ({"architectures": "absent"}, "key 'architectures'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'quantization_config' says awq"),
        ({"hidden_act": "gelu"}, "key 'hidden_act' is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "key 'partial_rotary_factor'"),
        ({"torch_dtype": "float8_e4m3fn"}, "key 'dtype' is 'float8_e4m3fn'"),
        ({"eos_token_id": ["</s>"]}, "key 'eos_token_id'"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
    ],
)
def test_refusals_name_file_and_key(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, change)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        load_model_config(str(tmp_path))
    for text, message in (("{", "not readable JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_model_config(str(tmp_path))


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def gguf_config(tmp_path, arch="llama", **options) -> ModelConfig:
    return load_model_config(str(write_gguf(tmp_path / "m.gguf", arch, **options)))


def test_smollm2(smollm2_path):
    assert load_model_config(smollm2_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        context_length=8192,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
    )


def test_gguf_shape_comes_from_tensors(tmp_path):
    embedding = np.zeros((300, 32), dtype=np.float32)  # padded beyond the tokens
    config = gguf_config(tmp_path, tensors={"token_embd.weight": embedding, "output.weight": embedding})
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (300, 32, 8)
    assert not config.tie_word_embeddings


def test_gguf_qwen(tmp_path):
    bias = {f"blk.0.attn_{x}.bias": np.zeros(32, dtype=np.float32) for x in "qkv"}
    config = gguf_config(tmp_path, "qwen2", tensors=bias)
    assert (config.architecture, config.attention_bias, config.attention_out_bias) == ("Qwen2ForCausalLM", True, False)
    norm = {"blk.0.attn_q_norm.weight": np.zeros(16, dtype=np.float32)}
    config = gguf_config(tmp_path, "qwen3", tensors=norm, fields={"qwen3.attention.key_length": 16})
    assert (config.architecture, config.qk_norm, config.head_dim) == ("Qwen3ForCausalLM", True, 16)


def test_gguf_end_ids_and_dtype(tmp_path):
    fields = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2, "general.file_type": 1}
    config = gguf_config(tmp_path, fields=fields)
    assert config.eos_token_ids == (2, 9)
    assert config.torch_dtype == "float16"


def test_gguf_rope_scaling(tmp_path):
    prefix = "llama.rope.scaling"
    fields = {f"{prefix}.type": "yarn", f"{prefix}.factor": 4.0, f"{prefix}.original_context_length": 128}
    config = gguf_config(tmp_path, fields=fields)
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_gguf_llama3_scaling_is_recovered_from_its_tensor(tmp_path):
    """Divisors of Llama 3.1 8B (head_dim 128, theta 5e5, factor 8), worked out with the published rule."""
    inverse = 5e5 ** (np.arange(0, 128, 2, dtype=np.float64) / 128)
    wavelength = 2 * np.pi * inverse
    smooth = (8192 / wavelength - 1) / 3
    divisors = np.where(wavelength < 2048, 1.0, np.where(wavelength > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    fields = {"llama.rope.freq_base": 5e5, "llama.rope.dimension_count": 128}
    tensors = {"rope_freqs.weight": divisors.astype(np.float32)}
    config = gguf_config(tmp_path, fields=fields, tensors=tensors)
    assert config.rope_scaling == {"rope_type": "llama3", **LLAMA3}
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"] * np.float32(1.5)
    with pytest.raises(ConfigError, match="rope_freqs.weight is not Llama 3's scaling"):
        gguf_config(tmp_path, fields=fields, tensors=tensors)


@pytest.mark.parametrize(
    ("arch", "fields", "message"),
    [
        ("gemma", {}, "architecture 'gemma'; this server runs llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, "mixture-of-experts"),
        ("llama", {"llama.block_count": None}, "no metadata key 'llama.block_count'"),
    ],
)
def test_gguf_refusals(tmp_path, arch, fields, message):
    with pytest.raises(ConfigError, match=message):
        gguf_config(tmp_path, arch, fields=fields)
