"""Accounting that must hold whenever the scheduler is idle; a violation is logged, counted and exported."""

from __future__ import annotations

from sglang.srt.managers.planner import Planner


def violations(planner: Planner, num_requests: int) -> list[str]:
    """What is wrong with an idle scheduler that has no live request; empty when all is well.

    Args:
        num_requests: requests the scheduler still knows (must be 0).
    """
    kv = planner.kv
    found = []
    if num_requests or planner.waiting or planner.live:
        found.append(
            f"{num_requests} requests known, {len(planner.waiting)} waiting, {len(planner.live)} live; expected none"
        )
    if kv.cache.locked_pages:
        found.append(f"{kv.cache.locked_pages} prefix-cache pages are locked by nobody")
    missing = kv.allocator.num_pages - kv.allocator.num_free - kv.cache.evictable_pages - kv.cache.locked_pages
    if missing:
        found.append(f"{missing} KV pages belong to nobody")
    if kv.table.num_free != len(kv.table.host):
        found.append(f"{len(kv.table.host) - kv.table.num_free} sequence slots belong to nobody")
    return found
