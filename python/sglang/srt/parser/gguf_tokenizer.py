"""Builds a `tokenizers` pipeline from the metadata of a GGUF file.

Called by `Tokenizer.from_path`. GGUF names the pre-tokenizer ("smollm", "qwen2", …) instead of storing it; the
patterns here are those of the models' own tokenizer.json. A name not listed is refused: a wrong pattern would tokenize
almost right, which nobody notices.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sglang.srt.config.model_config import gguf_eos_ids
from sglang.srt.errors import ConfigError
from sglang.srt.utils.gguf_file import GGUFFile, open_gguf

_CONTROL, _USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type`: hidden when special tokens are skipped; added whole but visible."""

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _PreTokenizer(NamedTuple):
    """`patterns` split the text one after the other; `whole_words` keeps a word that is itself in the vocabulary."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer((_GPT2_SPLIT,)),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2_SPLIT)),
    "llama-bpe": _PreTokenizer((rf"{_CASELESS}|\p{{N}}{{1,3}}|{_SYMBOLS}",), whole_words=True, add_bos=True),
    "qwen2": _PreTokenizer((rf"{_CASELESS}|\p{{N}}|{_SYMBOLS}",), nfc=True),
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}
_ALIASES = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


class GGUFTokenizerParts(NamedTuple):
    """What `Tokenizer` is made of; `special_tokens` are chat-template variables."""

    backend: Tokenizer
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None


def find_gguf(path: str) -> str | None:
    """`path` itself when it is a .gguf file, the only .gguf file of a directory, or None."""
    if not os.path.isdir(path):
        return path if path.endswith(".gguf") and os.path.isfile(path) else None
    files = [name for name in os.listdir(path) if name.endswith(".gguf")]
    return os.path.join(path, files[0]) if len(files) == 1 else None


def load_gguf_parts(path: str) -> GGUFTokenizerParts:
    """Tokenizer, special tokens and chat template of a GGUF file.

    Raises:
        ConfigError: a tokenizer model or pre-tokenizer that is not supported; names it and the remedy.
    """
    file = open_gguf(path)
    pre = _pre_tokenizer(file)
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    ids = {name: file.field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    backend = _byte_level_bpe(file, tokens, pre)
    _add_tokens(backend, tokens, file.field("tokenizer.ggml.token_type", []))
    _add_post_processor(backend, file, tokens, pre, ids)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return GGUFTokenizerParts(
        backend=backend,
        special_tokens={names[kind]: tokens[i] for kind, i in ids.items() if i is not None and i < len(tokens)},
        eos_token_ids=gguf_eos_ids(file),
        chat_template=file.field("tokenizer.chat_template"),
    )


def _pre_tokenizer(file: GGUFFile) -> _PreTokenizer:
    remedy = "pass --tokenizer-path with the directory that holds the model's tokenizer.json"
    model = file.field("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(f"{file.path}: tokenizer model {model!r} is not byte-level BPE ('gpt2'); {remedy}")
    name = file.field("tokenizer.ggml.pre", "default")
    pre = _PRE_TOKENIZERS.get(_ALIASES.get(name, name))
    if pre is None:
        known = ", ".join([*_PRE_TOKENIZERS, *_ALIASES])
        raise ConfigError(f"{file.path}: pre-tokenizer {name!r} is not one of {known}; {remedy}")
    return pre


def _byte_level_bpe(file: GGUFFile, tokens: list[str], pre: _PreTokenizer) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    # No unk token: a byte that the vocabulary lacks vanishes, as in the models' own tokenizer.json.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)


def _add_post_processor(
    backend: Tokenizer, file: GGUFFile, tokens: list[str], pre: _PreTokenizer, ids: dict[str, int | None]
) -> None:
    """BOS in front and EOS behind, where the file asks for them."""
    bos = ids["bos"] if file.field("tokenizer.ggml.add_bos_token", pre.add_bos) else None
    eos = ids["eos"] if file.field("tokenizer.ggml.add_eos_token", False) else None
    wrapped = [None if i is None else tokens[i] for i in (bos, eos)]
    if wrapped == [None, None]:
        return
    before, after = ([] if token is None else [token] for token in wrapped)
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(tokens[i], i) for i in dict.fromkeys((bos, eos)) if i is not None],
    )
