"""Bar chart of one benchmark line: `python benchmark/serving/plot.py LINE.json CHART.png`, or `bench.py --plot`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a chart: one panel a phase, one bar a system (median), a whisker from the slowest to the fastest round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = result["systems"]
    phases = list(next(iter(systems.values())))
    figure, panels = pyplot.subplots(1, len(phases), figsize=(3.2 * len(phases), 3.6), squeeze=False)
    for panel, phase in zip(panels[0], phases, strict=True):
        speeds = [figures[phase]["tokens_per_s"] for figures in systems.values()]
        medians = [s["median"] for s in speeds]
        whiskers = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
        bars = panel.bar(list(systems), medians, yerr=whiskers, capsize=4, color="#4878a8")
        panel.bar_label(bars, fmt="%.0f", padding=2)
        panel.set_title("prefill" if phase == "prefill" else f"{phase[1:]} concurrent")
        panel.tick_params(axis="x", rotation=30)
    panels[0][0].set_ylabel("tokens/s")
    device = result["device"]
    figure.suptitle(
        f"{result['settings']['model']} on {device['cpu']}, {device['cores']} cores, commit {result['commit']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text().splitlines()[-1]), Path(sys.argv[2]))
