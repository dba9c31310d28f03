"""Sums of two numbers: ``17+5=`` wants ``22`` and then the end. Learnt by a model of half a million weights."""

from __future__ import annotations

import random

from sglang.rl.config import TaskSection
from sglang.rl.rewards import exact_match
from sglang.rl.samples import Problem
from sglang.rl.tasks.base import Options, PromptTokenizer, Task, TaskError, plain_prompt, random_of, read_options


class SumsOptions(Options, frozen=True, kw_only=True):
    """Options of the task.

    Fields:
        below: both numbers are from 0 to this one less 1.
    """

    below: int = 100


class Sums(Task):
    """See the module."""

    def __init__(self, section: TaskSection, tokenizer: PromptTokenizer) -> None:
        super().__init__(section, tokenizer)
        self._options = _options(section)
        self._evals = {name: _options(section, overrides) for name, overrides in section.eval.items()}

    def problem(self, seed: int, index: int) -> Problem:
        """See `Task`."""
        return self._sum(random_of(seed, index), self._options.below)

    def evals(self) -> dict[str, list[Problem]]:
        """See `Task`."""
        sets = {}
        for name, options in self._evals.items():
            rng = random_of("eval", options.seed)
            sets[name] = [self._sum(rng, options.below) for _ in range(options.count)]
        return sets

    def score(self, problem: Problem, text: str, finish: str) -> float:
        """See `Task`."""
        return exact_match(text, problem.answer, finish)

    def _sum(self, rng: random.Random, below: int) -> Problem:
        a, b = rng.randrange(below), rng.randrange(below)
        return Problem(prompt=plain_prompt(self.tokenizer, f"{a}+{b}="), answer=str(a + b), key=f"sums/{a}+{b}")


def _options(section: TaskSection, overrides: dict[str, object] | None = None) -> SumsOptions:
    options = read_options(SumsOptions, section, overrides)
    if options.below < 1:
        raise TaskError(f"below is {options.below}; numbers are drawn below it, so it must be at least 1")
    return options
