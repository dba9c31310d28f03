"""A `transformers` model in float32, from a directory or straight from a Llama GGUF file.

Written apart from the server's own loader on purpose: it is what the server is compared with. (`transformers` reads
GGUF too, but needs another package for it and half a minute.)
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from sglang.srt.config.model_config import ModelConfig, load_model_config
from sglang.srt.config.model_path import resolve_model_path
from sglang.srt.utils.gguf_file import GGUFFile

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_hf_model(model: str) -> Any:
    """The model in eval mode, greedy by default and without an end token.

    Args:
        model: a Hugging Face directory, a GGUF file of the llama architecture, or a name `resolve_model_path` knows.
    """
    path = resolve_model_path(model)
    if path.endswith(".gguf"):
        loaded = _from_gguf(path)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    loaded.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return loaded.eval()


def _from_gguf(path: str) -> Any:
    file, shape = GGUFFile(path), load_model_config(path)
    if file.architecture != "llama":
        raise ValueError(f"{path} is of architecture {file.architecture!r}; only llama is known here")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    model = transformers.LlamaForCausalLM(config)
    state = dict(_tensor(file, name, shape) for name in file.tensor_names() if name != "rope_freqs.weight")
    if shape.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _tensor(file: GGUFFile, name: str, shape: ModelConfig) -> tuple[str, torch.Tensor]:
    tensor = torch.tensor(file.tensor(name))
    if name in _TOP:
        return _TOP[name], tensor
    _, layer, kind, suffix = name.split(".")
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}.get(kind)
    if heads is not None:
        # llama.cpp interleaves the two halves that rotary embedding pairs; Hugging Face keeps them apart.
        tensor = tensor.view(heads, shape.head_dim // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return f"model.layers.{layer}.{_BLOCK[kind]}.{suffix}", tensor
