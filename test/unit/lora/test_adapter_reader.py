"""Directories and tensors of requests become adapters that fit the model, or one message with all problems."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import threading
import time

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save
from unit.lora.adapter_files import (
    K0,
    MODEL,
    Q0,
    RANK,
    SHAPES,
    by_module,
    every,
    factors,
    minimal_config,
    random,
    reader,
    value_of,
    write_adapter,
)
from unit.lora.test_tensor_unpickler import flat, metadata
from unit.lora.torch_pickles import Text, dump, name, tensor, value

from sglang.srt.errors import AdapterError
from sglang.srt.lora import adapter_image, adapter_reader, host_buffer
from sglang.srt.lora.adapter import Adapter

PREFIX = "base_model.model."
V0, O0 = "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read_image(
    tensors: dict[str, np.ndarray], config: dict | None = None, **lora: object
) -> adapter_reader.ReadAdapter:
    return reader(**lora).read_tensors(config or minimal_config(), b64(save(tensors)))


def refusal(tensors: dict[str, np.ndarray], config: dict | None = None, **lora: object) -> str:
    """Message of invalid_adapter."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterError) as caught:
        read_image(tensors, config, **lora)
    assert caught.value.code == "invalid_adapter" and caught.value.status == 400
    # Others' may be collected meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= before, "a refused adapter keeps its buffer"
    return str(caught.value)


def directory_refusal(path: object, code: str, **lora: object) -> str:
    with pytest.raises(AdapterError) as caught:
        reader(**lora).read_directory(str(path))
    assert caught.value.code == code
    return str(caught.value)


