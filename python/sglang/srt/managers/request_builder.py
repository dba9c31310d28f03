"""From a client's GenerateReqInput to records and SubmitRequests: all validation, and tokenising.

Used by TokenizerManager in two steps, because a call must be known (so that it can be aborted) before it is tokenised:
`open` checks what needs no tokens and makes the records, `fill` tokenises, checks lengths and ids, and gives every
record its message. Either step raises RequestError, and then nothing of the call may be sent.
Invariant: whatever goes on the wire has exactly the types `wire` declares; the back trusts that.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import logging
import operator
import random
import uuid
from typing import Any

import msgspec
import numpy as np

from sglang.srt.config.sections import Config
from sglang.srt.errors import AdapterError, ConfigError, RequestError
from sglang.srt.managers.detokenizer import Detokenizer
from sglang.srt.managers.io_struct.requests import GenerateReqInput
from sglang.srt.managers.io_struct.wire import SubmitRequest
from sglang.srt.managers.request_state import LogprobOptions, Prompt, RequestGroup, RequestRecord
from sglang.srt.parser.tokenizer import Tokenizer
from sglang.srt.sampling.sampling_params import SamplingParams, sequence_seed

logger = logging.getLogger(__name__)

OFF_LOOP_CHARACTERS = 50_000
"""Calls with more text than this are tokenised in a thread, so that they do not hold up everybody else."""
MAX_SEQUENCES = 65_536
"""Prompts times n of one call: an absurd n must be an error, not a server that stands still."""
PER_PROMPT_LOGPROB_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num")


class RequestBuilder:
    """Knows the limits of model and server; keeps nothing of a call.

    Args:
        tokenizer: None with --skip-tokenizer-init: prompts come as ids, replies go as ids.

    Raises:
        ConfigError: --preferred-sampling-params does not hold valid sampling parameters.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None) -> None:
        self._model = config.model
        self._schedule = config.schedule
        self._lora_enabled = config.lora.enabled
        self._truncate = config.server.allow_auto_truncate
        self._preferred = config.server.preferred_sampling_params
        self._tokenizer = tokenizer
        # A tokenizer may name an end that config.json does not (chat models do); text stops at either.
        ends = {*config.model.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        self._eos_ids = tuple(sorted(i for i in ends if i < config.model.vocab_size))
        self._seeds = random.Random(config.load.random_seed)
        self._req_ids = itertools.count(1)
        try:
            SamplingParams.from_dict(self._preferred).verify(self._model.vocab_size)
        except RequestError as error:
            raise ConfigError(f"--preferred-sampling-params: {error}") from error

    def open(self, obj: GenerateReqInput, *, stream: bool) -> RequestGroup:
        """Check the request and make its records, without messages yet.

        Raises:
            RequestError: what the request asks for is malformed, out of range or not supported.
        """
        obj.check()
        _check_rids(obj)
        _check_token_ids_logprob(obj)
        items = [obj] if obj.is_single else [obj[i] for i in range(obj.batch_size)]
        prompts = self._prompts(obj, items)
        n = _common_n(prompts)
        _check_samples(obj, n, len(prompts))
        group = RequestGroup(stream=stream, is_list=n > 1 or not obj.is_single)
        group.prompts = prompts
        batch_alias = (obj.rid,) if isinstance(obj.rid, str) and not obj.is_single else ()
        for item, prompt in zip(items, prompts, strict=True):
            self._add_records(group, prompt, item.rid, n, batch_alias)  # type: ignore[arg-type]
        return group

    async def fill(self, group: RequestGroup, max_input_len: int | None) -> None:
        """Tokenise and give every record its SubmitRequest; waits only for long texts.

        Args:
            max_input_len: longest prompt the scheduler takes, when it has said so.

        Raises:
            RequestError: a prompt that cannot be tokenised, is empty or too long, or holds ids outside the vocabulary.
        """
        texts = [prompt for prompt in group.prompts if prompt.text is not None]
        if sum(len(prompt.text or "") for prompt in texts) > OFF_LOOP_CHARACTERS:
            await asyncio.to_thread(self._tokenize, texts)
        else:
            self._tokenize(texts)
        for prompt in group.prompts:
            self._fill_prompt(prompt, max_input_len)

    def _prompts(self, obj: GenerateReqInput, items: list[GenerateReqInput]) -> list[Prompt]:
        shared = None if isinstance(obj.sampling_params, list) else self._params(obj.sampling_params)
        return [self._prompt(item, shared or self._params(item.sampling_params)) for item in items]  # type: ignore[arg-type]

    def _params(self, own: dict[str, Any] | None) -> tuple[SamplingParams, bool]:
        """Parameters over the server's preferred ones, and whether the client set max_new_tokens."""
        data = {} if own is None else own
        if not isinstance(data, dict):
            raise RequestError(f"sampling_params must be an object, got {own!r}.")
        if self._preferred:
            data = {**self._preferred, **{k: v for k, v in data.items() if v is not None}}
        params = SamplingParams.from_dict(data)
        params.verify(self._model.vocab_size)
        if params.json_schema or params.regex or params.ebnf or params.structural_tag:
            raise RequestError(
                "structured output is not supported yet: drop json_schema, regex, ebnf and structural_tag "
                "(response_format and a forced tool_choice ask for them, too)."
            )
        if self._tokenizer is None and (params.stop_strings or params.stop_patterns):
            raise RequestError("stop and stop_regex need a tokenizer, and the server runs with --skip-tokenizer-init.")
        return params, (own or {}).get("max_new_tokens") is not None

    def _prompt(self, item: GenerateReqInput, params: tuple[SamplingParams, bool]) -> Prompt:
        if item.lora_path and not self._lora_enabled:
            raise AdapterError(
                "not_enabled",
                f"LoRA adapter '{item.lora_path}' was requested, but LoRA is not enabled. "
                "Please launch the server with --enable-lora to use adapters.",
            )
        if item.text is not None and self._tokenizer is None:
            raise RequestError("The server runs with --skip-tokenizer-init: send input_ids instead of text.")
        return Prompt(
            text=_string("text", item.text) if item.text is not None else None,
            token_ids=item.input_ids or [],  # type: ignore[arg-type]
            params=params[0],
            max_new_given=params[1],
            logprobs=self._logprob_options(item),
            adapter=_string("lora_path", item.lora_path) if item.lora_path else None,
            extra_key=_string("extra_key", item.extra_key or ""),
            priority=_integer("priority", item.priority or 0, -(2**31), 2**31 - 1),
            log_metrics=item.log_metrics,
        )

    def _logprob_options(self, item: GenerateReqInput) -> LogprobOptions | None:
        if not item.return_logprob:
            return None
        last = self._model.vocab_size - 1
        start = -1 if item.logprob_start_len is None else item.logprob_start_len
        return LogprobOptions(
            start=_integer("logprob_start_len", start, -1, 2**31 - 1),
            top_num=_integer("top_logprobs_num", item.top_logprobs_num or 0, 0, last + 1),
            token_ids=tuple(_integer("token_ids_logprob", i, 0, last) for i in _token_list(item.token_ids_logprob)),
            with_text=bool(item.return_text_in_logprobs),
        )

    def _add_records(
        self, group: RequestGroup, prompt: Prompt, rid: str | None, n: int, aliases: tuple[str, ...]
    ) -> None:
        if n > 1 and rid:
            aliases, rid = (rid, *aliases), None
        for _ in range(n):
            record = RequestRecord(
                req_id=next(self._req_ids),
                rid=rid or uuid.uuid4().hex,
                group=group,
                index=len(group.records),
                prompt=prompt,
                aliases=aliases,
                stream_interval=max(prompt.params.stream_interval or self._schedule.stream_interval, 1),
            )
            group.add(record)

    def _tokenize(self, prompts: list[Prompt]) -> None:
        for prompt in prompts:
            assert self._tokenizer is not None and prompt.text is not None
            try:
                prompt.token_ids = self._tokenizer.encode(prompt.text)
            except (TypeError, ValueError) as error:
                raise RequestError(f"The text cannot be tokenised: {error}.") from error

    def _fill_prompt(self, prompt: Prompt, max_input_len: int | None) -> None:
        packed = self._pack_ids(prompt, max_input_len)
        options, params = prompt.logprobs, prompt.params
        if options is not None and options.start > prompt.num_tokens:
            raise RequestError(
                f"logprob_start_len ({options.start}) is larger than the number of prompt tokens ({prompt.num_tokens})."
            )
        seed = self._seeds.getrandbits(63) if params.sampling_seed is None else params.sampling_seed
        spec = params.resolve(
            vocab_size=self._model.vocab_size,
            eos_ids=self._eos_ids,
            max_new_tokens=self._max_new_tokens(prompt),
            seed=seed,
        )
        for i, record in enumerate(prompt.records):
            record.submit = SubmitRequest(
                req_id=record.req_id,
                input_ids=packed,
                sampling=msgspec.structs.replace(spec, seed=sequence_seed(seed, i)),
                extra_key=prompt.extra_key,
                priority=prompt.priority if self._schedule.enable_priority else 0,
                return_logprob=options is not None,
                logprob_start=prompt.num_tokens if options is None or options.start < 0 else options.start,
                top_logprobs_num=options.top_num if options is not None else 0,
                token_ids_logprob=options.token_ids if options is not None else (),
            )
            self._attach_detokenizer(record)

    def _attach_detokenizer(self, record: RequestRecord) -> None:
        if self._tokenizer is None:
            return
        params = record.prompt.params
        record.check_stops = bool(params.stop_strings or params.stop_patterns)
        record.detokenizer = Detokenizer(
            self._tokenizer,
            skip_special_tokens=bool(params.skip_special_tokens),
            stop_strings=tuple(params.stop_strings),
            stop_patterns=tuple(params.stop_patterns),
            no_stop_trim=bool(params.no_stop_trim),
            min_new_tokens=params.min_new_tokens or 0,
        )

    def _pack_ids(self, prompt: Prompt, max_input_len: int | None) -> bytes:
        """Check the prompt's ids and length, cutting it where that is allowed; int32 bytes of what is left."""
        try:
            ids = array.array("i", prompt.token_ids)
        except (TypeError, OverflowError) as error:
            raise RequestError(f"input_ids must be a list of token ids: {error}.") from error
        if not ids:
            raise RequestError("The prompt is empty: send at least one token.")
        limit = self._input_limit(len(ids), max_input_len)
        prompt.token_ids = ids[:limit].tolist()
        values = np.frombuffer(ids, dtype=np.int32)[:limit]
        if values.min() < 0 or values.max() >= self._model.vocab_size:
            bad = int(values[(values < 0) | (values >= self._model.vocab_size)][0])
            raise RequestError(
                f"input_ids holds {bad}, which is outside the vocabulary [0, {self._model.vocab_size - 1}]."
            )
        return values.astype("<i4").tobytes()

    def _input_limit(self, length: int, max_input_len: int | None) -> int:
        """How many prompt tokens are used: all of them, or fewer with --allow-auto-truncate."""
        context = self._model.context_length
        capacity = context if max_input_len is None else min(max_input_len, context)
        if length < context and length <= capacity:
            return length
        if self._truncate:
            logger.warning("cut a prompt of %d tokens to the %d that fit", length, min(context - 1, capacity))
            return min(context - 1, capacity)
        if length >= context:
            raise RequestError(
                f"The input ({length} tokens) is longer than the model's context length ({context} tokens)."
            )
        raise RequestError(
            f"The input ({length} tokens) is longer than the {capacity} tokens that fit the server's KV cache; "
            "send a shorter prompt or launch with a larger --mem-fraction-static or --max-total-tokens."
        )

    def _max_new_tokens(self, prompt: Prompt) -> int:
        """Output limit within the context: an explicit one must fit, the default is lowered."""
        length, context = prompt.num_tokens, self._model.context_length
        wanted, room = prompt.params.max_new_tokens or 0, context - length
        if wanted <= room:
            return wanted
        if self._truncate or not prompt.max_new_given:
            return room
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens: {length} prompt "
            f"tokens and max_new_tokens {wanted} make {length + wanted}. Ask for at most {room} new tokens."
        )


