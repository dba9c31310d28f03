"""bf16 as numpy has it, and when a rounded sum is right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Floats = NDArray[np.float64]

NAN = 0x7FC7
"""A bf16 that says: nobody was to read or write this."""


def to_bf16(values: Floats) -> Bits:
    """To nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_float(bits: Bits) -> Floats:
    """Exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def random_bf16(rng: np.random.Generator, *shape: int) -> Bits:
    """Normal numbers."""
    return to_bf16(rng.standard_normal(shape))


def padded(rows: Bits, stride: int) -> Bits:
    """The same rows, each followed by NaN up to `stride` columns."""
    wide = np.full((len(rows), stride), NAN, np.uint16)
    wide[:, : rows.shape[1]] = rows
    return wide


def assert_rounded_once(actual: Bits, exact: Floats, magnitude: Floats, extra: Floats | float = 0.0) -> None:
    """That `actual` is `exact`, summed in float32 in any order and rounded to bf16 once.

    Args:
        actual: what a kernel wrote.
        exact: the sum in float64 of what is stored.
        magnitude: the same sum of absolute values; float32 is wrong by some 2^-22 of it.
        extra: an error that is allowed besides, e.g. that of a rounded intermediate.
    """
    error = np.abs(to_float(actual) - exact)
    ulp = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
    float32 = magnitude * 2.0**-20
    limit = ulp * (0.5 + 2.0**-8) + float32 + extra
    assert not (~(error <= limit)).any(), f"error {error.max()} at {np.argwhere(~(error <= limit))[:4].tolist()}"
    ideal = np.linalg.norm(to_float(to_bf16(exact)) - exact)
    allowed = 1.02 * ideal + np.linalg.norm(np.broadcast_to(extra, exact.shape)) + np.linalg.norm(float32)
    assert np.linalg.norm(error) <= allowed
