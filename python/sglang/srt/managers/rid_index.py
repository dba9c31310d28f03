"""Which request in flight a client means by a rid.

Owned by `request_lifecycle`. Rids belong to clients and are reused by them; inside the server a request is known by its
`req_id`. A call's own rid is kept as an alias of its records when these have rids of their own (a batch, or n > 1).
"""

from __future__ import annotations

from collections.abc import Iterable

from sglang.srt.errors import RequestError
from sglang.srt.managers.request_state import RequestRecord


class RidIndex:
    """Maps rids, and aliases of several records, to records whose reply is not complete.

    Invariant: `discard` works on the record it is given, never on whatever has its rid now. `by_rid` is public as
    `TokenizerManager.rid_to_state`, and outside code may remove entries from it.
    """

    def __init__(self) -> None:
        self.by_rid: dict[str, RequestRecord] = {}
        self._by_alias: dict[str, dict[int, RequestRecord]] = {}

    def add(self, records: Iterable[RequestRecord]) -> None:
        """Register the records of one call: all of them, or none.

        Raises:
            RequestError: a rid or alias is in flight already, or occurs twice in the call.
        """
        fresh: dict[str, RequestRecord] = {}
        aliases: dict[str, dict[int, RequestRecord]] = {}
        for record in records:
            if record.rid in fresh or self._in_flight(record.rid):
                raise RequestError(f"Duplicate request ID detected: {record.rid}")
            fresh[record.rid] = record
            for alias in record.aliases:
                aliases.setdefault(alias, {})[record.req_id] = record
        for alias in aliases:
            if alias in fresh or self._in_flight(alias):
                raise RequestError(f"Duplicate request ID detected: {alias}")
        self.by_rid.update(fresh)
        self._by_alias.update(aliases)

    def discard(self, record: RequestRecord) -> None:
        """Free the record's names; does nothing for names that are not its own any more."""
        if self.by_rid.get(record.rid) is record:
            del self.by_rid[record.rid]
        for alias in record.aliases:
            members = self._by_alias.get(alias)
            if members is not None and members.get(record.req_id) is record:
                del members[record.req_id]
                if not members:
                    del self._by_alias[alias]

    def find(self, rid: str, *, prefix: bool = False) -> list[RequestRecord]:
        """The records a rid stands for; with `prefix`, those of every rid that starts with it."""
        if not prefix:
            record = self.by_rid.get(rid)
            return list(self._by_alias.get(rid, {}).values()) if record is None else [record]
        found = {record.req_id: record for name, record in self.by_rid.items() if name.startswith(rid)}
        for alias, members in self._by_alias.items():
            if alias.startswith(rid):
                found |= members
        return list(found.values())

    def _in_flight(self, rid: str) -> bool:
        return rid in self.by_rid or rid in self._by_alias
