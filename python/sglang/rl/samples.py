"""What rollouts are: attempts at a problem, token by token with the version that drew each.

Made by `rollout`, given rewards by `tasks`, turned into tensors by `batching`. Plain data, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to solve.

    Fields:
        prompt: text that the model sees, the chat template applied.
        answer: whatever its task needs to score an attempt.
        key: names the problem in logs; the same in every run of a seed.
    """

    prompt: str
    answer: Any
    key: str


@dataclass(slots=True)
class Sample:
    """One attempt.

    Fields:
        output_ids: with the token that ended it, if one did.
        logprobs: of each output token at the temperature it was drawn with, as the server computed them.
        versions: number of the publish whose adapter drew each output token; 0 is the base model.
        finish: stop, length, or abort (cut off and not continued).
    """

    prompt_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    reward: float = 0.0
    continuations: int = 0
    """How often it was cut off and went on."""

    @property
    def oldest_version(self) -> int:
        """Of its tokens."""
        return min(self.versions, default=0)


@dataclass(slots=True)
class Group:
    """All attempts at one problem.

    Fields:
        started_at: version that was served when the group was begun.
    """

    problem: Problem
    samples: list[Sample]
    started_at: int = 0
