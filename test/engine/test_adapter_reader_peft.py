"""The adapter reader against the real makers of adapters: PEFT's files and scales, torch's pickles."""

from __future__ import annotations

import base64
import io
import json
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import LlamaConfig, LlamaForCausalLM

from sglang.srt.config.model_config import ModelConfig
from sglang.srt.config.sections import LoRASection
from sglang.srt.errors import AdapterError
from sglang.srt.lora.adapter import Span
from sglang.srt.lora.adapter_reader import AdapterReader, ReadAdapter
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", model_type="llama", rms_norm_eps=1e-5, rope_theta=1e4, context_length=64, **SIZES
)
READER = AdapterReader(MODEL, LoRASection(enabled=True), "/models/tiny")


def peft_model(tied: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, LoraConfig(**({"r": 4, "init_lora_weights": False} | options)))


def saved(model: Any, path: Path, dtype: torch.dtype | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (model if dtype is None else model.to(dtype)).save_pretrained(path)
    return str(path)


def tensor_of(read: ReadAdapter, span: Span) -> torch.Tensor:
    count = span.shape[0] * span.shape[1]
    dtype: torch.dtype = getattr(torch, span.dtype)
    raw = np.fromfile(read.adapter.path, np.uint8, count * dtype.itemsize, offset=span.offset)
    return torch.frombuffer(raw, dtype=dtype).view(span.shape)


def deltas(read: ReadAdapter) -> dict[str, torch.Tensor]:
    """scale * B A by module."""
    return {
        m.name: m.scale * (tensor_of(read, m.b).double() @ tensor_of(read, m.a).double()) for m in read.adapter.modules
    }


def assert_is(read: ReadAdapter, model: Any) -> None:
    """The modules and their deltas are those that PEFT would merge."""
    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").double()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    found = deltas(read)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        mine = found[name].T if name == "model.embed_tokens" else found[name]
        assert delta.any()
        torch.testing.assert_close(mine, delta, rtol=1e-5, atol=2e-6)  # PEFT multiplies in float32
    read.close()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "lora_alpha": 32},
        {"target_modules": r".*layers\.1.*\.(k|up)_proj"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_c9_c11_files_of_peft(tmp_path, options):
    model = peft_model(**options)
    if options.get("init_lora_weights") == "gaussian":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    assert_is(READER.read_directory(saved(model, tmp_path)), model)


def test_c14_rslora_scales_by_root_rank(tmp_path):
    model = peft_model(target_modules=["o_proj"], r=16, lora_alpha=16, use_rslora=True)
    read = READER.read_directory(saved(model, tmp_path))
    assert read.adapter.modules[0].scale == 4.0
    assert_is(read, model)


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {"layers.1.self_attn.q_proj": 2, "q_proj": 6},
        {r"^model\.layers\.0\..*": 3},
        {"model.layers.1.mlp.up_proj": 5, "proj": 7, "self_attn": 9},
        {"(q|k)_proj": 6},
    ],
    ids=str,
)
def test_c15_patterns_mean_what_they_mean_to_peft(tmp_path, pattern):
    alphas = {key: 3 * rank for key, rank in reversed(pattern.items())}
    path = saved(peft_model(target_modules="all-linear", rank_pattern=pattern, alpha_pattern=alphas), tmp_path)
    # Loaded again: PEFT sorts the patterns when it saves them, and the first that matches counts.
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(base, path)
    assert_is(READER.read_directory(path), again)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=str)
def test_c12_embedding_and_head_of_peft(tmp_path, tied, targets):
    model = peft_model(tied, target_modules=targets)
    read = READER.read_directory(saved(model, tmp_path))
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    copies = {name: tensor_of(read, span) for name, span in read.adapter.base_copies}
    assert {names[target] for target in targets if target in names} <= copies.keys()
    state = model.base_model.model
    base = {"model.embed_tokens.weight": state.get_input_embeddings(), "lm_head.weight": state.get_output_embeddings()}
    for name, copy in copies.items():
        layer = base[name]
        assert torch.equal(copy, getattr(layer, "base_layer", layer).weight)
    assert_is(read, model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
    ],
    ids=str,
)
def test_c15_what_peft_can_do_and_this_server_cannot(tmp_path, options, named):
    path = saved(peft_model(target_modules=["q_proj"], **options), tmp_path)
    with pytest.raises(AdapterError, match=named):
        READER.read_directory(path)


def test_c15_dora_is_refused_by_its_tensors_too(tmp_path):
    path = saved(peft_model(target_modules=["q_proj"], use_dora=True), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(AdapterError, match="lora_magnitude_vector matches no module"):
        READER.read_directory(path)


# ---- payloads of requests ------------------------------------------------------------------------------------------


def flattened(tensors: dict[str, torch.Tensor]) -> bytes:
    """A bucket as clients send it."""
    bucket = FlattenedTensorBucket(named_tensors=tensors.items())
    return pickle.dumps({"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()})


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_h1_every_route_of_clients_gives_the_directory_s_digest(tmp_path, dtype):
    path = saved(peft_model(target_modules="all-linear"), tmp_path, dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    strided = {name: tensor.T.contiguous().T for name, tensor in tensors.items()}
    shared = torch.stack([torch.zeros(4, 32, dtype=dtype), torch.ones(4, 32, dtype=dtype)])
    routes: list[tuple[Any, str | None]] = [
        (b64(save(tensors)), None),
        (save(tensors), "safetensors"),
        (b64(pickle.dumps(tensors)), None),
        (b64(pickle.dumps(tensors, protocol=5)), None),
        ([b64(pickle.dumps(list(tensors.items())))] * 2, None),
        (b64(pickle.dumps(strided)), None),
        (b64(pickle.dumps({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})), None),
        (b64(flattened(tensors)), "flattened_bucket"),
    ]
    reads = [READER.read_directory(path), *(READER.read_tensors(config, *route) for route in routes)]
    assert len({read.digest for read in reads}) == 1
    for read in reads:
        read.close()
    views = {
        "layers.0.self_attn.q_proj.lora_A.weight": shared[1],
        "layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
    }
    read = READER.read_tensors({"r": 4}, b64(pickle.dumps(views)))
    assert torch.equal(tensor_of(read, read.adapter.modules[0].a), shared[1])
    read.close()


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_c22_handles_of_torch_multiprocessing_get_a_remedy(strategy):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump({"layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)})
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    with pytest.raises(AdapterError, match=r"is a handle .* send the tensors as base64 of safetensors"):
        READER.read_tensors({"r": 4}, b64(buffer.getvalue()))


@pytest.mark.parametrize("zipped", [True, False])
def test_h6_torch_save_is_refused(zipped):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterError, match="serialized tensors"):
        READER.read_tensors({"r": 4}, b64(buffer.getvalue()))
