"""Killing a process tree leaves nobody behind."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from sglang.srt.utils import kill_process_tree

WAIT = "import sys; sys.stdin.read()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAIT!r}], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def family():
    """(process, pid of its child)"""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        yield parent, child
        parent.kill()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_parent_and_child_go(family):
    parent, child = family
    kill_process_tree(parent.pid)
    assert not alive(parent.pid)
    assert not alive(child)


def test_the_parent_may_stay(family):
    parent, child = family
    kill_process_tree(parent.pid, include_parent=False)
    assert alive(parent.pid)
    assert not alive(child)


def test_a_process_may_be_spared(family):
    parent, child = family
    kill_process_tree(parent.pid, skip_pid=child)
    assert not alive(parent.pid)
    assert alive(child)
    kill_process_tree(child)


def test_a_process_that_is_gone_is_no_error(family):
    parent, _ = family
    kill_process_tree(parent.pid)
    kill_process_tree(parent.pid)


def test_killing_oneself_exits():
    code = "import os; from sglang.srt.utils import kill_process_tree; kill_process_tree(os.getpid()); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_unknown_helpers_are_attribute_errors():
    import sglang.srt.utils as utils

    with pytest.raises(AttributeError, match="no_such_helper"):
        utils.no_such_helper  # noqa: B018
