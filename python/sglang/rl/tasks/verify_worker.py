"""The child process of `rewards.MathVerifier`: reads a line of JSON, answers with a word, until its input ends.

Started as a module, by its name. Nothing but the words may reach its standard output. It may be killed at any time.
Words: right, wrong, unparsed (no answer in the text), bad_gold, failed (the package raised something).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
from typing import Any

from sglang.rl.rewards import MEMORY_BYTES


def verdict(question: dict[str, Any], verify: Any) -> str:
    """The word for one question.

    Args:
        question: text, gold, precision.
        verify: the package `math_verify`.
    """
    targets = (verify.LatexExtractionConfig(), verify.ExprExtractionConfig())
    gold = str(question["gold"])
    # Gold answers are bare expressions in most data sets, and LaTeX is only looked for where something marks it.
    marked = gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}"
    try:
        wanted = verify.parse(marked, extraction_config=targets)
        if not wanted:
            return "bad_gold"
        given = verify.parse(question["text"], extraction_config=targets)
        if not given:
            return "unparsed"
        return "right" if verify.verify(wanted, given, float_rounding=question["precision"]) else "wrong"
    except Exception:  # sympy raises whatever it likes on nonsense; an answer that breaks it is not right
        return "failed"


def main() -> None:
    """Answer until the input ends."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The package may print: words go to a copy of the output that nobody else has.
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        math_verify = importlib.import_module("math_verify")
    except ImportError as error:
        words.write(f"{type(error).__name__}: {error}\n")
        words.flush()
        return
    words.write("ready\n")
    words.flush()
    for line in sys.stdin:
        words.write(verdict(json.loads(line), math_verify) + "\n")
        words.flush()


if __name__ == "__main__":
    main()
