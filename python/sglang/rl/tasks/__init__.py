"""What can be trained on: problems with rewards, by name. Used by `train` and `rollout`.

A task is a sequence of problems without end for each seed, some evaluation sets, and a score for an attempt. See
`base.Task`; a new one is a module with a class and a line in `TASKS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.rl.config import TaskSection
    from sglang.rl.tasks.base import PromptTokenizer, Task

TASKS = {
    "sums": "sglang.rl.tasks.sums:Sums",
    "reasoning_gym": "sglang.rl.tasks.gym:ReasoningGym",
    "math": "sglang.rl.tasks.mathematics:Mathematics",
}
"""Name -> module and class."""


def make_task(section: TaskSection, tokenizer: PromptTokenizer) -> Task:
    """Build the task that a recipe names.

    Args:
        tokenizer: the model's, as transformers or `sglang.srt.parser.tokenizer` load it.

    Raises:
        TaskError: no such task, an option that it does not have, or data that cannot be had; says what to do.
    """
    # Modules are looked up here: importing the package must cost a child process nothing.
    errors = importlib.import_module("sglang.rl.tasks.base")
    if section.name not in TASKS:
        raise errors.TaskError(f"there is no task {section.name!r}; choose one of {', '.join(TASKS)}")
    module, _, name = TASKS[section.name].partition(":")
    task: Task = getattr(importlib.import_module(module), name)(section, tokenizer)
    return task
