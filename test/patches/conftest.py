"""Makes the patcher importable from its sources; what needs libcst is skipped where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "patches" / "src"
sys.path.insert(0, str(SOURCES))


@pytest.fixture
def toy(tmp_path):
    """A folder with a toy release of the same structure as the real ones."""
    from toy_stock import write

    return write(tmp_path / "site")
