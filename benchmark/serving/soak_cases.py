"""What the soak sends: seeded cases of every shape a client may ask for, and of every way it may ask wrongly.

A case is a request, what its client does with it (`Fate`) and what the reply has to look like. Two runs with one seed
send the same cases in the same order; what overlaps with what is up to the clock.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from typing import Any

SAFE_VOCAB = 400
"""Ids below this are in the vocabulary of every model the soak is run on."""
BAD_ID = 10_000_000
_TEXT = (
    "water people time number word part day call down find way long make first look more write see over new sound take "
    "only little work know place year live back give most very after thing our just name good sentence man think"
)
_WORDS = _TEXT.split()
_ODD = ("héllo", "日本語", "naïve", "🙂🙃", "\n\n", "\t", "<|im_end|>", "0123456789", "𝔘𝔫𝔦", "don't")
_STOPS = ("e", "the", " a", "\n", "qu", "ing ", "zzzzzz", "é")


class Kind(str, enum.Enum):
    """Which endpoint a case is for, hence how its reply is checked."""

    NATIVE = "native"
    COMPLETIONS = "completions"
    CHAT = "chat"
    INVALID = "invalid"


class Fate(str, enum.Enum):
    """What the client does: read all, leave (DROP), leave while still sending (CUT), abort by rid or by its prefix."""

    READ = "read"
    DROP = "drop"
    CUT = "cut"
    ABORT = "abort"
    ABORT_PREFIX = "abort_prefix"


@dataclass(slots=True)
class Case:
    """One request of the soak.

    Fields:
        body: JSON value, or raw bytes sent as they are.
        delay: seconds before a DROP or an abort.
        drop_events: a streaming DROP happens after this many events instead, when that comes first.
        reset: a DROP or CUT is a TCP reset rather than an orderly close.
        twin: the same request, rid included, is sent twice at once.
        results: choices or list items expected (prompts times n).
        says: part of the error message an INVALID case must be answered with.
    """

    index: int
    kind: Kind
    target: str
    body: Any
    fate: Fate = Fate.READ
    delay: float = 0.0
    drop_events: int = 1
    reset: bool = False
    twin: bool = False
    results: int = 1
    says: str = ""

    @property
    def stream(self) -> bool:
        """Whether the reply is an event stream."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def repeatable(self) -> bool:
        """Whether the same request must give the same tokens at any other time."""
        if self.kind is not Kind.NATIVE or self.fate is not Fate.READ or self.results != 1:
            return False
        sampling = self.body["sampling_params"]
        return sampling.get("temperature") == 0.0 or "sampling_seed" in sampling


