"""Markdown tables of a run's records beside `reference_numbers`. Called by `gpu.py`; also reads a results.jsonl:

python benchmark/serving/gpu_tables.py OUT/results.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import reference_numbers as reference

Records = list[dict[str, Any]]


def tables(records: Records) -> str:
    """Every table there are records for."""
    parts = [_decode(records), _prefill(records), _streaming(records), _sync(records), _startup(records)]
    problems = [f"- {r['case']} ({r['server']}): {r['error'].splitlines()[0]}" for r in records if "error" in r]
    if problems:
        parts.append("## Problems\n" + "\n".join(problems))
    return "\n\n".join([*filter(None, parts), f"Beside ours: {reference.SOURCE}"]) + "\n"


def load(path: Path) -> Records:
    """Records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def decode_series(records: Records) -> dict[str, dict[int, float]]:
    """Milliseconds per token by concurrency, for each server and traffic; of several runs the last counts."""
    series: dict[str, dict[int, float]] = {}
    for r in records:
        if r["case"] == "decode" and "ms_per_token" in r:
            series.setdefault(f"{r['server']}: {r['traffic']}", {})[r["concurrency"]] = r["ms_per_token"]
    return series


def _decode(records: Records) -> str:
    ours = decode_series(records)
    if not ours:
        return ""
    series = ours | reference.DECODE_MS
    concurrencies = sorted({c for values in ours.values() for c in values})
    rows = [[str(c), *(_cell(values.get(c)) for values in series.values())] for c in concurrencies]
    return "## Decode: ms per token and request\n" + _table(["requests", *series], rows)


def _prefill(records: Records) -> str:
    rows = [[f"{r['server']}: {r['traffic']}", _cell(r.get("wall_s"))] for r in records if r["case"] == "prefill"]
    if not rows:
        return ""
    rows += [[name, _cell(value)] for name, value in reference.PREFILL_S.items()]
    return "## Prefill: seconds for 64 x 2048 tokens (ours: see requests in the records)\n" + _table(["", "s"], rows)


def _streaming(records: Records) -> str:
    names = ("tokens_per_s_whole", "tokens_per_s", "ratio", "gap_p50_ms", "gap_p99_ms", "ttft_p99_ms", "client_cpu")
    rows = [
        [f"{r['server']}: {r['traffic']}", *(_cell(r.get(name)) for name in names)]
        for r in records
        if r["case"] == "streaming"
    ]
    if not rows:
        return ""
    for name, ratio in reference.STREAMED_RATIO.items():
        rows.append([name, "", "", _cell(ratio), *[""] * (len(names) - 3)])
    return "## Streaming against whole replies\n" + _table(["", *names], rows)


def _sync(records: Records) -> str:
    names = ("aborted", "total_ms", "first_token_ms", "gap_before_p99_ms", "gap_after_p99_ms", "gap_growth_ms")
    rows = [
        [f"{r['server']}: {r['traffic']}", *(_cell(r.get(name)) for name in names)]
        for r in records
        if r["case"] == "sync_summary"
    ]
    if not rows:
        return ""
    for name, values in reference.SYNC.items():
        total = values["pause_load_flush_continue_ms"]
        rows.append([f"{name} (a round)", *(_cell(total if n == "total_ms" else values.get(n)) for n in names)])
    return "## Publishing under streams (aborted: of all rounds; times: medians)\n" + _table(["", *names], rows)


def _startup(records: Records) -> str:
    rows = [
        [r["server"], _cell(r["import_first_s"]), _cell(r["import_s"]), _cell(r["ready_s"])]
        for r in records
        if r["case"] == "startup"
    ]
    if not rows:
        return ""
    rows += [[name, "", _cell(v["import"]), _cell(v["ready"])] for name, v in reference.STARTUP_S.items()]
    return "## Start-up: seconds\n" + _table(["", "first import", "import", "ready"], rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(tables(load(Path(sys.argv[1]))), end="")
