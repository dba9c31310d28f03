"""`sampling_params` as clients send them: defaults, coercion, ranges, and the complete spec they resolve to."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import RequestError
from sglang.srt.sampling.sampling_params import MAX_SEED, SamplingParams, SamplingSpec, sequence_seed

VOCAB = 100

STOCK_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128,
    "stop": None,
    "stop_token_ids": None,
    "stop_regex": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "n": 1,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "custom_params": None,
    "stream_interval": None,
    "logit_bias": None,
    "sampling_seed": None,
}


def parse(**data: Any) -> SamplingParams:
    params = SamplingParams.from_dict(data)
    params.verify(VOCAB)
    return params


def resolve(**data: Any) -> SamplingSpec:
    return parse(**data).resolve(vocab_size=VOCAB, eos_ids=(2, 7), max_new_tokens=64, seed=5)


def test_names_and_defaults_are_stock_ones() -> None:
    assert msgspec.structs.asdict(SamplingParams()) == STOCK_DEFAULTS
    assert msgspec.structs.asdict(SamplingParams.from_dict({})) == STOCK_DEFAULTS


@pytest.mark.parametrize("name", STOCK_DEFAULTS)
def test_null_is_the_default(name: str) -> None:
    assert getattr(parse(**{name: None}), name) == STOCK_DEFAULTS[name]


def test_a_params_object_with_nulls_resolves_as_the_default() -> None:
    built = SamplingParams(temperature=None, top_k=None, max_new_tokens=None, n=None, min_new_tokens=None)
    built.verify(VOCAB)
    assert built.resolve(vocab_size=VOCAB, eos_ids=(), max_new_tokens=9, seed=0) == SamplingParams().resolve(
        vocab_size=VOCAB, eos_ids=(), max_new_tokens=9, seed=0
    )


@pytest.mark.parametrize(
    ("name", "sent", "parsed"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", 1, 1.0),
        ("top_k", "20", 20),
        ("top_k", 20.0, 20),
        ("top_k", "1e8", 10**8),
        ("max_new_tokens", "7", 7),
        ("ignore_eos", "true", True),
        ("ignore_eos", 0, False),
        ("sampling_seed", "17", 17),
        ("stop_token_ids", [1, None, "3"], [1, None, 3]),
        ("stop", "x", "x"),
        ("stop", ["x", "y"], ["x", "y"]),
        ("logit_bias", {"4": "1.5"}, {"4": 1.5}),
        ("logit_bias", {4: -2}, {"4": -2.0}),
        ("logit_bias", {4: -math.inf}, {"4": -math.inf}),
        ("custom_params", {"a": [1]}, {"a": [1]}),
    ],
)
def test_coercion(name: str, sent: Any, parsed: Any) -> None:
    value = getattr(parse(**{name: sent}), name)
    assert value == parsed
    assert type(value) is type(parsed)


def test_parsing_leaves_the_clients_dict_alone() -> None:
    data = {"logit_bias": {3: 1.0}, "top_p": None}
    SamplingParams.from_dict(data)
    assert data == {"logit_bias": {3: 1.0}, "top_p": None}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0.0, 1e-7, 1e5, 1e300], [-0.1, "nan", "inf", math.inf, math.nan]),
        ("top_p", [1e-9, 0.5, 1.0], [0.0, -0.5, 1.0001, "nan"]),
        ("min_p", [0.0, 1.0], [-0.01, 1.01, "nan"]),
        ("top_k", [-1, 1, VOCAB + 1, 10**8], [0, -2]),
        ("frequency_penalty", [-2.0, 2.0], [-2.01, 2.01, "nan"]),
        ("presence_penalty", [-2.0, 2.0], [-2.01, 2.01, "nan"]),
        ("repetition_penalty", [0.01, 2.0], [0.0, -1.0, 2.01, "nan"]),
        ("max_new_tokens", [0, 1, 10**9], [-1]),
        ("min_new_tokens", [0, 128], [-1, 129]),
        ("n", [1, 64], [0, -1]),
        ("sampling_seed", [0, -1, MAX_SEED, 2**64 - 1, -(2**63)], [2**64, -(2**63) - 1]),
        ("stop_token_ids", [[], [0, VOCAB - 1]], [[VOCAB], [-1]]),
        ("logit_bias", [{}, {"0": 1}, {str(VOCAB - 1): -100}], [{str(VOCAB): 1}, {"-1": 1}, {"x": 1}, {"²": 1}]),
        ("logit_bias", [{"1": -math.inf}], [{"1": math.inf}, {"1": "nan"}, {"--5": 1}, {"9" * 5000: 1}, {"": 1}]),
        ("stop_regex", ["a+", ["", "b"]], ["(", ["a", "["], "a{99999999999}", "(" * 5000]),
    ],
)
def test_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        parse(**{name: value})
    for value in bad:
        with pytest.raises(RequestError) as caught:
            parse(**{name: value})
        assert name in caught.value.message
        assert caught.value.status == 400
        assert len(caught.value.message) < 400


def test_range_errors_name_value_and_range() -> None:
    with pytest.raises(RequestError, match=r"^top_p must be in \(0, 1\], got 1\.5\.$"):
        parse(top_p=1.5)
    with pytest.raises(RequestError, match=r"^min_new_tokens must be in \[0, max_new_tokens=3\], got 4\.$"):
        parse(min_new_tokens=4, max_new_tokens=3)


@pytest.mark.parametrize(
    "data",
    [
        {"temprature": 1},
        {1: 2},
        {"top_k": 5.5},
        {"temperature": [1]},
        {"temperature": True},
        {"stop": ["a", None]},
        {"stop_token_ids": 5},
        {"logit_bias": [1]},
        {"logit_bias": {"1": None}},
        {"max_new_tokens": "many"},
        {"json_schema": {"type": "object"}},
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(data: dict[Any, Any]) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        SamplingParams.from_dict(data)


def test_at_most_one_grammar_and_structural_tag_is_not_counted() -> None:
    with pytest.raises(RequestError, match="Only one of"):
        parse(json_schema="{}", regex="a")
    assert resolve(json_schema="{}", structural_tag="t").grammar == ("json_schema", "{}")
    assert resolve(structural_tag="t").grammar == ("structural_tag", "t")
    assert resolve(ebnf="root ::= 'a'").grammar == ("ebnf", "root ::= 'a'")
    assert resolve(regex="").grammar is None


def test_stops_are_listed_without_empty_ones() -> None:
    params = parse(stop=["", "a"], stop_regex="b")
    assert (params.stop_strings, params.stop_patterns) == (["a"], ["b"])
    params = parse(stop="a", stop_regex=["", "b", "c"])
    assert (params.stop_strings, params.stop_patterns) == (["a"], ["b", "c"])
    assert (parse().stop_strings, parse().stop_patterns) == ([], [])


def test_resolve_of_the_defaults() -> None:
    assert resolve() == SamplingSpec(
        max_new_tokens=64,
        min_new_tokens=0,
        temperature=1.0,
        top_k=VOCAB,
        top_p=1.0,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        seed=5,
        stop_token_ids=(2, 7),
    )


def test_resolve_carries_every_value() -> None:
    spec = resolve(
        temperature=0.5,
        top_k=10,
        top_p=0.25,
        min_p=0.125,
        frequency_penalty=1.5,
        presence_penalty=-1.5,
        repetition_penalty=1.25,
        min_new_tokens=3,
        logit_bias={"4": 2, 5: -1},
        stop_token_ids=[9, None, 9, 2],
    )
    assert spec == SamplingSpec(
        max_new_tokens=64,
        min_new_tokens=3,
        temperature=0.5,
        top_k=10,
        top_p=0.25,
        min_p=0.125,
        frequency_penalty=1.5,
        presence_penalty=-1.5,
        repetition_penalty=1.25,
        seed=5,
        stop_token_ids=(2, 7, 9),
        logit_bias={4: 2.0, 5: -1.0},
    )
    assert not spec.is_greedy


@pytest.mark.parametrize("temperature", [0, 0.0, 9e-7])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    spec = resolve(temperature=temperature, top_p=0.3, min_p=0.5, top_k=40)
    assert spec.is_greedy
    assert (spec.temperature, spec.top_k, spec.top_p, spec.min_p) == (1.0, 1, 1.0, 0.0)


def test_temperatures_from_the_threshold_on_are_sampled() -> None:
    assert not resolve(temperature=1e-6).is_greedy


def test_top_k_one_is_greedy_and_keeps_its_temperature() -> None:
    spec = resolve(top_k=1, temperature=0.7)
    assert spec.is_greedy
    assert spec.temperature == 0.7


@pytest.mark.parametrize("top_k", [-1, VOCAB, VOCAB + 1, 10**8, 2**30])
def test_top_k_beyond_the_vocabulary_keeps_everything(top_k: int) -> None:
    assert resolve(top_k=top_k).top_k == VOCAB


def test_ignore_eos_switches_off_every_stop_id() -> None:
    assert resolve(ignore_eos=True, stop_token_ids=[9]).stop_token_ids == ()


def test_min_new_tokens_follows_a_lowered_limit() -> None:
    params = parse(min_new_tokens=50, max_new_tokens=100)
    spec = params.resolve(vocab_size=VOCAB, eos_ids=(), max_new_tokens=20, seed=0)
    assert (spec.max_new_tokens, spec.min_new_tokens) == (20, 20)


def test_the_first_sample_keeps_the_clients_seed() -> None:
    assert sequence_seed(1234, 0) == 1234
    assert sequence_seed(-1, 0) == MAX_SEED


@given(base=st.integers(-(2**63), 2**64 - 1), index=st.integers(0, 10_000))
def test_sequence_seeds_fit_and_repeat(base: int, index: int) -> None:
    seed = sequence_seed(base, index)
    assert 0 <= seed <= MAX_SEED
    assert seed == sequence_seed(base, index)


@given(base=st.integers(0, MAX_SEED))
def test_samples_of_one_request_have_distinct_seeds(base: int) -> None:
    assert len({sequence_seed(base, i) for i in range(64)}) == 64


def test_neighbouring_requests_share_no_seed() -> None:
    assert len({sequence_seed(base, i) for base in range(50) for i in range(1, 50)}) == 50 * 49
