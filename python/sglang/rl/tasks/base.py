"""What a task is, and what tasks share: options, prompts, shuffled passes.

Used by the tasks; `rollout` and `train` know `Task`. Invariant: a problem depends on the task's options, the seed and
its index alone, so that a run can be resumed anywhere and repeated.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from sglang.rl.config import RecipeError, TaskSection
from sglang.rl.samples import Problem

OptionsT = TypeVar("OptionsT", bound="Options")

EVAL_SEED = 1_000_000_007
"""Of evaluation sets, unless they say otherwise: far from the seeds of runs."""


class TaskError(RecipeError):
    """A task that cannot be built or give problems; the message says what to do."""


class PromptTokenizer(Protocol):
    """What tasks and rollouts need of a tokenizer; transformers' fast ones and the server's own have it."""

    chat_template: Any

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text."""

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Prompt text, with ``tokenize=False``."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options that all tasks have.

    Fields:
        count: of an evaluation set: how many problems.
        seed: of an evaluation set.
    """

    count: int = 200
    seed: int = EVAL_SEED


class Task(ABC):
    """Problems and their scores.

    Args:
        section: name, options, and options of evaluation sets over them.

    Raises:
        TaskError: the options make no sense, or data cannot be had.
    """

    def __init__(self, section: TaskSection, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    def problem(self, seed: int, index: int) -> Problem:
        """One of the endless sequence of a seed; the same whenever it is asked for.

        Args:
            index: from 0.
        """

    def train(self, seed: int, start: int = 0) -> Iterator[Problem]:
        """The endless sequence of a seed, from the problem number `start` on."""
        return (self.problem(seed, index) for index in itertools.count(start))

    @abstractmethod
    def evals(self) -> dict[str, list[Problem]]:
        """Evaluation sets by name."""

    @abstractmethod
    def score(self, problem: Problem, text: str, finish: str) -> float:
        """Reward of an attempt, in [0, 1]; any thread may call it, several at once.

        Args:
            finish: stop, length or abort, as in `samples.Sample`.
        """

    def counters(self) -> dict[str, int]:
        """What there is to say about the scoring so far, by name."""
        return {}

    def close(self) -> None:  # noqa: B027 - most tasks own nothing
        """Free what the task owns."""


def read_options(kind: type[OptionsT], section: TaskSection, overrides: Mapping[str, Any] | None = None) -> OptionsT:
    """A section's options, checked.

    Args:
        overrides: an evaluation set's.

    Raises:
        TaskError: unknown names, wrong types.
    """
    try:
        return msgspec.convert({**section.options, **(overrides or {})}, kind, strict=False)
    except msgspec.ValidationError as error:
        where = "task.eval" if overrides is not None else "task.options"
        raise TaskError(f"{where} of {section.name}: {error}") from error


def random_of(*parts: object) -> random.Random:
    """A generator that depends on these values alone, the same on every machine."""
    return random.Random("/".join(map(str, parts)))


def plain_prompt(tokenizer: PromptTokenizer, text: str) -> str:
    """The text as a base model wants it: behind the token that begins a sequence, if the tokenizer puts one there."""
    start = tokenizer.encode("", add_special_tokens=True)[:1]
    first = tokenizer.decode(start, skip_special_tokens=False) if start else ""
    # An empty text may also get an end token; only what stands before a real text counts.
    begins = bool(start) and tokenizer.encode(text, add_special_tokens=True)[:1] == start
    return first + text if begins and tokenizer.encode(text, add_special_tokens=False)[:1] != start else text


def chat_prompt(
    tokenizer: PromptTokenizer,
    question: str,
    *,
    system: str = "",
    examples: Sequence[tuple[str, str]] = (),
    template: Mapping[str, Any] | None = None,
) -> str:
    """The question as a user's turn of the model's chat template; without one, as a plain text.

    Args:
        examples: turns before it, each a question and the model's answer.
        template: variables of the chat template, e.g. ``{"enable_thinking": False}``.
    """
    if not tokenizer.chat_template:
        shown = [f"{asked}\n{answered}" for asked, answered in examples]
        return plain_prompt(tokenizer, "\n\n".join([*filter(None, [system]), *shown, question]))
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question})
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **dict(template or {})
    )
    return text


class Passes:
    """Endless shuffled passes over a finite set: every pass has every item once, in an order of its own."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._orders: dict[tuple[int, int], list[int]] = {}

    def item(self, seed: int, index: int) -> int:
        """Which item stands at `index` of a seed's sequence."""
        epoch, place = divmod(index, self._size)
        order = self._orders.get((seed, epoch))
        if order is None:
            order = list(range(self._size))
            random_of(seed, epoch).shuffle(order)
            # The pass before is still asked for where one begins.
            self._orders = {key: value for key, value in self._orders.items() if key == (seed, epoch - 1)}
            self._orders[seed, epoch] = order
        return order[place]
