"""The first kernel of a captured decode step: what the host would otherwise have looked up."""

# Device functions are Triton's language, not Python's: no types to give.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


@triton.jit(do_not_specialize=["rows"])
def _begin(slots, positions, locs, last_tokens, pages, ids, rows, max_pages, page_size, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    slot = tl.load(slots + row, live, 0)
    position = tl.load(positions + row, live, 0)
    page = tl.load(locs + row, live, 0) // page_size
    tl.store(pages + slot * max_pages + position // page_size, page.to(tl.int32), live)
    tl.store(ids + row, tl.load(last_tokens + slot, live, 0), live)


def begin_decode(
    slots: Tensor, positions: Tensor, locs: Tensor, last_tokens: Tensor, pages: Tensor, page_size: int, ids: Tensor
) -> None:
    """Bring the page table up to date with the pages of the new tokens, and look up their ids.

    Args:
        slots, positions, locs: int64 [B], of the new tokens: sequence, place in it, row of the KV pool.
        last_tokens: int64 [slots], the token that each sequence drew last.
        pages: int32 [slots, max_pages], written.
        ids: int64 [B], written.
    """
    rows = len(slots)
    _begin[(triton.cdiv(rows, _ROWS),)](
        slots,
        positions,
        locs,
        last_tokens,
        pages,
        ids,
        rows,
        pages.shape[1],
        page_size,
        BLOCK=_ROWS,
        enable_fp_fusion=True,
    )
