"""Rotary embedding of a model: its frequencies, by the scaling rule its config names, and each step's angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.errors import ConfigError
from sglang.srt.ops.rope import FUSED_HEAD_DIMS, Rotation


class RotaryEmbedding:
    """Angles of positions.

    Raises:
        ConfigError: the config asks for a scaling rule this server does not know.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        scaling = config.rope_scaling or {}
        rule = scaling.get("rope_type", scaling.get("type", "default"))
        if rule not in _RULES:
            raise ConfigError(f"rope_type {rule!r} is not supported; known are {', '.join(sorted(_RULES))}")
        base = config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        inverse, self._gain = _RULES[rule](1.0 / base, scaling, config)
        self._inverse = inverse.to(device)
        self._dtype = dtype
        fused = device.type == "cuda" and config.head_dim in FUSED_HEAD_DIMS
        self._table = self._all_angles(config.context_length) if fused else None

    def rotation(self, positions: Tensor) -> Rotation:
        """The angles of a step.

        Args:
            positions: int64 [T].
        """
        if self._table is not None:
            return Rotation(positions, self._table)
        return Rotation(positions, None, *self.angles(positions))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions int64 [T], each [T, 1, D], as `ops.rope.rotate_` takes them."""
        angles = positions[:, None, None].float() * self._inverse
        cos, sin = angles.cos() * self._gain, angles.sin() * self._gain
        return torch.cat([cos, cos], dim=-1).to(self._dtype), torch.cat([-sin, sin], dim=-1).to(self._dtype)

    def _all_angles(self, count: int) -> Tensor:
        """As `Rotation.table`, of positions below `count`."""
        angles = torch.arange(count, device=self._inverse.device)[:, None].float() * self._inverse
        return torch.cat([angles.cos() * self._gain, angles.sin() * self._gain], dim=-1)


def _default(inverse: Tensor, scaling: dict[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    return inverse, 1.0


def _linear(inverse: Tensor, scaling: dict[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023)."""
    return inverse / scaling["factor"], 1.0


def _llama3(inverse: Tensor, scaling: dict[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended (Llama 3.1)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * inverse / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inverse / factor * (1 - blend) + inverse * blend, 1.0


def _yarn(inverse: Tensor, scaling: dict[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): as llama3's blend, over dimensions, and a gain on the attention logits."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.context_length
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1

    def dimension(turns: float) -> float:
        return config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = ((torch.arange(len(inverse), dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    gain = scaling.get("attention_factor")
    if gain is None:
        gain = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return inverse / factor * ramp + inverse * (1 - ramp), float(gain)


_RULES: dict[str, Callable[[Tensor, dict[str, Any], ModelConfig], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
