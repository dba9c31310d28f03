"""The prompt set: real English text, the same for every system, no prompt twice in a run.

Text comes from the manual pages inside the Python distribution (`pydoc_data`), so nothing is downloaded or shipped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pydoc_data.topics import topics

from sglang.benchmark.load import Prompt
from sglang.srt.config.model_path import resolve_model_path
from sglang.srt.parser.tokenizer import Tokenizer

_ASKS = (
    "Explain in plain words: {}",
    "Summarise this for a beginner: {}",
    "What does the following mean in practice? {}",
    "Give an example that shows the point of this: {}",
    "Rewrite this as advice to a colleague: {}",
    "Which mistake does this warn about? {}",
)


class PromptSet:
    """Endless distinct prompts in a fixed order for a seed: chat questions, and plain passages of an exact length."""

    def __init__(self, model: str, seed: int = 0) -> None:
        self._tokenizer = Tokenizer.from_path(resolve_model_path(model))
        rng = random.Random(seed)
        text = " ".join(" ".join(page.split()) for _, page in sorted(topics.items()))
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 60 <= len(s) <= 220 and s[0].isupper()]
        rng.shuffle(sentences)
        self._sentences: Iterator[str] = iter(sentences)
        passages = self._tokenizer.encode(text)
        self._passages = passages
        self._starts = iter(rng.sample(range(len(passages) // 97), len(passages) // 97))
        self._rng = rng

    def questions(self, count: int, output_len: int) -> list[Prompt]:
        """`count` single-turn chats through the model's chat template (about 50 to 100 tokens each)."""
        prompts = []
        for _ in range(count):
            content = self._rng.choice(_ASKS).format(next(self._sentences))
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": content}])
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            prompts.append(Prompt(ids=ids, output_len=output_len))
        return prompts

    def passages(self, count: int, length: int) -> list[Prompt]:
        """`count` passages of `length` tokens that no prefix cache has seen, asking for one token each."""
        prompts = []
        while len(prompts) < count:
            start = next(self._starts) * 97
            ids = self._passages[start : start + length]
            if len(ids) == length:
                prompts.append(Prompt(ids=ids, output_len=1))
        return prompts
