"""Stock's real TokenizerManager, before and after, on every path. Opt-in: imports torch and stock's dependencies."""

from __future__ import annotations

import pytest
import stock

VERSIONS = ("0.5.9", "0.5.10", "0.5.11", "0.5.12", "0.5.21")
LEAKS = ("abort_queued", "n4", "load_evicts_busy")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not stock.ASKED_FOR, reason=stock.MISSING)]


@pytest.fixture(params=VERSIONS)
def version(request):
    if stock.wheel(request.param) is None:
        pytest.skip(f"no wheel of sglang {request.param}: {stock.HOW}")
    return request.param


def test_stock_leaks(version):
    reports = stock.drive(stock.stock_tree(version), "finish", *LEAKS)
    assert stock.verdict(reports.pop("finish")) == "ok"
    assert all("HANG" in stock.verdict(report) for report in reports.values())


def test_patched_gives_everything_back(version):
    reports = stock.drive(stock.patched_tree(version))
    assert {path: stock.verdict(report) for path, report in reports.items()} == dict.fromkeys(reports, "ok")
    assert max(report.get("unload_ms", 0) for report in reports.values()) < 1000


def test_hook_gives_everything_back(version):
    reports = stock.drive(stock.stock_tree(version), "finish", *LEAKS, hook=True)
    assert all(report["patched"] for report in reports.values())
    assert {path: stock.verdict(report) for path, report in reports.items()} == dict.fromkeys(reports, "ok")


def test_apply_imports_what_it_wrote(version):
    """As a user runs it, with the import check, in an environment in which stock imports."""
    assert stock.checked_apply(version) == 0
