"""What the operations demand of their arguments.

Called by `ops`, once a call for every argument, so these are plain comparisons of numbers: a decode step without graphs
comes here hundreds of times. All raise TypeError for a dtype and ValueError for anything else, with the value and the
remedy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_kernel.lora.layout import LoraSite
from sgl_kernel.types import FLOATS, LoraBatch, LoraDelta, LoraSlabs


def flat(name: str, tensor: Tensor) -> Tensor:
    """[..., C] as [rows, C], without a copy."""
    if tensor.ndim == 2:
        return tensor
    if tensor.ndim == 0 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, strides {tensor.stride()}; make it contiguous or [rows, columns]"
        )
    return tensor.view(-1, tensor.shape[-1])


def check_rows(name: str, tensor: Tensor) -> tuple[int, int]:
    """Its rows and columns, if it is a matrix that backends take."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    if tensor.ndim != 2 or tensor.stride(1) != 1 and tensor.shape[1] != 1:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, strides {tensor.stride()}; "
            "it must be [rows, columns] with adjacent columns"
        )
    if tensor.is_cuda and (tensor.data_ptr() | tensor.stride(0) * tensor.element_size()) % 16:
        raise ValueError(
            f"{name} is at {tensor.data_ptr():#x} with {tensor.stride(0)} elements between rows; "
            "every row must start at a multiple of 16 bytes, so pad its width"
        )
    return tensor.shape[0], tensor.shape[1]


def check_same(name: str, tensor: Tensor, like: Tensor) -> None:
    """That a tensor has the dtype and the device of the activations."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}; it must be {like.dtype}, as the activations are")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {like.device}, where the activations are")


def check_out(name: str, tensor: Tensor, like: Tensor, rows: int, columns: int) -> None:
    """That an output or a second input fits the activations."""
    check_same(name, tensor, like)
    if check_rows(name, tensor) != (rows, columns):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {[rows, columns]}")


def check_outputs(like: Tensor, outputs: int) -> None:
    """That rows of so many columns are what a GPU's kernels can write: in fours, and as `check_rows` says."""
    if like.is_cuda and outputs % 8:
        raise ValueError(f"weight has {outputs} rows; on a GPU they must be a multiple of 8, so pad it")


def check_vector(name: str, tensor: Tensor, like: Tensor, length: int) -> None:
    """That it is a dense vector for these activations."""
    check_same(name, tensor, like)
    if tensor.shape != (length,) or not tensor.is_contiguous():
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be contiguous [{length}]")
    if tensor.is_cuda and tensor.data_ptr() % 16:
        raise ValueError(f"{name} is at {tensor.data_ptr():#x}; it must start at a multiple of 16 bytes")


def check_index(name: str, tensor: Tensor, like: Tensor, rows: int) -> None:
    """That it has one int64 for every row."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} are {tensor.dtype}; they must be torch.int64")
    if tensor.shape != (rows,) or not tensor.is_contiguous() or tensor.device != like.device:
        raise ValueError(
            f"{name} have shape {list(tensor.shape)} on {tensor.device}; "
            f"they must be contiguous [{rows}] on {like.device}"
        )


def check_angles(cos_sin: Tensor, like: Tensor, head_dim: int) -> None:
    """That it is a table of cosines and sines."""
    if cos_sin.dtype != torch.float32:
        raise TypeError(f"cos_sin is {cos_sin.dtype}; it must be torch.float32")
    if (
        cos_sin.ndim != 2
        or cos_sin.shape[1] != head_dim
        or not cos_sin.is_contiguous()
        or cos_sin.device != like.device
    ):
        raise ValueError(
            f"cos_sin has shape {list(cos_sin.shape)} on {cos_sin.device}; "
            f"it must be contiguous [positions, {head_dim}] on {like.device}"
        )


def check_pools(
    k_pool: Tensor | None, v_pool: Tensor | None, locs: Tensor | None, like: Tensor, rows: int, heads: tuple[int, int]
) -> None:
    """That the pools can take k and v, if there are any."""
    if k_pool is None or v_pool is None or locs is None:
        if k_pool is not None or v_pool is not None or locs is not None:
            raise ValueError("only some of k_pool, v_pool and locs are given; give all three or none")
        return
    check_index("locs", locs, like, rows)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        check_same(name, pool, like)
        # One stride for both dimensions of a row, and for all rows: kernels address a pool by its row alone.
        if pool.ndim != 3 or pool.shape[1:] != heads or not pool.is_contiguous():
            raise ValueError(
                f"{name} has shape {list(pool.shape)}; it must be contiguous [slots, {heads[0]}, {heads[1]}]"
            )


def check_item(site: LoraSite, x: Tensor) -> None:
    """That kernels can read the slabs: those of GPUs take bfloat16 alone."""
    if x.is_cuda and site.dtype != "bfloat16":
        raise ValueError(
            f"the site's numbers are {site.dtype}, kernels of a GPU read bfloat16; "
            "make the layout with dtype='bfloat16'"
        )


def check_lora(x: Tensor, slabs: LoraSlabs, site: LoraSite, batch: LoraBatch, rows: int) -> None:
    """That adapters, a site and a batch fit each other and the activations."""
    device = x.device
    check_item(site, x)
    if slabs.data.device != device or batch.words.device != device:
        raise ValueError(
            f"the slabs are on {slabs.data.device}, the batch on {batch.words.device}; both must be on {device}"
        )
    if rows > batch.shape.max_tokens:
        raise ValueError(f"{rows} rows, the batch has room for {batch.shape.max_tokens}; make its shape larger")
    if batch.shape.num_slots > slabs.data.shape[0]:
        raise ValueError(f"the batch names {batch.shape.num_slots} slots, there are {slabs.data.shape[0]}")
    if site.end > slabs.data.shape[1]:
        raise ValueError(
            f"the site ends at byte {site.end}, a slab at {slabs.data.shape[1]}; take it from the slabs' layout"
        )


def check_delta(y: Tensor, delta: LoraDelta, rows: int, columns: int) -> None:
    """That a delta, which has been checked by itself, is of this tensor."""
    u = delta.u
    check_item(delta.site, y)
    if columns != delta.site.total_out:
        raise ValueError(f"the activations have {columns} columns, the delta's site has {delta.site.total_out} outputs")
    if u.shape[0] < rows:
        raise ValueError(f"u has {u.shape[0]} rows, the activations have {rows}; it must have as many")
    if rows > delta.batch.shape.max_tokens:
        raise ValueError(f"{rows} rows, the batch has room for {delta.batch.shape.max_tokens}; make its shape larger")
    check_same("u", u, y)