@dataclass(slots=True)
class CaseMaker:
    """Makes the cases of one run.

    Args:
        model: id for the OpenAI endpoints.
        context_length: the model's, in tokens; over-long cases exceed it.
        max_prompt_len, max_new_tokens: upper limits of the valid cases.
    """

    seed: int
    model: str
    context_length: int
    max_prompt_len: int = 200
    max_new_tokens: int = 96
    _rng: random.Random = field(init=False)
    _prefixes: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        half = max(8, self.max_prompt_len // 2)
        self._prefixes = [[self._rng.randrange(4, SAFE_VOCAB) for _ in range(half)] for _ in range(4)]

    def make(self, index: int) -> Case:
        """The next case."""
        kind = self._rng.choices(list(Kind), weights=(74, 8, 8, 10))[0]
        case = {
            Kind.NATIVE: self._native,
            Kind.COMPLETIONS: self._completions,
            Kind.CHAT: self._chat,
            Kind.INVALID: self._invalid,
        }[kind](index)
        if kind is not Kind.INVALID:
            self._choose_fate(case)
        return case

    def _choose_fate(self, case: Case) -> None:
        rng = self._rng
        case.fate = rng.choices(list(Fate), weights=(70, 16, 2, 8, 4))[0]
        case.delay = rng.choice((0.0, 0.002, 0.02, 0.1, 0.3))
        case.drop_events = rng.choice((1, 2, 5))
        case.reset = rng.random() < 0.5
        if case.fate in (Fate.ABORT, Fate.ABORT_PREFIX) and "rid" not in case.body:
            case.fate = Fate.READ
        case.twin = case.fate is Fate.READ and "rid" in case.body and rng.random() < 0.1

    def _native(self, index: int) -> Case:
        rng = self._rng
        prompts = rng.choice((2, 3, 4)) if rng.random() < 0.15 else 1
        samples = rng.choice((2, 3, 4)) if rng.random() < 0.2 else 1
        body: dict[str, Any] = {"sampling_params": self._sampling(samples), "stream": rng.random() < 0.5}
        name, make = ("text", self._text) if rng.random() < 0.5 else ("input_ids", self._ids)
        body[name] = make() if prompts == 1 else [make() for _ in range(prompts)]
        if rng.random() < 0.4:
            self._ask_logprobs(body)
        if samples == 1 and rng.random() < 0.6:
            body["rid"] = f"soak-{index}"
        if rng.random() < 0.1:
            body["extra_key"] = rng.choice(("a", "b"))
        return Case(index, Kind.NATIVE, "/generate", body, results=prompts * samples)

    def _ask_logprobs(self, body: dict[str, Any]) -> None:
        rng = self._rng
        body["return_logprob"] = True
        body["logprob_start_len"] = rng.choice((-1, -1, 0, 0, 1))
        body["top_logprobs_num"] = rng.choice((0, 0, 2, 5))
        if rng.random() < 0.3:
            ids = [5, 17, 300]
            body["token_ids_logprob"] = ids
        body["return_text_in_logprobs"] = rng.random() < 0.3

    def _sampling(self, samples: int) -> dict[str, Any]:
        rng = self._rng
        longest = rng.choice((4, 16, 16, 48, self.max_new_tokens))
        params: dict[str, Any] = {
            "max_new_tokens": rng.randint(1, longest),
            "temperature": rng.choice((0.0, 0.7, 1.0, 1.5)),
        }
        if samples > 1:
            params["n"] = samples
        if rng.random() < 0.03:
            params["max_new_tokens"] = 0
        optional: dict[str, tuple[float, Any]] = {
            "top_p": (0.3, rng.choice((0.1, 0.9, 1.0))),
            "top_k": (0.3, rng.choice((1, 5, 50, -1, 100_000_000))),
            "min_p": (0.15, rng.choice((0.0, 0.1))),
            "frequency_penalty": (0.1, rng.choice((-1.0, 0.5))),
            "presence_penalty": (0.1, rng.choice((-0.5, 1.0))),
            "repetition_penalty": (0.1, rng.choice((0.9, 1.2))),
            "stop": (0.25, rng.sample(_STOPS, rng.randint(1, 3))),
            "stop_token_ids": (0.1, [rng.randrange(SAFE_VOCAB) for _ in range(4)]),
            "stop_regex": (0.05, rng.choice(("[0-9]{2}", "[aeiou]{3}"))),
            "ignore_eos": (0.3, True),
            "sampling_seed": (0.4, rng.randrange(1 << 31)),
            "logit_bias": (0.08, {str(rng.randrange(SAFE_VOCAB)): rng.choice((-100.0, 5.0))}),
            "skip_special_tokens": (0.1, False),
            "no_stop_trim": (0.1, True),
            "min_new_tokens": (0.1, rng.randint(0, params["max_new_tokens"])),
        }
        return params | {name: value for name, (chance, value) in optional.items() if rng.random() < chance}

    def _text(self) -> str:
        rng = self._rng
        words = [rng.choice(_WORDS) if rng.random() < 0.92 else rng.choice(_ODD) for _ in range(rng.randint(1, 40))]
        shared = f"You are helper number {rng.randrange(3)}. Answer in few words and do not repeat the question. "
        return (shared if rng.random() < 0.4 else "") + " ".join(words)

    def _ids(self) -> list[int]:
        rng = self._rng
        prefix = rng.choice(self._prefixes) if rng.random() < 0.5 else []
        own = rng.randint(1, max(1, self.max_prompt_len - len(prefix)))
        return prefix + [rng.randrange(4, SAFE_VOCAB) for _ in range(own)]

    def _completions(self, index: int) -> Case:
        rng = self._rng
        prompts, samples = rng.choice((1, 1, 2)), rng.choice((1, 1, 2))
        make = self._text if rng.random() < 0.5 else self._ids
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": make() if prompts == 1 else [make() for _ in range(prompts)],
            "max_tokens": rng.randint(1, self.max_new_tokens // 2),
            "temperature": rng.choice((0.0, 1.0)),
            "n": samples,
            "stream": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            body["logprobs"] = rng.choice((0, 1, 3))
        if rng.random() < 0.3:
            body["stop"] = rng.choice(_STOPS)
        return Case(index, Kind.COMPLETIONS, "/v1/completions", body, results=prompts * samples)

    def _chat(self, index: int) -> Case:
        rng = self._rng
        samples = rng.choice((1, 1, 2))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self._text()}],
            "max_tokens": rng.randint(1, self.max_new_tokens // 2),
            "n": samples,
            "stream": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": rng.choice((0, 2))}
        return Case(index, Kind.CHAT, "/v1/chat/completions", body, results=samples)

    def _invalid(self, index: int) -> Case:
        body, says = self._rng.choice(self._native_mistakes())
        target = "/generate"
        if self._rng.random() < 0.2:
            target, body, says = self._rng.choice(_OPENAI_MISTAKES)
        elif isinstance(body, dict) and self._rng.random() < 0.3:
            body = body | {"stream": True} if "stream" not in body else body
        return Case(index, Kind.INVALID, target, body, says=says)

    def _native_mistakes(self) -> list[tuple[Any, str]]:
        limit = self.context_length
        mistakes: list[tuple[Any, str]] = [
            ({"input_ids": [5] * (limit + 10)}, "longer than the model's context length"),
            ({"text": "water " * (2 * limit)}, "longer than the model's context length"),
            (
                {"input_ids": [5] * (limit - 4), "sampling_params": {"max_new_tokens": 64}},
                "Requested token count exceeds",
            ),
            ({"input_ids": [5, BAD_ID]}, ""),
            ({"input_ids": [5, -1]}, ""),
            ({"input_ids": []}, ""),
            ({"input_ids": [[5], []]}, ""),
            ({"input_ids": [[5], 6]}, ""),
            ({"text": "a", "input_ids": [5]}, "Either text, input_ids"),
            ({}, "Either text, input_ids"),
            ({"text": []}, ""),
            ({"text": 5}, ""),
            ({"text": "a", "stream": None}, ""),
            ({"text": "a", "sampling_params": "hot"}, ""),
            ({"text": "a", "rid": ["x", "y"]}, ""),
            ({"text": ["a", "b"], "rid": ["same", "same"]}, "Duplicate request ID"),
            ({"text": ["a", "b"], "return_logprob": [True]}, ""),
            ({"text": "a", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
            ({"text": "a", "image_data": "cat.png"}, "image_data"),
            ({"text": "a", "lora_path": "nobody"}, "LoRA is not enabled"),
            (b'{"text": "a"', ""),
            (b"[1, 2]", ""),
            (b"", ""),
            (b"\xff\xfe", ""),
        ]
        return mistakes + [({"text": "a", "sampling_params": {name: value}}, name) for name, value in _BAD_SAMPLING]


_BAD_SAMPLING: tuple[tuple[str, Any], ...] = (
    ("temperature", -1),
    ("top_p", 0),
    ("top_k", 0),
    ("min_p", 2),
    ("frequency_penalty", 3),
    ("repetition_penalty", 0),
    ("max_new_tokens", -1),
    ("min_new_tokens", 1000),
    ("n", 0),
    ("stop_regex", "["),
    ("logit_bias", {str(BAD_ID): 1.0}),
    ("stop_token_ids", [BAD_ID]),
    ("no_such_parameter", 1),
)

_OPENAI_MISTAKES: tuple[tuple[str, Any, str], ...] = (
    ("/v1/completions", {"model": "default"}, ""),
    ("/v1/completions", {"model": "default", "prompt": "a", "max_tokens": -1}, ""),
    ("/v1/completions", {"model": "default", "prompt": "a", "temperature": -1}, ""),
    ("/v1/completions", {"model": "default", "prompt": [BAD_ID]}, ""),
    ("/v1/chat/completions", {"model": "default"}, ""),
    ("/v1/chat/completions", {"model": "default", "messages": []}, ""),
    ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user", "content": "a"}], "top_p": 9}, ""),
    ("/v1/chat/completions", b"{", ""),
)
