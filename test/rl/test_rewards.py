"""Rewards: what is found in texts, and a verifier whose verdict comes in time whatever its processes do."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sglang.rl import rewards
from sglang.rl.rewards import MathVerifier, RewardError, exact_match, extract
from sglang.rl.tasks.verify_worker import verdict

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@pytest.mark.parametrize(
    ("text", "finish", "want"),
    [("22", "stop", 1.0), (" 22\n", "stop", 1.0), ("22", "length", 0.0), ("22", "abort", 0.0), ("220", "stop", 0.0)],
)
def test_exact_match(text, finish, want):
    assert exact_match(text, "22", finish) == want


@pytest.mark.parametrize(
    ("kind", "text", "want"),
    [
        ("last_number", "3 apples and 1,234.50 pears.", "1234.50"),
        ("last_number", "so x = -7.", "-7"),
        ("last_number", "it is 3 / 4", "3/4"),
        ("last_number", "17+5=22", "22"),
        ("last_number", "in 2024, 10 of 12", "12"),
        ("last_number", ".5", ".5"),
        ("last_number", "none", None),
        ("answer", "Answer: 3\nThe answer is: **4**.", "4"),
        ("answer", "ANSWER: x y z", "x y z"),
        ("answer", "the answer 4", None),
        ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed {a {b}} and \boxed{cut o", "a {b}"),
        ("boxed", r"\fbox{7}", "7"),
        ("boxed", "7", None),
        ("tag", "<answer>1</answer> <answer>\n2\n</answer>", "2"),
        ("tag", "<answer>1", None),
        ("text", " a b ", "a b"),
        ("text", " ", None),
    ],
)
def test_extraction(kind, text, want):
    assert extract(kind, text) == want


def test_an_unknown_extraction_is_an_error():
    with pytest.raises(RewardError, match="'guess'; choose one of last_number, answer"):
        extract("guess", "x")


# ---- the verifier's processes, played ------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path: Path) -> list[str]:
    """A child that does what the text says: sleep, die, print something, or give its word."""
    path = tmp_path / "child.py"
    path.write_text(
        textwrap.dedent("""
        import json, sys, time
        print("ready", flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            if question["text"] == "hang":
                time.sleep(1000)
            if question["text"] == "die":
                sys.exit(1)
            print("right" if question["text"] == question["gold"] else "wrong", flush=True)
        """)
    )
    return [sys.executable, str(path)]


def test_a_hanging_and_a_dying_process_are_wrong_and_replaced(child):
    before = psutil.Process().children()
    verifier = MathVerifier(processes=1, timeout=1.0, command=child)
    texts = ["4", "5", "hang", "4", "die", "4"]
    assert [verifier.score(text, "4") for text in texts] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert verifier.counters() == {"right": 3, "wrong": 1, "timeout": 1, "crashed": 1}
    children = [c for c in psutil.Process().children() if c not in before]
    verifier.close()
    psutil.wait_procs(children, timeout=5)
    assert not [c for c in psutil.Process().children() if c in children]


def test_threads_share_the_processes(child):
    verifier = MathVerifier(processes=3, timeout=10.0, command=child)
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda i: verifier.score(str(i % 2), "1"), range(60)))
    assert scores == [0.0, 1.0] * 30
    verifier.close()


def test_long_and_odd_texts_pass(child):
    verifier = MathVerifier(processes=1, timeout=10.0, command=child)
    for text in ("x" * 300_000, "a\nb\r\n ü\ud800\0"):
        assert verifier.score(text, text) == 1.0
    verifier.close()


def test_a_verifier_that_does_not_start_says_what_to_do(monkeypatch):
    verifier = MathVerifier(processes=1, command=[sys.executable, "-c", "print('ImportError: no module')"])
    for _ in range(2):
        with pytest.raises(RewardError, match="ImportError: no module.*pip install math-verify"):
            verifier.score("1", "1")
    monkeypatch.setattr(rewards, "START_SECONDS", 0.2)
    slow = MathVerifier(processes=1, command=[sys.executable, "-c", "import time; time.sleep(1000)"])
    with pytest.raises(RewardError, match="timeout"):
        slow.score("1", "1")


# ---- the worker's word ---------------------------------------------------------------------------------------------


def package(parse: Any, verify: Any = None) -> Any:
    kinds = {"LatexExtractionConfig": lambda: "latex", "ExprExtractionConfig": lambda: "expr"}
    return SimpleNamespace(**kinds, parse=parse, verify=verify)


@pytest.mark.parametrize(
    ("parsed", "equal", "want"),
    [
        ({"\\boxed{4}": ["4"], "t": ["4"]}, True, "right"),
        ({"\\boxed{4}": ["4"], "t": ["5"]}, False, "wrong"),
        ({"\\boxed{4}": ["4"], "t": []}, True, "unparsed"),
        ({"\\boxed{4}": [], "t": ["4"]}, True, "bad_gold"),
        ({"\\boxed{4}": ["4"]}, True, "failed"),
    ],
)
def test_verdicts(parsed, equal, want):
    calls = []

    def verify(gold: list[str], given: list[str], float_rounding: int) -> bool:
        calls.append(float_rounding)
        return equal

    question = {"text": "t", "gold": "4", "precision": 6}
    assert verdict(question, package(lambda text, extraction_config: parsed[text], verify)) == want
    assert calls in ([], [6])


@needs_math_verify
def test_the_real_package():
    verifier = MathVerifier(processes=2)
    cases = [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        ("The final answer is $x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("the answer is 3", "4", 0.0),
        (r"\boxed{0.3333333}", r"\frac{1}{3}", 1.0),
        (r"\boxed{0.333}", r"\frac{1}{3}", 0.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        ("no idea", "7", 0.0),
        ("", "7", 0.0),
    ]
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda case: verifier.score(case[0], case[1]), cases))
    assert scores == [want for *_, want in cases]
    assert verifier.score(r"\boxed{9^{9^{9^{9^{9}}}}}", "7") == 0.0
    assert verifier.score(r"\boxed{7}", "7") == 1.0
    verifier.close()