def _check_rids(obj: GenerateReqInput) -> None:
    seen: set[str] = set()
    for rid in obj.rid if isinstance(obj.rid, list) else []:
        if not isinstance(rid, str):
            raise RequestError(f"rid must be a string or a list of strings, got {rid!r}.")
        if rid in seen:
            raise RequestError(f"Duplicate request ID detected: {rid}")
        seen.add(rid)


def _common_n(prompts: list[Prompt]) -> int:
    counts = sorted({prompt.params.n or 1 for prompt in prompts})
    if len(counts) > 1:
        raise RequestError(
            f"All prompts of a batch must ask for the same n, got {counts}; send them as separate requests."
        )
    return counts[0]


def _check_samples(obj: GenerateReqInput, n: int, num_prompts: int) -> None:
    if n == 1:
        return
    if n * num_prompts > MAX_SEQUENCES:
        raise RequestError(
            f"n={n} for {num_prompts} prompts is more than the {MAX_SEQUENCES} sequences one request may ask for."
        )
    lists = [name for name in PER_PROMPT_LOGPROB_FIELDS if isinstance(getattr(obj, name), list)]
    if not obj.is_single and _is_nested(obj.token_ids_logprob):
        lists.append("token_ids_logprob")
    if lists:
        raise RequestError(f"{', '.join(lists)} cannot be a list per prompt together with n={n}; send a single value.")


def _is_nested(ids: Any) -> bool:
    return bool(ids) and (ids[0] is None or isinstance(ids[0], list))


def _check_token_ids_logprob(obj: GenerateReqInput) -> None:
    ids = obj.token_ids_logprob
    if not _is_nested(ids):
        return
    if obj.is_single:
        raise RequestError("token_ids_logprob must be a flat list of token ids for a single prompt.")
    if ids is not None and len(ids) != obj.batch_size:
        raise RequestError(f"token_ids_logprob has {len(ids)} entries for a batch of {obj.batch_size} prompts.")


def _token_list(value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise RequestError(f"token_ids_logprob must be a list of token ids, got {value!r}.")
    return value or []


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} must be an integer, got {value!r}.") from None
    if not low <= number <= high:
        raise RequestError(f"{name} must be in [{low}, {high}], got {number}.")
    return number


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, got {value!r}.")
    return value
