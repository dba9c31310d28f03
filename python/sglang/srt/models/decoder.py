"""The decoder-only transformer that every model of this package is: blocks, topology and weight names from ModelConfig.

A family is a subclass that names itself; what sets it apart (biases, q/k norms, window) is in the config.
Shape legend: T tokens of a step, H hidden size, Hq query heads, Hkv KV heads, D head dimension, I MLP size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.layers.rotary import RotaryEmbedding
from sglang.srt.model_executor.forward_context import ForwardContext, LoRABatch
from sglang.srt.models.weight_map import Cut, Parameter, Target, WeightMap
from sglang.srt.ops.activation import silu_and_mul
from sglang.srt.ops.linear import Product, embedding, head_logits, linear
from sglang.srt.ops.norm import fused_add_rms_norm, rms_norm
from sglang.srt.ops.rope import Heads, KVTarget, Rotation, attention_inputs
from sglang.srt.platforms.platform import allocate_weights

_ALIGNMENT = 64


@dataclass(slots=True)
class Projection:
    """A matrix that adapters may add to; `name` is its parameter's."""

    name: str
    weight: Parameter
    bias: Tensor | None

    def __call__(self, x: Tensor, lora: LoRABatch | None) -> Product:
        """[T, O] for x [T, I]; strides as `linear` leaves them."""
        if lora is None:
            return Product(linear(x, self.weight, self.bias))
        return lora.project(x, self.weight, self.bias, self.name)


@dataclass(slots=True)
class Layer:
    """Weights of one block, q/k/v and gate/up each fused into one matrix; optional ones are None.

    The bias of q, k and v is added behind the projection, with all else that becomes of them.
    """

    input_norm: Tensor
    qkv: Projection
    qkv_bias: Tensor | None
    heads: Heads
    out: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection


