"""A linear layer with a low-rank adapter, for training on the very kernels that serve it.

Used by trainers. The base product is torch's; shrink and expand are `ops`', on a one-adapter slab that is packed on the
device in every call, so that an optimizer may write to the factors in any way.
Invariants: the forward pass is the server's function, bit for bit: factors rounded to bf16, u rounded to x's dtype, one
rounding of y. The backward pass differentiates that function with the roundings taken as identities, and sums in
float32. float64 has no kernels and no rounding; it is there for checking gradients.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgl_kernel.lora.batch import BatchShape, build_batch
from sgl_kernel.lora.layout import HEADER_BYTES, RANK_STEP, LoraGroup, LoraLayout, LoraSite, round_up
from sgl_kernel.ops import lora_expand_add_, lora_shrink
from sgl_kernel.types import LoraBatch, LoraDelta, LoraSlabs

_GROUP = "linear"
_CACHED_BATCHES = 32
_DECODE_TOKENS = 16
"""Up to this many rows the small tile wastes less."""


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x weight^T + bias + scale (x a^T) b^T, differentiable in everything but the scale.

    Args:
        x: [..., K], K a multiple of 8; bfloat16, float16, float32, or float64 for checking gradients.
        weight, bias: [N, K] and [N] of x's dtype; bias may be None.
        a: [r, K]; b: [N, r]; r up to 256. Of any floating dtype: float32 masters, or bfloat16. Gradients have theirs.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit.
    """
    _check(x, weight, a, b)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinear.apply(x, weight, bias, a, b, float(scale))  # type: ignore[no-any-return,no-untyped-call]


class LoraLinear(nn.Module):
    """A frozen linear layer and its trainable adapter, which starts as zero.

    Args:
        base: the layer to adapt; its parameters are shared, and frozen.
        rank: r, 1 to 256.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
        dtype: of the factors.

    Attributes:
        lora_a: [r, K]; lora_b: [N, r].
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        LoraLayout([LoraGroup(_GROUP, base.in_features, (base.out_features,))], 1, rank)  # refuses what has no slab
        self.base = base.requires_grad_(False)
        self.scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] from x [..., K], which has the base's dtype."""
        return lora_linear(x, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scale)

    def extra_repr(self) -> str:
        """What `print` shows beside the submodules."""
        return f"rank={len(self.lora_a)}, scale={self.scale:g}"


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        if x.dtype == torch.float64:
            kept_a, kept_b, u = a, b, rows @ a.t()
            y = y + scale * (u @ b.t())
        else:
            kept_a, kept_b, u = _add_adapter(y, rows.contiguous(), a, b, scale)
        ctx.save_for_backward(rows, weight, kept_a, kept_b, u)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        wide = dy.to(_wide(dy.dtype))
        dx = dweight = dbias = da = db = None
        if need_x or need_a:
            du = ctx.scale * (wide @ b.to(wide.dtype))
            if need_x:
                # The base's part is rounded before the addition, as torch's own linear layer would.
                dx = ((dy @ weight).to(wide.dtype) + du @ a.to(wide.dtype)).to(x.dtype).view(ctx.shape)
            if need_a:
                da = (du.t() @ x.to(wide.dtype)).to(ctx.dtypes[0])
        if need_b:
            db = (ctx.scale * (wide.t() @ u.to(wide.dtype))).to(ctx.dtypes[1])
        if need_weight:
            dweight = (wide.t() @ x.to(wide.dtype)).to(weight.dtype)
        if need_bias:
            dbias = wide.sum(dim=0).to(weight.dtype)
        return dx, dweight, dbias, da, db, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> None:
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs or a.shape[1:] != (inputs,) or b.shape != (outputs, len(a)):
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, a {list(a.shape)} and b {list(b.shape)} do not fit; "
            "they must be [..., K], [N, K], [r, K] and [N, r]"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, weight is {weight.dtype}; convert one, autocast is off in here")


def _add_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Add the adapter's term to y [T, N] in place; (A and B as they were rounded, u [T, r])."""
    rank = len(a)
    slabs, site, kept_a, kept_b = _pack(a, b, scale)
    if not len(x):
        return kept_a, kept_b, x.new_empty(0, rank)
    batch = _whole_batch(len(x), rank, x.device)
    u = lora_shrink(x, slabs, site, batch)
    lora_expand_add_(y, LoraDelta(u, slabs, site, batch))
    return kept_a, kept_b, u[:, :rank]


def _pack(a: Tensor, b: Tensor, scale: float) -> tuple[LoraSlabs, LoraSite, Tensor, Tensor]:
    """A slab of one adapter, and views of A [r, K] and B [N, r] in it. One copy a factor, which also rounds it."""
    rank, inputs = a.shape
    layout = _layout(inputs, len(b), rank)
    site = layout.site(0, _GROUP)
    slab = torch.empty(1, layout.slab_bytes, dtype=torch.uint8, device=a.device)
    head = _head(rank, scale, a.device)
    slab[0, : len(head)] = head
    start, stride = site.a_start(0), round_up(rank, RANK_STEP)
    kept_a = slab[0, start : start + rank * inputs * 2].view(torch.bfloat16).view(rank, inputs)
    start = site.b_offsets[0]
    whole_b = slab[0, start : start + len(b) * stride * 2].view(torch.bfloat16).view(len(b), stride)
    kept_b = whole_b[:, :rank]
    kept_a.copy_(a)
    kept_b.copy_(b)
    if rank < stride:
        whole_b[:, rank:].zero_()
    return LoraSlabs(slab, layout, np.array([rank], np.int32)), site, kept_a, kept_b


@functools.lru_cache(maxsize=256)
def _layout(inputs: int, outputs: int, rank: int) -> LoraLayout:
    return LoraLayout([LoraGroup(_GROUP, inputs, (outputs,))], 1, rank)


@functools.lru_cache(maxsize=256)
def _head(rank: int, scale: float, device: torch.device) -> Tensor:
    """uint8 [32] on the device: the header, the one entry of the table, and padding."""
    words = np.zeros(8, np.int32)
    entry = HEADER_BYTES // 4
    words[0] = words[entry] = rank
    words[entry + 1 : entry + 2].view(np.float32)[0] = scale
    return torch.from_numpy(words.view(np.uint8)).to(device)


@functools.lru_cache(maxsize=_CACHED_BATCHES)
def _whole_batch(tokens: int, rank: int, device: torch.device) -> LoraBatch:
    """All rows are those of the only adapter, of this rank."""
    shape = BatchShape(tokens, 1, 16 if tokens <= _DECODE_TOKENS else 64)
    words = build_batch(np.zeros(tokens, np.int32), np.array([rank], np.int32), shape)
    return LoraBatch.to_device(words, shape, device)
