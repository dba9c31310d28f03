"""Makes a tiny random Llama with a byte-level BPE tokenizer: a complete Hugging Face directory in about a second.

For tests that need a whole server but no sense in its words. Weights are large enough that sampling has clear
favourites, so outputs vary, and byte tokens make invalid and split UTF-8 common, which is what detokenising must stand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 512
BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = 0, 1, 2, 3
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "the of and to in is that it was for on are with as his they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way about "
    "many then them would write like so these her long make thing see him two has look more day could go come did my "
    "sound no most number who over know water than call first people may down side been now find any new work part"
)
WORDS = _TEXT.split()
_CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(0, len(WORDS), 7)]


def make_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    context_length: int = 512,
    weight_scale: float = 1.0,
) -> Path:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors (float32) into `path`.

    Args:
        weight_scale: multiplies the output layer; larger makes the next-token distribution more peaked.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": IM_END_ID,
        "pad_token_id": EOS_ID,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, IM_END_ID], "pad_token_id": EOS_ID})
    )
    save_file(_weights(config, seed, weight_scale), path / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(path)
    return path


def _weights(config: dict, seed: int, weight_scale: float) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]

    def matrix(out: int, in_: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal((out, in_)) * scale / np.sqrt(in_)).astype(np.float32)

    ones = np.ones(hidden, np.float32)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((vocab, hidden)).astype(np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(vocab, hidden, weight_scale),
    }
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": ones,
            "post_attention_layernorm.weight": ones,
            "self_attn.q_proj.weight": matrix(hidden, hidden),
            "self_attn.k_proj.weight": matrix(kv_size, hidden),
            "self_attn.v_proj.weight": matrix(kv_size, hidden),
            "self_attn.o_proj.weight": matrix(hidden, hidden),
            "mlp.gate_proj.weight": matrix(ffn, hidden),
            "mlp.up_proj.weight": matrix(ffn, hidden),
            "mlp.down_proj.weight": matrix(hidden, ffn),
        }
        tensors |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    return tensors


def _save_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if tokenizer.get_vocab_size() > VOCAB_SIZE:
        raise AssertionError(f"tokenizer has {tokenizer.get_vocab_size()} entries, the model {VOCAB_SIZE}")
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "</s>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 1000000,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
