"""When an adapter goes out as a slab, and that it has the bytes that `pack_slab` makes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from unit.lora.adapter_files import every, factors
from unit.lora.slab_images import RANK, image_of, packed, servers_layout, slab_config, slab_tensors, wire_layout

from sgl_kernel.lora import LoraLayout
from sglang.rl.publisher_package import DType, Package

OWN = servers_layout()
HEAD = "base_model.model.lm_head"


def package(
    tensors: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    dtype: DType = "float32",
    layout: LoraLayout = OWN,
) -> Package:
    return Package(tensors or slab_tensors(), config or slab_config(), dtype, layout.describe())


def image(made: Package) -> bytes:
    return b"".join(made.image())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_the_bytes_are_those_of_pack_slab(framework, dtype):
    import torch

    own, tensors = servers_layout(256, dtype), slab_tensors()
    given = tensors if framework == "numpy" else {name: torch.from_numpy(value) for name, value in tensors.items()}
    made = package(given, slab_config(use_rslora=True), dtype, own)
    slab = packed(wire_layout(own), tensors, slab_config(use_rslora=True))
    assert made.form == "slab"
    assert image(made).endswith(slab.tobytes())
    assert made.nbytes == len(image(made)) == len(made.tensor())
    assert made.tensor().numpy().tobytes() == image(made)
    assert made.digest == hashlib.sha256(made.config + image(made)).hexdigest()
    header = int.from_bytes(image(made)[:8], "little")
    assert (8 + header) % 8 == 0 and made.nbytes == 8 + header + len(slab)


def test_the_official_library_reads_the_image():
    from safetensors.numpy import load

    (read,) = load(image(package())).items()
    slab = packed(wire_layout(OWN), slab_tensors(), slab_config())
    assert read[0] == "lora_slab" and np.array_equal(read[1], slab)
    assert load(image_of(slab, wire_layout(OWN).describe())).keys() == {"lora_slab"}


def test_the_order_does_not_matter_and_the_content_does():
    same = {package().digest, package(dict(reversed(slab_tensors().items()))).digest}
    changed = {name: -value for name, value in slab_tensors().items()}
    others = {package(changed).digest, package(None, slab_config(lora_alpha=1)).digest}
    assert len(same) == 1 and len(same | others) == 3


@pytest.mark.parametrize(
    ("kinds", "groups"), [(("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv", "o")), (("down_proj",), ("down",))]
)
def test_nothing_is_sent_for_what_is_not_there(kinds, groups):
    tensors, config = slab_tensors(*kinds), slab_config(*kinds)
    made, plain = package(tensors, config), Package(tensors, config, "float32")
    assert made.form == "slab"
    assert image(made).endswith(packed(wire_layout(OWN, groups=groups), tensors, config).tobytes())
    assert made.data.nbytes == plain.data.nbytes


def less(*ends: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in slab_tensors().items() if not any(end in name for end in ends)}


def of_ranks(rank: int, other: int) -> dict[str, np.ndarray]:
    """down_proj of another rank."""
    return {**slab_tensors(rank=rank), **factors(*every("down_proj"), rank=other)}


UNLIKE = {
    "another dtype than the servers'": {"dtype": "bfloat16"},
    "a rank beyond the servers'": {"layout": servers_layout(max_rank=7)},
    "a rank that is no multiple of 8": {"tensors": slab_tensors(rank=4), "config": slab_config(r=4)},
    "two ranks": {"tensors": of_ranks(8, 16), "config": slab_config(rank_pattern={"down_proj": 16})},
    "two ranks, of one padding": {"tensors": of_ranks(8, 4), "config": slab_config(rank_pattern={"down_proj": 4})},
    "a slice missing": {"tensors": less("k_proj"), "config": slab_config("q_proj", "v_proj", "o_proj", "mlp")},
    "a layer missing": {"tensors": less(".1."), "config": slab_config(layers_to_transform=[0])},
    "one module missing": {"tensors": less("1.mlp.down_proj")},
    "half a pair": {"tensors": less("1.mlp.down_proj.lora_A")},
    "an embedding": {"tensors": slab_tensors() | factors("model.embed_tokens", rank=RANK)},
    "the head": {"tensors": slab_tensors() | factors("lm_head", rank=RANK)},
    "a strange tensor": {"tensors": slab_tensors() | {"x": np.zeros((8, 8), np.float32)}},
    "no dimensions": {"tensors": slab_tensors() | {f"{HEAD}.lora_A.weight": np.float32(1)}},
    "a scalar factor": {"tensors": slab_tensors() | {next(iter(slab_tensors())): np.array(1, np.float32)}},
    "another layer": {
        "tensors": slab_tensors() | {n.replace(".1.", ".2."): v for n, v in slab_tensors().items() if ".1." in n}
    },
    "another width": {"layout": LoraLayout(OWN.groups[1:], 2, 16, "float32")},
    "DoRA": {"config": slab_config(use_dora=True)},
    "no rank": {"config": slab_config(r=None)},
    "another rank in the config": {"config": slab_config(r=16)},
    "patterns that are none": {"config": slab_config(rank_pattern=["x"])},
    "a pattern that is none": {"config": slab_config(alpha_pattern={"(": 1})},
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_no_slab_describes_goes_as_tensors(case):
    fields = UNLIKE[case]
    made = package(**fields)
    assert made.form == "tensors"
    plain = Package(
        fields.get("tensors") or slab_tensors(), fields.get("config") or slab_config(), fields.get("dtype", "float32")
    )
    assert image(made) == image(plain)


def test_a_layout_of_another_format_is_none():
    assert Package(slab_tensors(), slab_config(), "float32", {**OWN.describe(), "format": 3}).form == "tensors"
    assert Package(slab_tensors(), slab_config(), "float32", {"max_rank": 0}).form == "tensors"
    assert Package(slab_tensors(), slab_config(), "float32").form == "tensors"


def test_values_that_are_not_finite_are_named_in_slabs_too():
    tensors = slab_tensors()
    name = next(name for name in tensors if "1.mlp.up_proj.lora_B" in name)
    tensors[name][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj\.lora_B\.weight has NaN"):
        package(tensors).check_finite()


def test_a_peft_model_is_packed():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from unit.lora.adapter_files import MODEL

    from sglang.rl.publisher_package import gather

    shape = {"num_attention_heads": MODEL.num_attention_heads, "num_key_value_heads": MODEL.num_key_value_heads}
    sizes = {"hidden_size": MODEL.hidden_size, "intermediate_size": MODEL.intermediate_size, "vocab_size": 40}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    tensors, config = gather(model)
    made = package(tensors, config)
    assert made.form == "slab"
    state = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert image(made).endswith(packed(wire_layout(OWN), state, config).tobytes())
