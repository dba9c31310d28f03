"""Rendering chat templates: environment, forms of messages, continuing a message, and whose error a failure is."""

from __future__ import annotations

import datetime

import pytest
from unit.tiny_models import CHATML

from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.parser.chat_template import ChatTemplate, read_template_argument

USER = {"role": "user", "content": "Hi"}
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)


def template(source: str, **special: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, special, "test")


def render(source: str, *messages: dict, **options) -> str:
    return template(source).render(list(messages) or [USER], **options)


# ---- environment ---------------------------------------------------------------------------------------------------


def test_whitespace_control_as_templates_expect():
    assert render("  {% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_tojson_is_plain_json():
    assert render("{{ x | tojson }}", x={"b": "é<'>", "a": [1]}) == '{"b": "é<\'>", "a": [1]}'
    assert render("{{ x | tojson(indent=2, sort_keys=true) }}", x={"b": 1, "a": 2}) == '{\n  "a": 2,\n  "b": 1\n}'


def test_loop_controls_generation_tag_and_clock():
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"
    year = str(datetime.datetime.now().year)
    assert render("{{ strftime_now('%Y') }}") == year


def test_variables():
    chat = template("{{ bos_token }}|{{ tools }}|{{ add_generation_prompt }}|{{ depth }}", bos_token="<s>")
    assert chat.render([USER], add_generation_prompt=False, depth=3) == "<s>|None|False|3"
    assert chat.render([USER], tools=[], messages_extra=1) == "<s>|None|True|"


def test_the_sandbox_reads_and_changes_nothing():
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ range.__globals__ }}"):
        with pytest.raises(RequestError):
            render(source + "{{ ''.__class__.__mro__[1] }}")
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    template(CHATML).render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


# ---- messages ------------------------------------------------------------------------------------------------------


def test_text_parts_are_joined_for_templates_that_take_strings():
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert render(CHATML, message, add_generation_prompt=False) == "<|im_start|>user\na b<|im_end|>\n"
    assert render("{{ messages[0].content }}", message) == "a b"
    assert render(PARTS, message) == "[a][b]"


@pytest.mark.parametrize(
    ("source", "want"),
    [(CHATML, False), ("{{ messages[0].content }}", False), ("{{ messages | tojson }}", False), (PARTS, True)],
)
def test_whether_a_template_takes_parts_is_found_out(source, want):
    assert template(source).takes_parts is want


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, "text", {}])
def test_parts_that_are_not_text_are_the_clients_error(part):
    with pytest.raises(RequestError, match="is not supported: the model reads text"):
        render(PARTS, {"role": "user", "content": [part]})


def test_null_keys_are_dropped_and_null_content_is_empty():
    source = "{% for m in messages %}{{ m.content + '.' }}{{ m.name is defined }}{% endfor %}"
    assert render(source, {"role": "assistant", "content": None, "name": None}) == ".False"


def test_tool_call_arguments_become_objects():
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    assert render(source, {"role": "assistant", "content": None, "tool_calls": calls}) == '{"x": 1}'
    assert calls[0]["function"]["arguments"] == '{"x": 1}'
    calls[0]["function"]["arguments"] = "not json"
    assert render(source, {"role": "assistant", "content": None, "tool_calls": calls}) == '"not json"'


def test_tool_template_is_used_for_tools():
    chat = ChatTemplate({"default": "d", "tool_use": "t"}, {}, "test")
    assert chat.render([USER]) == "d"
    assert chat.render([USER], tools=[{"type": "function"}]) == "t"


# ---- continuing the final message ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["The answer ", [{"type": "text", "text": "The answer "}]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_continue_final_message_leaves_it_open(content, add_generation_prompt):
    text = render(
        CHATML,
        USER,
        {"role": "assistant", "content": content},
        continue_final_message=True,
        add_generation_prompt=add_generation_prompt,
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe answer "


def test_continue_final_message_needs_an_assistant_message():
    assert render(CHATML, USER, continue_final_message=True) == render(CHATML, USER)


def test_continue_final_message_with_a_template_that_takes_parts():
    message = {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}
    assert render(PARTS + "A:", USER, message, continue_final_message=True) == "HiA:x y"


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "refused the messages"),
        ("{{ messages[0].content + 1 }}", "cannot render these messages"),
        ("{{ 1 // 0 }}", "cannot render these messages"),
        ("{{ x | tojson }}", "cannot render these messages"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(source, message):
    with pytest.raises(RequestError, match=message):
        render(source, x={1, 2})


def test_invalid_templates_stop_the_start():
    with pytest.raises(ConfigError, match="chat template of test is not valid Jinja"):
        template("{% for %}")
    with pytest.raises(ConfigError, match="empty list of chat templates"):
        ChatTemplate({}, {}, "test")


def test_template_argument(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ 1 }}é", encoding="utf-8")
    assert read_template_argument(str(file)) == "{{ 1 }}é"
    assert read_template_argument("{{ 2 }}") == "{{ 2 }}"
    with pytest.raises(ConfigError, match="neither a file nor a Jinja template"):
        read_template_argument("chatml")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template_argument(str(file))
