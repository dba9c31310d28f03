"""Environment variables the server reads: one typed table, read at access, a bad value is an error that names it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

from sglang.srt.errors import ConfigError

T = TypeVar("T")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def parse_bool(text: str) -> bool:
    """Parse a boolean environment value; raises ValueError on anything that is not plainly true or false."""
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError(f"expected one of {sorted(_TRUE | _FALSE - {''})}")


class EnvVar(Generic[T]):
    """One variable: name, parser, default. Call `get()`; truth-testing is refused a forgotten `.get()` fails."""

    def __init__(self, name: str, parse: Callable[[str], T], default: T, doc: str) -> None:
        self.name, self.parse, self.default, self.doc = name, parse, default, doc

    def get(self) -> T:
        """The parsed value, or the default when unset; raises ConfigError on a value that does not parse."""
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"environment variable {self.name}={text!r} is not valid: {error}") from error

    def __bool__(self) -> bool:
        raise TypeError(f"use environ.{self.name}.get(), not the variable itself")


SGLANG_RETURN_ORIGINAL_LOGPROB = EnvVar(
    "SGLANG_RETURN_ORIGINAL_LOGPROB",
    parse_bool,
    False,
    "report log-probabilities of the raw logits (before temperature)",
)
SGLANG_DRAIN_TIMEOUT = EnvVar(
    "SGLANG_DRAIN_TIMEOUT", float, 30.0, "seconds SIGTERM lets live requests run before they are aborted"
)
SGLANG_LORA_READ_TIMEOUT = EnvVar(
    "SGLANG_LORA_READ_TIMEOUT",
    float,
    300.0,
    "seconds that reading and checking an adapter may take before its load fails; a hung file system must not hang it",
)
SGLANG_PAUSE_TIMEOUT = EnvVar(
    "SGLANG_PAUSE_TIMEOUT",
    float,
    3600.0,
    "seconds after which a pause that names no timeout of its own ends by itself; 0 for never",
)
