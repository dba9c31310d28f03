"""The front's tokenizer: text to ids, ids to text, messages to prompt text, by `tokenizers` and Jinja alone.

Built once at start by `Tokenizer.from_path` from a directory with tokenizer.json, or from a GGUF file (see
`gguf_tokenizer`). Used by TokenizerManager, the detokenizer and the OpenAI endpoints.
Invariant: nothing changes a tokenizer after `from_path`, so any thread may call it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend

from sglang.srt.errors import ConfigError, RequestError
from sglang.srt.parser.chat_template import ChatTemplate, read_template_argument, read_template_file

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_NAMES = ("additional_special_tokens", "extra_special_tokens")


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Args:
        backend: the `tokenizers` pipeline, complete with added tokens and post-processor.
        special_tokens: template variables, e.g. ``{"eos_token": "</s>"}``; also gives `bos_token_id`.
        eos_token_ids: ids that end a sequence as far as the tokenizer's files say; the model's config may know more.
        chat_template: None when the model has none.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # A tokenizer.json may carry the training run's padding and truncation; neither belongs in a server.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = backend.token_to_id(self.special_tokens.get("bos_token", ""))

    @classmethod
    def from_path(cls, path: str, chat_template: str | None = None) -> Tokenizer:
        """Load the tokenizer of a model.

        Args:
            path: directory with tokenizer.json, .gguf file, or directory with one .gguf file.
            chat_template: `--chat-template`, a file or Jinja source, in place of the model's own.

        Raises:
            ConfigError: missing or unsupported files; the message says what to do.
        """
        if os.path.isdir(path) and os.path.isfile(os.path.join(path, "tokenizer.json")):
            return _from_directory(path, chat_template)
        from sglang.srt.parser.gguf_tokenizer import find_gguf, load_gguf_parts

        file = find_gguf(path)
        if file is None:
            raise ConfigError(
                f"{path} has no tokenizer.json, which this server needs; write one with "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or pass --tokenizer-path"
            )
        parts = load_gguf_parts(file)
        sources = {} if parts.chat_template is None else {"default": parts.chat_template}
        return cls(
            parts.backend,
            special_tokens=parts.special_tokens,
            eos_token_ids=parts.eos_token_ids,
            chat_template=_chat_template(sources, chat_template, parts.special_tokens, file),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: apply the tokenizer's post-processor (BOS, …); False for text that a chat template made.

        Raises:
            RequestError: the text is not valid Unicode (a lone surrogate).
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError(
                "The text holds a lone surrogate (half of a UTF-16 pair); send valid Unicode."
            ) from error
        return ids

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of token ids; ids that stand for no token give no text.

        Args:
            spaces_between_special_tokens: accepted for stock's clients; it only ever changed slow Python tokenizers.

        Raises:
            RequestError: an id is negative or above 2**32.
        """
        try:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError(f"Token ids must be between 0 and {self.vocab_size - 1}: {error}.") from error
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id (e.g. ``Ġthe``), None when there is no such token."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    @functools.cached_property
    def token_bytes(self) -> TokenBytes | None:
        """Bytes of every token when the decoder is byte-level (a text is then their concatenation), else None."""
        return TokenBytes(self.backend) if isinstance(self.backend.decoder, decoders.ByteLevel) else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Prompt text of a conversation (see `ChatTemplate.render`); encode it with ``add_special_tokens=False``.

        Raises:
            RequestError: no chat template, or one that refuses these messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "The model has no chat template; use /v1/completions, or start the server with --chat-template FILE."
            )
        return self.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes it stands for under a byte-level decoder; filled as ids turn up, b"" for unknown ids."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token: str = self._backend.id_to_token(token_id) or ""
        table = _byte_of_char()
        # The decoder takes a token with any character outside its alphabet literally.
        literal = not all(char in table for char in token)
        value = token.encode() if literal else bytes(table[char] for char in token)
        self[token_id] = value
        return value


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, every other byte for a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(0x100 + i): b for i, b in enumerate(others)}}


# ---- tokenizer.json directories ------------------------------------------------------------------------------------


def _from_directory(path: str, override: str | None) -> Tokenizer:
    file = os.path.join(path, "tokenizer.json")
    try:
        backend = Backend.from_file(file)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} cannot be loaded: {error}") from error
    config = {**_read_json(path, "special_tokens_map.json"), **_read_json(path, "tokenizer_config.json")}
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name)))}
    _add_missing_tokens(backend, config, special)
    eos = backend.token_to_id(special.get("eos_token", ""))
    return Tokenizer(
        backend,
        special_tokens=special,
        eos_token_ids=() if eos is None else (eos,),
        chat_template=_chat_template(_template_sources(path, config), override, special, path),
    )


def _read_json(path: str, name: str) -> dict[str, Any]:
    file = os.path.join(path, name)
    if not os.path.isfile(file):
        return {}
    try:
        with open(file, encoding="utf-8") as stream:
            data = json.load(stream)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return data


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as {"content": …}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Tokens that only tokenizer_config.json declares; in a complete tokenizer.json this changes nothing."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder", {})
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            flags = {key: bool(entry.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            known[entry["content"]] = flags["special"]
            backend.add_tokens([AddedToken(entry["content"], **flags)])
    extra = [config.get(name) or [] for name in _EXTRA_NAMES]
    listed = [_token_text(v) for group in extra for v in (group.values() if isinstance(group, dict) else group)]
    for text in [*special.values(), *listed]:
        if text and not known.get(text):
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _template_sources(path: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja, else tokenizer_config.json's string or list of named ones."""
    file = os.path.join(path, "chat_template.jinja")
    if os.path.isfile(file):
        return {"default": read_template_file(file)}
    value = config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return dict(value) if isinstance(value, dict) else {}


def _chat_template(
    sources: Mapping[str, str], override: str | None, special: Mapping[str, str], origin: str
) -> ChatTemplate | None:
    if override is not None:
        return ChatTemplate({"default": read_template_argument(override)}, special, "--chat-template")
    return ChatTemplate(sources, special, origin) if sources else None
