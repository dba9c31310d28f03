"""Request objects under upstream's public names: the JSON bodies of the native endpoints and what `Engine` builds.

Parsing follows stock: unknown keys are ignored, numeric strings coerce, `null` for a non-optional field is an error.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import msgspec

from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct.wire import PauseMode

UNSUPPORTED_FIELDS = {
    "input_embeds": "embeddings as input are not supported; send text or input_ids",
    "image_data": "images are not supported by text models",
    "video_data": "videos are not supported by text models",
    "audio_data": "audio is not supported by text models",
    "session_params": "sessions are not supported; send the whole prompt, the prefix cache makes it cheap",
    "custom_logit_processor": "custom logit processors are not supported",
    "return_hidden_states": "hidden states are not returned by this server",
    "return_routed_experts": "the model has no experts",
}
"""Fields of the public schema that this server refuses when they ask for something, with the reason."""


class GenerateReqInput(msgspec.Struct, kw_only=True, dict=True):
    """Body of `/generate`: one prompt, or a batch of prompts (lists).

    Exactly one of `text` and `input_ids` is given. Single when `text` is a str or `input_ids` a flat list of ints.
    Per-prompt fields may be a scalar (applies to all) or a list as long as the batch.
    """

    rid: str | list[str] | None = None
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    lora_path: str | list[str | None] | None = None
    lora_id: str | list[str | None] | None = None
    session_params: Any = None
    custom_logit_processor: Any = None
    return_hidden_states: bool | list[bool] = False
    return_routed_experts: bool = False
    priority: int | None = None
    extra_key: str | list[str | None] | None = None
    log_metrics: bool = True
    no_logs: bool = False
    model: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether this asks for one prompt (n > 1 samples of it still count as single)."""
        if self.text is not None:
            return isinstance(self.text, str)
        return not self.input_ids or not isinstance(self.input_ids[0], list)

    @property
    def batch_size(self) -> int:
        """Number of prompts."""
        if self.is_single:
            return 1
        return len(self.text if self.text is not None else self.input_ids or [])

    def check(self) -> None:
        """Refuse what the schema allows and this server cannot do.

        Raises:
            RequestError: no input, two inputs, an empty batch, a list of the wrong length, or an unsupported field.
        """
        for name, reason in UNSUPPORTED_FIELDS.items():
            if getattr(self, name):
                raise RequestError(f"{name}: {reason}.")
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("Either text, input_ids or input_embeds should be provided.")
        if not self.is_single and self.input_ids is not None:
            for i, ids in enumerate(self.input_ids):
                if not isinstance(ids, list):
                    raise RequestError(f"input_ids[{i}] is {ids!r}: a batch holds one list of ids per prompt.")
        elif self.input_ids is not None and list in set(map(type, self.input_ids)):
            raise RequestError("input_ids mixes ids and lists; send a flat list, or one list per prompt.")
        if self.batch_size == 0:
            raise RequestError("The batch is empty; send at least one prompt.")
        if self.is_single and isinstance(self.rid, list):
            raise RequestError("rid must be a string for a single prompt.")
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.is_single:
            for name in (
                "sampling_params",
                "return_logprob",
                "logprob_start_len",
                "top_logprobs_num",
                "lora_path",
                "extra_key",
            ):
                if isinstance(getattr(self, name), list):
                    raise RequestError(f"{name} is a list, but there is a single prompt.")
            return
        for name in (
            "rid",
            "sampling_params",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "lora_path",
            "extra_key",
        ):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.batch_size:
                raise RequestError(f"{name} has {len(value)} entries for a batch of {self.batch_size} prompts.")

    def __getitem__(self, i: int) -> GenerateReqInput:
        """The i-th prompt of a batch as a single request; scalars are shared. A string rid becomes `rid_i`."""
        one = copy.copy(self)
        if self.is_single:
            return one
        for name in ("text", "input_ids"):
            value = getattr(self, name)
            setattr(one, name, value if value is None else value[i])
        for name in (
            "sampling_params",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "lora_path",
            "lora_id",
            "extra_key",
        ):
            value = getattr(self, name)
            setattr(one, name, value[i] if isinstance(value, list) else value)
        if isinstance(self.rid, list):
            one.rid = self.rid[i]
        elif self.rid is not None:
            one.rid = f"{self.rid}_{i}"
        ids = self.token_ids_logprob
        if ids and isinstance(ids[0], list | None):
            one.token_ids_logprob = ids[i]  # type: ignore[assignment]
        return one


class AbortReq(msgspec.Struct, kw_only=True):
    """Body of `/abort_request`: one rid, every rid that starts with it (`prefix`), an adapter's requests, or all."""

    rid: str | None = None
    abort_all: bool = False
    prefix: bool = False
    lora_name: str | None = None


class PauseGenerationReqInput(msgspec.Struct, kw_only=True):
    """Body of `/pause_generation`.

    Fields:
        lora_name: pause the requests of one adapter only (mode abort).
        owner: who pauses; a continue that names another owner is refused.
        timeout: seconds until the pause ends by itself, 0 for never; default: SGLANG_PAUSE_TIMEOUT.
    """

    mode: PauseMode = PauseMode.ABORT
    lora_name: str | None = None
    owner: str | None = None
    timeout: Annotated[float, msgspec.Meta(ge=0.0)] | None = None


