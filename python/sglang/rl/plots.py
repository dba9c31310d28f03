"""Pictures of runs, drawn from their metrics.jsonl alone.

Called by `director` after every evaluation and by whoever compares runs. Owns no state: matplotlib is imported when
something is drawn, without pyplot, so that no display is needed and no global figure is left behind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.rl import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[list[int], list[float]]
"""Steps, values."""

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", (metrics.REWARD_MEAN,)),
    ("evaluation", (metrics.EVAL,)),
    ("importance weight", (metrics.RATIO_MEAN, metrics.RATIO_MAX)),
    ("|log p of server - of trainer|", (metrics.LOGP_GAP_MEAN, metrics.LOGP_GAP_MAX)),
    ("staleness, versions", (metrics.STALENESS_MEAN, metrics.STALENESS_MAX)),
    ("weight sync, s", (metrics.SYNC_SECONDS,)),
    ("tokens/s", (metrics.TOKENS_PER_SECOND,)),
)
"""Title -> metrics of one panel; a name that ends in a slash stands for all that begin with it."""

_COLUMNS = 3
_STYLES = ("-", "--", ":", "-.")


def plot_curves(log: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Draw one run: a panel for each of `PANELS` that the log has numbers for.

    Args:
        log: a metrics.jsonl.
        out: picture to write; its suffix is the format, usually png.

    Raises:
        OSError: the log cannot be read or the picture not written.
        ValueError: the log has nothing to draw.
        ImportError: matplotlib is not installed.
    """
    plot_runs({"": log}, out)


def plot_runs(logs: Mapping[str, str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Draw several runs in the same panels, a colour for each; arguments and errors as of `plot_curves`.

    Args:
        logs: label -> metrics.jsonl.
    """
    runs = {label: read_series(log) for label, log in logs.items()}
    drawn = [(title, names) for title, patterns in PANELS if (names := _names(runs, patterns))]
    if not drawn:
        raise ValueError(f"nothing to draw in {', '.join(str(log) for log in logs.values()) or 'no logs'}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'sglang[train]'") from error

    columns = min(_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, names) in zip(panels, drawn, strict=False):
        _draw(axes, title, names, runs)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def read_series(log: str | os.PathLike[str]) -> dict[str, Series]:
    """Metric -> its steps and values, of the steps that have a number for it.

    Raises:
        OSError: it cannot be read.
    """
    series: dict[str, Series] = {}
    for line in metrics.read_log(log):
        for name, value in line.items():
            if name == metrics.STEP or value is None:
                continue
            steps, values = series.setdefault(name, ([], []))
            steps.append(line[metrics.STEP])
            values.append(value)
    return series


def _names(runs: Mapping[str, Mapping[str, Series]], patterns: tuple[str, ...]) -> list[str]:
    """Metrics of a panel that any run has, in the order of the patterns."""
    known = sorted({name for series in runs.values() for name in series})
    return [
        name
        for pattern in patterns
        for name in known
        if name == pattern or (pattern.endswith("/") and name.startswith(pattern))
    ]


def _draw(axes: Axes, title: str, names: list[str], runs: Mapping[str, Mapping[str, Series]]) -> None:
    """Colours tell runs apart and styles metrics; of a single run, colours tell metrics."""
    lines = 0
    for r, (label, series) in enumerate(runs.items()):
        for n, name in enumerate(names):
            if name not in series:
                continue
            steps, values = series[name]
            several = len(runs) > 1
            text = " ".join(part for part in (label, name if len(names) > 1 or not several else "") if part)
            style, color = (_STYLES[n % len(_STYLES)], f"C{r}") if several else ("-", f"C{n}")
            # Few points (evaluations) are seen by their markers.
            marker = "o" if len(steps) <= 20 else ""
            axes.plot(steps, values, linestyle=style, color=color, marker=marker, markersize=3, label=text)
            lines += 1
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if lines > 1:
        axes.legend(fontsize=7)
