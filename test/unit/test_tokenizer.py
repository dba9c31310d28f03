"""Tokenizers from directories and GGUF files: ids against an independent BPE, special tokens, errors, threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from unit.tiny_models import CHATML, SPECIALS, byte_fallback, byte_level, word_level, write_gguf, write_tokenizer

from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.parser.tokenizer import TokenBytes, Tokenizer
from sglang.srt.utils.gguf_file import open_gguf

TEXT = "Hello world, it's 2024: naïve café — 字 😀\n\n  def f(x):\treturn x+1<|im_end|>"


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> Tokenizer:
    return Tokenizer.from_path(smollm2_path)


# ---- the real model's GGUF -----------------------------------------------------------------------------------------


def test_smollm2_special_tokens(smollm2):
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_ids) == (1, (2,))
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.id_to_token(2) == "<|im_end|>"
    assert smollm2.id_to_token(49152) is None


def test_smollm2_known_ids(smollm2):
    # No BOS, digits one by one, special tokens whole.
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.encode("1234") == [33, 34, 35, 36]
    assert smollm2.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert smollm2.decode([1, 4093, 198]) == "user\n"
    assert smollm2.decode([1, 4093, 198], skip_special_tokens=False) == "<|im_start|>user\n"


def test_smollm2_equals_a_plain_bpe(smollm2, smollm2_path):
    """Against byte-pair encoding as defined: merge the pair of lowest rank until none is left."""
    file = open_gguf(smollm2_path)
    vocab = {token: i for i, token in enumerate(file.field("tokenizer.ggml.tokens"))}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(file.field("tokenizer.ggml.merges"))}
    char_of = {value[0]: smollm2.id_to_token(i) for i in range(17, 400) if len(value := smollm2.token_bytes[i]) == 1}
    words = regex.compile(r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(text: str) -> list[int]:
        ids = []
        for piece in regex.split(r"(\p{N})", text):  # digits split first, the rest after
            for word in words.findall(piece):
                parts = [char_of[b] for b in word.encode()]
                while (
                    best := min(zip(parts, parts[1:], strict=False), key=lambda p: ranks.get(p, 1e9), default=None)
                ) in ranks:
                    at = next(i for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair == best)
                    parts[at : at + 2] = ["".join(best)]
                ids += [vocab[part] for part in parts]
        return ids

    for text in ("Hello world, it's 2024", "  def f(x):\treturn x+1\n\n", "naïve café — 字 😀", "we'll I'd 3rd 1,000"):
        assert smollm2.encode(text) == encode(text)


@pytest.fixture(scope="session")
def digits_and_byte_level(smollm2_path) -> Backend:
    """The pipeline of the model's own tokenizer.json: Digits, then ByteLevel with its built-in pattern."""
    file = open_gguf(smollm2_path)
    vocab = {token: i for i, token in enumerate(file.field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    return backend


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("ab 'st12½\n\t.-é字", max_size=40))
def test_smollm2_equals_the_digits_and_byte_level_pipeline(smollm2, digits_and_byte_level, text):
    assert smollm2.encode(text) == digits_and_byte_level.encode(text).ids


def test_smollm2_round_trip(smollm2):
    ids = smollm2.encode(TEXT)
    assert smollm2.decode(ids, skip_special_tokens=False) == TEXT
    assert smollm2.decode(ids) == TEXT.removesuffix("<|im_end|>")


def test_smollm2_chat_template(smollm2):
    text = smollm2.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_threads_share_a_tokenizer(smollm2):
    texts = [TEXT * (i % 5 + 1) + str(i) for i in range(64)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(smollm2.encode, texts)) == [smollm2.encode(text) for text in texts]


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def from_gguf(tmp_path, **options) -> Tokenizer:
    return Tokenizer.from_path(str(write_gguf(tmp_path / "m.gguf", **options)))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words the pre-tokenizer makes, as text."""
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in words]


@pytest.mark.parametrize(
    ("pre", "text", "want"),
    [
        ("gpt-2", "it's 1234 ok", ["it", "'s", " 1234", " ok"]),
        ("default", "IT'S 12", ["IT", "'", "S", " 12"]),
        ("smollm", "it's 1234 ok", ["it", "'s", " ", "1", "2", "3", "4", " ok"]),
        ("llama-bpe", "IT'S 12345 (ok)\n\nx", ["IT", "'S", " ", "123", "45", " (", "ok", ")\n\n", "x"]),
        ("qwen2", "IT'S 123 (ok)\n\nx", ["IT", "'S", " ", "1", "2", "3", " (", "ok", ")\n\n", "x"]),
        ("tekken", "helloWorld don't 12 a/\n", ["hello", "World", " don", "'t", " ", "1", "2", " a", "/\n"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(tmp_path, pre, text, want):
    assert pieces(from_gguf(tmp_path, fields={"tokenizer.ggml.pre": pre}), text) == want


def test_gguf_bos_and_eos_are_added_where_the_file_says(tmp_path):
    the = from_gguf(tmp_path).encode("the")
    assert len(the) == 1
    cases = [
        ({"tokenizer.ggml.add_bos_token": True}, [1, *the]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1, *the, 2]),
        ({"tokenizer.ggml.add_eos_token": True}, [*the, 2]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [1, *the]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, the),
        ({"tokenizer.ggml.pre": "qwen2"}, the),
    ]
    for fields, want in cases:
        tokenizer = from_gguf(tmp_path, fields=fields)
        assert tokenizer.encode("the") == want
        assert tokenizer.encode("the", add_special_tokens=False) == the


def test_gguf_user_defined_tokens_are_whole_but_visible(tmp_path):
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe", "<think>"]
    types = [3, 3, 3, *[1] * (len(tokens) - 4), 4]
    tokenizer = from_gguf(tmp_path, tokens=tokens, types=types)
    ids = tokenizer.encode("<think><|im_end|>")
    assert ids == [len(tokens) - 1, 2]
    assert tokenizer.decode(ids) == "<think>"


def test_qwen2_text_is_normalised_to_nfc(tmp_path):
    tokenizer = from_gguf(tmp_path, fields={"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.pre": "mystery"}, "pre-tokenizer 'mystery' is not one of gpt-2, .*--tokenizer-path"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer model 'llama' .*--tokenizer-path"),
        ({"tokenizer.ggml.tokens": None}, "no metadata key 'tokenizer.ggml.tokens'"),
    ],
)
def test_gguf_refusals(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        from_gguf(tmp_path, fields=fields)


# ---- directories ---------------------------------------------------------------------------------------------------


def test_directory_honours_the_post_processor(tmp_path):
    write_tokenizer(tmp_path, byte_fallback(), bos_token="<s>", eos_token={"content": "</s>"}, unk_token="<unk>")
    tokenizer = Tokenizer.from_path(str(tmp_path))
    assert tokenizer.encode("the")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("the", add_special_tokens=False) == tokenizer.encode("the")[1:]
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode(tokenizer.encode("the é字")) == "the é字"


def test_directory_without_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_path(str(write_tokenizer(tmp_path, word_level(), bos_token=None)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, ())
    assert tokenizer.decode(tokenizer.encode("one two")) == "one two"


def test_training_padding_and_truncation_are_dropped(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    tokenizer = Tokenizer.from_path(str(write_tokenizer(tmp_path, backend)))
    assert len(tokenizer.encode("abcdefgh")) == 8


def test_tokens_declared_only_in_tokenizer_config(tmp_path):
    size = byte_level().get_vocab_size()
    declared = {str(size + i): {"content": t, "special": t == "<a>"} for i, t in enumerate(["<a>", "<tool>"])}
    write_tokenizer(tmp_path, byte_level(), added_tokens_decoder=declared, additional_special_tokens=["<think>"])
    tokenizer = Tokenizer.from_path(str(tmp_path))
    ids = tokenizer.encode("<a><tool><think>")
    assert ids[:2] == [size, size + 1]
    assert tokenizer.decode(ids) == "<tool>"
    assert tokenizer.vocab_size == size + 2


def test_decode_options_and_errors(tmp_path):
    tokenizer = Tokenizer(byte_level(), special_tokens={}, eos_token_ids=())
    the = tokenizer.encode("the")
    assert tokenizer.decode([*the, 10**6], spaces_between_special_tokens=False) == "the"
    with pytest.raises(RequestError, match="between 0 and"):
        tokenizer.decode([-1])
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_missing_tokenizer_names_the_remedy(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"has no tokenizer.json.*save_pretrained.*--tokenizer-path"):
            Tokenizer.from_path(str(path))


def test_unreadable_files_are_named(tmp_path):
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer_config.json is not readable JSON"):
        Tokenizer.from_path(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json cannot be loaded"):
        Tokenizer.from_path(str(tmp_path))


def test_directory_with_one_gguf(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert Tokenizer.from_path(str(tmp_path)).eos_token_ids == (2,)


# ---- chat template sources -----------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "Hi"}]


def chat(path, override: str | None = None, **options) -> str:
    return Tokenizer.from_path(str(path), chat_template=override).apply_chat_template(USER, **options)


def test_chat_template_sources_by_precedence(tmp_path):
    write_tokenizer(tmp_path, byte_level(), eos_token="<|im_end|>", chat_template="config {{ eos_token }}")
    assert chat(tmp_path) == "config <|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat(tmp_path) == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert chat(tmp_path, str(tmp_path / "mine.jinja")) == "mine"
    assert chat(tmp_path, "{{ messages[0].content }}!") == "Hi!"


def test_named_chat_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    write_tokenizer(tmp_path, byte_level(), chat_template=named)
    assert chat(tmp_path) == "plain"
    assert chat(tmp_path, tools=[{"type": "function"}]) == "tools 1"


def test_no_chat_template_names_the_remedy(tmp_path):
    with pytest.raises(RequestError, match="/v1/completions.*--chat-template"):
        chat(write_tokenizer(tmp_path, byte_level()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("llama-2", "--chat-template 'llama-2' is neither a file nor"),
        ("{% if %}", "--chat-template is not valid Jinja"),
    ],
)
def test_bad_chat_template_stops_the_start(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        chat(write_tokenizer(tmp_path, byte_level()), override)


def test_gguf_chat_template(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", fields={"tokenizer.chat_template": CHATML})
    assert chat(path) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# ---- bytes of tokens -----------------------------------------------------------------------------------------------


def test_token_bytes_equal_the_decoder():
    backend = byte_level()
    table = TokenBytes(backend)
    every = range(backend.get_vocab_size())
    for i in every:
        assert table[i].decode("utf-8", "replace") == backend.decode([i], skip_special_tokens=False)
    assert table[10**6] == b""
    assert sorted(table[i] for i in every if len(table[i]) == 1) == [bytes([b]) for b in range(256)]


def test_only_byte_level_decoders_have_token_bytes():
    assert Tokenizer(byte_fallback(), special_tokens={}, eos_token_ids=()).token_bytes is None
    assert json.loads(byte_level().to_str())["decoder"]["type"] == "ByteLevel"
