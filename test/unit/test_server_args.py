"""Launch flags as clients give them: command lines, keyword arguments, patched and mirrored parsers."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from typing import Any

import pytest

from sglang.srt.server_args import ServerArgs, json_value, prepare_server_args, scaled_int

# What AstraFlow's builder emits for its LoRA recipe.
ASTRAFLOW_LINE = """
--tokenizer-path m --tokenizer-mode auto --load-format auto --trust-remote-code --device cuda --tp-size 1
--base-gpu-id 0 --nnodes 1 --node-rank 0 --model-path m --random-seed 1 --skip-tokenizer-init --disable-radix-cache
--torch-compile-max-bs 32 --triton-attention-num-kv-splits 8 --num-continuous-decode-steps 1 --attention-backend triton
--context-length 7168 --mem-fraction-static 0.8 --max-running-requests 48 --chunked-prefill-size -1
--max-prefill-tokens 32768 --schedule-policy lpm --schedule-conservativeness 1.0 --cpu-offload-gb 0 --dtype bfloat16
--kv-cache-dtype auto --dp-size 1 --ep-size 1 --enable-lora --max-lora-rank 32
--lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --max-loaded-loras 256
--max-loras-per-batch 4 --lora-backend triton --log-level warning --log-level-http warning --log-requests-level 0
--enable-metrics --decode-log-interval 1 --host 0.0.0.0 --port 31000
""".split()

# Flags its configuration can emit besides.
ASTRAFLOW_OTHERS = """
--disable-cuda-graph --disable-cuda-graph-padding --enable-nccl-nvls --disable-outlines-disk-cache
--disable-custom-all-reduce --disable-overlap-schedule --enable-mixed-chunk --enable-dp-attention
--enable-torch-compile --cuda-graph-max-bs 32 --cuda-graph-bs 1 2 4 --torchao-config int8wo --enable-nan-detection
--enable-p2p-check --triton-attention-reduce-in-fp32 --enable-memory-saver --allow-auto-truncate --enable-multimodal
--sampling-backend flashinfer --lora-paths a=/x b=/y --log-requests --show-time-cost --lora-drain-wait-threshold 0.5
--model-loader-extra-config {} --dist-init-addr h:1 --pp-size 1 --enable-return-routed-experts
""".split()

# Keyword arguments slime passes to ServerArgs.
SLIME_KEYWORDS: dict[str, Any] = {
    "model_path": "m",
    "trust_remote_code": True,
    "random_seed": 7,
    "enable_memory_saver": True,
    "host": "[::1]",
    "port": 15000,
    "nccl_port": 15001,
    "nnodes": 1,
    "node_rank": 0,
    "dist_init_addr": "[::1]:15002",
    "gpu_id_step": 1,
    "base_gpu_id": 3,
    "tp_size": 1,
    "dp_size": 1,
    "pp_size": 1,
    "ep_size": 1,
    "skip_server_warmup": True,
    "enable_draft_weights_cpu_backup": False,
    "enable_metrics": True,
    "disaggregation_mode": "null",
    "disaggregation_bootstrap_port": 8998,
    "disaggregation_transfer_backend": "mooncake",
    "load_balance_method": "round_robin",
    "encoder_only": False,
    "enable_return_routed_experts": False,
    "dtype": "auto",
    "cuda_graph_backend_prefill": None,
    "moe_dp_size": 1,
    "enable_weights_cpu_backup": False,
    "custom_weight_loader": None,
}


def test_astraflows_line_parses_to_its_values():
    args = prepare_server_args(ASTRAFLOW_LINE)
    assert (args.model_path, args.tokenizer_path) == ("m", "m")
    assert (args.host, args.port) == ("0.0.0.0", 31000)
    assert (args.chunked_prefill_size, args.max_prefill_tokens) == (-1, 32768)
    assert args.lora_target_modules == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert args.enable_lora is True
    assert args.skip_tokenizer_init is True
    assert args.schedule_conservativeness == 1.0


def test_astraflows_other_flags_parse():
    args = prepare_server_args([*ASTRAFLOW_LINE, *ASTRAFLOW_OTHERS])
    assert args.cuda_graph_bs == [1, 2, 4]
    assert args.lora_paths == ["a=/x", "b=/y"]
    assert args.lora_drain_wait_threshold == 0.5
    assert args.dist_init_addr == "h:1"


def test_areals_lora_paths_take_names_and_objects():
    line = ["--model-path", "m", "--attention-backend", "fa3", "--lora-paths", "n-v0=/p", '{"lora_name": "a"}']
    args = prepare_server_args(line)
    assert args.lora_paths == ["n-v0=/p", {"lora_name": "a"}]


def test_slimes_keywords_are_fields():
    args = ServerArgs(**SLIME_KEYWORDS)
    assert args.url() == "http://[::1]:15000"
    assert args.api_key is None
    assert args == pickle.loads(pickle.dumps(args))


def mirror(parser: argparse.ArgumentParser, skipped: set[str]) -> None:
    """What slime does: wrap `add_argument` so that every server flag gets a prefix."""
    add = parser.add_argument

    def prefixed(*flags: str, **options: Any) -> None:
        assert all(flag.startswith("--") for flag in flags)
        if flags[0][2:].replace("-", "_") not in skipped:
            add(*(f"--sglang-{flag[2:]}" for flag in flags), **options)

    parser.add_argument = prefixed
    ServerArgs.add_cli_args(parser)
    parser.add_argument = add


def test_a_mirrored_parser_has_upstreams_destinations():
    parser = argparse.ArgumentParser()
    mirror(parser, {"model_path"})
    args = parser.parse_args(
        ["--sglang-dp-size", "2", "--sglang-mem-fraction-static", "0.5", "--sglang-enable-metrics"]
    )
    assert args.sglang_data_parallel_size == 2
    assert args.sglang_pipeline_parallel_size == args.sglang_expert_parallel_size == 1
    assert args.sglang_tensor_parallel_size == 1
    assert args.sglang_mem_fraction_static == 0.5
    assert args.sglang_enable_metrics is True
    assert args.sglang_lora_target_modules is None


def test_add_cli_args_may_be_replaced_and_unknown_keys_stay_behind(monkeypatch: pytest.MonkeyPatch):
    original = ServerArgs.add_cli_args

    def patched(parser: argparse.ArgumentParser) -> None:
        original(parser)
        parser.add_argument("--rollout-manager-address", default=None)

    assert not hasattr(ServerArgs, "rollout_manager_address")
    monkeypatch.setattr(ServerArgs, "add_cli_args", staticmethod(patched))
    args = prepare_server_args(["--model-path", "m", "--rollout-manager-address", "h:1"])
    assert not hasattr(args, "rollout_manager_address")
    args.rollout_manager_address = "h:1"
    assert args.rollout_manager_address == "h:1"


@pytest.mark.parametrize("line", [["--model-path", "m", "--no-such-flag"], [], ["--model-path", "m", "--port", "x"]])
def test_bad_lines_fail_as_argparse_does(line: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        prepare_server_args(line)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "sglang serve: error:" in message
    assert message.count("\n") < 5


def test_help_says_what_becomes_of_flags(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        prepare_server_args(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--schedule-policy SCHEDULE_POLICY order of the queue" in text
    assert "--cpu-offload-gb CPU_OFFLOAD_GB ignored: " in text
    assert "--enable-http2 refused: " in text


def non_default(field: dataclasses.Field[Any], parsed: Any) -> list[str]:
    """A command line for the flag of one field that changes its value."""
    flag = "--" + field.name.replace("_", "-")
    if isinstance(parsed, bool) or "bool" in str(field.type):
        return [flag]
    if "dict" in str(field.type) and "list" not in str(field.type):
        return [flag, '{"a": 1}']
    return [flag, "12345"]


def test_every_field_has_a_flag_that_sets_it():
    defaults = ServerArgs(model_path="m")
    for field in dataclasses.fields(ServerArgs):
        line = ["--model-path", "m", *non_default(field, getattr(defaults, field.name))]
        args = prepare_server_args(line)
        changed = {f.name for f in dataclasses.fields(args) if getattr(args, f.name) != getattr(defaults, f.name)}
        assert changed == {field.name}, line


def test_parsing_nothing_gives_the_dataclass_defaults():
    assert prepare_server_args(["--model", "m"]) == ServerArgs(model_path="m")


def test_lists_are_not_shared():
    first, second = ServerArgs(model_path="m"), ServerArgs(model_path="m")
    first.uvicorn_access_log_exclude_prefixes.append("/health")
    assert second.uvicorn_access_log_exclude_prefixes == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:30000"),
        ("0.0.0.0", "http://127.0.0.1:30000"),
        ("", "http://127.0.0.1:30000"),
        ("::", "http://[::1]:30000"),
        ("[fe80::1]", "http://[fe80::1]:30000"),
        ("gpu7", "http://gpu7:30000"),
    ],
)
def test_url(host: str, url: str):
    assert ServerArgs(model_path="m", host=host).url() == url


def test_url_with_another_port():
    assert ServerArgs(model_path="m").url(port=1) == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("-1", -1), ("8k", 8000), ("25.6k", 25600), ("1M", 10**6), ("8Ki", 8192), ("2Mi", 2**21)],
)
def test_scaled_int(text: str, value: int):
    assert scaled_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.5Ki", "8 k", "8kb", "0x10", "1e3"])
def test_scaled_int_refuses(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="8Ki"):
        scaled_int(text)


def test_json_value_refuses_with_the_text():
    assert json_value('{"a": [1]}') == {"a": [1]}
    with pytest.raises(argparse.ArgumentTypeError, match="'{a' is not JSON"):
        json_value("{a")
