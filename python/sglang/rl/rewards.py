r"""What an answer is worth: functions from texts to numbers, and a verifier of mathematics that cannot hang.

Used by `tasks`. The functions are pure. `MathVerifier` owns child processes that run `math-verify`.
Invariants: whatever a text holds, a verdict comes within the verifier's deadline; what cannot be parsed, takes too long
or kills its process is wrong, and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang.srt.errors import SglangError

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|[-+]?\.\d+")
_AFTER = re.compile(r"answer\s*(?:is\s*)?:\s*(.*)", re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")

START_SECONDS = 120.0
"""For a child to import its packages, on a busy machine."""
MEMORY_BYTES = 4 << 30
"""Of address space for a child: a power tower must not take the trainer's memory."""


class RewardError(SglangError):
    """Rewards cannot be computed at all; the message says what to do."""


def exact_match(text: str, answer: str, finish: str) -> float:
    """1 for exactly the answer, spaces around it aside, that the model itself has ended; else 0."""
    return float(finish == "stop" and text.strip() == answer)


# ---- finding the answer --------------------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The last number: ``1,234.5`` without its commas, ``3/4`` as it is; None without any."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace(" ", "").lstrip("+") if found else None


def after_answer(text: str) -> str | None:
    """What stands behind the last ``Answer:`` of a line, without a final full stop or emphasis; None without one."""
    found = _AFTER.findall(text)
    return found[-1].strip(" *\t\r").removesuffix(".").strip(" *") if found else None


def tagged_answer(text: str) -> str | None:
    """The content of the last ``<answer>``; None without one."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{}``, braces matched; None without one."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i].strip()
    return None


def whole_text(text: str) -> str | None:
    """All of it, spaces around it aside; None when that is nothing."""
    return text.strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "last_number": last_number,
    "answer": after_answer,
    "boxed": boxed,
    "tag": tagged_answer,
    "text": whole_text,
}
"""Ways to find the answer in a text, by the name that a task's options give them."""


def extract(kind: str, text: str) -> str | None:
    """The answer in a text.

    Raises:
        RewardError: no extractor of that name.
    """
    if kind not in EXTRACTORS:
        raise RewardError(f"there is no extraction {kind!r}; choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[kind](text)


# ---- mathematics ---------------------------------------------------------------------------------------------------


class MathVerifier:
    """Compares mathematical answers with the `math-verify` package, in child processes; any thread may call it.

    Args:
        processes: verdicts at the same time; each takes about 100 MB.
        timeout: seconds for one verdict, after which its process is killed.
        precision: decimals to which numbers are compared.
        command: of a child, for tests.
    """

    def __init__(
        self, *, processes: int = 4, timeout: float = 10.0, precision: int = 6, command: Sequence[str] | None = None
    ) -> None:
        self._timeout, self._precision = timeout, precision
        self._command = list(command or (sys.executable, "-m", "sglang.rl.tasks.verify_worker"))
        self._slots: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(processes):
            self._slots.put(None)
        self._processes = processes
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def score(self, text: str, gold: str) -> float:
        """1 when the answer in the text equals the gold one, else 0; waits for a free process.

        Raises:
            RewardError: `math-verify` is not installed, or cannot be started.
        """
        child, done = self._slots.get(), False
        try:
            if child is None:
                child = _Child(self._command)
            verdict = child.ask({"text": text, "gold": gold, "precision": self._precision}, self._timeout)
            done = child.alive
        finally:
            # One whose answer was not waited for would give it to the next question.
            if child is not None and not done:
                child.kill()
            self._slots.put(child if done else None)
        with self._lock:
            self._counts[verdict] += 1
        return float(verdict == "right")

    def counters(self) -> dict[str, int]:
        """Verdicts so far: right, wrong, unparsed (the text), bad_gold, failed, timeout, crashed."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """End the processes, once those that work are done."""
        children = [self._slots.get() for _ in range(self._processes)]
        for child in children:
            if child is not None:
                child.kill()
            self._slots.put(None)


class _Child:
    """One process that answers a line of JSON with a word."""

    def __init__(self, command: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # A session of its own: Ctrl-C in the trainer's terminal is the trainer's to handle.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        greeting = self._read(START_SECONDS)
        if greeting != "ready":
            self.kill()
            raise RewardError(
                f"the verifier of mathematics did not start ({greeting}); is it installed? pip install math-verify"
            )

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, question: dict[str, object], seconds: float) -> str:
        """Its word; ``timeout`` or ``crashed`` when there is none, and then the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self.kill()
            return "crashed"
        answer = self._read(seconds)
        if answer in ("timeout", "crashed"):
            self.kill()
        return answer

    def kill(self) -> None:
        """At once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it was to read cannot be flushed any more
                    pipe.close()

    def _read(self, seconds: float) -> str:
        assert self._process.stdout is not None
        handle, line, deadline = self._process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                return "timeout"
            piece = os.read(handle, 4096)
            if not piece:
                return "crashed"
            line += piece
        return line.decode().strip()
