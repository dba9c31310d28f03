"""The detokenizer against decoding everything at once, for every kind of decoder, and its stop matching."""

from __future__ import annotations

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from unit import tiny_models

from sglang.srt.errors import RequestError
from sglang.srt.managers import stop_matcher
from sglang.srt.managers.detokenizer import MAX_PENDING, Detokenizer
from sglang.srt.managers.stop_matcher import StopMatcher
from sglang.srt.parser.tokenizer import Tokenizer

FIRST_BYTE = 3
unhurried = settings(deadline=None)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(getattr(tiny_models, kind)(), special_tokens={}, eos_token_ids=())


BYTES, FALLBACK, WORDS = (functools.partial(tokenizer_of, k) for k in ("byte_level", "byte_fallback", "word_level"))


def fallback_bytes(data: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in data]


def byte_ids(data: bytes) -> list[int]:
    """One token per byte of the byte-level tokenizer."""
    table = {BYTES().token_bytes[i]: i for i in range(3, 3 + 256)}
    return [table[bytes([b])] for b in data]


def chunks_of(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@st.composite
def chunked_ids(draw, vocab_size: int, beyond: int = 5) -> list[list[int]]:
    # Ids beyond the vocabulary happen: embeddings are padded.
    ids = draw(st.lists(st.integers(0, vocab_size + beyond), max_size=40))
    return chunks_of(draw, ids)


def run(tokenizer: Tokenizer, chunks: list[list[int]], skip: bool, **options) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, **options)
    text = "".join(detokenizer.push(chunk).text for chunk in chunks)
    return text + detokenizer.finish()


def joined(chunks: list[list[int]]) -> list[int]:
    return [i for chunk in chunks for i in chunk]


# ---- deltas equal decoding at once ---------------------------------------------------------------------------------


@unhurried
@given(chunked_ids(264), st.booleans())
def test_byte_level_deltas_equal_decode(chunks, skip):
    want = BYTES().decode(joined(chunks), skip_special_tokens=skip)
    assert run(BYTES(), chunks, skip) == want


@unhurried
@given(chunked_ids(264), st.booleans())
def test_byte_level_deltas_with_an_unmatched_stop_equal_decode(chunks, skip):
    # Special tokens are searched too, so with skipped ones the search text differs from the output.
    want = BYTES().decode(joined(chunks), skip_special_tokens=skip)
    options = {"stop_strings": ["zzzzzz", "the quick", "<|im_end|><|im_end|><|im_end|>!"], "stop_patterns": ["q{9}x"]}
    searched = BYTES().decode(joined(chunks), skip_special_tokens=False)
    assume(not any(stop in searched for stop in options["stop_strings"]) and "q" * 9 + "x" not in searched)
    assert run(BYTES(), chunks, skip, **options) == want


@unhurried
@given(st.data(), st.text(max_size=20), st.booleans())
def test_unicode_round_trip(data, text, skip):
    ids = BYTES().encode(text)
    assert run(BYTES(), chunks_of(data.draw, ids), skip) == text


@unhurried
@given(st.data(), st.text(alphabet="the aé€😀字\n.", max_size=20))
def test_byte_fallback_valid_text_equals_decode(data, text):
    ids = FALLBACK().encode(text)
    assert run(FALLBACK(), chunks_of(data.draw, ids), True) == FALLBACK().decode(ids) == text


@unhurried
@given(chunked_ids(300), st.booleans())
def test_byte_fallback_random_ids(chunks, skip):
    assert run(FALLBACK(), chunks, skip) == expected_fallback(joined(chunks), skip)


@unhurried
@given(chunked_ids(7), st.booleans())
def test_tokens_joined_by_spaces_equal_decode(chunks, skip):
    want = WORDS().decode(joined(chunks), skip_special_tokens=skip)
    assert run(WORDS(), chunks, skip) == want


def expected_fallback(ids: list[int], skip: bool) -> str:
    """The rule for runs of byte tokens: what is valid so far is out; what is then broken is one U+FFFD a byte.

    A space at the very start is stripped, so it is not out, and belongs to the run that follows.
    """
    backend, text, run_of_bytes = FALLBACK().backend, "", b""

    def flush(run_of_bytes: bytes) -> str:
        return " " if run_of_bytes == b" " else "\ufffd" * len(run_of_bytes)

    for token_id in ids:
        token = backend.id_to_token(token_id)
        if token is None or (skip and token_id in FALLBACK().special_ids):
            continue
        if token.startswith("<0x"):
            run_of_bytes += bytes([int(token[3:5], 16)])
            if not text and run_of_bytes == b" ":
                continue
            try:
                text, run_of_bytes = text + run_of_bytes.decode(), b""
            except UnicodeDecodeError:
                continue
        else:
            text, run_of_bytes = text + flush(run_of_bytes) + token.replace("▁", " "), b""
    return (text + flush(run_of_bytes)).removeprefix(" ")


