"""Adapter versions that are in memory and wait for their commit: one per name, each for a limited time.

Owned by AdapterService, on the event-loop thread. Invariant: whoever is in here is STAGING, and leaves by `take` or by
being retired; nothing waits for longer than the seconds it was given.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sglang.srt.lora.lease import AdapterVersion

logger = logging.getLogger(__name__)


class StagedVersions:
    """See the module.

    Args:
        retire: ends a version that will not be committed.
    """

    def __init__(self, retire: Callable[[AdapterVersion], None]) -> None:
        self._retire = retire
        self._waiting: dict[str, tuple[AdapterVersion, asyncio.TimerHandle, float]] = {}

    def __contains__(self, version: AdapterVersion) -> bool:
        return self.of(version.name) is version

    def of(self, name: str) -> AdapterVersion | None:
        """The version that waits under a name."""
        return self._waiting[name][0] if name in self._waiting else None

    def add(self, version: AdapterVersion, seconds: float, started: float) -> None:
        """Wait for so long from now on; another one of its name is retired.

        Args:
            started: when its load was asked for; `take` gives it back.
        """
        before = self.of(version.name)
        if before is not None:
            self.take(before)
        if before is not None and before is not version:
            self._retire(before)
        timer = asyncio.get_running_loop().call_later(seconds, self._expire, version, seconds)
        self._waiting[version.name] = version, timer, started

    def take(self, version: AdapterVersion) -> float:
        """It waits no longer, and somebody else decides about it; returns when its load was asked for."""
        _, timer, started = self._waiting.pop(version.name)
        timer.cancel()
        return started

    def drop(self, name: str, version_id: int) -> bool:
        """Retire a version that waits; False when it does not."""
        version = self.of(name)
        if version is None or version.version_id != version_id:
            return False
        self.take(version)
        self._retire(version)
        return True

    def _expire(self, version: AdapterVersion, seconds: float) -> None:
        logger.warning(
            "version %d of adapter %s was not committed within %g s: dropped", version.version_id, version.name, seconds
        )
        self.drop(version.name, version.version_id)