def change(tensors: dict[str, np.ndarray], end: str, **changes: object) -> dict[str, np.ndarray]:
    """Tensors with one of them, whose name ends so, renamed (`name`), replaced (`values`) or dropped."""
    (found,) = [key for key in tensors if key.endswith(end)]
    rest = {key: entry for key, entry in tensors.items() if key != found}
    return rest | {str(changes.get("name", found)): changes.get("values", tensors[found])} if changes else rest


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_a_directory_becomes_an_adapter(tmp_path):
    modules = every("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tensors = factors(*modules)
    config = minimal_config("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    read = reader().read_directory(write_adapter(tmp_path / "a", tensors, config))
    assert read.num_tensors == 2 * len(modules) and read.max_rank == RANK and read.nbytes == read.buffer.nbytes
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(read.adapter), type=Adapter) == read.adapter
    found = by_module(read)
    assert sorted(found) == sorted(modules)
    for module, (scale, a, b) in found.items():
        assert scale == 2.0
        assert np.array_equal(a, tensors[f"{PREFIX}{module}.lora_A.weight"])
        assert np.array_equal(b, tensors[f"{PREFIX}{module}.lora_B.weight"])


def test_the_directory_is_never_read_again(tmp_path):
    path = write_adapter(tmp_path / "a", factors())
    read = reader().read_directory(path)
    expected = read.adapter.modules[0], value_of(read, read.adapter.modules[0].a)
    write_adapter(tmp_path / "a", {key: entry * 0 for key, entry in factors().items()})
    assert np.array_equal(value_of(read, expected[0].a), expected[1])
    read.close()
    read.close()


def test_every_route_and_order_gives_the_same_digest(tmp_path):
    tensors = factors(Q0, K0, O0)
    config = minimal_config("q_proj", "k_proj", "o_proj")
    backwards = dict(reversed(tensors.items()))
    bucket, metadatas, end = b"", [], 0
    for key, entry in tensors.items():
        bucket += entry.tobytes()
        metadatas.append(metadata(key, entry.shape, "float32", end, len(bucket)))
        end = len(bucket)
    pickled = {key: tensor(entry) for key, entry in backwards.items()}
    reads = [
        reader().read_directory(write_adapter(tmp_path / "a", tensors, config)),
        reader().read_tensors(config, b64(save(backwards))),
        reader().read_tensors(config, save(tensors), "safetensors"),
        reader().read_tensors(config, [b64(dump(pickled)), "unread"]),
        reader().read_tensors(config, b64(dump(list(pickled.items())))),
        reader().read_tensors(
            config, b64(dump({"flattened_tensor": flat(bucket), "metadata": metadatas})), "flattened_bucket"
        ),
        reader().read_tensors(config, b64(save({key.removeprefix(PREFIX): entry for key, entry in tensors.items()}))),
    ]
    assert len({read.digest for read in reads}) == 1 and {read.num_tensors for read in reads} == {6}
    for read in reads[1:]:
        first, again = by_module(reads[0]) if read is reads[-1] else None, by_module(read)
        assert first is None or all(np.array_equal(first[m][1], again[m][1]) for m in again)


@pytest.mark.parametrize("leaf", [64, 100, 4 << 20])
def test_fused_names_give_the_digest_of_their_parts(leaf, monkeypatch):
    """A is sent once and is in the image once for each part; pieces of tensors are in several leaves."""
    monkeypatch.setattr(adapter_image, "LEAF_BYTES", leaf)
    gate, up, fused = (f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj"))
    parts = factors(gate, up)
    shared = parts[f"{PREFIX}{gate}.lora_A.weight"]
    parts[f"{PREFIX}{up}.lora_A.weight"] = shared
    b = np.concatenate([parts[f"{PREFIX}{name}.lora_B.weight"] for name in (gate, up)])
    whole = {f"{PREFIX}{fused}.lora_A.weight": shared, f"{PREFIX}{fused}.lora_B.weight": b}
    sums = {key: hashlib.sha256(entry.tobytes()).hexdigest() for key, entry in whole.items()}
    config = minimal_config("gate_proj", "up_proj")
    reads = [
        read_image(parts, config),
        read_image(whole, config),
        reader().read_tensors(config, b64(dump({key: tensor(entry) for key, entry in whole.items()})), None, sums),
    ]
    assert len({read.digest for read in reads}) == 1 and [read.num_tensors for read in reads] == [4, 2, 2]
    first, *others = (by_module(read) for read in reads)
    assert all(np.array_equal(first[m][i], other[m][i]) for other in others for m in (gate, up) for i in (1, 2))
    whole[f"{PREFIX}{fused}.lora_B.weight"] = np.where(b == b[-1, -1], np.inf, b)
    assert f"{fused}.lora_B.weight has NaN" in refusal(whole, config)


def test_versions_of_one_shape_share_a_buffer_and_nothing_else(tmp_path):
    """What a buffer held before, and where the last adapter's tensors were, says nothing about the next one."""
    one = reader()
    odd = {key: entry[:3] if "_A" in key else entry[:, :3] for key, entry in factors(Q0, K0).items()}
    configs = {3: minimal_config("q_proj", "k_proj", r=3), RANK: minimal_config("q_proj", "k_proj")}
    sent = [(3, odd), (RANK, factors(Q0, K0)), (3, {k: -v for k, v in odd.items()}), (3, odd), (RANK, factors(K0, Q0))]
    for rank, tensors in sent:
        read = one.read_tensors(configs[rank], save(tensors), "safetensors")
        alone = reader().read_tensors(configs[rank], save(tensors), "safetensors")
        assert read.digest == alone.digest and read.adapter.modules == alone.adapter.modules
        assert np.array_equal(read.buffer.view, alone.buffer.view)
        read.buffer.view[:] = 0xFF
        read.close()
        alone.close()


def test_digests_differ_with_scale_values_names_and_dtype():
    tensors = factors()
    digests = {
        read_image(tensors).digest,
        read_image(tensors, minimal_config(lora_alpha=16)).digest,
        read_image({key: entry + 1 for key, entry in tensors.items()}).digest,
        read_image(factors("model.layers.1.self_attn.q_proj")).digest,
        read_image(factors(dtype="float16")).digest,
    }
    assert len(digests) == 5


def test_strided_tensors_arrive_row_major():
    a, b = random((16, RANK)), random((16, RANK))
    stride = Text(tensor(a).replace(value((16, RANK)), value((RANK, 16))).replace(value((RANK, 1)), value((1, RANK))))
    payload = dump({f"{Q0}.lora_A.weight": stride, f"{Q0}.lora_B.weight": tensor(b)})
    found = by_module(reader().read_tensors(minimal_config(), b64(payload)))
    assert np.array_equal(found[Q0][1], a.T) and np.array_equal(found[Q0][2], b)


def test_bfloat16_keeps_its_bits():
    payload = dump(
        {
            f"{Q0}.lora_A.weight": tensor(np.full((RANK, 16), 0x3F80, np.uint16), "BFloat16Storage"),
            f"{Q0}.lora_B.weight": tensor(np.full((16, RANK), 0xBF80, np.uint16), "BFloat16Storage"),
        }
    )
    read = reader().read_tensors(minimal_config(), b64(payload))
    assert read.adapter.modules[0].a.dtype == "bfloat16"
    assert np.unique(by_module(read)[Q0][2]).tolist() == [0xBF80]


def test_c14_rslora_and_patterns_reach_the_scales():
    tensors = factors(Q0) | factors(K0, rank=2)
    config = minimal_config(
        "q_proj", "k_proj", use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 3}
    )
    read = read_image(tensors, config)
    assert read.max_rank == RANK
    found = by_module(read)
    assert found[Q0][0] == 3 / math.sqrt(RANK) and found[K0][0] == 8 / math.sqrt(2)


def test_c9_partial_layers_and_partial_qkv_are_fine():
    found = by_module(read_image(factors(Q0, V0), minimal_config("q_proj", "v_proj")))
    assert sorted(found) == [Q0, V0]
    assert sorted(by_module(read_image(factors(Q0), minimal_config("qkv_proj")))) == [Q0]


def test_c10_normalised_names_load():
    for prefix in ("base_model.model.model.language_model.", "language_model.model.", "", "base_model.model.model."):
        tensors = {
            f"{prefix}layers.0.self_attn.q_proj.lora_{f}.default.weight": random(s)
            for f, s in (("A", (4, 16)), ("B", (16, 4)))
        }
        assert list(by_module(read_image(tensors))) == [Q0]


@pytest.mark.parametrize("targets", ["all-linear", "all", r".*\.(q|k)_proj"])
def test_c11_target_modules_as_a_string(targets):
    found = by_module(read_image(factors(Q0, K0), minimal_config() | {"target_modules": targets}))
    assert sorted(found) == [K0, Q0]


@pytest.mark.parametrize("tied", [False, True])
def test_c12_embedding_and_head_are_modules_of_their_own(tied):
    model = msgspec.structs.replace(MODEL, tie_word_embeddings=tied)
    tensors = {key.replace("lm_head", "unembed_tokens"): entry for key, entry in factors(EMBED, HEAD).items()}
    config = minimal_config("embed_tokens", "unembed_tokens")
    found = by_module(reader(model=model).read_tensors(config, save(tensors)))
    assert found[EMBED][1].shape == (RANK, 40) and found[EMBED][2].shape == (16, RANK)
    assert found[HEAD][1].shape == (RANK, 16) and found[HEAD][2].shape == (40, RANK)


def test_fused_tensors_share_a_and_split_the_rows_of_b():
    parts = {"qkv_proj": [Q0, K0, V0], "gate_up_proj": every("gate_proj")[:1] + every("up_proj")[:1]}
    for kind, modules in parts.items():
        rows = [SHAPES[module][0] for module in modules]
        fused = modules[0].rpartition(".")[0] + f".{kind}"
        tensors = {f"{fused}.lora_A.weight": random((4, 16)), f"{fused}.lora_B.weight": random((sum(rows), 4))}
        read = read_image(tensors, minimal_config(kind))
        assert read.num_tensors == 2
        found = by_module(read)
        expected = np.split(tensors[f"{fused}.lora_B.weight"], np.cumsum(rows)[:-1])
        for module, b in zip(modules, expected, strict=True):
            assert np.array_equal(found[module][1], tensors[f"{fused}.lora_A.weight"])
            assert np.array_equal(found[module][2], b)


def test_fresh_adapters_with_zero_b_are_legitimate():
    tensors = {key: entry * ("lora_A" in key) for key, entry in factors().items()}
    assert not by_module(read_image(tensors))[Q0][2].any()


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_c2_unmatched_tensors_are_named():
    message = refusal(factors() | {"base_model.model.transformer.h.0.attn.lora_A.weight": random((4, 16))})
    assert "base_model.model.transformer.h.0.attn.lora_A.weight matches no module" in message


@pytest.mark.parametrize(
    "strange",
    [
        "model.layers.2.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.lora_A.weight",
        "lm_head.modules_to_save.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "input_embeddings.weight",
    ],
)
def test_c2_no_tensor_is_skipped(strange):
    assert f"{strange} matches no module" in refusal(factors() | {strange: random((4, 16))})


def test_c2_a_target_without_tensors_is_missing():
    assert "target_modules names v_proj, of which no layer has tensors" in refusal(
        factors(), minimal_config("q_proj", "v_proj")
    )
    assert "target_modules names linear_qkv" in refusal(factors(), minimal_config("q_proj", "linear_qkv"))


def test_tensors_that_the_config_leaves_out_are_refused():
    assert f"{K0}.lora_A.weight is of a module that the adapter's config leaves out" in refusal(factors(Q0, K0))
    config = minimal_config(layers_to_transform=[1])
    assert "leaves out" in refusal(factors(), config)


def test_c3_shapes_of_another_base_are_refused():
    tensors = {f"{Q0}.lora_A.weight": random((4, 32)), f"{Q0}.lora_B.weight": random((32, 4))}
    message = refusal(tensors)
    assert f"{Q0}.lora_A.weight is [4, 32]; r=4 and this model make it [4, 16]" in message
    assert f"{Q0}.lora_B.weight is [32, 4]; r=4 and this model make it [16, 4]" in message


@pytest.mark.parametrize("shape", [(4,), (4, 16, 1), (16, 4), (), (0, 16), (4, 0)])
def test_c3_other_dimensions_are_refused(shape):
    tensors = change(factors(), "lora_A.weight", values=np.zeros(shape, np.float32))
    assert f"lora_A.weight is {list(shape)}" in refusal(tensors)


def test_ranks_must_agree():
    assert "r=8 and this model make it [8, 16]" in refusal(factors(), minimal_config(r=8))
    assert "r=2 and this model" in refusal(factors(), minimal_config(rank_pattern={"q_proj": 2}))
    assert "lora_B.weight is [16, 3]" in refusal(change(factors(), "lora_B.weight", values=random((16, 3))))


def test_c4_rank_above_the_limit_names_the_flag():
    message = refusal(factors(), max_lora_rank=2)
    assert "incompatible" in message and "--max-lora-rank 2" in message
    by_module(read_image(factors(), max_lora_rank=4))


def test_c4_rank_that_no_flag_admits_says_so():
    message = refusal(factors(rank=257), minimal_config(r=257))
    assert "rank 257 is incompatible with --max-lora-rank 256; no server takes larger ones" in message
    by_module(read_image(factors(rank=256), minimal_config(r=256)))


def test_modules_outside_the_launch_flag_are_incompatible():
    message = refusal(factors(Q0, O0), minimal_config("q_proj", "o_proj"), target_modules=("qkv_proj", "embed_tokens"))
    assert "o_proj are incompatible with --lora-target-modules qkv_proj embed_tokens" in message
    by_module(read_image(factors(Q0, K0), minimal_config("q_proj", "k_proj"), target_modules=("qkv_proj",)))
    by_module(read_image(factors(O0), minimal_config("o_proj"), target_modules=("all-linear",)))


@pytest.mark.parametrize(("dropped", "missing"), [("lora_A.weight", "lora_A"), ("lora_B.weight", "lora_B")])
def test_c8_half_a_pair_is_refused(dropped, missing):
    assert f"has no {missing} beside it" in refusal(change(factors(), dropped))


def test_c15_unsupported_configs_are_refused_by_name():
    assert "use_dora" in refusal(factors(), minimal_config(use_dora=True))
    assert "fan_in_fan_out" in refusal(factors(), minimal_config(fan_in_fan_out=True))


def test_c18_c19_a_module_twice_is_refused():
    twice = factors() | {f"{Q0}.lora_A.other.weight": random((4, 16))}
    assert f"are both lora_A of {Q0}" in refusal(twice)
    fused = Q0.replace("q_proj", "qkv_proj")
    both = factors() | {f"{fused}.lora_A.weight": random((4, 16)), f"{fused}.lora_B.weight": random((32, 4))}
    assert f"{Q0} has factors twice" in refusal(both, minimal_config("qkv_proj"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_c20_nan_and_infinity_are_refused(bad, dtype):
    tensors = factors(Q0, K0, dtype=dtype)
    tensors[f"{PREFIX}{K0}.lora_B.weight"][-1, -1] = bad
    message = refusal(tensors, minimal_config("q_proj", "k_proj"))
    assert f"{K0}.lora_B.weight has NaN or infinite values" in message and Q0 not in message


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_c20_nan_and_infinity_in_bfloat16(bits):
    a = np.zeros((RANK, 16), np.uint16)
    a[0, 3] = bits
    b = np.full((16, RANK), 0x7F7F, np.uint16)  # the largest finite number
    payload = dump({f"{Q0}.lora_{f}.weight": tensor(t, "BFloat16Storage") for f, t in (("A", a), ("B", b))})
    with pytest.raises(AdapterError, match=r"lora_A\.weight has NaN") as caught:
        reader().read_tensors(minimal_config(), b64(payload))
    assert "lora_B" not in str(caught.value)


def test_c20_the_last_slice_is_checked(monkeypatch):
    monkeypatch.setattr(adapter_image, "LEAF_BYTES", 64)
    tensors = factors()
    by_module(read_image(tensors))
    tensors[f"{PREFIX}{Q0}.lora_A.weight"][-1, -1] = np.nan
    assert "has NaN" in refusal(tensors)


def test_c21_no_tensors_are_refused():
    assert "no LoRA factors among 0 tensors" in refusal({})
    with pytest.raises(AdapterError, match="no LoRA factors"):
        reader().read_tensors(minimal_config(), b64(dump({})))


def test_c21_c19_checksums_of_every_tensor():
    tensors = factors()
    sums = {key: hashlib.sha256(entry.tobytes()).hexdigest() for key, entry in tensors.items()}
    payload = b64(save(tensors))
    by_module(reader().read_tensors(minimal_config(), payload, None, sums))
    with pytest.raises(AdapterError, match="expected_checksums must be a dict"):
        reader().read_tensors(minimal_config(), payload, None, ["x"])
    first, second = sums
    for wrong, message in (
        (sums | {first: "0" * 64}, f"{first} is not what expected_checksums says"),
        (sums | {"more": "0" * 64}, "more is in expected_checksums but was not sent"),
        ({second: sums[second]}, f"{first} is not what expected_checksums says"),
    ):
        with pytest.raises(AdapterError, match=message):
            reader().read_tensors(minimal_config(), payload, None, wrong)


def test_all_problems_are_listed_and_capped():
    tensors = {f"nowhere.{i}.lora_A.weight": random((4, 16)) for i in range(30)}
    message = refusal(tensors | change(factors(), "lora_B.weight"))
    assert message.count("matches no module") == 20 and message.endswith("and 12 more")
    both = refusal(change(factors(Q0, K0), "q_proj.lora_B.weight"), max_lora_rank=1)
    assert "has no lora_B" in both and "leaves out" in both and "--max-lora-rank 1" in both


# ---- base weights and vocabularies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["embed_tokens.weight", "embed_tokens.base_layer.weight"])
def test_base_embeddings_that_peft_repeats_become_base_copies(form):
    base = random((40, 16), 9)
    read = read_image(factors(EMBED) | {f"base_model.model.model.{form}": base}, minimal_config("embed_tokens"))
    ((copied, span),) = read.adapter.base_copies
    assert copied == "model.embed_tokens.weight" and np.array_equal(value_of(read, span), base)
    assert read.num_tensors == 3
    read.close()


def test_base_head_beside_an_adapter_of_it():
    tensors = factors(HEAD) | {"base_model.model.lm_head.base_layer.weight": random((40, 16))}
    read = read_image(tensors, minimal_config("lm_head"))
    assert [copied for copied, _ in read.adapter.base_copies] == ["lm_head.weight"]
    read.close()


def test_base_weights_without_an_adapter_of_them_are_refused():
    message = refusal(factors() | {"base_model.model.lm_head.weight": random((40, 16))})
    assert "lm_head.weight is a base weight" in message and "save_embedding_layers=False" in message


def test_extended_vocabularies_are_refused():
    larger = factors(EMBED) | {"base_model.model.model.embed_tokens.weight": random((44, 16))}
    assert "is [44, 16], the model's is [40, 16]" in refusal(larger, minimal_config("embed_tokens"))
    tensors = change(factors(HEAD), "lora_B.weight", values=random((44, RANK)))
    assert "lora_B.weight is [44, 4]" in refusal(tensors, minimal_config("lm_head"))


def test_c13_only_ids_beyond_the_vocabulary_are_added_tokens(tmp_path):
    path = write_adapter(tmp_path / "a", factors())
    tokens = tmp_path / "a" / "added_tokens.json"
    tokens.write_text(json.dumps({"<a>": 3, "<b>": 39}))
    by_module(reader().read_directory(path))
    tokens.write_text(json.dumps({"<a>": 3, "<new>": 40}))
    assert "1 added tokens ('<new>')" in directory_refusal(path, "invalid_adapter")
    with pytest.raises(AdapterError, match="<new>"):
        reader().read_tensors(minimal_config(), save(factors()), added_tokens={"<new>": 41})
    by_module(reader().read_tensors(minimal_config(), save(factors()), added_tokens={"<old>": 4}))


@pytest.mark.parametrize("base", ["org/tiny", "tiny", "/models/tiny", "/elsewhere/TINY/"])
def test_c3_base_names_that_match(base, caplog):
    by_module(read_image(factors(), minimal_config(base_model_name_or_path=base), strict=True))
    assert not caplog.records


def test_c3_another_base_is_a_warning_or_with_strict_an_error(caplog):
    config = minimal_config(base_model_name_or_path="Qwen/Qwen2.5-72B")
    with caplog.at_level(logging.WARNING):
        by_module(read_image(factors(), config))
    assert "Qwen/Qwen2.5-72B" in caplog.text
    assert "--lora-strict-loading" in refusal(factors(), config, strict=True)


@pytest.mark.parametrize(
    ("base", "path", "same"),
    [
        ("Qwen/Qwen3-1.7B", "/hub/models--Qwen--Qwen3-1.7B/snapshots/abc", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "/x/SmolLM2-135M-Instruct-Q4_1.gguf", True),
        ("Qwen/Qwen3-1.7B", "/models/Qwen3-8B", False),
        ("Qwen/Qwen3-1.7B", "/models/Qwen3-1.7B-Base", False),
    ],
)
def test_where_a_base_may_lie(base, path, same):
    assert adapter_reader._is_same_model(base, path) is same


# ---- directories ---------------------------------------------------------------------------------------------------


def test_c7_missing_directories_and_hub_ids(tmp_path):
    assert "there is no directory" in directory_refusal(tmp_path / "none", "adapter_not_found")
    assert "names on the hub are not fetched" in directory_refusal("org/adapter", "adapter_not_found")
    assert directory_refusal("", "adapter_not_found") and directory_refusal("a\0b", "adapter_not_found")
    (tmp_path / "file").write_text("x")
    assert "no directory" in directory_refusal(tmp_path / "file", "adapter_not_found")


def test_c7_directories_that_hold_something_else(tmp_path):
    assert "only nothing" in directory_refusal(tmp_path, "adapter_not_found")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no adapter_config.json, only model.safetensors" in directory_refusal(tmp_path, "adapter_not_found")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no adapter_model.safetensors" in directory_refusal(tmp_path, "adapter_not_found")


def test_h6_pickled_weights_are_an_unsupported_format(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    assert "adapter_model.bin, a pickle" in directory_refusal(tmp_path, "invalid_adapter")


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_c5_truncated_weights_may_be_complete_later(tmp_path, keep):
    path = write_adapter(tmp_path / "a", factors())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "adapter_model.safetensors" in directory_refusal(path, "path_unreadable")


def test_c5_corrupt_files(tmp_path):
    path = write_adapter(tmp_path / "a", factors())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    directory_refusal(path, "path_unreadable")
    weights.write_bytes(b"\x10" + bytes(7) + b"x" * 100)
    directory_refusal(path, "invalid_adapter")
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": ')
    assert "no complete JSON" in directory_refusal(path, "path_unreadable")
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 100_000)
    directory_refusal(path, "path_unreadable")
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in directory_refusal(path, "invalid_adapter")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "a", factors())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    preadv = os.preadv

    def meanwhile(action) -> None:
        def reads(*args: object) -> int:
            action()
            return preadv(*args)

        monkeypatch.setattr(os, "preadv", reads)

    meanwhile(lambda: os.truncate(weights, 300))
    assert "became shorter" in directory_refusal(path, "path_unreadable")
    write_adapter(tmp_path / "a", factors())
    meanwhile(lambda: os.truncate(weights, weights.stat().st_size + 1))
    assert "changed while it was read" in directory_refusal(path, "path_unreadable")
    write_adapter(tmp_path / "a", factors())
    meanwhile(lambda: os.utime(weights, ns=(1, time.time_ns())))
    assert "changed while it was read" in directory_refusal(path, "path_unreadable")


def test_short_reads_are_continued(tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "a", factors())
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, position: preadv(fd, [views[0][:7]], position))
    tensors = factors()
    assert np.array_equal(by_module(reader().read_directory(path))[Q0][1], tensors[f"{PREFIX}{Q0}.lora_A.weight"])


def test_failing_disks_and_permissions(tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "a", factors())

    def fails(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fails)
        assert "Permission denied" in directory_refusal(path, "path_unreadable")
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fails)
        directory_refusal(path, "path_unreadable")
    monkeypatch.setattr(os, "listdir", fails)
    directory_refusal(path, "path_unreadable")