def test_broken_byte_run_does_not_raise_and_keeps_what_went_out():
    ids = [*fallback_bytes("€".encode()), *fallback_bytes(b"\xff"), *FALLBACK().encode("the", add_special_tokens=False)]
    detokenizer = Detokenizer(FALLBACK(), skip_special_tokens=True)
    assert [detokenizer.push([i]).text for i in ids] == ["", "", "€", "", "\ufffd the"]
    assert FALLBACK().decode(ids) == "\ufffd" * 4 + " the"


def test_byte_fallback_run_without_end_is_bounded():
    detokenizer = Detokenizer(FALLBACK(), skip_special_tokens=True)
    detokenizer.push(FALLBACK().encode("the"))
    out = [detokenizer.push([FIRST_BYTE + 0xFF]).text for _ in range(3 * MAX_PENDING)]
    assert "".join(out) == "\ufffd" * (3 * MAX_PENDING)
    assert detokenizer.push(FALLBACK().encode("the", add_special_tokens=False)).text == " the"


def test_incomplete_character_is_held_and_flushed_as_replacement():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True)
    assert detokenizer.push(byte_ids("é😀".encode()[:5])).text == "é"
    assert detokenizer.finish() == "\ufffd"


def test_skipped_special_token_inside_a_character_does_not_break_it():
    first, last = byte_ids("é".encode())
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["nothing"])
    assert "".join(detokenizer.push([i]).text for i in (first, 1, last)) == "é"


def test_real_vocabulary_matches_decode(smollm2_path):
    smollm2 = Tokenizer.from_path(smollm2_path)
    ids = smollm2.encode("Tokens — 字 and 1234 emoji 😀, <|im_start|>user\n`def f(): return 'é'`")
    for skip in (True, False):
        want = smollm2.decode(ids, skip_special_tokens=skip)
        assert run(smollm2, [[i] for i in ids], skip) == want
        assert run(smollm2, [ids], skip) == want


# ---- stop strings --------------------------------------------------------------------------------------------------


def feed(detokenizer: Detokenizer, ids: list[int], size: int = 1) -> tuple[str, str | None, int]:
    """Push in pieces until a match; text, matched, number of ids that belong to the output."""
    text, count = "", 0
    for at in range(0, len(ids), size):
        out = detokenizer.push(ids[at : at + size])
        text, count = text + out.text, count + out.num_tokens
        if out.matched is not None:
            assert detokenizer.finish() == ""
            return text, out.matched, count
    return text + detokenizer.finish(), None, count


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(("trim", "want"), [(True, "one "), (False, "one two")])
def test_stop_string_across_tokens(size, trim, want):
    ids = byte_ids(b"one two three")
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["two"], no_stop_trim=not trim)
    assert feed(detokenizer, ids, size) == (want, "two", 7)


def test_text_after_the_match_in_the_same_token_is_dropped():
    the = BYTES().encode(" the")
    assert len(the) == 1
    for keep, want in ((False, "a"), (True, "a th")):
        detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=[" th"], no_stop_trim=keep)
        assert feed(detokenizer, [*byte_ids(b"a"), *the, *the]) == (want, " th", 2)


def test_partial_match_is_held_and_released_when_it_fails():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["\n\nUser:", "END"])
    out = [detokenizer.push([i]).text for i in byte_ids(b"a\n\nUsX E")]
    assert out == ["a", "", "", "", "", "\n\nUsX", " ", ""]
    assert detokenizer.finish() == "E"


def test_overlapping_partial_match_is_kept():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["aab"])
    assert feed(detokenizer, byte_ids(b"aaaab!")) == ("aa", "aab", 5)


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (["c", "abcd"], ("ab", "c", 3)),  # completed by the earlier token
        (["abc", "bc"], ("", "abc", 3)),  # same token: starts first
        (["bc", "abc"], ("", "abc", 3)),
        (["xyz", "abcde"], ("", "abcde", 5)),
    ],
)
def test_earliest_match_wins(stops, want):
    assert feed(Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=stops), byte_ids(b"abcde")) == want


def test_first_listed_wins_at_the_same_place():
    the = BYTES().encode(" the")
    for stops in ([" t", " th"], [" th", " t"]):
        assert feed(Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=stops), the) == ("", stops[0], 1)


@pytest.mark.parametrize("skip", [True, False])
def test_stop_string_matches_a_special_token_even_when_skipped(skip):
    ids = [*byte_ids(b"hi"), 2, *byte_ids(b"x")]
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=skip, stop_strings=["<|im_end|>"])
    assert feed(detokenizer, ids) == ("hi", "<|im_end|>", 3)


