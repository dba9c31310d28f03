"""Arrays of any floating dtype as bf16 bits, as float16 or as float32, without torch.

Used by `slab`. numpy has no bf16, so its bits travel as uint16. Invariant: a value is rounded once, to nearest with
ties to even, whatever it is rounded from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_bf16_bits(array: Any) -> NDArray[np.uint16]:
    """The bf16 bits of a tensor of torch or an array of numpy.

    Args:
        array: float16, float32, float64 or bfloat16; a numpy array of dtype uint16 is bf16 bits already.

    Returns:
        uint16 of the same shape; a view where nothing had to be changed.

    Raises:
        TypeError: it has another dtype.
    """
    values = _as_numpy(array)
    if values.dtype == np.uint16:
        return values
    return _round_float32(
        _to_odd_float32(values) if values.dtype == np.float64 else values.astype(np.float32, copy=False)
    )


def to_float32(array: Any) -> NDArray[np.float32]:
    """The float32 values of what `to_bf16_bits` takes; only float64 has to be rounded.

    Returns:
        float32 of the same shape; a view where nothing had to be changed.

    Raises:
        TypeError: it has another dtype.
    """
    values = _as_numpy(array)
    if values.dtype == np.uint16:
        return from_bf16_bits(values)
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32, copy=False)


def to_float16(array: Any) -> NDArray[np.float16]:
    """The float16 values of what `to_bf16_bits` takes, infinite where they are too large.

    Returns:
        float16 of the same shape; a view where nothing had to be changed.

    Raises:
        TypeError: it has another dtype.
    """
    values = _as_numpy(array)
    if values.dtype == np.uint16:
        values = from_bf16_bits(values)
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16, copy=False)


def from_bf16_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values, exactly."""
    wide: NDArray[np.uint32] = np.left_shift(bits, 16, dtype=np.uint32)
    return wide.view(np.float32)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no value, of float32, of float16 or of bf16 as bits, is infinite or NaN."""
    if values.dtype == np.uint16 and values.size:
        # What is beyond an infinity is NaN: among signed integers larger than all other bits, or among unsigned ones.
        return bool(values.view(np.int16).max() < 0x7F80 and values.max() < 0xFF80)
    return bool(np.isfinite(values).all())


def _as_numpy(array: Any) -> NDArray[Any]:
    """float16, float32 or float64, or bf16 of either library as uint16: the array itself, or a tensor's memory."""
    values = _memory(array)
    if values.dtype not in (np.uint16, np.float16, np.float32, np.float64):
        raise TypeError(
            f"dtype is {values.dtype}; it must be float16, float32, float64, bfloat16 or bf16 bits as uint16"
        )
    return values


def _memory(array: Any) -> NDArray[Any]:
    if hasattr(array, "detach"):  # a tensor, so torch is in the process already; this module must not bring it
        tensor = array.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            import torch

            return np.asarray(tensor.view(torch.int16).numpy()).view(np.uint16)
        return np.asarray(tensor.numpy())
    values = np.asarray(array)
    return values.view(np.uint16) if values.dtype.name == "bfloat16" else values


def _round_float32(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits: NDArray[np.uint32] = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # The sum above would turn some NaNs into numbers.
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FC0), rounded) if nan.any() else rounded


def _to_odd_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rounded to odd: towards zero, with the last bit set if anything was lost, so that the next rounding sees it."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        nearest = values.astype(np.float32)
        inexact = np.isfinite(values) & (nearest != values)
        beyond = inexact & (np.abs(nearest) > np.abs(values))
    bits = np.ascontiguousarray(nearest).view(np.uint32)
    odd: NDArray[np.uint32] = (bits - beyond) | inexact
    return odd.view(np.float32)
