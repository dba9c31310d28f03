"""Chat templates: Jinja2 source from a checkpoint, a file or the command line, and OpenAI messages in, prompt text out.

Owned by `parser.tokenizer.Tokenizer`; rendered by the OpenAI endpoints. The environment is the one that templates are
written for (transformers' documented one), sandboxed: a template reads what it is given and changes nothing.
Invariants: a template that does not compile stops the start (`ConfigError`); one that fails on a request's messages is
that request's error (`RequestError`); rendering keeps no state, so threads may share a `ChatTemplate`.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sglang.srt.errors import ConfigError, RequestError

Message = Mapping[str, Any]

_PROBE = "sglang-probe"


class ChatTemplate:
    """A compiled chat template.

    Args:
        sources: template by name; "default" is used, or "tool_use" for requests with tools where there is one.
        special_tokens: variables of every rendering, e.g. ``{"bos_token": "<s>"}``.
        origin: where the source came from, for error messages.

    Raises:
        ConfigError: a template is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {origin} is not valid Jinja: {error}") from error
        if not self._templates:
            raise ConfigError(f"{origin} has an empty list of chat templates; pass one with --chat-template")

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template understands content given as a list of parts; otherwise their text is joined."""
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        try:
            text = self._render([message], None, True, {})
        except RequestError:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text for a conversation.

        Args:
            messages: OpenAI messages; `content` a string, None or a list of text parts.
            tools: OpenAI tool definitions, shown to the template.
            add_generation_prompt: end with the opening of an assistant turn.
            continue_final_message: leave a final assistant message open, for the model to go on with; no effect
                when the last message is another role's.
            kwargs: further template variables (`chat_template_kwargs`).

        Raises:
            RequestError: the template refuses the messages, or a part is not text.
        """
        prepared = [self._prepare(message) for message in messages]
        if not (continue_final_message and prepared and prepared[-1].get("role") == "assistant"):
            return self._render(prepared, tools, add_generation_prompt, kwargs)
        # The open turn is rendered by the template and filled by us: templates trim or close a message they see whole.
        final = _joined_text(prepared.pop()["content"])
        return self._render(prepared, tools, True, kwargs) + final

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._pick(tools).render(variables)
        except jinja2.TemplateError as error:
            raise RequestError(f"The chat template refused the messages: {error}") from error
        except Exception as error:  # the template's own code failed on the client's values, e.g. `str + None`
            raise RequestError(f"The chat template cannot render these messages: {error}") from error

    def _pick(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default") or next(iter(self._templates.values()))

    def _prepare(self, message: Message) -> dict[str, Any]:
        """A copy in the form templates expect: no null keys, text content, tool arguments as objects."""
        prepared = {key: value for key, value in message.items() if value is not None}
        content = prepared.get("content", "")
        if isinstance(content, list):
            _check_parts(content)
            if not self.takes_parts:
                content = _joined_text(content)
        prepared["content"] = content
        if prepared.get("tool_calls"):
            prepared["tool_calls"] = [_with_parsed_arguments(call) for call in prepared["tool_calls"]]
        return prepared


def read_template_argument(value: str) -> str:
    """Source behind `--chat-template`: the content of a file, or the value itself when it is Jinja.

    Raises:
        ConfigError: neither an existing file nor Jinja.
    """
    if "{{" in value or "{%" in value:
        return value
    path = os.path.expanduser(value)
    if not os.path.isfile(path):
        raise ConfigError(
            f"--chat-template {value!r} is neither a file nor a Jinja template; "
            "pass the path of a .jinja file (named templates are not built in)"
        )
    return read_template_file(path)


def read_template_file(path: str) -> str:
    """Text of a .jinja file; raises ConfigError when it cannot be read as UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path} cannot be read: {error}") from error


def _check_parts(parts: list[Any]) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"message content of type {kind!r} is not supported: the model reads text; "
                'send a string or parts like {"type": "text", "text": "..."}'
            )


def _joined_text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(part["text"] for part in content)
    return str(content)


def _with_parsed_arguments(call: Any) -> Any:
    """OpenAI sends a call's arguments as JSON text; templates expect the object. Other text stays as it is."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks assistant text for training masks; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        """Called by Jinja at the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
