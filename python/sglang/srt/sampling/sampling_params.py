"""What a client may ask of the sampler: parsing, defaults and range checks of `sampling_params`.

Owned by the front. `SamplingParams` is the public request object (field names are upstream's); `resolve` turns it into
the `SamplingSpec` that travels to the scheduler, with nothing left optional.
Invariant: a `SamplingSpec` is always valid; the back never re-checks it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from sglang.srt.errors import RequestError

GREEDY_EPSILON = 1e-6
"""Temperatures below this are greedy decoding."""
MAX_SEED = 2**63 - 1
_TOKEN_ID = re.compile("[0-9]{1,10}")


class SamplingSpec(msgspec.Struct, array_like=True, frozen=True):
    """Sampling parameters as the scheduler sees them: complete and checked. Stop strings stay in the front.

    Fields:
        temperature: > 0; greedy requests carry 1.0 with `top_k` 1.
        top_k: 1..vocab_size (vocab_size keeps every token).
        seed: 63-bit seed of this sequence's random stream, always set.
        stop_token_ids: ids that end the sequence (the model's eos ids included unless ignore_eos).
        grammar: (kind, text) with kind json_schema | regex | ebnf | structural_tag, or None.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}
    grammar: tuple[str, str] | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether only the arg-max token can be drawn."""
        return self.top_k == 1


class SamplingParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`sampling_params` of a request, with stock SGLang's names and defaults (`None` means the default)."""

    max_new_tokens: int | None = 128
    stop: str | list[str] | None = None
    stop_token_ids: list[int | None] | None = None
    stop_regex: str | list[str] | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = -1
    min_p: float | None = 0.0
    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    min_new_tokens: int | None = 0
    n: int | None = 1
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    no_stop_trim: bool | None = False
    custom_params: dict[str, Any] | None = None
    stream_interval: int | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SamplingParams:
        """Parse a request's dict: numeric strings coerce, `null` means the default, unknown keys are refused.

        Raises:
            RequestError: unknown key or wrong type.
        """
        bias = data.get("logit_bias")
        if isinstance(bias, dict):  # JSON keys are strings; Python callers write the ids as they are
            data = {**data, "logit_bias": {str(token): value for token, value in bias.items()}}
        try:
            params = msgspec.convert(data, cls, strict=False)
        except msgspec.ValidationError as error:
            raise RequestError(f"sampling_params: {error}") from error
        for name, default in _DEFAULTS.items():
            if default is not None and getattr(params, name) is None:
                setattr(params, name, default)
        return params

    @property
    def stop_strings(self) -> list[str]:
        """Non-empty stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in stops if s]

    @property
    def stop_patterns(self) -> list[str]:
        """Non-empty stop regular expressions."""
        patterns = [self.stop_regex] if isinstance(self.stop_regex, str) else self.stop_regex or []
        return [p for p in patterns if p]

    def verify(self, vocab_size: int) -> None:
        """Check every range.

        Raises:
            RequestError: names the parameter, the value and the allowed range.
        """
        v = _Values(self)
        v.require("temperature", 0.0 <= v.temperature < math.inf, "a finite number >= 0")
        v.require("top_p", 0.0 < v.top_p <= 1.0, "in (0, 1]")
        v.require("min_p", 0.0 <= v.min_p <= 1.0, "in [0, 1]")
        v.require("top_k", v.top_k == -1 or v.top_k >= 1, "-1 (all) or at least 1")
        v.require("frequency_penalty", -2.0 <= v.frequency_penalty <= 2.0, "in [-2, 2]")
        v.require("presence_penalty", -2.0 <= v.presence_penalty <= 2.0, "in [-2, 2]")
        v.require("repetition_penalty", 0.0 < v.repetition_penalty <= 2.0, "in (0, 2]")
        v.require("max_new_tokens", v.max_new_tokens >= 0, "at least 0")
        v.require(
            "min_new_tokens", 0 <= v.min_new_tokens <= v.max_new_tokens, f"in [0, max_new_tokens={v.max_new_tokens}]"
        )
        v.require("n", v.n >= 1, "at least 1")
        v.require("sampling_seed", -(2**63) <= (self.sampling_seed or 0) < 2**64, "a 64-bit integer")
        if sum(bool(g) for g in (self.json_schema, self.regex, self.ebnf)) > 1:
            raise RequestError("Only one of regex, json_schema, or ebnf can be set.")
        self._verify_ids(vocab_size)
        for pattern in self.stop_patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                shown = pattern if len(pattern) <= 100 else pattern[:100] + "..."
                raise RequestError(f"stop_regex {shown!r} is not a valid regular expression: {error}.") from error

    def _verify_ids(self, vocab_size: int) -> None:
        for token, bias in (self.logit_bias or {}).items():
            if not _TOKEN_ID.fullmatch(token) or not int(token) < vocab_size:
                raise RequestError(f"logit_bias key {token[:50]!r} must be a token id in [0, {vocab_size - 1}].")
            if not bias < math.inf:
                raise RequestError(f"logit_bias of token {token} must be a number below infinity, got {bias}.")
        for stop_id in self.stop_token_ids or ():
            if stop_id is not None and not 0 <= stop_id < vocab_size:
                raise RequestError(f"stop_token_ids must be in [0, {vocab_size - 1}], got {stop_id}.")

    def resolve(self, *, vocab_size: int, eos_ids: tuple[int, ...], max_new_tokens: int, seed: int) -> SamplingSpec:
        """The complete spec for one sequence.

        Args:
            eos_ids: the model's end ids, used unless `ignore_eos` (which, as in stock, switches off every stop id).
            max_new_tokens: the limit after the context length has been applied.
            seed: this sequence's seed (see `sequence_seed`).
        """
        v = _Values(self)
        greedy = v.temperature < GREEDY_EPSILON
        stop_ids = (
            ()
            if self.ignore_eos
            else tuple(sorted({i for i in self.stop_token_ids or () if i is not None} | set(eos_ids)))
        )
        return SamplingSpec(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(v.min_new_tokens, max_new_tokens),
            temperature=1.0 if greedy else v.temperature,
            top_k=1 if greedy else vocab_size if v.top_k == -1 else min(v.top_k, vocab_size),
            top_p=1.0 if greedy else v.top_p,
            min_p=0.0 if greedy else v.min_p,
            frequency_penalty=v.frequency_penalty,
            presence_penalty=v.presence_penalty,
            repetition_penalty=v.repetition_penalty,
            seed=seed,
            stop_token_ids=stop_ids,
            logit_bias={int(k): float(b) for k, b in (self.logit_bias or {}).items()},
            grammar=self._grammar(),
        )

    def _grammar(self) -> tuple[str, str] | None:
        for kind in ("json_schema", "regex", "ebnf", "structural_tag"):
            text = getattr(self, kind)
            if text:
                return kind, text
        return None


# Looking at a struct's fields takes a millisecond, which would be most of a request's cost.
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}


class _Values:
    """Non-optional view of the numeric fields; `from_dict` and the field defaults have replaced every null."""

    def __init__(self, params: SamplingParams) -> None:
        def number(name: str) -> Any:
            value = getattr(params, name)
            return _DEFAULTS[name] if value is None else value

        self.temperature: float = number("temperature")
        self.top_p: float = number("top_p")
        self.top_k: int = number("top_k")
        self.min_p: float = number("min_p")
        self.frequency_penalty: float = number("frequency_penalty")
        self.presence_penalty: float = number("presence_penalty")
        self.repetition_penalty: float = number("repetition_penalty")
        self.max_new_tokens: int = number("max_new_tokens")
        self.min_new_tokens: int = number("min_new_tokens")
        self.n: int = number("n")
        self._params = params

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Raise a RequestError that names the parameter unless `ok`."""
        if not ok:
            raise RequestError(f"{name} must be {allowed}, got {getattr(self._params, name)!r}.")


def sequence_seed(base: int, index: int) -> int:
    """Seed of the `index`-th of n samples: the base itself for index 0, a splitmix64 step of it for the others."""
    if index == 0:
        return base & MAX_SEED
    mask = 2**64 - 1
    z = (base + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & MAX_SEED
