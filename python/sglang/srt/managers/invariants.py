"""Accounting that must hold whenever the scheduler is idle; a violation is logged, counted and exported."""

from __future__ import annotations

from collections.abc import Set

from sglang.srt.managers.io_struct.wire import BASE_VERSION
from sglang.srt.managers.planner import Planner


def violations(planner: Planner, num_requests: int, versions: Set[int] = frozenset()) -> list[str]:
    """What is wrong with an idle scheduler that has no live request; empty when all is well.

    Args:
        num_requests: requests the scheduler still knows (must be 0).
        versions: adapter versions that are staged.
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
    if kv.table.num_free != kv.table.max_slots:
        found.append(f"{kv.table.max_slots - kv.table.num_free} sequence slots belong to nobody")
    if planner.lora_slots.num_holds:
        found.append(f"{planner.lora_slots.num_holds} holds of adapter slots belong to nobody")
    for what, used in (("prefix-cache pages", kv.cache.versions), ("a slot", set(planner.lora_slots.versions))):
        if gone := used - versions - {BASE_VERSION}:
            found.append(f"adapter versions {sorted(gone)} are gone but still have {what}")
    if kv.cache.num_condemned:
        found.append(f"{kv.cache.num_condemned} dropped namespaces of the prefix cache still have pages")
    return found
