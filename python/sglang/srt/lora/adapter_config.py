"""What an adapter_config.json means, or why it cannot be served.

Called by `adapter_reader`. Invariant: every key is implemented, known to say nothing about serving, or refused by name
when it has a value; no path in it is ever opened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sglang.srt.errors import AdapterError
from sglang.srt.lora.target_modules import ALL_MODULES, ends_of, layer_of, meaning_of

T = TypeVar("T")
Patterns = tuple[tuple[re.Pattern[str], float], ...]

DEFAULT_RANK = DEFAULT_ALPHA = 8
"""PEFT's own defaults of r and lora_alpha."""

# About training, or about how the file was made: serving is the same whatever they say. layers_pattern is the name of
# the list of layers, which tensor names spell out; megatron_core and qalora_group_size qualify keys that are refused.
_INFORMATIVE = frozenset(
    "auto_mapping inference_mode layers_pattern lora_dropout megatron_core peft_version qalora_group_size revision "
    "runtime_config task_type".split()
)
_REASONS = {
    "use_dora": "DoRA is not supported",
    "use_qalora": "QA-LoRA is not supported",
    "lora_bias": "a bias of lora_B is not supported",
    "modules_to_save": "modules trained in full are not supported; train them as LoRA targets",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "adapters of bare parameters are not supported",
    "trainable_token_indices": "trained tokens are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "fan_in_fan_out": "weights stored as (inputs, outputs) are not supported; save the adapter transposed",
    "megatron_config": "Megatron's parallel layers are not supported; export the adapter to PEFT's format",
}
_RANK_RULE, _ALPHA_RULE = "must be a positive integer", "must be a finite number other than 0"
_INITS = ("gaussian", "orthogonal")

