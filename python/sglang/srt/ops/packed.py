"""Weights kept as their checkpoint stores them, and products with them.

Decoding on a CPU reads every weight for each step: four bits take an eighth of the time that float32 takes. What is
computed is float32 on the widened values, so results differ from a dequantised model's only in the order of additions.
CPU and float32 activations only; everywhere else the loader widens weights once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.srt.ops.cpu.build import load_library

BLOCK = 32
"""Inputs per block of every format; matrices with another width are not packed."""
MAX_KERNEL_ROWS = 96
"""Beyond this many activations a product is bound by arithmetic: widening once and torch's GEMM are faster."""


def _widen_bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _widen_q8_0(blocks: Tensor) -> Tensor:
    """Block: f16 scale, 32 signed bytes."""
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return blocks[..., 2:].contiguous().view(torch.int8).float() * scale


def _widen_q4_1(blocks: Tensor) -> Tensor:
    """Block: f16 scale, f16 minimum, 16 bytes that hold value j in the low and j + 16 in the high half."""
    scale, minimum = blocks[..., :4].contiguous().view(torch.float16).float().split(1, dim=-1)
    quants = blocks[..., 4:]
    return torch.cat([quants & 15, quants >> 4], dim=-1).float() * scale + minimum


@dataclass(frozen=True, slots=True)
class Format:
    """Bytes of a block, and the torch reference that widens uint8 [..., block_bytes] to float32 [..., BLOCK]."""

    block_bytes: int
    widen: Callable[[Tensor], Tensor]


FORMATS = {
    "bf16": Format(2 * BLOCK, _widen_bf16),
    "q8_0": Format(2 + BLOCK, _widen_q8_0),
    "q4_1": Format(20, _widen_q4_1),
}


def can_pack() -> bool:
    """Whether products with packed weights have a kernel on this machine."""
    return load_library() is not None


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [O, I] in a stored format.

    Fields:
        data: uint8 [O, I / BLOCK * block_bytes], contiguous, on the CPU.
    """

    format: str
    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.data), self.data.shape[1] // FORMATS[self.format].block_bytes * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return int(self.data.nbytes)

    def unpack(self) -> Tensor:
        """float32 [O, I]."""
        library = load_library()
        if library is None:
            return unpack_reference(self)
        out = torch.empty(self.shape)
        unpack = getattr(library, f"sgl_unpack_{self.format}")
        unpack(_pointer(self.data), _pointer(out), ctypes.c_int64(out.numel()))
        return out

    def rows(self, index: Tensor) -> Tensor:
        """float32 [T, I], rows `index` int64 [T]: the embedding of tokens."""
        return PackedWeight(self.format, self.data[index]).unpack()


Parameter = Tensor | PackedWeight


def unpack_reference(weight: PackedWeight) -> Tensor:
    """float32 [O, I] by torch operations."""
    layout = FORMATS[weight.format]
    return layout.widen(weight.data.view(len(weight.data), -1, layout.block_bytes)).reshape(weight.shape)


def stack(parts: list[PackedWeight]) -> PackedWeight:
    """Matrices of one format and width on top of each other."""
    return PackedWeight(parts[0].format, torch.cat([part.data for part in parts]))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias for float32 x [T, I] and bias [O]; float32 [T, O]."""
    library = load_library()
    if library is None or len(x) > MAX_KERNEL_ROWS:
        return F.linear(x, weight.unpack(), bias)
    x = x.contiguous()
    outputs, inputs = weight.shape
    y = torch.empty(len(x), outputs)
    product = getattr(library, f"sgl_linear_{weight.format}")
    sizes = (ctypes.c_int64(n) for n in (len(x), inputs, outputs))
    product(_pointer(weight.data), _pointer(x), None if bias is None else _pointer(bias), _pointer(y), *sizes)
    return y


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