class ContinueGenerationReqInput(msgspec.Struct, kw_only=True):
    """Body of `/continue_generation`; `torch_empty_cache` is taken for stock's clients and has no effect."""

    torch_empty_cache: bool = True
    lora_name: str | None = None
    owner: str | None = None


class LoadLoRAAdapterReqInput(msgspec.Struct, kw_only=True):
    """Body of `/load_lora_adapter`.

    Fields:
        upsert: publish a new version of a name that is taken.
        mode: what a new version does to running requests: they finish on the old one, or switch at the next step.
    """

    lora_name: str
    lora_path: str
    pinned: bool = False
    upsert: bool = False
    mode: Literal["finish_old", "switch"] = "finish_old"


class LoadLoRAAdapterFromTensorsReqInput(msgspec.Struct, kw_only=True):
    """Body of `/load_lora_adapter_from_tensors`; exactly one of the two tensor fields.

    Fields:
        config_dict: what adapter_config.json would say.
        serialized_tensors: base64 of a safetensors image, or of the clients' pickled dict of tensors.
        serialized_named_tensors: the same, one item per tensor-parallel rank.
        load_format: flattened_bucket, safetensors, or None to look at the bytes.
    """

    lora_name: str
    config_dict: dict[str, Any]
    serialized_tensors: str | None = None
    serialized_named_tensors: list[str] | str | None = None
    pinned: bool = False
    upsert: bool = False
    mode: Literal["finish_old", "switch"] = "finish_old"
    load_format: str | None = None
    added_tokens_config: dict[str, Any] | None = None
    expected_checksums: Any = None


class StageLoRAAdapterReqInput(msgspec.Struct, kw_only=True):
    """Body of `/stage_lora_adapter`; exactly one of `lora_path`, `tensors` and `group_name`.

    Fields:
        config_dict: with `tensors` and `group_name`, what adapter_config.json would say.
        tensors: a safetensors image; base64 in JSON, raw behind the JSON in an `application/octet-stream` body.
        group_name: a group that this server has joined (`/init_weights_update_group`), to which the trainer broadcasts
            the same image, of `nbytes`, under the name `broadcast`, never used before.
        timeout: seconds that a broadcast may take to come, and after which a version that nobody has committed is
            dropped.
    """

    lora_name: str
    lora_path: str | None = None
    config_dict: dict[str, Any] | None = None
    tensors: bytearray | None = None
    group_name: str | None = None
    broadcast: str | None = None
    nbytes: int | None = None
    pinned: bool = False
    timeout: Annotated[float, msgspec.Meta(gt=0.0)] = 120.0


class CommitLoRAAdapterReqInput(msgspec.Struct, kw_only=True):
    """Body of `/commit_lora_adapter`: make a name mean what was staged under it.

    Fields:
        lora_version, digest: as the reply to staging gave them; versions are counted anew by a server that restarts,
            so a commit that may be repeated should name the digest, too.
        mode: see LoadLoRAAdapterReqInput.
    """

    lora_name: str
    lora_version: int
    digest: str | None = None
    mode: Literal["finish_old", "switch"] = "finish_old"


class DropLoRAAdapterReqInput(msgspec.Struct, kw_only=True):
    """Body of `/drop_lora_adapter`: forget what was staged, if it has not been committed."""

    lora_name: str
    lora_version: int


class UnloadLoRAAdapterReqInput(msgspec.Struct, kw_only=True):
    """Body of `/unload_lora_adapter`.

    Fields:
        timeout: seconds to wait for the requests that hold the adapter; None waits for as long as they run.
        abort: end them.
    """

    lora_name: str
    timeout: Annotated[float, msgspec.Meta(ge=0.0)] | None = None
    abort: bool = False


class LoRAUpdateOutput(msgspec.Struct, kw_only=True):
    """Reply of the adapter endpoints; the first five fields are upstream's.

    Fields:
        loaded_adapters: name -> path of every adapter with a name, after the call.
        error_code: see errors.AdapterError.
        lora_version, digest, num_tensors, rank, nbytes: of the version that was loaded.
        num_holders: requests that an unloaded adapter still waits for.
        state: of a version that was staged or committed: staging until it is committed, serving from then on.
    """

    rid: str | None = None
    http_worker_ipc: str | None = None
    success: bool = True
    error_message: str = ""
    loaded_adapters: dict[str, str] = {}
    error_code: str | None = None
    lora_name: str | None = None
    lora_version: int | None = None
    digest: str | None = None
    num_tensors: int | None = None
    rank: int | None = None
    nbytes: int | None = None
    num_holders: int | None = None
    state: str | None = None


class FlushCacheReqInput(msgspec.Struct, kw_only=True):
    """Query of `/flush_cache`: seconds to wait for an idle scheduler before giving up."""

    timeout: float = 0.0


class InitWeightsUpdateGroupReqInput(msgspec.Struct, kw_only=True):
    """Body of `/init_weights_update_group`: join the group of a trainer, which is its rank 0.

    Fields:
        master_address, master_port: of the trainer's torch.distributed.TCPStore.
        rank_offset: this server's rank.
        timeout: seconds that all members have to join.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"
    timeout: Annotated[float, msgspec.Meta(gt=0.0)] = 60.0


class DestroyWeightsUpdateGroupReqInput(msgspec.Struct, kw_only=True):
    """Body of `/destroy_weights_update_group`: leave a group."""

    group_name: str = "weight_update_group"


class WeightsUpdateGroupOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Reply of both. `error_code`: as of AdapterError."""

    success: bool
    message: str
    error_code: str | None = None
