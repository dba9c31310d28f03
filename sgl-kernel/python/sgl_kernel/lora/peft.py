"""PEFT's names and config, as modules to pack.

Called by whoever has an adapter in PEFT's form: the state dict of a checkpoint or of a model in training. Imports no
PEFT and no torch. Invariant: what this cannot represent exactly is an error, never left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sgl_kernel.lora.layout import LoraLayout
from sgl_kernel.lora.slab import LoraModule

DECODER_MODULES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The model's names of the slices of every group of `decoder_groups`."""

_WRAPPER = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?!weight$)[^.]+)?\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_DEFAULT_RANK = _DEFAULT_ALPHA = 8
_REFUSED_KEYS = {
    "use_dora": "DoRA is not supported",
    "use_qalora": "QA-LoRA is not supported",
    "lora_bias": "a bias of lora_B is not supported",
    "fan_in_fan_out": "weights stored as (inputs, outputs) are not supported; save the adapter transposed",
    "modules_to_save": "modules trained in full are not supported; train them as LoRA targets",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "adapters of bare parameters are not supported",
    "trainable_token_indices": "trained tokens are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
}
_REFUSED_NAMES = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding_", "adapters of embeddings are not supported"),
    ("embed_tokens", "adapters of embeddings are not supported"),
    ("lm_head", "adapters of lm_head are not supported"),
    (".bias", "biases are not supported"),
)


class _Place(NamedTuple):
    layer: int
    group: str
    slice_index: int


def peft_modules(layout: LoraLayout, state: Mapping[str, Any], config: Mapping[str, Any]) -> list[LoraModule]:
    """The modules of an adapter that PEFT made.

    Args:
        state: tensors or arrays by PEFT's names, such as
            ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``; ``base_model.model.`` may be missing,
            and the adapter's name may stand before ``weight``, as in a model that is being trained.
        config: what adapter_config.json has (`LoraConfig.to_dict()`); r, lora_alpha, use_rslora, rank_pattern and
            alpha_pattern are read, and missing ones have PEFT's defaults.

    Returns:
        One per module, for `pack_slab`, which checks shapes and values.

    Raises:
        ValueError: the adapter has something that a slab cannot represent, or tensors and config disagree.
    """
    _check_config(config)
    factors: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        module, factor = _split(name)
        pair = factors.setdefault(module, {})
        if factor in pair:
            raise ValueError(f"{name}: {module} has two lora_{factor}; give the tensors of one adapter")
        pair[factor] = tensor
    places = _places(layout)
    return [_module(name, pair, places, config) for name, pair in factors.items()]


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type") or "LORA"
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise ValueError(f"peft_type is {kind}; only LORA is supported")
    for key, reason in _REFUSED_KEYS.items():
        if config.get(key):
            raise ValueError(f"{key} is {config[key]!r}: {reason}")
    if (config.get("bias") or "none") != "none":
        raise ValueError(f"bias is {config['bias']!r}: trained biases are not supported; train with bias='none'")


def _split(name: str) -> tuple[str, str]:
    """(the model's name of the module, A or B)."""
    for part, reason in _REFUSED_NAMES:
        if part in name:
            raise ValueError(f"{name}: {reason}; train the adapter without it")
    match = _NAME.fullmatch(name.removeprefix(_WRAPPER))
    if match is None:
        raise ValueError(f"{name} is not the name of a LoRA factor; give lora_A and lora_B weights only")
    return match["module"], match["factor"]


def _places(layout: LoraLayout) -> dict[str, _Place]:
    """By name within a layer; the layer is still 0."""
    names: dict[str, _Place] = {}
    for group in layout.groups:
        for index, name in enumerate(DECODER_MODULES.get(group.name, ())):
            names[name] = _Place(0, group.name, index)
    return names


def _module(name: str, pair: Mapping[str, Any], places: Mapping[str, _Place], config: Mapping[str, Any]) -> LoraModule:
    match = _LAYER.fullmatch(name)
    place = places.get(match[2]) if match else None
    if match is None or place is None:
        known = ", ".join(places)
        raise ValueError(f"{name} is not a module of this layout; those are model.layers.N. and one of {known}")
    if len(pair) != 2:
        missing = "B" if "A" in pair else "A"
        raise ValueError(f"{name} has no lora_{missing}; give both factors of every module")
    rank = int(_of_pattern(config, "rank_pattern", name, config.get("r", _DEFAULT_RANK)))
    if rank < 1 or len(pair["A"]) != rank:
        raise ValueError(
            f"{name} has rank {len(pair['A'])}, its config says {rank}; give the config it was trained with"
        )
    alpha = float(_of_pattern(config, "alpha_pattern", name, config.get("lora_alpha", _DEFAULT_ALPHA)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(int(match[1]), place.group, place.slice_index, scale, pair["A"], pair["B"])


def _of_pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or, after a dot, its end."""
    patterns = config.get(key) or {}
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
