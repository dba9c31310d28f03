"""Small model directories, GGUF files and tokenizers for the tests of the front, made in a few milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(*, merges: tuple[str, ...] = ("t h", "th e", "Ġ the")) -> Tokenizer:
    """A byte-level BPE tokenizer: 3 special tokens, 256 bytes, one visible added token, a few merges."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("naïve→", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A SentencePiece-style tokenizer like Llama 2's: ▁ for space, <0x..> for what the vocabulary lacks, BOS added."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyzé.", "th", "the", "▁the", "▁a"]:
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_level() -> Tokenizer:
    """Words without a decoder: tokens are joined by spaces."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<eos>", "one", "two", "three", "\ufffd", "+"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<eos>", normalized=False)])
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """tokenizer.json and tokenizer_config.json; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_config(directory: Path, config: dict[str, object], generation: dict[str, object] | None = None) -> Path:
    """config.json and, when given, generation_config.json; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    fields: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokens: list[str] | None = None,
    types: list[int] | None = None,
    merges: tuple[str, ...] = ("t h", "th e", "Ġ the"),
) -> Path:
    """A GGUF file with the metadata of a 2-layer model; `fields` adds to it, or removes a key with None."""
    writer = gguf.GGUFWriter(str(path), arch)
    if tokens is None:
        tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    values: dict[str, object] = {
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": 32,
        f"{arch}.feed_forward_length": 64,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types or [3 if t in SPECIALS else 1 for t in tokens],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **(fields or {}),
    }
    for key, value in values.items():
        _add(writer, key, value)
    weights = {"token_embd.weight": np.zeros((len(tokens), 32), dtype=np.float32), **(tensors or {})}
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
