"""Loading: GGUF, safetensors and random weights; and what a checkpoint that does not fit is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from engine.family_models import load_ours, prompts, reference_logits, run_schedule, save_family
from safetensors.torch import load_file, save_file
from unit.tiny_models import write_gguf

from sglang.srt.config.model_config import load_model_config
from sglang.srt.config.sections import LoadSection
from sglang.srt.errors import ConfigError, WeightError
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.decoder import DecoderForCausalLM
from sglang.srt.ops.packed import PackedWeight

CPU = torch.device("cpu")
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def load(path: Path, load_format: str = "auto", seed: int = 0) -> DecoderForCausalLM:
    section = LoadSection(path=str(path), dtype="float32", load_format=load_format, random_seed=seed)
    return load_model(load_model_config(str(path)), section, CPU)


def gguf_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in GGUF_TOP:
        return f"{GGUF_TOP[stem]}.{ending}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_LAYER[part]}.{ending}"


def rotary_pairs_together(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k of a llama: row d of a head goes to 2 d, row d + D/2 to 2 d + 1."""
    dim = tensor.shape[0] // heads
    order = [h * dim + half * (dim // 2) + i for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return tensor[order]


def save_gguf(family: str, path: Path, directory: Path) -> torch.nn.Module:
    """A family's model as GGUF. The MLP's output projection is Q8_0, the rest float32; returns what it decodes to."""
    model = save_family(family, directory)
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        tensor = parameter.data
        if "down_proj" in name:
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
            continue
        projection = name.split(".")[-2]
        if arch == "llama" and projection in heads:
            tensor = rotary_pairs_together(tensor, heads[projection])
        writer.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return model


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_gguf_equals_transformers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    reference = save_gguf(family, path, tmp_path / "hf")
    ids = prompts((33, 5))
    for ours, tokens in zip(run_schedule(load_ours(path), "one-shot", ids), ids, strict=True):
        torch.testing.assert_close(ours, reference_logits(reference, tokens), rtol=0, atol=1e-4)


def test_gguf_errors_name_every_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors={"blk.0.attn_q.weight": np.zeros((32, 16), np.float32)})
    with pytest.raises(WeightError) as caught:
        load(path)
    text = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.weight" in text and "[32, 16]" in text and "[32, 32]" in text
    assert "model.layers.1.mlp.down_proj.weight" in text and "model.norm.weight" in text


def edit(path: Path, change: object) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_errors_list_all_problems_at_once(tmp_path: Path) -> None:
    save_family("qwen3", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_norm.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 65)
        tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(5)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(96, 64)
        tensors["visual.patch.weight"] = torch.zeros(3, 2)

    with pytest.raises(WeightError) as caught:
        load(edit(tmp_path, change))
    text = str(caught.value)
    assert str(tmp_path) in text
    for part in (
        "model.layers.1.self_attn.k_norm.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight has shape [96, 65], the model needs [96, 64]",
        "model.layers.0.self_attn.v_proj.weight has shape [5], the model needs [48, 64]",
        "model.layers.7.mlp.up_proj.weight [96, 64] is unknown",
        "visual.patch.weight [3, 2] is unknown",
    ):
        assert part in text
    assert text.count(" is missing") == 2 and "q_proj" not in text


def test_tied_and_derived_tensors_may_be_there(tmp_path: Path) -> None:
    reference = save_family("llama", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full((160, 64), 7.0)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    ids = prompts((9,))
    ours = run_schedule(load_ours(edit(tmp_path, change)), "one-shot", ids)[0]
    torch.testing.assert_close(ours, reference_logits(reference, ids[0]), rtol=0, atol=1e-4)


def test_bfloat16_checkpoint_is_widened_exactly(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    tensors = {k: v.bfloat16() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    qkv = torch.cat([tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]).float()
    loaded = model.parameters["layers.1.qkv"]
    assert torch.equal(loaded.unpack() if isinstance(loaded, PackedWeight) else loaded, qkv)


def test_no_weights_and_broken_files(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(WeightError, match=r"model\.safetensors"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(WeightError, match="no .safetensors"):
        load(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    reference = save_family("llama", tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    shard = sorted((tmp_path / "many").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightError, match=shard.name):
        load(tmp_path / "many")


def test_unused_files_beside_an_index_are_not_read(tmp_path: Path) -> None:
    reference = save_family("llama", tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    (tmp_path / "many" / "zz.safetensors").write_bytes(b"not weights")
    assert json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    load(tmp_path / "many")


def test_random_weights_need_no_files_and_follow_the_seed(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, same, other = (load(tmp_path, "dummy", seed) for seed in (1, 1, 2))
    assert torch.equal(first.embed_tokens, same.embed_tokens)
    assert not torch.equal(first.embed_tokens, other.embed_tokens)
    assert torch.equal(first.norm, torch.ones(64)) and first.embed_tokens.std() == pytest.approx(0.02, rel=0.05)


def test_load_format_must_fit_the_path(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    with pytest.raises(ConfigError, match="gguf"):
        load(tmp_path, "gguf")


def test_summary_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_family("llama", tmp_path)
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    assert any("GiB in" in record.getMessage() for record in caplog.records)


def test_parameters_are_aligned_views_of_one_allocation(tmp_path: Path) -> None:
    save_family("qwen2", tmp_path)
    parameters = load(tmp_path).parameters.values()
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    assert all(p.is_contiguous() and p.storage_offset() % 64 == 0 for p in parameters)


def test_unknown_architecture_lists_the_supported_ones() -> None:
    from engine.test_ops import rope_config

    from sglang.srt.models.registry import model_class

    with pytest.raises(ConfigError, match=r"'Mamba'.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        model_class(rope_config(architecture="Mamba"))  # type: ignore[arg-type]
