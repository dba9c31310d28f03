"""The `openai` package against a real server on a real model."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"


def test_models(smollm2):
    [model] = smollm2.models.list().data
    assert (model.id, model.owned_by) == ("smollm2", "sglang")
    assert smollm2.models.retrieve("smollm2").id == "smollm2"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        smollm2.models.retrieve("gpt-9")


def test_chat_answers(smollm2):
    reply = smollm2.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=32)
    [choice] = reply.choices
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.metadata == {"weight_version": "default"}


def test_chat_stream_is_the_same_text(smollm2):
    whole = smollm2.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_completion_tokens=24)
    stream = smollm2.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        temperature=0,
        max_completion_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_logprobs(smollm2):
    reply = smollm2.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in content).decode().startswith(reply.choices[0].message.content)
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest


def test_n_seed_and_stop(smollm2):
    def sample(seed: int) -> list[str]:
        reply = smollm2.completions.create(
            model="smollm2", prompt=PROMPT, n=3, seed=seed, temperature=1.0, max_tokens=8, stop=["\n"]
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert not any("\n" in choice.text for choice in reply.choices)
        return [choice.text for choice in reply.choices]

    first = sample(1)
    assert first == sample(1)
    assert len(set(first)) > 1


def test_completions_take_texts_and_tokens(smollm2, smollm2_server):
    ids = httpx.post(f"{smollm2_server.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    replies = [
        smollm2.completions.create(model="smollm2", prompt=prompt, temperature=0, max_tokens=4)
        for prompt in (PROMPT, ids, [PROMPT, "1, 2, 3,"], [ids])
    ]
    text = replies[0].choices[0].text
    assert [reply.choices[0].text for reply in replies] == [text] * 4
    assert "4" in replies[2].choices[1].text
    assert replies[2].usage.prompt_tokens > replies[0].usage.prompt_tokens


def test_echo_with_logprobs_scores_a_prompt(smollm2):
    """What evaluation harnesses do."""
    reply = smollm2.completions.create(model="smollm2", prompt=f"{PROMPT} Paris", echo=True, logprobs=1, max_tokens=0)
    scores = reply.choices[0].logprobs
    assert reply.choices[0].text == f"{PROMPT} Paris"
    assert "".join(scores.tokens) == f"{PROMPT} Paris"
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    assert scores.text_offset[-1] == len(PROMPT)
    [likeliest] = scores.top_logprobs[-1]
    assert likeliest == " Paris"


def test_completion_stream(smollm2):
    whole = smollm2.completions.create(model="smollm2", prompt=PROMPT, temperature=0, max_tokens=8, logprobs=0)
    chunks = list(
        smollm2.completions.create(model="smollm2", prompt=PROMPT, temperature=0, max_tokens=8, logprobs=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    values = [value for chunk in chunks for value in (chunk.choices[0].logprobs or whole).token_logprobs]
    assert values == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-4)


def test_multi_turn_hits_the_prefix_cache(smollm2):
    system = {"role": "system", "content": "You answer in one word. " * 10}
    for _ in range(2):
        reply = smollm2.chat.completions.create(
            model="smollm2", messages=[system, *QUESTION], temperature=0, max_tokens=2
        )
    assert reply.usage.prompt_tokens_details.cached_tokens > 50


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 10**6}, "8192"),
        ({"messages": []}, "Messages"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "context length"),
        ({"model": "smollm2:adapter"}, "--enable-lora"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"extra_body": {"top_k": 0}}, "top_k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(smollm2, fields, part, stream):
    request = {"model": "smollm2", "messages": QUESTION, "stream": stream, **fields}
    with pytest.raises(openai.BadRequestError, match=part):
        smollm2.chat.completions.create(**request)


def test_helpers_of_the_client_work(smollm2):
    """`parse` and `stream()` of the package read more of the reply than `create` does."""

    class Answer(BaseModel):
        text: str

    with pytest.raises(openai.BadRequestError, match="structured output"):
        smollm2.chat.completions.parse(model="smollm2", messages=QUESTION, response_format=Answer)
    with smollm2.chat.completions.stream(model="smollm2", messages=QUESTION, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert "Paris" in final.choices[0].message.content


async def test_the_asynchronous_client_runs_many_at_once(smollm2_server):
    async with openai.AsyncOpenAI(base_url=f"{smollm2_server.url}/v1", api_key="x") as client:
        replies = await asyncio.gather(
            *(
                client.completions.create(model="smollm2", prompt=f"{i} plus {i} is", max_tokens=4, temperature=0)
                for i in range(6)
            )
        )
    assert all(reply.usage.completion_tokens == 4 for reply in replies)
