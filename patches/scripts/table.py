#!/usr/bin/env python3
"""Prints which way of ending a request leaves what behind, by release, before and after the patch.

    python patches/scripts/table.py [--versions 0.5.9 0.5.21] [--again]

Needs the scratch environment of `stock_venv.sh`; fetches wheels it does not have. Measurements are kept beside the
wheels and taken again with --again.
"""

# ruff: noqa: T201  (printing is what it is for)
from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "test" / "patches"), str(REPOSITORY / "patches" / "src")]

import stock  # type: ignore[import-not-found]  # noqa: E402
from sglang_lora_patch.versions import SUPPORTED  # noqa: E402

COLUMNS = 4
Reports = dict[str, dict[str, Any]]


def fingerprint(run: str) -> str:
    """Changes with what drives the run, and for the one after the patch with what is inserted."""
    files = [Path(stock.__file__).with_name(name) for name in ("stock_driver.py", "stock_stub.py")]
    if run == "after":
        files += [stock.SOURCES / "sglang_lora_patch" / name for name in ("runtime.py", "transform.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def measure(version: str, *, again: bool) -> dict[str, Reports] | str:
    """Both runs of one release, or why there are none."""
    results: dict[str, Reports] = {}
    for run, tree in (("before", stock.stock_tree), ("after", stock.patched_tree)):
        kept = stock.HOME / "results" / f"{version}-{run}.json"
        known = json.loads(kept.read_text()) if kept.exists() and not again else {}
        if known.get("fingerprint") != fingerprint(run):
            try:
                place = tree(version, fetch=True)
                if place is None:
                    return "no wheel"
                known = {"fingerprint": fingerprint(run), "reports": stock.drive(place)}
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known))
        results[run] = known["reports"]
    return results


def show(results: dict[str, dict[str, Reports]]) -> None:
    """Print the table, a few releases side by side."""
    versions = list(results)
    for at in range(0, len(versions), COLUMNS):
        some = versions[at : at + COLUMNS]
        paths = list(results[some[0]]["before"])
        print(f"{'':26}" + "".join(f"{version:<28}" for version in some))
        print(f"{'path':26}" + f"{'before':<18}{'after':<10}" * len(some))
        for path in paths:
            cells = [(results[each]["before"].get(path), results[each]["after"].get(path)) for each in some]
            texts = [[stock.verdict(report) if report else "-" for report in pair] for pair in cells]
            print(f"{path:26}" + "".join(f"{before:<18}{after:<10}" for before, after in texts))
        print()


def main() -> int:
    """Measure what is asked for; 0 when a release was measured, and of each every path is ok after the patch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(SUPPORTED), metavar="X")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    if not stock.PYTHON.exists():
        print(f"no scratch environment in {stock.HOME}: run patches/scripts/stock_venv.sh")
        return 2
    results: dict[str, dict[str, Reports]] = {}
    for version in arguments.versions:
        measured = measure(version, again=arguments.again)
        if isinstance(measured, str):
            print(f"{version}: not measured ({measured})", flush=True)
        else:
            results[version] = measured
    show(results)
    bad = [
        f"{version} {path}"
        for version, runs in results.items()
        for path, report in runs["after"].items()
        if stock.verdict(report) != "ok"
    ]
    print(f"{len(results)} release(s) measured, after the patch not ok: {', '.join(bad) or 'none'}")
    return bool(bad) or not results


if __name__ == "__main__":
    raise SystemExit(main())
