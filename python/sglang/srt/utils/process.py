"""Ending processes. Called by clients that started a server; the server itself ends its back process in `launcher`."""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

REAP_SECONDS = 5.0
"""How long to wait for killed processes to be gone."""


def kill_process_tree(parent_pid: int | None, include_parent: bool = True, skip_pid: int | None = None) -> None:
    """Kill a process and everything it started, and wait until they are gone.

    Args:
        parent_pid: root of the tree; None for this process, which then spares itself.
        include_parent: kill the root, too. When the root is this process, it exits with status 0.
        skip_pid: a process to spare.
    """
    if parent_pid is None:
        parent_pid, include_parent = os.getpid(), False
    try:
        parent = psutil.Process(parent_pid)
        victims = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    itself = parent_pid == os.getpid()
    if include_parent and not itself:
        victims.append(parent)
    victims = [victim for victim in victims if victim.pid != skip_pid]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=REAP_SECONDS)
    if include_parent and itself:
        sys.exit(0)
