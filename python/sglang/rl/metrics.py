"""What a run tells about itself: the names of its metrics and the log that they go to.

`RunLog` is owned by `train` on rank 0; `losses`, `trainer`, `rollout` and `plots` take the names from here.
Invariants: metrics.jsonl holds one JSON object a step in the order of steps, flushed before `log` returns; it is valid
JSON whatever the numbers are; after `resume(n)` it is as if no step beyond n had ever run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import numbers
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"
"""In a run's directory."""

STEP = "step"
VERSION = "version"
REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
EVAL = "eval/"
"""Before the name of an evaluation set."""
RATIO_MEAN = "ratio/mean"
RATIO_MAX = "ratio/max"
CLIP_SHARE = "clip/share"
MASK_SHARE = "mask/share"
M2 = "m2"
KL = "kl"
KL_REFERENCE = "kl/reference"
LOSS = "loss"
GRAD_NORM = "grad_norm"
LR = "lr"
LOGP_GAP_MEAN = "logp_gap/mean"
"""Of |server's - trainer's| log-probability of a token, by the same version; null where no token is of that."""
LOGP_GAP_MAX = "logp_gap/max"
STALENESS_MEAN = "staleness/mean"
STALENESS_MAX = "staleness/max"
SYNC_SECONDS = "sync/seconds"
ROLLOUT_SECONDS = "rollout/seconds"
TRAIN_SECONDS = "train/seconds"
TOKENS_PER_SECOND = "tokens/per_second"
TOKENS_PER_STEP = "tokens/step"
GROUPS_KEPT = "groups/kept"
SAMPLES_ABORTED = "samples/aborted"
SAMPLES_CONTINUED = "samples/continued"
HANGS = "hangs"


class RunLog:
    """Log of a run: metrics.jsonl, TensorBoard if it is installed, and a line of progress.

    Args:
        out_dir: the run's directory; made if there is none. An existing log is appended to.
        total_steps: of the run, for the progress and the time that is left; 0: unknown.
    """

    def __init__(self, out_dir: str | os.PathLike[str], total_steps: int = 0) -> None:
        self.path = Path(out_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        self._has_board = _tensorboard_is_there()
        self._purge_step: int | None = None
        self._console = _ProgressLine(total_steps)

    def resume(self, step: int) -> None:
        """Forget what was logged beyond `step`, and a last line that a crash cut off; -1 forgets everything.

        Call it before the first `log`.
        """
        kept = [line for line in read_log(self.path) if line[STEP] <= step]
        self._file.close()
        # A crash in here must leave the old log or the new one.
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(_encode(line) for line in kept), encoding="utf-8")
        fresh.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = step + 1

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Record a step.

        Args:
            values: by the names above; numbers, or tensors and arrays of one. NaN and infinities become null.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(_encode({STEP: step, **plain}))
        self._file.flush()
        if self._has_board:
            self._to_board(step, plain)
        self._console.show(step, plain)

    def close(self) -> None:
        """End the log; it cannot be used after."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._console.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _to_board(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path.parent), purge_step=self._purge_step)
        for name, value in values.items():
            if value is not None and name != STEP:
                self._board.add_scalar(name, value, step)
        self._board.flush()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, but for any that is no JSON object with a step: a crash may cut the last one off.

    Raises:
        OSError: it cannot be read.
    """
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and STEP in line:
            lines.append(line)
    return lines


def summary(values: Mapping[str, float | None]) -> str:
    """The few numbers of a step that a person watches, as one line."""
    evals = [(name, name.removeprefix(EVAL)) for name in values if name.startswith(EVAL)]
    shown = [
        (REWARD_MEAN, "reward", "{:.3f}"),
        *((name, label, "{:.3f}") for name, label in evals),
        (RATIO_MEAN, "weight", "{:.4f}"),
        (LOGP_GAP_MEAN, "gap", "{:.1e}"),
        (SYNC_SECONDS, "sync", "{:.2f} s"),
        (TOKENS_PER_SECOND, "tokens/s", "{:,.0f}"),
    ]
    found = [(label, form, values.get(name)) for name, label, form in shown]
    return "  ".join(f"{label} {form.format(value)}" for label, form, value in found if value is not None)


class _ProgressLine:
    """The line of progress: drawn in place on a terminal with rich, else a log record a step."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._evals: dict[str, float | None] = {}
        self._began: tuple[int, float] | None = None
        self._live: tuple[Progress, TaskID] | None = None
        self._is_new = True

    def show(self, step: int, values: Mapping[str, float | None]) -> None:
        # Evaluations are rare: the last ones stay on the line.
        self._evals.update((name, value) for name, value in values.items() if name.startswith(EVAL))
        line = "  ".join(part for part in (summary({**self._evals, **values}), self._time_left(step)) if part)
        if self._is_new:
            self._live, self._is_new = _live_progress(self._total), False
        if self._live is None:
            logger.info("step %d%s  %s", step, f"/{self._total}" if self._total else "", line)
            return
        progress, task = self._live
        progress.update(task, completed=step, line=line)

    def close(self) -> None:
        if self._live is not None:
            self._live[0].stop()

    def _time_left(self, step: int) -> str:
        """From the mean duration of this process's own steps; of a resumed run the earlier ones are not counted."""
        now = time.monotonic()
        if self._began is None:
            self._began = step, now
        first, since = self._began
        if step <= first or step >= self._total:
            return ""
        seconds = round((now - since) / (step - first) * (self._total - step))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _live_progress(total_steps: int) -> tuple[Progress, TaskID] | None:
    """A started progress bar, or None where nobody watches or rich is not installed."""
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[line]}"))
    progress = Progress(*columns, console=console)
    task = progress.add_task("", total=total_steps or None, line="")
    progress.start()
    return progress, task


def _tensorboard_is_there() -> bool:
    if importlib.util.find_spec("tensorboard") is not None:
        return True
    logger.warning("tensorboard is not installed: metrics go to %s only", FILE)
    return False


def _plain(value: SupportsFloat) -> int | float | None:
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _encode(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
