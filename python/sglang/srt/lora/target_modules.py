"""The modules an adapter may have, their shapes, and the names that tensors of adapters go by.

Called by `adapter_reader`. Shapes follow `models.decoder`, which the front may not import; a test compares the two.
Invariant: a name either is a factor of a module, by every spelling that trainers use, or it is nothing; nothing is
guessed from parts of names.

Shape legend: O outputs, I inputs of a module; the embedding is a product over one-hot rows, so its I is the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from sglang.srt.config.model_config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Names of several modules side by side, in the order of their rows."""
ALL_MODULES = ("all", "all-linear")

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])(?:\.[^.]+)?\.weight|embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
_BASE_COPY = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class FactorName(NamedTuple):
    """A tensor's place: the module (fused ones under their fused name) and which of its factors, A or B."""

    module: str
    factor: str


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(O, I) of every module of the model, by the model's own names."""
    hidden, mlp, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes = {
        f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()
    }
    return shapes | {EMBEDDING: (hidden, config.vocab_size), HEAD: (config.vocab_size, hidden)}


def parse_factor(name: str) -> FactorName | None:
    """What a tensor's name says, or None for names that no factor has.

    Understands PEFT's ``base_model.model.`` in front, an adapter's name before ``.weight``, ``lora_embedding_A``,
    ``language_model.`` anywhere, names without the leading ``model.``, and ``unembed_tokens`` for the head.
    """
    match = _FACTOR.fullmatch(name)
    if match is None:
        return None
    return FactorName(module_name(match["module"]), match["linear"] or match["embedding"])


def parse_base_copy(name: str) -> str | None:
    """Module whose base weight a tensor repeats (PEFT does so for the embedding and the head), or None."""
    match = _BASE_COPY.fullmatch(name)
    module = module_name(match["module"]) if match else None
    return module if module in (EMBEDDING, HEAD) else None


def module_name(name: str) -> str:
    """The model's own name of a module, as far as the spelling goes."""
    name = name.removeprefix("base_model.model.")
    parts = ["lm_head" if part == "unembed_tokens" else part for part in name.split(".") if part != "language_model"]
    while parts[:1] == ["model"]:
        parts = parts[1:]
    return ".".join(parts if parts == ["lm_head"] else ["model", *parts])


def parts_of(module: str) -> tuple[str, ...]:
    """The modules that a fused name stands for, in the order of their rows; the module itself for all others."""
    parent, _, kind = module.rpartition(".")
    return tuple(f"{parent}.{part}" if parent else part for part in FUSED.get(kind, (kind,)))


def kind_of(module: str) -> str:
    """Last component of a module's name, e.g. q_proj."""
    return module.rpartition(".")[2]


def layer_of(module: str) -> int | None:
    """Number of a module's layer; None for the embedding and the head."""
    match = _LAYER.match(module)
    return int(match[1]) if match else None


def meaning_of(entry: str) -> tuple[str, ...]:
    """Ends of the module names that an entry of a list of target modules stands for; several for a fused name."""
    return parts_of(module_name(entry).removeprefix("model."))


def ends_of(module: str) -> list[str]:
    """What a module may be called in a list of target modules: its name from any component on."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def allowed_kinds(entries: Iterable[str] | None) -> frozenset[str] | None:
    """Last components that --lora-target-modules allows; None for all of them."""
    names = list(entries or ALL_MODULES)
    if any(name in ALL_MODULES for name in names):
        return None
    return frozenset(kind_of(part) for name in names for part in parts_of(module_name(name)))
