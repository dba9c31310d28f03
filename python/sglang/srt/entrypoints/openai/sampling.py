"""From the sampling fields of an OpenAI request to native `sampling_params`."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang.srt.config.sections import ServerSection
from sglang.srt.entrypoints.openai.prompts import named_tool, tool_name
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CommonRequest
from sglang.srt.errors import RequestError

SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "no_stop_trim",
    "ignore_eos",
    "skip_special_tokens",
    "regex",
    "ebnf",
    "json_schema",
    "custom_params",
    "n",
)
RENAMED = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"}


def sampling_params(request: CommonRequest, server: ServerSection, max_new_tokens: int) -> dict[str, Any]:
    """Native parameters: the request's own, above --preferred-sampling-params, above generation_config.json's.

    Raises:
        RequestError: a response_format this server does not know.
    """
    own = {name: getattr(request, name) for name in SAME_NAME}
    own |= {native: getattr(request, name) for name, native in RENAMED.items()}
    own |= _response_format(request.response_format)
    given = {name: value for name, value in own.items() if value is not None}
    params = {**server.sampling_defaults, **server.preferred_sampling_params, **given}
    params["max_new_tokens"] = max_new_tokens
    return params


def _response_format(spec: dict[str, Any] | None) -> dict[str, str]:
    kind = "text" if spec is None else spec.get("type")
    if spec is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": '{"type": "object"}'}
    if kind == "json_schema":
        holder = spec.get("json_schema")
        schema = holder.get("schema") if isinstance(holder, dict) else spec.get("schema")
        if not isinstance(schema, dict):
            raise RequestError("response_format.json_schema.schema must be a JSON schema object.")
        return {"json_schema": msgspec.json.encode(schema).decode()}
    if kind == "structural_tag":
        return {"structural_tag": msgspec.json.encode(spec).decode()}
    raise RequestError(f"response_format.type must be text, json_object, json_schema or structural_tag, got {kind!r}.")


def tool_constraint(request: ChatCompletionRequest) -> dict[str, Any]:
    """Parameters that make the model call a tool, for `tool_choice` "required" or a named function; else none.

    Raises:
        RequestError: the choice needs tools that are not there.
    """
    choice = request.tool_choice
    tools = request.tools or []
    _check_tools(tools)
    if choice is None or choice in ("auto", "none"):
        return {}
    if isinstance(choice, str) and choice != "required":
        raise RequestError(f"tool_choice must be none, auto, required or a function, got {choice!r}.")
    name = named_tool(choice)
    if isinstance(choice, dict) and name is None:
        raise RequestError("tool_choice must name a function: {'type': 'function', 'function': {'name': …}}.")
    if not tools:
        raise RequestError(f"tool_choice is {'required' if name is None else name!r}, but there are no tools.")
    wanted = [tool["function"] for tool in tools if name is None or tool_name(tool) == name]
    if not wanted:
        raise RequestError(f"tool_choice names {name!r}, which is not one of the tools.")
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [_call_schema(f) for f in wanted]}}
    if request.parallel_tool_calls is False:
        schema["maxItems"] = 1
    return {"json_schema": msgspec.json.encode(schema).decode()}


def _check_tools(tools: list[dict[str, Any]]) -> None:
    for i, tool in enumerate(tools):
        if not tool_name(tool):
            raise RequestError(f"tools[{i}] must be an object with a function that has a name.")


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "parameters": function.get("parameters") or {"type": "object"},
        },
        "required": ["name", "parameters"],
    }


def cache_key(request: CommonRequest) -> str | None:
    """Part of the prefix-cache namespace that the client chose."""
    return (request.cache_salt or "") + (request.extra_key or "") or None
