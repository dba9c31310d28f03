"""The list of flags: complete, one owner each, and each status does what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from test_server_args import ASTRAFLOW_LINE, SLIME_KEYWORDS

from sglang.srt.config.sections import Config
from sglang.srt.config.upstream_flags import FLAGS, Ignored, Implemented, Refused, default_of, review
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs, prepare_server_args

FIELDS = {field.name: field for field in dataclasses.fields(ServerArgs)}


def of_kind(kind: type) -> list[str]:
    return [name for name, status in FLAGS.items() if isinstance(status, kind)]


def other_value(name: str) -> Any:
    """A value of the right type that is neither the default nor one that asks for what the server does anyway."""
    default, annotation = default_of(FIELDS[name]), str(FIELDS[name].type)
    if "list" in annotation:
        return ["x"]
    if "dict" in annotation:
        return {"a": "b"}
    if "bool" in annotation:
        return not default
    return "something-else" if "str" in annotation else (default or 0) + 7


def args_with(**values: Any) -> ServerArgs:
    return ServerArgs(**{"model_path": "m", **values})


def test_the_list_and_the_fields_are_the_same():
    assert list(FLAGS) == list(FIELDS)


def test_owners_are_fields_of_config():
    for name in of_kind(Implemented):
        section, field = FLAGS[name].owner.split(".")
        sections = {f.name: f.type for f in msgspec.structs.fields(Config)}
        assert field in sections[section].__struct_fields__, name


def test_every_config_field_that_users_can_set_has_a_flag():
    owned = {FLAGS[name].owner for name in of_kind(Implemented)}
    sections = {f.name: f.type for f in msgspec.structs.fields(Config) if f.name not in ("model", "lora")}
    all_fields = {f"{section}.{field}" for section, kind in sections.items() for field in kind.__struct_fields__}
    decided_by_the_server = {"device.threads"}
    assert all_fields - owned == decided_by_the_server


def test_defaults_pass_in_silence():
    assert review(args_with()) == []


@pytest.mark.parametrize("name", of_kind(Ignored))
def test_an_ignored_flag_warns_in_one_line(name: str):
    lines = review(args_with(**{name: other_value(name)}))
    assert len(lines) == 1
    assert lines[0].startswith(f"--{name.replace('_', '-')} ")
    assert lines[0].endswith("is ignored: " + FLAGS[name].reason)
    assert "\n" not in lines[0]


@pytest.mark.parametrize("name", of_kind(Ignored))
def test_values_that_change_nothing_do_not_warn(name: str):
    for value in FLAGS[name].quiet:
        assert review(args_with(**{name: value})) == []


@pytest.mark.parametrize("name", of_kind(Refused))
def test_a_refused_flag_says_why(name: str):
    with pytest.raises(ConfigError) as refused:
        review(args_with(**{name: other_value(name)}))
    assert str(refused.value).startswith(f"--{name.replace('_', '-')} ")
    assert FLAGS[name].reason in str(refused.value)
    for value in FLAGS[name].allowed:
        assert review(args_with(**{name: value})) == []


@pytest.mark.parametrize("name", [name for name in of_kind(Implemented) if FLAGS[name].values])
def test_an_implemented_flag_serves_its_values_and_refuses_others(name: str):
    for value in FLAGS[name].values:
        assert review(args_with(**{name: value})) == []
    with pytest.raises(ConfigError, match="use one of " + str(FLAGS[name].values[0])):
        review(args_with(**{name: other_value(name)}))


def test_all_refusals_come_at_once():
    with pytest.raises(ConfigError) as refused:
        review(args_with(tp_size=2, speculative_algorithm="EAGLE", schedule_policy="random"))
    lines = str(refused.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--schedule-policy", "--tp-size", "--speculative-algorithm"]


@pytest.mark.parametrize("value", [None, "", [], False, 0])
def test_other_ways_to_say_off_are_off(value: Any):
    assert review(args_with(enable_lora=value, quantization=value, lora_paths=value, cpu_offload_gb=value)) == []


def test_slimes_keywords_are_served():
    lines = review(ServerArgs(**SLIME_KEYWORDS))
    ignored = {line.split()[0] for line in lines}
    assert ignored == {
        "--trust-remote-code",
        "--nccl-port",
        "--load-balance-method",
        "--dist-init-addr",
        "--enable-memory-saver",
    }


def test_astraflows_line_is_served():
    lines = review(prepare_server_args(ASTRAFLOW_LINE))
    ignored = {line.split()[0] for line in lines}
    assert ignored == {"--trust-remote-code", "--lora-backend"}
