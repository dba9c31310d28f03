"""Tasks: problems that come again for a seed, evaluation sets apart from them, scores, and errors that help."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_model import make_tiny_model

from sglang.rl.config import TaskSection
from sglang.rl.tasks import make_task
from sglang.rl.tasks.base import Passes, TaskError, chat_prompt, plain_prompt, random_of
from sglang.srt.parser.tokenizer import Tokenizer


class Plain:
    """Characters are tokens; a text begins with `start` if that is given."""

    chat_template = None

    def __init__(self, start: str = "") -> None:
        self.start = start

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in (self.start if add_special_tokens else "") + text]

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(str(make_tiny_model(tmp_path_factory.mktemp("tiny"))))


def task_of(name: str, tokenizer: Any = None, eval: dict[str, Any] | None = None, **options: Any) -> Any:
    return make_task(TaskSection(name=name, options=options, eval=eval or {}), tokenizer or Plain())


def first(task: Any, count: int, seed: int = 0, start: int = 0) -> list[Any]:
    return list(itertools.islice(task.train(seed, start), count))


# ---- what all have -------------------------------------------------------------------------------------------------


def test_unknown_tasks_and_options_are_errors():
    with pytest.raises(TaskError, match="'sum'; choose one of sums, reasoning_gym, math"):
        task_of("sum")
    with pytest.raises(TaskError, match=r"task.options of sums: .*`beneath`"):
        task_of("sums", beneath=3)
    with pytest.raises(TaskError, match=r"task.eval of sums: .*`int`"):
        task_of("sums", eval={"easy": {"count": "many"}})


def test_a_plain_prompt_begins_as_the_tokenizer_begins_texts():
    assert plain_prompt(Plain(), "1+1=") == "1+1="
    assert plain_prompt(Plain("^"), "1+1=") == "^1+1="


def test_a_chat_template_is_used_where_there_is_one(tiny):
    assert chat_prompt(tiny, "hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with_system = chat_prompt(tiny, "hi", system="be brief", template={"enable_thinking": False})
    assert with_system.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    assert chat_prompt(Plain(), "hi", system="be brief") == "be brief\n\nhi"
    shown = chat_prompt(tiny, "hi", examples=[("1+1=", "2")])
    assert shown.startswith(
        "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nhi"
    )
    assert chat_prompt(Plain(), "3+4=", system="add", examples=[("1+1=", "2")]) == "add\n\n1+1=\n2\n\n3+4="


def test_transformers_tokenizers_will_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = make_tiny_model(tmp_path / "m")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.from_path(str(path))
    for system in ("", "be brief"):
        assert chat_prompt(theirs, "hi", system=system) == chat_prompt(ours, "hi", system=system)
    assert plain_prompt(theirs, "17+5=") == plain_prompt(ours, "17+5=")


def test_every_pass_has_every_item_in_an_order_of_its_own():
    passes = Passes(50)
    orders = [[passes.item(3, 50 * epoch + i) for i in range(50)] for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert orders[0] != orders[1] != orders[2]
    assert [Passes(50).item(3, i) for i in range(70, 80)] == orders[1][20:30]
    assert passes.item(3, 0) == orders[0][0]
    assert [passes.item(4, i) for i in range(50)] != orders[0]


def test_generators_are_the_same_everywhere():
    assert random_of(1, "a").randrange(10**6) == random_of(1, "a").randrange(10**6)
    assert random_of(1, 12).random() != random_of(11, 2).random()


# ---- sums ----------------------------------------------------------------------------------------------------------


def test_sums():
    task = task_of("sums", eval={"easy": {"count": 30, "below": 10}, "hard": {"below": 1000}})
    problems = first(task, 300)
    for problem in problems:
        a, b = problem.prompt.removesuffix("=").split("+")
        assert problem.answer == str(int(a) + int(b))
        assert 0 <= int(a) < 100 and 0 <= int(b) < 100
        assert problem.key == f"sums/{a}+{b}"
    assert len({problem.prompt for problem in problems}) > 250
    assert first(task, 10, start=200) == problems[200:210]
    assert first(task_of("sums"), 300) == problems
    assert first(task, 300, seed=1) != problems
    evals = task.evals()
    assert [len(evals[name]) for name in ("easy", "hard")] == [30, 200]
    assert all(len(problem.prompt) == 4 for problem in evals["easy"])
    assert task.evals() == evals
    problem = problems[0]
    assert task.score(problem, problem.answer, "stop") == 1.0
    assert task.score(problem, problem.answer, "length") == 0.0
    assert task.score(problem, problem.answer + "1", "stop") == 0.0
    with pytest.raises(TaskError, match="below is 0"):
        task_of("sums", below=0)


# ---- reasoning-gym -------------------------------------------------------------------------------------------------


class FakeDataset:
    def __init__(self, name: str, seed: int, size: int, scale: int = 1) -> None:
        self.name, self.seed, self.size, self.scale = name, seed, size, scale

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{self.name} {self.seed} {index}?", "answer": str(index * self.scale), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return {True: 1.0, False: 0.01}[int(answer) == int(entry["answer"])]


@pytest.fixture
def fake_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(name: str, **config: Any) -> FakeDataset:
        if name == "nothing":
            raise ValueError("Dataset 'nothing' not registered")
        return FakeDataset(name, **config)

    module = ModuleType("reasoning_gym")
    module.create_dataset = create_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_a_mixture_of_data_sets(fake_gym):
    task = task_of(
        "reasoning_gym",
        datasets={"a": {"scale": 2}, "b": {}},
        weights={"a": 3},
        suffix=" Say it.",
        eval={"only_b": {"datasets": {"b": {}}, "weights": {}, "count": 7}},
    )
    problems = first(task, 400)
    names = [problem.key.split("/")[0] for problem in problems]
    assert 270 < names.count("a") < 330
    assert all(problem.prompt.endswith("? Say it.") for problem in problems)
    assert [p.prompt for p in first(task, 5, start=100)] == [p.prompt for p in problems[100:105]]
    assert not {p.prompt for p in first(task, 400, seed=1)} & {p.prompt for p in problems}
    only_b = task.evals()["only_b"]
    assert len(only_b) == 7
    assert {problem.prompt.split()[0] for problem in only_b} == {"b"}
    problem = problems[3]
    right = problem.answer.entry["answer"]
    assert task.score(problem, f"so\nAnswer: {right}.", "stop") == 1.0
    assert task.score(problem, f"so\nAnswer: {right}.", "abort") == 0.0
    assert task.score(problem, "Answer: 999999", "length") == 0.01
    assert task.score(problem, "no", "stop") == 0.0
    assert task.score(problem, "Answer: what?", "stop") == 0.0
    assert task.counters() == {"no_answer": 2, "scorer_failed": 1}


def test_errors_of_reasoning_gym_help(fake_gym, monkeypatch):
    with pytest.raises(TaskError, match=r"needs task.options.datasets"):
        task_of("reasoning_gym")
    with pytest.raises(TaskError, match="cannot make 'nothing'.*not registered"):
        task_of("reasoning_gym", datasets={"nothing": {}})
    with pytest.raises(TaskError, match="cannot make 'a'.*wrong"):
        task_of("reasoning_gym", datasets={"a": {"wrong": 1}})
    with pytest.raises(TaskError, match="'guess' is not one of"):
        task_of("reasoning_gym", datasets={"a": {}}, extraction="guess")
    with pytest.raises(TaskError, match=r"weights are given for \['z'\]"):
        task_of("reasoning_gym", datasets={"a": {}}, weights={"z": 1})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match="pip install reasoning-gym"):
        task_of("reasoning_gym", datasets={"a": {}})


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_the_real_reasoning_gym(tiny):
    task = task_of(
        "reasoning_gym",
        tiny,
        datasets={"chain_sum": {"max_terms": 3}, "gcd": {}, "leg_counting": {}},
        extraction="last_number",
        eval={"long": {"count": 5, "datasets": {"chain_sum": {"min_terms": 5, "max_terms": 6}}}},
    )
    problems = first(task, 30)
    assert {problem.key.split("/")[0] for problem in problems} == {"chain_sum", "gcd", "leg_counting"}
    for problem in problems:
        assert problem.prompt.startswith("<|im_start|>user\n")
        assert task.score(problem, f"It is {problem.answer.entry['answer']}.", "stop") == 1.0
        assert task.score(problem, "It is 123456789.", "stop") < 1.0
    assert len(task.evals()["long"]) == 5
    tens = next(p for p in problems if p.key.startswith("chain_sum"))
    nearly = f"It is {tens.answer.entry['answer']}0."
    strict = replace(tens, answer=replace(tens.answer, partial=False))
    assert 0 < task.score(tens, nearly, "stop") < 1 and task.score(strict, nearly, "stop") == 0.0
    assert [p.prompt for p in first(task, 30)] == [p.prompt for p in problems]


# ---- mathematics ---------------------------------------------------------------------------------------------------


def write_rows(path: Path, count: int, **names: str) -> str:
    question, answer = names.get("question", "problem"), names.get("answer", "answer")
    rows = [{question: f"What is {i}\u2028+ 1?", answer: i + 1} for i in range(count)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def score(self: Any, text: str, gold: str) -> float:
        asked.append((text, gold))
        return 1.0

    monkeypatch.setattr("sglang.rl.rewards.MathVerifier.score", score)
    return asked


def test_mathematics_from_a_file(tmp_path, verdicts):
    train = write_rows(tmp_path / "train.jsonl", 20)
    test = write_rows(tmp_path / "test.jsonl", 5, question="q", answer="a")
    sets = {"test": {"dataset": test, "question": "q", "answer": "a", "suffix": ""}, "few": {"limit": 3}}
    task = task_of("math", dataset=train, suffix=" Go.", eval=sets)
    problems = first(task, 40)
    assert sorted(problem.key for problem in problems[:20]) == sorted(f"math/train/{i}" for i in range(20))
    assert sorted(problem.key for problem in problems[20:]) == sorted(f"math/train/{i}" for i in range(20))
    assert first(task, 5, start=30) == problems[30:35]
    evals = task.evals()
    assert [problem.prompt for problem in evals["test"]] == [f"What is {i}\u2028+ 1?" for i in range(5)]
    assert [problem.prompt for problem in evals["few"]] == [f"What is {i}\u2028+ 1? Go." for i in range(3)]
    assert evals["few"][2].answer == "3"
    assert task.score(evals["few"][2], "text", "length") == 1.0
    assert task.score(evals["few"][2], "text", "abort") == 0.0
    assert verdicts == [("text", "3")]
    task.close()


def test_long_problems_are_left_out(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", 20)
    longest = len("What is 9\u2028+ 1?")
    task = task_of("math", dataset=path, suffix="", max_prompt_tokens=longest)
    assert {problem.key for problem in first(task, 30)} == {f"math/train/{i}" for i in range(10)}
    with pytest.raises(TaskError, match="no problem with at most 3 prompt tokens"):
        task_of("math", dataset=path, max_prompt_tokens=3)


def test_mathematics_from_a_hub(monkeypatch):
    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        return [{"problem": "1+1?", "answer": "2", "solution": "..."}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = task_of("math", eval={"math500": {"dataset": "HuggingFaceH4/MATH-500", "split": "test"}})
    assert asked == [
        ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"), ("HuggingFaceH4/MATH-500", None, "test"),
    ]  # fmt: skip
    assert first(task, 1)[0].prompt.startswith("1+1?\nPlease reason step by step")
    assert "\\boxed{}" in task.evals()["math500"][0].prompt


def test_without_a_hub_the_error_says_what_to_do(monkeypatch, tmp_path):
    def load_dataset(*args: Any, **fields: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TaskError, match=r"cannot be loaded.*Couldn't reach.*to_json\(.*set `dataset` to the path"):
        task_of("math")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets"):
        task_of("math")
    with pytest.raises(TaskError, match="cannot be read as JSON"):
        task_of("math", dataset=str(tmp_path / "none.jsonl"))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(TaskError, match="a JSON object in every line"):
        task_of("math", dataset=str(tmp_path / "list.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="is empty"):
        task_of("math", dataset=str(tmp_path / "empty.jsonl"))
    path = write_rows(tmp_path / "x.jsonl", 2, answer="result")
    with pytest.raises(TaskError, match="no column 'answer', only problem, result"):
        task_of("math", dataset=path)
