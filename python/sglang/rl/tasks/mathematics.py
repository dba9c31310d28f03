"""Mathematics with answers that can be checked: data sets of a hub or of a file, verdicts by `math-verify`.

The defaults are the published recipe's: DeepScaleR to train on, an answer in a box, 1 for a right one and 0 for
anything else. Evaluation sets name data sets of their own.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang.rl.config import TaskSection
from sglang.rl.rewards import MathVerifier
from sglang.rl.samples import Problem
from sglang.rl.tasks.base import Options, Passes, PromptTokenizer, Task, TaskError, chat_prompt, read_options

Row = tuple[str, str]
"""Question and answer."""


class MathOptions(Options, frozen=True, kw_only=True):
    """Options of the task.

    Fields:
        dataset: name on the hub, or path of a .jsonl file with an object a line.
        subset, split: of a data set of the hub.
        question, answer: names of the columns.
        suffix: appended to every question; system: message of the system; template: variables of the chat template.
        max_prompt_tokens: longer problems are left out; 0 keeps all.
        limit: only the first so many; of evaluation sets, `count` does nothing.
        processes, timeout: of the verifier, see `rewards.MathVerifier`.
    """

    dataset: str = "agentica-org/DeepScaleR-Preview-Dataset"
    subset: str | None = None
    split: str = "train"
    question: str = "problem"
    answer: str = "answer"
    suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    system: str = ""
    template: dict[str, Any] = msgspec.field(default_factory=lambda: {"enable_thinking": False})
    max_prompt_tokens: int = 0
    limit: int = 0
    processes: int = 4
    timeout: float = 10.0


class Mathematics(Task):
    """See the module."""

    def __init__(self, section: TaskSection, tokenizer: PromptTokenizer) -> None:
        super().__init__(section, tokenizer)
        options = read_options(MathOptions, section)
        self._train = self._problems("train", options)
        self._evals = {
            name: self._problems(name, read_options(MathOptions, section, overrides))
            for name, overrides in section.eval.items()
        }
        self._passes = Passes(len(self._train))
        self._verifier = MathVerifier(processes=options.processes, timeout=options.timeout)

    def problem(self, seed: int, index: int) -> Problem:
        """See `Task`."""
        return self._train[self._passes.item(seed, index)]

    def evals(self) -> dict[str, list[Problem]]:
        """See `Task`."""
        return dict(self._evals)

    def score(self, problem: Problem, text: str, finish: str) -> float:
        """See `Task`. A text that was cut off is scored by what it says."""
        return 0.0 if finish == "abort" else self._verifier.score(text, problem.answer)

    def counters(self) -> dict[str, int]:
        """Verdicts so far, see `rewards.MathVerifier.counters`."""
        return self._verifier.counters()

    def close(self) -> None:
        """End the verifier's processes."""
        self._verifier.close()

    def _problems(self, kind: str, options: MathOptions) -> list[Problem]:
        problems = []
        for i, (question, answer) in enumerate(read_rows(options)):
            prompt = chat_prompt(
                self.tokenizer, question + options.suffix, system=options.system, template=options.template
            )
            if options.max_prompt_tokens:
                length = len(self.tokenizer.encode(prompt, add_special_tokens=False))
                if length > options.max_prompt_tokens:
                    continue
            problems.append(Problem(prompt=prompt, answer=answer, key=f"math/{kind}/{i}"))
        if not problems:
            raise TaskError(f"{options.dataset} has no problem with at most {options.max_prompt_tokens} prompt tokens")
        return problems


def read_rows(options: MathOptions) -> list[Row]:
    """Questions and answers of a data set, in its order.

    Raises:
        TaskError: it cannot be had, is empty, or lacks a column.
    """
    local = options.dataset.endswith(".jsonl")
    rows = _read_file(Path(options.dataset)) if local else _read_hub(options)
    found = [_row(row, options) for row in itertools.islice(rows, options.limit or None)]
    if not found:
        raise TaskError(f"{options.dataset} is empty")
    return found


def _row(row: Mapping[str, Any], options: MathOptions) -> Row:
    try:
        return str(row[options.question]), str(row[options.answer])
    except KeyError as error:
        raise TaskError(
            f"{options.dataset} has no column {error}, only {', '.join(row)}; say which with `question` and `answer`"
        ) from error


def _read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        # Not splitlines: JSON may hold Unicode's other line ends as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read as JSON objects, one a line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{path} must hold a JSON object in every line")
    return rows


def _read_hub(options: MathOptions) -> Iterable[Mapping[str, Any]]:
    remedy = (
        f"where a hub can be reached: datasets.load_dataset({options.dataset!r}, split={options.split!r})"
        '.to_json("problems.jsonl"); then set `dataset` to the path of that file'
    )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise TaskError(f"{options.dataset} needs the package datasets: pip install datasets; or {remedy}") from error
    try:
        loaded: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            options.dataset, options.subset, split=options.split
        )
    except Exception as error:  # of a dozen kinds, by what of the network is missing
        raise TaskError(f"{options.dataset} cannot be loaded ({type(error).__name__}: {error}); {remedy}") from error
    return loaded