_SAFE_PATTERN = re.compile(r"(?:[\w.^$|()-]|\\[.dw]|\[[\w-]+\]|(?<!\))[*+])+")
_MAX_PATTERNS, _MAX_REPEATS, _MAX_REPEATING = 4096, 2, 16


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How an adapter's factors are to be applied.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rank_patterns, alpha_patterns: PEFT's rank_pattern and alpha_pattern; the first that matches counts.
        target_modules: names, or ends of names, of modules that have factors; None when the tensors say it.
        excluded: names, or ends of names, of modules that have none.
        layers: numbers of the layers that have factors; None for any.
        base_model: name of the model the adapter was trained on.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_patterns: Patterns = ()
    alpha_patterns: Patterns = ()
    target_modules: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    base_model: str | None = None
    _target_ends: frozenset[str] = field(init=False, repr=False)
    _excluded_ends: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_target_ends", _ends(self.target_modules or ()))
        object.__setattr__(self, "_excluded_ends", _ends(self.excluded))

    def rank_of(self, module: str) -> int:
        """r of a module, by the name it was trained under."""
        return int(_matching(self.rank_patterns, module, self.rank))

    def scale_of(self, module: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank_of(module)
        return _matching(self.alpha_patterns, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def admits(self, module: str) -> bool:
        """Whether the config lets a module have factors."""
        if self._excludes(module):
            return False
        return self.target_modules is None or not self._target_ends.isdisjoint(ends_of(module))

    def unmet_targets(self, modules: Iterable[str]) -> list[str]:
        """Entries of target_modules that none of these modules answers to, though other keys do not rule them out."""
        present = {end for module in modules for end in ends_of(module)}
        missing = [entry for entry in self.target_modules or () if present.isdisjoint(meaning_of(entry))]
        return [entry for entry in missing if not all(self._excludes(f"model.{end}") for end in meaning_of(entry))]

    def _excludes(self, module: str) -> bool:
        layer = layer_of(module)
        if self.layers is not None and layer is not None and layer not in self.layers:
            return True
        return not self._excluded_ends.isdisjoint(ends_of(module))


def parse_adapter_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """Check a config and read what serving needs.

    Args:
        raw: the decoded JSON. Missing keys have PEFT's defaults.

    Raises:
        AdapterError: invalid_adapter; the message names every key at fault.
    """
    reader = _Reader(raw)
    config = AdapterConfig(
        rank=reader.positive("r", DEFAULT_RANK),
        alpha=reader.alpha(),
        use_rslora=reader.flag("use_rslora"),
        rank_patterns=reader.patterns("rank_pattern", whole=True),
        alpha_patterns=reader.patterns("alpha_pattern", whole=False),
        target_modules=reader.target_modules(),
        excluded=tuple(reader.names("exclude_modules")),
        layers=reader.layers(),
        base_model=reader.text("base_model_name_or_path"),
    )
    reader.check_kind()
    reader.refuse_the_rest()
    if reader.problems:
        raise AdapterError("invalid_adapter", "adapter config: " + "; ".join(reader.problems))
    return config


class _Reader:
    """Takes keys one by one and collects what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.rest = dict(raw)
        self.problems: list[str] = []

    def positive(self, key: str, default: int) -> int:
        value = self._take(key, default)
        if type(value) is not int or value < 1:
            return self._bad(key, value, _RANK_RULE, default)
        return value

    def alpha(self) -> float:
        value = self._take("lora_alpha", DEFAULT_ALPHA)
        if not _is_factor(value):
            return self._bad("lora_alpha", value, _ALPHA_RULE, 1.0)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._take(key, False)
        return value if isinstance(value, bool) else self._bad(key, value, "must be true or false", False)

    def text(self, key: str) -> str | None:
        value = self._take(key, None)
        return value if value is None or isinstance(value, str) else self._bad(key, value, "must be a string", None)

    def names(self, key: str) -> list[str]:
        value: Any = self._take(key, [])
        if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
            return value
        return self._bad(key, value, "must be a list of module names", [])

    def target_modules(self) -> tuple[str, ...] | None:
        """A string is PEFT's regular expression or `all-linear`: which modules it means shows in the tensors."""
        if isinstance(self.rest.get("target_modules"), str):
            del self.rest["target_modules"]
            return None
        names = self.names("target_modules")
        return None if not names or any(name in ALL_MODULES for name in names) else tuple(names)

    def layers(self) -> frozenset[int] | None:
        value = self._take("layers_to_transform", None)
        layers = [value] if type(value) is int else value
        if layers is None:
            return None
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            return self._bad("layers_to_transform", value, "must be a layer's number or a list of them", None)
        return frozenset(layers)

    def patterns(self, key: str, whole: bool) -> Patterns:
        """{end of a module's name or regular expression: number}; `whole` for positive integers."""
        value = self._take(key, {})
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            return self._bad(key, value, f"must be a dict of at most {_MAX_PATTERNS} entries", ())
        if sum("*" in name or "+" in name for name in value) > _MAX_REPEATING:
            return self._bad(key, value, f"has more than {_MAX_REPEATING} expressions with repeats", ())
        found = []
        for name, number in value.items():
            pattern = _compile(name)
            if pattern is None:
                self._bad(f"{key}[{name!r}]", number, "its name must be a module or a simple regular expression", None)
            elif (type(number) is not int or number < 1) if whole else not _is_factor(number):
                self._bad(f"{key}[{name!r}]", number, _RANK_RULE if whole else _ALPHA_RULE, None)
            else:
                found.append((pattern, number))
        return tuple(found)

    def check_kind(self) -> None:
        """Refuse other methods than LoRA, and LoRA that changes more than adding B A to a frozen base."""
        kind = self._take("peft_type", "LORA")
        if kind != "LORA":
            self._bad("peft_type", kind, "only LORA is supported", None)
        bias = self._take("bias", "none")
        if bias != "none":
            self._bad("bias", bias, "trained biases are not supported", None)
        init = self._take("init_lora_weights", True)
        if not isinstance(init, bool) and init not in _INITS:
            remedy = f"only true, false, {' and '.join(_INITS)} leave the base as it is; convert the adapter to LoRA"
            self._bad("init_lora_weights", init, remedy, None)

    def refuse_the_rest(self) -> None:
        for key, value in self.rest.items():
            if value and key not in _INFORMATIVE:
                self._bad(key, value, _REASONS.get(key, "this key is not supported"), None)

    def _take(self, key: str, default: Any) -> Any:
        """The value of a key; null is the same as absent."""
        value = self.rest.pop(key, None)
        return default if value is None else value

    def _bad(self, key: str, value: Any, problem: str, instead: T) -> T:
        shown = repr(value)
        self.problems.append(f"{key} is {shown if len(shown) <= 80 else shown[:77] + '...'}: {problem}")
        return instead


def _ends(entries: Iterable[str]) -> frozenset[str]:
    return frozenset(end for entry in entries for end in meaning_of(entry))


def _is_factor(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < abs(value) < 1e30


def _compile(name: object) -> re.Pattern[str] | None:
    """PEFT's match of a pattern's key: the module's whole name or what follows one of its dots.

    None for what could take for ever to match, or is no expression at all.
    """
    if not isinstance(name, str) or len(name) > 256 or not _SAFE_PATTERN.fullmatch(name):
        return None
    if len(re.findall(r"[*+]", name)) > _MAX_REPEATS:
        return None
    try:
        # Alone first: brackets that only balance around it are no expression of a name.
        return re.compile(rf"(?:.*\.)?(?:{re.compile(name).pattern})")
    except re.error:
        return None


def _matching(patterns: Patterns, module: str, default: float) -> float:
    return next((number for pattern, number in patterns if pattern.fullmatch(module)), default)