def test_pipes_and_directories_in_the_place_of_files(tmp_path):
    path = write_adapter(tmp_path / "a", factors())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "not a regular file" in directory_refusal(path, "path_unreadable")
    weights.unlink()
    weights.mkdir()
    assert "not a regular file" in directory_refusal(path, "path_unreadable")


def test_h5_paths_stay_inside_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    inside_path, outside_path = write_adapter(root / "a", factors()), write_adapter(outside / "a", factors())
    lora = {"root": str(root)}
    by_module(reader(**lora).read_directory("a"))
    by_module(reader(**lora).read_directory(inside_path))
    (root / "link").symlink_to(outside / "a")
    (tmp_path / "root-too").symlink_to(outside / "a")
    for path in (
        outside_path,
        "../outside/a",
        "a/../../outside/a",
        "link",
        "..",
        "/",
        "/etc",
        str(tmp_path / "root-too"),
    ):
        assert "outside --lora-root" in directory_refusal(path, "adapter_not_found", **lora)
    (root / "alias").symlink_to(root / "a")
    by_module(reader(**lora).read_directory("alias"))


def test_h5_files_stay_inside_the_root(tmp_path):
    root = tmp_path / "root"
    write_adapter(root / "a", factors())
    write_adapter(tmp_path / "outside", factors())
    weights = root / "a" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    assert "outside --lora-root" in directory_refusal("a", "adapter_not_found", root=str(root))
    by_module(reader().read_directory(str(root / "a")))