class DecoderForCausalLM:
    """Implements forward_context.CausalLM.

    Args:
        config: the shape; `weight_map(config)` names the tensors it needs.
        spare_rows: rows that are to follow those of a parameter in memory, by its name.

    Attributes:
        extended: [rows + spare rows, columns], by name, of the parameters that have any.
        logits_dtype: the model's own, unless who loads it wants another.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        spare_rows: Mapping[str, int] | None = None,
    ) -> None:
        self.config = config
        self.logits_dtype = dtype
        self.weights = self.weight_map(config)
        shapes, spare = self.weights.shapes(), spare_rows or {}
        longer = {name: (shapes[name][0] + rows, *shapes[name][1:]) for name, rows in spare.items()}
        allocated = _allocate(shapes | longer, dtype, device)
        self.parameters: dict[str, Parameter] = {name: whole[: shapes[name][0]] for name, whole in allocated.items()}
        self.extended = {name: allocated[name] for name in spare}
        self.rotary = RotaryEmbedding(config, dtype, device)
        self.scale = config.head_dim**-0.5
        self.bind()

    def bind(self) -> None:
        """Hand the parameters out to the layers; called again when loading has replaced some by packed ones."""
        self.layers = [self._layer(f"layers.{i}") for i in range(self.config.num_hidden_layers)]
        self.norm: Tensor = self._get("norm")
        self.embed_tokens = self.parameters["embed_tokens"]
        self.lm_head = self.embed_tokens if self.config.tie_word_embeddings else self.parameters["lm_head"]

    def _layer(self, prefix: str) -> Layer:
        get = self._get
        return Layer(
            input_norm=get(f"{prefix}.input_norm"),
            qkv=Projection(f"{prefix}.qkv", self.parameters[f"{prefix}.qkv"], None),
            qkv_bias=get(f"{prefix}.qkv_bias"),
            heads=self._heads(get(f"{prefix}.q_norm"), get(f"{prefix}.k_norm")),
            out=self._projection(f"{prefix}.out"),
            post_norm=get(f"{prefix}.post_norm"),
            gate_up=self._projection(f"{prefix}.gate_up"),
            down=self._projection(f"{prefix}.down"),
        )

    def _projection(self, name: str) -> Projection:
        return Projection(name, self.parameters[name], self._get(f"{name}_bias"))

    def _heads(self, q_norm: Tensor | None, k_norm: Tensor | None) -> Heads:
        config = self.config
        shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return Heads(*shape, q_norm, k_norm, config.rms_norm_eps)

    def _get(self, name: str) -> Any:
        return self.parameters.get(name)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Checkpoint names of a model of this shape."""
        return WeightMap(_targets(config), _ignored(config))

    def forward(self, ctx: ForwardContext) -> Tensor:
        """Hidden states after the final norm, [T, H]."""
        eps = self.config.rms_norm_eps
        rotation = self.rotary.rotation(ctx.positions)
        residual = embedding(ctx.input_ids, self.embed_tokens)
        if ctx.lora is not None:
            ctx.lora.add_embedding_(residual, ctx.input_ids, "embed_tokens")
        x = rms_norm(residual, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            attended = self._attention(layer, index, x, rotation, ctx)
            out = layer.out(attended, ctx.lora)
            x = fused_add_rms_norm(out.y, residual, layer.post_norm, eps, out.delta)
            x = silu_and_mul(*layer.gate_up(x, ctx.lora))
            down = layer.down(x, ctx.lora)
            following = self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.norm
            x = fused_add_rms_norm(down.y, residual, following, eps, down.delta)
        return x

    def compute_logits(self, hidden: Tensor, lora: LoRABatch | None = None, out: Tensor | None = None) -> Tensor:
        """Logits [R, vocab_size] of `hidden` [R, H]: see CausalLM."""
        logits = head_logits(hidden, self.lm_head, self.logits_dtype, out)
        if lora is not None and lora.changes("lm_head"):
            logits = logits.float()
            lora.add_(logits, hidden, "lm_head")
        return logits

    def _attention(self, layer: Layer, index: int, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        qkv = layer.qkv(x, ctx.lora)
        target = KVTarget(*ctx.kv_pool.layer(index), ctx.out_locs)
        q, k, v = attention_inputs(qkv.y, layer.heads, rotation, target, layer.qkv_bias, qkv.delta)
        return ctx.attention.forward(q, k, v, index, self.scale)


def _allocate(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Every tensor, a view of one allocation; each starts at a multiple of _ALIGNMENT elements."""
    sizes = [-(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in shapes.values()]
    pieces = allocate_weights(sum(sizes), dtype, device).split(sizes)
    return {
        name: piece[: math.prod(shape)].view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def _targets(config: ModelConfig) -> dict[str, Target]:
    hidden, vocab = config.hidden_size, config.vocab_size
    targets = {
        "model.embed_tokens.weight": Target("embed_tokens", 0, (vocab, hidden), Cut.COLUMN),
        "model.norm.weight": Target("norm", 0, (hidden,), Cut.REPLICATED),
    }
    if not config.tie_word_embeddings:
        targets["lm_head.weight"] = Target("lm_head", 0, (vocab, hidden), Cut.COLUMN)
    for i in range(config.num_hidden_layers):
        for name, target in _layer_targets(config).items():
            parameter = f"layers.{i}.{target.parameter}"
            targets[f"model.layers.{i}.{name}"] = Target(parameter, target.start, target.shape, target.cut)
    return targets


def _layer_targets(config: ModelConfig) -> dict[str, Target]:
    hidden, mlp, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    targets = {
        "input_layernorm.weight": Target("input_norm", 0, (hidden,), Cut.REPLICATED),
        "post_attention_layernorm.weight": Target("post_norm", 0, (hidden,), Cut.REPLICATED),
        **_projection("self_attn.q_proj", "qkv", 0, (q, hidden), Cut.COLUMN, config.attention_bias),
        **_projection("self_attn.k_proj", "qkv", q, (kv, hidden), Cut.COLUMN, config.attention_bias),
        **_projection("self_attn.v_proj", "qkv", q + kv, (kv, hidden), Cut.COLUMN, config.attention_bias),
        **_projection("self_attn.o_proj", "out", 0, (hidden, q), Cut.ROW, config.attention_out_bias),
        **_projection("mlp.gate_proj", "gate_up", 0, (mlp, hidden), Cut.COLUMN, config.mlp_bias),
        **_projection("mlp.up_proj", "gate_up", mlp, (mlp, hidden), Cut.COLUMN, config.mlp_bias),
        **_projection("mlp.down_proj", "down", 0, (hidden, mlp), Cut.ROW, config.mlp_bias),
    }
    if config.qk_norm:
        targets["self_attn.q_norm.weight"] = Target("q_norm", 0, (dim,), Cut.REPLICATED)
        targets["self_attn.k_norm.weight"] = Target("k_norm", 0, (dim,), Cut.REPLICATED)
    return targets


def _projection(
    name: str, parameter: str, start: int, shape: tuple[int, int], cut: Cut, bias: bool
) -> dict[str, Target]:
    targets = {f"{name}.weight": Target(parameter, start, shape, cut)}
    if bias:
        # A row-cut product is summed over ranks, so its bias belongs to one of them only.
        bias_cut = Cut.COLUMN if cut is Cut.COLUMN else Cut.REPLICATED
        targets[f"{name}.bias"] = Target(f"{parameter}_bias", start, shape[:1], bias_cut)
    return targets


def _ignored(config: ModelConfig) -> tuple[str, ...]:
    """Names that checkpoints of these families hold although they follow from the config or from other tensors."""
    return ("rotary_emb.inv_freq", *(("lm_head.weight",) if config.tie_word_embeddings else ()))
