"""From chat messages to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from sglang.srt.errors import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.parser.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESERVED = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
"""Template variables that come from the request's own fields."""
INLINE_CHARACTERS = 50_000
"""Chats up to this size are encoded on the event loop; larger ones in a thread."""


class TemplateOptions(Protocol):
    """Fields of a body that shape the prompt made of its chat messages."""

    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    continue_final_message: bool | None
    reasoning_effort: str | None
    chat_template_kwargs: dict[str, Any] | None


def tokenizer_of(manager: TokenizerManager) -> Tokenizer:
    """The server's tokenizer.

    Raises:
        RequestError: the server runs with --skip-tokenizer-init.
    """
    if manager.tokenizer is None:
        raise RequestError(
            "This endpoint needs the tokenizer, but the server runs with --skip-tokenizer-init; "
            "send input_ids to /generate instead."
        )
    return manager.tokenizer


async def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], options: TemplateOptions) -> list[int]:
    """Render the chat template and tokenise it (the template brings the special tokens).

    Raises:
        RequestError: a message this server cannot take, or one the template refuses.
    """
    if not messages:
        raise RequestError("Messages cannot be empty.")
    size = sum(_check_message(i, message) for i, message in enumerate(messages))
    if options.continue_final_message and messages[-1]["role"] != "assistant":
        raise RequestError("continue_final_message needs a last message from the assistant.")
    if size > INLINE_CHARACTERS:
        return await asyncio.to_thread(_render, tokenizer, messages, options)
    return _render(tokenizer, messages, options)


def _render(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], options: TemplateOptions) -> list[int]:
    continues = bool(options.continue_final_message)
    text = tokenizer.apply_chat_template(
        messages,
        tools=_visible_tools(options),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        **_template_variables(options),
    )
    return tokenizer.encode(text, add_special_tokens=False)


def _template_variables(options: TemplateOptions) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if options.reasoning_effort is not None:
        variables["reasoning_effort"] = options.reasoning_effort
    if options.reasoning_effort == "none":
        variables.update(thinking=False, enable_thinking=False)  # templates know one name or the other
    own = options.chat_template_kwargs or {}
    taken = sorted(RESERVED & own.keys())
    if taken:
        raise RequestError(f"chat_template_kwargs cannot set {', '.join(taken)}: the request has fields for that.")
    return {**variables, **own}


def _visible_tools(options: TemplateOptions) -> list[dict[str, Any]] | None:
    if not options.tools or options.tool_choice == "none":
        return None
    name = named_tool(options.tool_choice)
    return [tool for tool in options.tools if name is None or tool_name(tool) == name]


def tool_name(tool: Any) -> str | None:
    """Name of the function that a tool, a tool call or a tool choice holds; None when it holds none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def named_tool(choice: str | dict[str, Any] | None) -> str | None:
    """The function a `tool_choice` object names, or None."""
    return tool_name(choice) if isinstance(choice, dict) else None


def _check_message(index: int, message: dict[str, Any]) -> int:
    """Check what the template does not; returns the size of the message in characters."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"messages[{index}].role must be one of {', '.join(ROLES)}, got {role!r}.")
    if content is not None and not isinstance(content, str | list):
        raise RequestError(f"messages[{index}].content must be a string or a list of parts.")
    calls = message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(tool_name(call) for call in calls)):
        raise RequestError(f"messages[{index}].tool_calls must be a list of calls, each with a function's name.")
    return len(str(content))
