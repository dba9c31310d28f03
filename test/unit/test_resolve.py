"""From launch flags to the frozen configuration, on a machine with and without a GPU."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang.srt.config import resolve as module
from sglang.srt.config.resolve import resolve
from sglang.srt.config.sections import MAX_LORA_RANK, Config
from sglang.srt.errors import ConfigError
from sglang.srt.server_args import ServerArgs

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG | {"torch_dtype": "float16"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    return str(tmp_path)


@pytest.fixture
def args(model: str) -> ServerArgs:
    return ServerArgs(model_path=model, device="cpu")


def changed(args: ServerArgs, **values: Any) -> ServerArgs:
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def test_cpu_defaults(args: ServerArgs, model: str):
    config = resolve(args)
    assert config.device.device == "cpu"
    assert config.load == module.LoadSection(path=model, dtype="float32", random_seed=config.load.random_seed)
    assert config.memory.kv_cache_dtype == "float32"
    assert (config.memory.page_size, config.memory.mem_fraction_static, config.memory.max_total_tokens) == (
        1,
        0.3,
        None,
    )
    assert config.schedule.max_running_requests == 64
    assert config.schedule.chunked_prefill_size == 512
    assert config.schedule.overlap is False
    assert config.schedule.max_queued_requests is None
    assert config.server.served_model_name == model
    assert config.server.log_level_http == "info"
    assert config.server.weight_version == "default"
    assert config.tokenizer.path == model
    assert config.model.context_length == 2048
    assert config.lora.enabled is False


def test_slots_of_adapters_have_room_for_every_rank_unless_told(args: ServerArgs):
    assert resolve(changed(args, enable_lora=True)).lora.max_lora_rank == MAX_LORA_RANK == 256
    assert resolve(changed(args, enable_lora=True, max_lora_rank=64)).lora.max_lora_rank == 64


@pytest.mark.parametrize(
    ("configs", "rank"),
    [
        (['{"r": 8}'], 8),
        (['{"r": 8}', '{"r": 4, "rank_pattern": {"q_proj": 32}}'], 32),
        (['{"r": 8, "rank_pattern": null}'], 8),
        (['{"r": 8}', "{"], MAX_LORA_RANK),
        (['{"r": 8}', None], MAX_LORA_RANK),
        (["{}"], MAX_LORA_RANK),
        (["[]"], MAX_LORA_RANK),
        (['{"r": "8"}'], MAX_LORA_RANK),
        (['{"r": 0}'], MAX_LORA_RANK),
        (['{"r": 300}'], MAX_LORA_RANK),
        (['{"r": 8, "rank_pattern": [16]}'], MAX_LORA_RANK),
    ],
)
@pytest.mark.parametrize("under_root", [False, True])
def test_slots_have_the_rank_of_the_first_adapters(args: ServerArgs, tmp_path: Path, configs, rank, under_root):
    paths = []
    for i, config in enumerate(configs):
        folder = tmp_path / f"adapter{i}"
        folder.mkdir()
        if config is not None:
            (folder / "adapter_config.json").write_text(config)
        paths.append(f"n{i}={folder.name if under_root else folder}")
    root = str(tmp_path) if under_root else ""
    flags = {"lora_paths": paths, "lora_root": root}
    assert resolve(changed(args, **flags)).lora.max_lora_rank == rank
    assert resolve(changed(args, **flags, max_lora_rank=64)).lora.max_lora_rank == 64


def test_cuda_defaults(args: ServerArgs):
    config = resolve(changed(args, device="cuda", base_gpu_id=2))
    assert (config.device.device, config.device.gpu_id) == ("cuda", 2)
    assert config.load.dtype == config.memory.kv_cache_dtype == "float16"
    assert config.schedule.overlap is True
    assert config.schedule.chunked_prefill_size == 8192
    assert config.schedule.max_running_requests == 256
    assert config.memory.mem_fraction_static == 0.85
    assert resolve(changed(args, device="cuda", disable_overlap_schedule=True)).schedule.overlap is False


def test_flags_reach_their_owners(args: ServerArgs):
    config = resolve(
        changed(
            args,
            context_length=100,
            dtype="half",
            kv_cache_dtype="bf16",
            random_seed=5,
            enable_fp32_lm_head=True,
            max_total_tokens=4096,
            max_queued_requests=9,
            max_running_requests=3,
            chunked_prefill_size=-1,
            schedule_policy="lpm",
            enable_mixed_chunk=True,
            page_size=16,
            host="[::1]",
            served_model_name="gpt",
            api_key="k",
            log_level="error",
            chat_template="t.jinja",
            sampling_defaults="openai",
            preferred_sampling_params='{"temperature": 0.1}',
            incremental_streaming_output=True,
        )
    )
    assert config.model.context_length == 100
    assert (config.load.dtype, config.memory.kv_cache_dtype) == ("float16", "bfloat16")
    assert config.load.random_seed == 5 and config.load.fp32_lm_head
    assert (config.memory.max_total_tokens, config.memory.page_size) == (4096, 16)
    schedule = config.schedule
    assert (schedule.max_queued_requests, schedule.max_running_requests) == (9, 3)
    assert schedule.chunked_prefill_size is None
    assert (schedule.policy, schedule.mixed_chunk) == ("lpm", True)
    server = config.server
    assert (server.host, server.served_model_name, server.api_key) == ("::1", "gpt", "k")
    assert (server.log_level, server.log_level_http) == ("error", "error")
    assert config.tokenizer.chat_template == "t.jinja"
    assert server.sampling_defaults == {}
    assert server.preferred_sampling_params == {"temperature": 0.1}
    assert server.incremental_streaming is True


def test_the_users_values_stay_as_they_were(args: ServerArgs):
    before = copy.deepcopy(vars(args))
    resolve(args)
    assert vars(args) == before


def test_the_config_survives_the_trip_to_the_back(args: ServerArgs):
    config = resolve(changed(args, preferred_sampling_params={"top_k": 5}))
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config


def test_a_seed_is_drawn_when_none_is_given(args: ServerArgs):
    assert len({resolve(args).load.random_seed for _ in range(5)}) > 1


def test_sampling_defaults_come_from_the_model(args: ServerArgs):
    defaults = resolve(args).server.sampling_defaults
    assert (defaults["temperature"], defaults["top_p"]) == (0.6, 0.9)


def test_without_tokenizer(args: ServerArgs):
    config = resolve(changed(args, skip_tokenizer_init=True, tokenizer_path="/nowhere"))
    assert config.tokenizer.path is None


@pytest.mark.parametrize(
    ("stored", "device", "dtype"),
    [
        ("float32", "cpu", "float32"),
        ("bfloat16", "cpu", "float32"),
        ("float32", "cuda", "bfloat16"),
        ("bfloat16", "cuda", "bfloat16"),
        ("float16", "cuda", "float16"),
    ],
)
def test_automatic_dtype(args: ServerArgs, stored: str, device: str, dtype: str):
    Path(args.model_path, "config.json").write_text(json.dumps(MODEL_CONFIG | {"torch_dtype": stored}))
    assert resolve(changed(args, device=device)).load.dtype == dtype


@pytest.mark.parametrize(
    ("gpu", "torch", "device"),
    [(False, "2.9.0", "cpu"), (True, "2.9.0+cu128", "cuda"), (True, "2.9.0", "cuda"), (True, "2.9.0+cpu", "cpu")],
)
def test_automatic_device(args: ServerArgs, monkeypatch: pytest.MonkeyPatch, gpu: bool, torch: str, device: str):
    monkeypatch.setattr(module, "_gpu_present", lambda: gpu)
    monkeypatch.setattr(module.metadata, "version", lambda _: torch)
    assert resolve(changed(args, device=None)).device.device == device
    assert resolve(changed(args, device="auto")).device.device == device


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_not_present(monkeypatch: pytest.MonkeyPatch, visible: str):
    monkeypatch.setattr(module.glob, "glob", lambda _: ["/dev/nvidia0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module._gpu_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert not module._gpu_present()


def test_ignored_flags_are_logged_line_by_line(args: ServerArgs, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        resolve(changed(args, trust_remote_code=True, attention_backend="fa3"))
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "--trust-remote-code",
        "--attention-backend",
    ]


@pytest.mark.parametrize(
    ("installed", "dtype", "backend", "reason"),
    [
        (True, "bfloat16", "flashinfer", ""),
        (False, "bfloat16", "triton", "not installed"),
        (True, "float32", "triton", "no kernels for heads of 64 values in float32"),
    ],
)
def test_flashinfer_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed, dtype, backend, reason
):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object() if installed else None)
    with caplog.at_level(logging.WARNING):
        assert module._attention_backend("flashinfer", "cuda", 64, dtype) == backend
    assert reason in caplog.text and bool(reason) == bool(caplog.records)


def test_half_width_on_a_cpu_warns(args: ServerArgs, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert resolve(changed(args, dtype="bfloat16")).load.dtype == "bfloat16"
    assert "--dtype bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp_size": 2}, "--tp-size 2 is refused: several GPUs"),
        ({"device": "npu"}, "--device npu is refused: use one of auto, cpu, cuda"),
        ({"port": 70000}, "--port 70000 must be from 0 to 65535"),
        ({"max_running_requests": 0}, "--max-running-requests 0 must be at least 1"),
        ({"chunked_prefill_size": -2}, "--chunked-prefill-size -2 must be at least 1"),
        ({"max_queued_requests": -1}, "--max-queued-requests -1 must be at least 1"),
        ({"stream_interval": 0}, "--stream-interval 0 must be at least 1"),
        ({"enable_lora": True, "max_lora_rank": 0}, "--max-lora-rank 0 must be at least 1"),
        ({"enable_lora": True, "max_lora_rank": 257}, "--max-lora-rank 257 must be at most 256"),
        ({"mem_fraction_static": 1.0}, "--mem-fraction-static 1.0 must be between 0 and 1"),
        ({"schedule_conservativeness": 0.0}, "--schedule-conservativeness 0.0 must be above 0"),
        ({"max_total_tokens": "many"}, "wrong type.*memory.max_total_tokens"),
        ({"context_length": 4096}, "--context-length 4096"),
        ({"preferred_sampling_params": "{"}, "--preferred-sampling-params { is not valid"),
        ({"preferred_sampling_params": "[1]"}, "must be a JSON object"),
        ({"preferred_sampling_params": {"temprature": 1}}, "temprature"),
        ({"model_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_refusals_name_flag_value_and_remedy(args: ServerArgs, values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(changed(args, **values))


def test_numbers_given_as_text_are_numbers(args: ServerArgs):
    assert resolve(changed(args, port="31000")).server.port == 31000


def test_the_small_model(smollm2_path: str):
    config = resolve(ServerArgs(model_path="smollm2", device="cpu"))
    assert config.load.path == config.tokenizer.path == smollm2_path
    assert config.server.served_model_name == "smollm2"