def test_h5_a_root_behind_a_link_is_fine(tmp_path):
    write_adapter(tmp_path / "real" / "a", factors())
    (tmp_path / "root").symlink_to(tmp_path / "real")
    by_module(reader(root=str(tmp_path / "root")).read_directory("a"))


# ---- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "load_format", "message"),
    [
        ("no base64!", None, "not base64"),
        ("é", None, "not base64"),
        ("", None, "serialized tensors"),
        ("AA==" * (1 << 17), None, "not base64"),
        ("A" * ((1 << 18) - 2) + "==AAAA", None, "it ends at character 262144"),
        ([], None, "at least one"),
        (["aaaa", 3], None, "must hold base64 strings"),
        (b64(b"PK\3\4" + bytes(40)), None, "opcode b'P'"),
        (b64(save(factors())), "flattened_bucket", "serialized tensors"),
        (b64(dump({})), "safetensors", "safetensors data"),
        (b64(save(factors())), "npcache", "load_format 'npcache'"),
        (b64(save(factors())[:-1]), None, "safetensors data"),
        (b64(dump({"a": Text(name("os", "system"))})), None, "os.system is not a part of tensors"),
    ],
)
def test_h1_payloads_that_are_no_tensors(payload, load_format, message):
    with pytest.raises(AdapterError, match=message) as caught:
        reader().read_tensors(minimal_config(), payload, load_format)
    assert caught.value.code == "invalid_adapter"


