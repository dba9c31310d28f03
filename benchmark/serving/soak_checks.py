"""What a well-formed reply is: each function returns the problems it sees, as sentences; none is an empty list."""

from __future__ import annotations

import json
from typing import Any

from soak_cases import Case

from sglang.benchmark.http_client import Reply

Json = dict[str, Any]
_TOLERANCE = 1e-4


def native_results(case: Case, results: Any, abort_allowed: bool) -> list[str]:
    """A complete `/generate` reply: the right number of results, each a finished sequence."""
    if case.results > 1:
        if not isinstance(results, list) or len(results) != case.results:
            return [f"expected a list of {case.results} results, got {str(results)[:120]}"]
    else:
        results = [results]
    return [problem for result in results for problem in native_result(case, result, abort_allowed)]


def native_result(case: Case, result: Any, abort_allowed: bool) -> list[str]:
    """One finished sequence."""
    try:
        meta, ids, text = result["meta_info"], result["output_ids"], result["text"]
        reason, completion_tokens = meta["finish_reason"], meta["completion_tokens"]
    except (KeyError, TypeError) as error:
        return [f"missing {error} in {str(result)[:200]}"]
    if not isinstance(text, str) or not isinstance(ids, list) or not meta.get("id"):
        return [f"wrong types in {str(result)[:200]}"]
    problems = _finish_problems(case, reason, completion_tokens, text, ids, abort_allowed)
    if completion_tokens != len(ids):
        problems.append(f"completion_tokens {completion_tokens} but {len(ids)} output_ids")
    if completion_tokens > case.body["sampling_params"]["max_new_tokens"]:
        problems.append(f"{completion_tokens} tokens, more than max_new_tokens")
    if case.body.get("return_logprob"):
        problems += _logprob_problems(case, meta, ids)
    return problems


def _finish_problems(
    case: Case, reason: Any, completion_tokens: int, text: str, ids: list[int], abort_allowed: bool
) -> list[str]:
    sampling = case.body["sampling_params"]
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind == "length":
        limit = sampling["max_new_tokens"]
        if reason.get("length") != completion_tokens or completion_tokens != limit:
            return [f"finish {reason} after {completion_tokens} tokens with max_new_tokens {limit}"]
    elif kind == "stop":
        return _stop_problems(sampling, reason.get("matched"), text, ids)
    elif kind == "abort":
        if not abort_allowed:
            return [f"aborted though nobody asked: {reason}"]
    else:
        return [f"finish_reason {reason} is none of stop, length, abort"]
    return []


def _stop_problems(sampling: Json, matched: Any, text: str, ids: list[int]) -> list[str]:
    if isinstance(matched, int):
        if sampling.get("ignore_eos"):
            return [f"stopped at id {matched} in spite of ignore_eos"]
        return [] if ids and ids[-1] == matched else [f"stopped at id {matched} but the last id is {ids[-1:]}"]
    stops = sampling.get("stop", [])
    if matched not in stops:
        return [] if "stop_regex" in sampling else [f"stopped at {matched!r}, which is none of {stops}"]
    if "min_new_tokens" in sampling or sampling.get("no_stop_trim"):
        return []
    early = [stop for stop in stops if stop in text]
    return [f"text still holds the stop strings {early}: {text[-60:]!r}"] if early else []


def _logprob_problems(case: Case, meta: Json, ids: list[int]) -> list[str]:
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        return [f"{len(entries) if isinstance(entries, list) else entries} output logprobs for {len(ids)} ids"]
    problems = [f"logprob entry {e} at id {i}" for e, i in zip(entries, ids, strict=True) if not _is_entry(e, i)]
    if meta["finish_reason"]["type"] == "abort" and "prompt_tokens" not in meta:
        return problems
    if meta.get("output_token_logprobs_length") != len(ids):
        problems.append(f"output_token_logprobs_length {meta.get('output_token_logprobs_length')} for {len(ids)} ids")
    if not (meta["finish_reason"]["type"] == "abort" and not ids):
        problems += _input_logprob_problems(case, meta)
    lists = {"top": case.body.get("top_logprobs_num", 0), "token_ids": len(case.body.get("token_ids_logprob") or ())}
    for name, width in lists.items():
        value = meta.get(f"output_{name}_logprobs")
        if width and (not isinstance(value, list) or len(value) != len(ids) or any(len(p) != width for p in value)):
            problems.append(f"output_{name}_logprobs is not {len(ids)} positions of {width}: {str(value)[:120]}")
    return problems


def _is_entry(entry: Any, token: int) -> bool:
    shaped = isinstance(entry, list) and len(entry) == 3 and entry[1] == token
    return shaped and isinstance(entry[0], float | int) and entry[0] <= _TOLERANCE


