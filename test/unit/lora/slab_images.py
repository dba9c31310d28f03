"""Slabs for tests: packed by sgl_kernel for the layout of `adapter_files`' model, and the image that they travel in."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
from unit.lora.adapter_files import MODEL, every, factors, minimal_config

from sgl_kernel.lora import LoraLayout, decoder_groups, pack_slab, peft_modules
from sglang.srt.lora.adapter_reader import AdapterReader

RANK = 8
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = MODEL.num_attention_heads, MODEL.num_key_value_heads, MODEL.head_dim
GROUPS = decoder_groups(MODEL.hidden_size, MODEL.intermediate_size, *HEADS)


def servers_layout(max_rank: int = 16, dtype: str = "float32") -> LoraLayout:
    return LoraLayout(GROUPS, MODEL.num_hidden_layers, max_rank, dtype)


def slab_config(*kinds: str, **changes: object) -> dict[str, Any]:
    return minimal_config(*(kinds or KINDS), **{"r": RANK, **changes})


def slab_tensors(*kinds: str, rank: int = RANK) -> dict[str, np.ndarray]:
    return factors(*every(*(kinds or KINDS)), rank=rank)


def packed(layout: LoraLayout, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> np.ndarray:
    """What a trainer packs."""
    slab = np.full(layout.slab_bytes, 0xAB, np.uint8)
    pack_slab(layout, peft_modules(layout, tensors, config), slab)
    return slab


def wire_layout(own: LoraLayout, rank: int = RANK, groups: tuple[str, ...] = ()) -> LoraLayout:
    """A server's layout at an adapter's rank."""
    kept = [group for group in own.groups if not groups or group.name in groups]
    return LoraLayout(kept, own.num_layers, rank, own.dtype)


def image_of(slab: np.ndarray, description: object, **changes: Any) -> bytes:
    """The image of a slab; `changes` are of its header: name, dtype, shape, data_offsets, metadata, more (tensors)."""
    text = description if isinstance(description, str) else json.dumps(description)
    entry = {"dtype": "U8", "shape": [len(slab)], "data_offsets": [0, len(slab)]}
    entry |= {key: changes[key] for key in entry.keys() & changes.keys()}
    head = {"__metadata__": changes.get("metadata", {"lora_layout": text}), changes.get("name", "lora_slab"): entry}
    encoded = json.dumps(head | changes.get("more", {})).encode()
    return len(encoded).to_bytes(8, "little") + encoded + slab.tobytes()


def slab_image(own: LoraLayout | None = None, **config: object) -> bytes:
    """A whole adapter of rank RANK."""
    layout = wire_layout(own or servers_layout())
    return image_of(packed(layout, slab_tensors(), slab_config(**config)), layout.describe())


def that_takes(reader: AdapterReader, layout: LoraLayout | None) -> AdapterReader:
    """The reader, once its back has said so."""
    reader.slab_layout = None if layout is None else copy.deepcopy(layout.describe())
    return reader