def test_h3_paths_in_config_dict_are_refused():
    with pytest.raises(AdapterError, match="path"):
        reader().read_tensors(minimal_config(path="org/repo"), save(factors()))


def test_h10_budget_of_bytes(tmp_path):
    path = write_adapter(tmp_path / "a", factors())
    for small in (0, 100):
        with pytest.raises(AdapterError, match=f"limit of {small}"):
            reader(small).read_directory(path)
        with pytest.raises(AdapterError, match=f"limit of {small}"):
            reader(small).read_tensors(minimal_config(), b64(save(factors())))
        with pytest.raises(AdapterError, match=f"limit of {small}"):
            reader(small).read_tensors(
                minimal_config(), b64(dump({key: tensor(entry) for key, entry in factors().items()}))
            )
    with pytest.raises(AdapterError, match="characters of base64 exceed"):
        reader(0).read_tensors(minimal_config(), "A" * (24 << 20))


def test_h10_a_rank_bomb_takes_no_memory(tmp_path):
    """The header promises gigabytes, the file is sparse: shapes are refused before anything is allocated."""
    rank = 1 << 26
    header = json.dumps(
        {
            f"{Q0}.lora_A.weight": {"dtype": "F32", "shape": [rank, 16], "data_offsets": [0, rank * 64]},
            f"{Q0}.lora_B.weight": {"dtype": "F32", "shape": [16, rank], "data_offsets": [rank * 64, rank * 128]},
        }
    ).encode()
    path = write_adapter(tmp_path / "a", factors())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(weights, 8 + len(header) + rank * 128)
    started = time.perf_counter()
    assert f"lora_A.weight is [{rank}, 16]" in directory_refusal(path, "invalid_adapter")
    assert time.perf_counter() - started < 1


def test_h10_no_memory_is_an_answer(monkeypatch):
    def full(_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_buffer, "HostBuffer", full)
    with pytest.raises(AdapterError, match="no memory") as caught:
        read_image(factors())
    assert caught.value.code == "capacity"


def test_c27_one_reader_serves_many_threads(tmp_path):
    path = write_adapter(tmp_path / "a", factors(*every("q_proj", "up_proj")), minimal_config("q_proj", "up_proj"))
    one, digests = reader(), []

    def work() -> None:
        for _ in range(5):
            read = one.read_directory(path)
            digests.append(read.digest)
            read.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 20 and len(set(digests)) == 1
