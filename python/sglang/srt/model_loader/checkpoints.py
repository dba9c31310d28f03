"""Reads checkpoints as (HF name, tensor) pairs from safetensors directories and GGUF files, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.errors import WeightError
from sglang.srt.models.weight_map import Parameter
from sglang.srt.ops.packed import BLOCK, FORMATS, PackedWeight
from sglang.srt.utils.gguf_file import GGUFFile, open_gguf

GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of GGUF files that ModelConfig has read already."""


def safetensors_weights(directory: str, pack: bool = False) -> Iterator[tuple[str, Parameter]]:
    """Every tensor of a directory's safetensors files, of one file or of the shards its index lists.

    Args:
        pack: leave bfloat16 matrices packed.

    Raises:
        WeightError: there are none, a listed shard is missing, or a file is damaged; the message names it.
    """
    for path in _safetensors_files(Path(directory)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                    tensor = file.get_tensor(name)
                    yield name, _packed_bf16(tensor) if pack else tensor
        except SafetensorError as error:
            raise WeightError(f"{path} cannot be read as safetensors: {error}") from error


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise WeightError(f"{index} lists files that are not there: {', '.join(missing)}")
        return [directory / shard for shard in shards]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightError(f"{directory} holds no .safetensors file; convert the checkpoint to safetensors")
    return files


def gguf_weights(path: str, config: ModelConfig, pack: bool = False) -> Iterator[tuple[str, Parameter]]:
    """Every tensor of a GGUF file under its HF name, dequantised to float32.

    A name that has no HF counterpart keeps its own, so that the loader reports it.

    Args:
        pack: leave matrices packed whose format `ops.packed` knows.
    """
    file = open_gguf(path)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in file.tensor_names():
        if name in GGUF_DERIVED:
            continue
        tensor = _read(file, name, pack)
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if file.architecture == "llama" and part in heads:
            tensor = _unpermute(tensor, heads[part])
        yield _hf_name(name), tensor


def _packed_bf16(tensor: Tensor) -> Parameter:
    if tensor.dtype != torch.bfloat16 or tensor.dim() != 2 or tensor.shape[1] % BLOCK:
        return tensor
    return PackedWeight("bf16", tensor.contiguous().view(torch.uint8))


def _read(file: GGUFFile, name: str, pack: bool) -> Parameter:
    kind, stored = file.stored(name)
    if pack and kind in FORMATS and stored.ndim == 2 and stored.dtype == np.uint8:
        return PackedWeight(kind, torch.from_numpy(stored.copy()))
    array = file.tensor(name)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, ending = name.split(".")
        return f"model.layers.{layer}.{GGUF_BLOCK_NAMES[part]}.{ending}" if part in GGUF_BLOCK_NAMES else name
    part, _, ending = name.rpartition(".")
    return f"{GGUF_NAMES[part]}.{ending}" if part in GGUF_NAMES else name


def _unpermute(tensor: Parameter, num_heads: int) -> Parameter:
    """Undo llama.cpp's order of q and k rows (rotated pairs side by side) for HF's (halves side by side)."""
    if isinstance(tensor, PackedWeight):
        return PackedWeight(tensor.format, _unpermute_rows(tensor.data, num_heads))
    return _unpermute_rows(tensor, num_heads)


def _unpermute_rows(tensor: Tensor, num_heads: int) -> Tensor:
    pairs = tensor.shape[0] // num_heads // 2
    return tensor.view(num_heads, pairs, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