def test_skipped_special_token_is_not_in_the_text_when_the_match_is_kept():
    ids = [*byte_ids(b"hi"), 2, *byte_ids(b"\nbye")]
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["<|im_end|>\n"], no_stop_trim=True)
    assert feed(detokenizer, ids) == ("hi\n", "<|im_end|>\n", 4)


def test_unicode_stop_string_in_bytes():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["。"])
    assert feed(detokenizer, byte_ids("好。x".encode())) == ("好", "。", 6)


def test_min_new_tokens_ignores_early_matches():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["ab"], min_new_tokens=4)
    assert feed(detokenizer, byte_ids(b"ab.ab.")) == ("ab.", "ab", 5)
    # A match that began early and ends late enough counts; one that ended early does not come back.
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["abc"], min_new_tokens=3)
    assert feed(detokenizer, byte_ids(b"abc")) == ("", "abc", 3)
    for options in ({"stop_strings": ["ab", "abc"]}, {"stop_patterns": ["ab"], "stop_strings": ["abc"]}):
        detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, min_new_tokens=3, **options)
        assert feed(detokenizer, byte_ids(b"abxab")) == ("abx", "ab", 5)


@unhurried
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_strings_equal_a_plain_search(text, stops, data):
    """Against the definition: take tokens one by one until some stop string is in the text."""
    want = (text, None, len(text))
    for end in range(1, len(text) + 1):
        hits = sorted((text[:end].find(s), stops.index(s)) for s in stops if s in text[:end])
        if hits:
            want = (text[: hits[0][0]], stops[hits[0][1]], end)
            break
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=stops)
    assert feed(detokenizer, byte_ids(text.encode()), data.draw(st.integers(1, 5))) == want


# ---- stop patterns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "want"),
    [
        (r"\d+", "ab12", ("ab", 3)),
        (r"Answer: \d", "so Answer: 7!", ("so ", 12)),
        (r"a.*z|b", "xa..b..z", ("xa..", 5)),
        (r"\bcat\b", "concat cat.", ("concat ", 10)),  # at its last letter, as a search of the text so far finds it
        (r"(?m)^Q", "aQ\nQ", ("aQ\n", 4)),
        (r"^Q", "aQ\nQ", ("aQ\nQ", None)),
        (r"END(?=;)", "END, END;", ("END, ", 9)),
        (r"x*", "ab", ("", 1)),
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_stop_pattern(pattern, text, want, size):
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_patterns=[pattern])
    got, matched, count = feed(detokenizer, byte_ids(text.encode()), size)
    if want[1] is None:
        assert (got, matched) == (text, None)
    else:
        assert (got, matched, count) == (want[0], pattern, want[1])


def test_pattern_is_held_back_and_kept_on_request():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_patterns=[r"<\w+>"])
    assert [detokenizer.push([i]).text for i in byte_ids(b"a<bc d")] == ["a", "", "", "", "<bc ", "d"]
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_patterns=[r"<\w+>"], no_stop_trim=True)
    assert feed(detokenizer, byte_ids(b"a<bc>d")) == ("a<bc>", r"<\w+>", 5)


def test_string_and_pattern_together():
    detokenizer = Detokenizer(BYTES(), skip_special_tokens=True, stop_strings=["the"], stop_patterns=[" t"])
    assert feed(detokenizer, BYTES().encode(" the")) == ("", " t", 1)


def test_pattern_holds_a_bounded_amount_of_text():
    matcher = StopMatcher([], ["a.*z"], keep_match=False)
    held = matcher.push("a" * (stop_matcher.MAX_HELD + 10))[0]
    assert len(held) == 10
    assert matcher.push("b" * 5) == ("a" * 5, None)
    assert matcher.push("z") == ("", "a.*z")


def test_matcher_keeps_a_bounded_amount_of_text():
    for matcher in (StopMatcher(["stop"], [], False), StopMatcher([], ["stop"], False)):
        out = "".join(matcher.push(f"word {i} ")[0] for i in range(2000))
        assert out == "".join(f"word {i} " for i in range(2000))
        assert len(matcher._text) < 3 * stop_matcher.CONTEXT


def test_pattern_that_backtracks_without_end_is_dropped_with_a_warning(caplog):
    matcher = StopMatcher(["stop"], [r"(x+x+)+y\d"], False)
    assert matcher.push("x" * 5000 + "y!") == ("x" * 5000 + "y!", None)
    assert "is ignored" in caplog.text
    assert matcher.push("ok stop") == ("ok ", "stop")


def test_bad_pattern_is_the_clients_error():
    with pytest.raises(RequestError, match=r"stop_regex '\(' is not a valid"):
        Detokenizer(BYTES(), skip_special_tokens=True, stop_patterns=["("])