def _input_logprob_problems(case: Case, meta: Json) -> list[str]:
    entries, start = meta.get("input_token_logprobs"), case.body.get("logprob_start_len", -1)
    if not isinstance(entries, list):
        return [f"input_token_logprobs is {entries!r}"]
    expected = 0 if start == -1 else max(0, meta["prompt_tokens"] - start)
    if len(entries) != expected:
        return [f"{len(entries)} input logprobs for {meta['prompt_tokens']} prompt tokens from {start}"]
    if start == 0 and entries[0][0] is not None:
        return [f"the first prompt token has a logprob: {entries[0]}"]
    top = meta.get("input_top_logprobs")
    if case.body.get("top_logprobs_num") and (not isinstance(top, list) or len(top) != expected):
        return [f"input_top_logprobs has not {expected} positions: {str(top)[:120]}"]
    return [f"input logprob {e}" for e in entries[1:] if not _is_entry(e, e[1])]


def native_stream(case: Case, events: list[bytes], abort_allowed: bool) -> list[str]:
    """A whole `/generate` stream: cumulative, one end per result, `[DONE]` last."""
    if not events or events[-1] != b"[DONE]" or events.count(b"[DONE]") != 1:
        return [f"the stream does not end in one [DONE]: {events[-1:]}"]
    problems: list[str] = []
    latest: dict[int, Json] = {}
    for payload in events[:-1]:
        event = json.loads(payload)
        if "meta_info" not in event:
            return [f"unexpected event {payload[:200]!r}"]
        index = event.get("index", 0)
        before = latest.get(index)
        latest[index] = event
        if before is None:
            continue
        if before["meta_info"]["finish_reason"] is not None:
            problems.append(f"result {index} goes on after its end")
        if event["output_ids"][: len(before["output_ids"])] != before["output_ids"]:
            problems.append(f"result {index} took back ids")
        if not event["text"].startswith(before["text"]):
            problems.append(f"result {index} took back text: {before['text'][-40:]!r} became {event['text'][-40:]!r}")
    if sorted(latest) != list(range(case.results)):
        return [*problems, f"results {sorted(latest)} of {case.results}"]
    return problems + [p for event in latest.values() for p in native_result(case, event, abort_allowed)]


def openai_reply(case: Case, reply: Json, abort_allowed: bool) -> list[str]:
    """A complete completion or chat completion."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or [c.get("index") for c in choices] != list(range(case.results)):
        return [f"expected {case.results} choices in order, got {str(choices)[:200]}"]
    problems = [p for c in choices for p in _openai_finish_problems(c.get("finish_reason"), abort_allowed)]
    for choice in choices:
        content = choice["text"] if "prompt" in case.body else choice["message"]["content"]
        if not isinstance(content, str):
            problems.append(f"content is {content!r}")
    usage = reply.get("usage") or {}
    if usage.get("total_tokens") != usage.get("prompt_tokens", -1) + usage.get("completion_tokens", -1):
        problems.append(f"usage does not add up: {usage}")
    return problems


def openai_stream(case: Case, events: list[bytes], abort_allowed: bool) -> list[str]:
    """A whole OpenAI stream: one finish_reason per choice and nothing after it, `[DONE]` last."""
    if not events or events[-1] != b"[DONE]" or events.count(b"[DONE]") != 1:
        return [f"the stream does not end in one [DONE]: {events[-1:]}"]
    ended: dict[int, Any] = {}
    problems: list[str] = []
    for payload in events[:-1]:
        event = json.loads(payload)
        if "choices" not in event:
            return [f"unexpected event {payload[:200]!r}"]
        for choice in event["choices"]:
            if choice["index"] in ended:
                problems.append(f"choice {choice['index']} goes on after its end")
            elif choice.get("finish_reason") is not None:
                ended[choice["index"]] = choice["finish_reason"]
    if sorted(ended) != list(range(case.results)):
        problems.append(f"choices {sorted(ended)} of {case.results} ended")
    return problems + [p for reason in ended.values() for p in _openai_finish_problems(reason, abort_allowed)]


def _openai_finish_problems(reason: Any, abort_allowed: bool) -> list[str]:
    if reason in ("stop", "length") or (reason == "abort" and abort_allowed):
        return []
    return [f"finish_reason {reason!r}"]


def refusal(case: Case, reply: Reply) -> list[str]:
    """The answer to a client's mistake: 4xx, a documented error body, the reason in its message."""
    if not 400 <= reply.status < 500:
        return [f"status {reply.status} for a bad request: {reply.body[:200]!r}"]
    try:
        body = reply.json()
        message = body["message"] if body.get("object") == "error" else body["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"not an error body: {reply.body[:200]!r}"]
    if not isinstance(message, str) or case.says not in message:
        return [f"message {message!r} does not say {case.says!r}"]
    return []
