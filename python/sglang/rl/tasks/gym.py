"""Problems that the package `reasoning-gym` makes up: any of its data sets, alone or mixed, without a download.

The package is imported when a task is built. Invariant: scorers run one at a time, and one that raises has scored 0.
"""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sglang.rl.config import TaskSection
from sglang.rl.rewards import EXTRACTORS, extract
from sglang.rl.samples import Problem
from sglang.rl.tasks.base import Options, PromptTokenizer, Task, TaskError, chat_prompt, random_of, read_options


class GymOptions(Options, frozen=True, kw_only=True):
    """Options of the task.

    Fields:
        datasets: name of a data set -> its configuration; problems are drawn from all.
        weights: name -> how often, relative to the others; 1 unless given.
        extraction: how the answer is found in a text, of `rewards.EXTRACTORS`.
        system: message of the system; suffix: appended to every question.
        partial: whether marks between 0 and 1, which some data sets give, count; if not they are 0, and a mean reward
            is the share of right answers.
        examples: questions with their answers, turns before every question: they show a weak model the form.
        template: variables of the chat template.
        size: problems of each data set before they come again; some data sets allow only small ones.
    """

    datasets: dict[str, dict[str, Any]] = {}
    weights: dict[str, float] = {}
    extraction: str = "answer"
    system: str = ""
    partial: bool = True
    suffix: str = "\nThink step by step, and end with a line that says Answer: and the final answer alone."
    examples: tuple[tuple[str, str], ...] = ()
    template: dict[str, Any] = {}
    size: int = 1 << 30


@dataclass(frozen=True, slots=True)
class GymAnswer:
    """What it takes to score: the data set, its entry, the way to the answer, and whether partial marks count."""

    dataset: Any
    entry: dict[str, Any]
    extraction: str
    partial: bool


class ReasoningGym(Task):
    """See the module."""

    def __init__(self, section: TaskSection, tokenizer: PromptTokenizer) -> None:
        super().__init__(section, tokenizer)
        self._gym = _package()
        self._options = _options(section)
        self._evals = {name: _options(section, overrides) for name, overrides in section.eval.items()}
        self._made: dict[tuple[str, str, int], Any] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        for options in (self._options, *self._evals.values()):
            for name in options.datasets:
                self._dataset(options, name, 0)

    def problem(self, seed: int, index: int) -> Problem:
        """See `Task`."""
        return self._draw(self._options, seed, index, "train")

    def evals(self) -> dict[str, list[Problem]]:
        """See `Task`."""
        return {
            name: [self._draw(options, options.seed, index, name) for index in range(options.count)]
            for name, options in self._evals.items()
        }

    def score(self, problem: Problem, text: str, finish: str) -> float:
        """See `Task`."""
        answer: GymAnswer = problem.answer
        found = None if finish == "abort" else extract(answer.extraction, text)
        with self._lock:
            if found is None:
                self._counts["no_answer"] += 1
                return 0.0
            try:
                mark = float(answer.dataset.score_answer(found, answer.entry))
            except Exception:  # scorers parse what the model wrote, and not all expect anything
                self._counts["scorer_failed"] += 1
                return 0.0
        return mark if answer.partial or mark == 1.0 else 0.0

    def counters(self) -> dict[str, int]:
        """Texts without an answer, and answers that broke the data set's own scorer."""
        return dict(self._counts)

    def _draw(self, options: GymOptions, seed: int, index: int, kind: str) -> Problem:
        names = sorted(options.datasets)
        rng = random_of("gym", seed, index)
        name = rng.choices(names, [options.weights.get(name, 1.0) for name in names])[0]
        dataset = self._dataset(options, name, seed)
        entry = dataset[index % len(dataset)]
        question = entry["question"] + options.suffix
        prompt = chat_prompt(
            self.tokenizer, question, system=options.system, examples=options.examples, template=options.template
        )
        return Problem(
            prompt=prompt,
            answer=GymAnswer(dataset, entry, options.extraction, options.partial),
            key=f"{name}/{kind}/{seed}/{index}",
        )

    def _dataset(self, options: GymOptions, name: str, seed: int) -> Any:
        """The package's own; it adds a problem's index to its seed, so ours are spread out."""
        config = {"size": options.size, **options.datasets[name]}
        key = (name, repr(sorted(config.items())), seed)
        if key not in self._made:
            try:
                self._made[key] = self._gym.create_dataset(name, seed=random_of(seed).getrandbits(48), **config)
            except (ValueError, TypeError, AssertionError) as error:
                raise TaskError(
                    f"reasoning-gym cannot make {name!r} with {config}: {error}; its documentation lists data sets and "
                    "their configuration (if it is the size, give a smaller `size`)"
                ) from error
        return self._made[key]


def _package() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise TaskError(f"the task needs the package reasoning-gym ({error}); pip install reasoning-gym") from error


def _options(section: TaskSection, overrides: dict[str, Any] | None = None) -> GymOptions:
    options = read_options(GymOptions, section, overrides)
    if not options.datasets:
        raise TaskError("reasoning_gym needs task.options.datasets, e.g. {chain_sum: {max_terms: 3}}")
    if options.extraction not in EXTRACTORS:
        raise TaskError(f"extraction {options.extraction!r} is not one of {', '.join(EXTRACTORS)}")
    if unknown := set(options.weights) - set(options.datasets):
        raise TaskError(f"weights are given for {sorted(unknown)}, which are not among the datasets")
    return options
