"""Charts of a GPU run beside the published figures: `python benchmark/serving/plot_gpu.py OUT [MORE/results.jsonl]`.

`gpu.py` calls `plot` at its end. Writes decode.png (ms per token over concurrency) and summary.png (prefill, streaming,
publishing) into OUT. Needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import reference_numbers as reference
from gpu_tables import Records, decode_series, load

REFERENCE_LINES = {
    "stock, LoRA off": ("#888888", "--"),
    "stock, one adapter": ("#c44e52", "--"),
    "goal, one adapter": ("#55a868", ":"),
    "limit": ("#000000", ":"),
}


def plot(records: Records, out: Path) -> list[Path]:
    """Write the charts there are records for; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, draw in (("decode.png", _decode), ("summary.png", _summary)):
        figure = draw(pyplot, records)
        if figure is not None:
            figure.suptitle(_title(records), fontsize=8)
            figure.tight_layout()
            figure.savefig(out / name, dpi=150)
            pyplot.close(figure)
            written.append(out / name)
    return written


def _decode(pyplot: Any, records: Records) -> Any:
    ours = decode_series(records)
    if not ours:
        return None
    figure, panel = pyplot.subplots(figsize=(7, 4.5))
    for name, (colour, style) in REFERENCE_LINES.items():
        values = reference.DECODE_MS[name]
        panel.plot(list(values), list(values.values()), style, color=colour, label=name, linewidth=1)
    for name, values in ours.items():
        panel.plot(list(values), list(values.values()), "o-", label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = sorted({c for values in [*ours.values(), reference.DECODE_MS["limit"]] for c in values})
    panel.set_xticks(ticks, [str(c) for c in ticks])
    panel.set_xlabel("concurrent requests")
    panel.set_ylabel("ms per token and request")
    panel.grid(visible=True, which="both", alpha=0.2)
    panel.legend(fontsize=7)
    return figure


def _summary(pyplot: Any, records: Records) -> Any:
    bars = {name: values for name, values in _bars(records).items() if values[0]}
    if not bars:
        return None
    figure, panels = pyplot.subplots(1, len(bars), figsize=(4 * len(bars), 4.2), squeeze=False)
    for panel, (title, (mine, others)) in zip(panels[0], bars.items(), strict=True):
        values = mine | others
        colours = ["#4878a8"] * len(mine) + ["#bbbbbb"] * (len(values) - len(mine))
        panel.bar_label(
            panel.bar(list(values), list(values.values()), color=colours), fmt="%.4g", padding=2, fontsize=8
        )
        panel.margins(y=0.12)
        panel.set_title(title, fontsize=9)
        panel.tick_params(axis="x", rotation=60, labelsize=7)
    return figure


def _bars(records: Records) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Ours and the published figures, by panel."""

    def ours(case: str, name: str) -> dict[str, float]:
        return {f"{r['server']}: {r['traffic']}": r[name] for r in records if r["case"] == case and r.get(name)}

    first_token = {name: values["first_token_ms"] for name, values in reference.SYNC.items()}
    return {
        "prefill of 64 x 2048 tokens, s": (ours("prefill", "wall_s"), reference.PREFILL_S),
        "streamed over whole, tokens/s": (ours("streaming", "ratio"), reference.STREAMED_RATIO),
        "first token of a new adapter, ms": (ours("sync_summary", "first_token_ms"), first_token),
    }


def _title(records: Records) -> str:
    last = records[-1]
    device = last["device"]
    where = device["cpu"] if device["gpu"] == "none" else device["gpu"]
    run = f"{last['model']} on {where}, commit {last['commit']}, torch {last['versions']['torch']}"
    return f"{run}\nbroken lines and grey bars: {reference.MEASURED_ON}"


def main() -> None:
    """Draw the results of the directories or files named; charts go to the first."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    files = [path / "results.jsonl" if path.is_dir() else path for path in paths]
    out = paths[0] if paths[0].is_dir() else paths[0].parent
    for path in plot([record for file in files for record in load(file)], out):
        print(path)


if __name__ == "__main__":
    main()
